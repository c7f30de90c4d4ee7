"""Recordings at addresses: downloaded before they are transcribed, and deleted afterwards."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.infra.downloads import download, video_pages
from pipelines.infra.downloads.download import Limits, OnBytes
from pipelines.infra.downloads.urls import DownloadError, Url


@contextlib.contextmanager
def local_copy(audio: Path | bytes | Url, limits: Limits, on_bytes: OnBytes) -> Iterator[Path | bytes]:
    """Yield a recording that can be read: a download if it is at an address. Raises DownloadError."""
    if not isinstance(audio, Url):
        yield audio
        return
    with tempfile.TemporaryDirectory(prefix="lab-download-") as name:
        folder = Path(name)
        path = folder / audio.file_name
        try:
            with open(path, "wb") as file:
                download.fetch(audio, file, limits, on_bytes)
        except DownloadError as error:
            if error.reason != "html":
                raise
            if not video_pages.is_installed():
                hint = f"{error}. For the sound of a video page, run: {video_pages.INSTALL}"
                raise DownloadError("html", hint) from None
            path.unlink()
            path = video_pages.fetch(audio, folder, limits, on_bytes)
        yield path
