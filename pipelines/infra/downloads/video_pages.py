"""The sound of video pages, by yt-dlp: on the command line only.

yt-dlp makes its own connections, several for a page. While it runs, this process resolves names to public addresses
only, and the addresses that were checked are those that are connected to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.infra.downloads import addresses
from pipelines.infra.downloads.addresses import IDLE_S, Deadline
from pipelines.infra.downloads.download import Limits, OnBytes
from pipelines.infra.downloads.urls import DownloadError, Url, parse

INSTALL = "pip install 'yt-dlp>=2025.1'"
_URL_IN_TEXT = re.compile(r"https?://[^\s'\"<>]+")
_MAX_DETAIL_CHARACTERS = 200


def is_installed() -> bool:
    """Return whether yt-dlp can be imported."""
    return importlib.util.find_spec("yt_dlp") is not None


def fetch(url: Url, folder: Path, limits: Limits, on_bytes: OnBytes = lambda n_bytes: None) -> Path:
    """Write the sound of a video page to a file in `folder`, and return its path. Raises DownloadError.

    Of a list of videos, the first is taken.
    """
    import yt_dlp

    parse(url)
    deadline, max_bytes = Deadline(limits.timeout_s), int(limits.max_mb * 1e6)
    too_large = DownloadError("too_large", f"{url} is too large: at most {limits.max_mb:g} MB")

    def check(progress: dict[str, Any]) -> None:
        n_bytes = progress.get("downloaded_bytes") or 0
        if max(n_bytes, progress.get("total_bytes") or 0) > max_bytes:
            raise too_large
        deadline.remaining_s()
        on_bytes(n_bytes)

    options = {
        "format": "bestaudio/best",
        "outtmpl": {"default": "%(id).60B.%(ext)s"},
        "paths": {"home": str(folder)},
        "noplaylist": True,
        "playlist_items": "1",
        "progress_hooks": [check],
        "socket_timeout": min(IDLE_S, limits.timeout_s),
        "proxy": "",
        "cachedir": False,
        "logger": _Silent(),
        "noprogress": True,
    }
    try:
        with _public_names_only(limits.allow_private), yt_dlp.YoutubeDL(options) as downloader:
            downloader.extract_info(url.text.strip(), download=True)
    except TimeoutError:
        raise DownloadError("too_slow", f"{url} was not received within {limits.timeout_s:g} s") from None
    except yt_dlp.utils.YoutubeDLError as error:
        raise DownloadError("broken", f"{url} has no recording that yt-dlp can get: {_describe(error)}") from None
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if not files:
        raise DownloadError("broken", f"{url} has no recording that yt-dlp can get")
    return files[-1]


class _Silent:
    """The logger of yt-dlp: its messages may contain addresses with tokens."""

    def debug(self, message: str) -> None:
        pass

    info = warning = error = debug


@contextlib.contextmanager
def _public_names_only(allow_private: bool) -> Iterator[None]:
    """Let this process resolve names to public addresses only."""
    resolve = socket.getaddrinfo

    def resolve_public(host: Any, *arguments: Any, **options: Any) -> list[Any]:
        resolved = resolve(host, *arguments, **options)
        if not all(addresses.is_public(address[4][0]) for address in resolved):
            raise socket.gaierror(f"{host} is not an address of the public internet")
        return resolved

    if not allow_private:
        socket.getaddrinfo = resolve_public
    try:
        yield
    finally:
        socket.getaddrinfo = resolve


def _describe(error: Exception) -> str:
    """Return the first line of yt-dlp's message without colours and without the secrets of addresses."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().partition("\n")[0].removeprefix("ERROR: ")
    text = _URL_IN_TEXT.sub(lambda match: str(Url(match[0])), text)
    return text if len(text) <= _MAX_DETAIL_CHARACTERS else f"{text[:_MAX_DETAIL_CHARACTERS]} ..."
