"""Common Voice from Mozilla Data Collective: downloaded once by its client, verified, then read as an archive.

    <cache folder>/mozilla/<dataset>/cv-corpus-….tar.gz          the archive
                                     download.json               its size and sha256: written after verification
                                     *.part, *.checksum          the client's files of an interrupted download

You need an account, an API key in MDC_API_KEY (or in a `.env` file; on Colab: a secret of that name), and to agree to
the data set's terms on its page. With `download.json` neither key nor network is needed; remove the folder to get a
newer version. The client (datacollective 0.7) compares neither size nor checksum; this module compares both.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.common_voice.release import CommonVoiceSource
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError, missing_package

KEY = "MDC_API_KEY"
_PAGES = "https://mozilladatacollective.com"
_RECORD = "download.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class MozillaSource:
    """The data set `dataset` (id or slug), downloaded on first access; see CommonVoiceSource."""

    dataset: str
    language: str = "sv"
    pool: str = "train"
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return the identity of the archive: it does not depend on how the archive was downloaded."""
        return self.corpus.identity()

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the examples of these splits in the archive's order."""
        return self.corpus.examples(splits)

    def outline(self) -> Iterator[Example]:
        """Return the examples of all splits in the same order, without their audio."""
        return self.corpus.outline()

    @cached_property
    def corpus(self) -> CommonVoiceSource:
        """The archive."""
        return CommonVoiceSource(str(download(self.dataset)), self.language, self.pool, self.seed)


def download(dataset: str, folder: Path | None = None) -> Path:
    """Return the archive of a data set in `folder` (default: the lab's cache folder), downloaded if necessary.

    An interrupted download is resumed. Raises LabError, in one line, if the package or the key is missing, the key is
    wrong, the terms are not agreed to, the data set does not exist, the disk is full, the download is interrupted, or
    size or checksum differ from the announced ones.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", dataset):
        raise LabError(f"source.dataset must be an id or slug such as cmqintw0q00xwnr07mjjzpe61, got {dataset[:60]!a}")
    folder = folder or environment.cache_folder() / "mozilla" / dataset
    return _verified(folder) or _fetch(_client(), dataset, folder)


def _fetch(client: ModuleType, dataset: str, folder: Path) -> Path:
    with _key() as key, _client_errors(dataset, key):
        details = client.get_dataset_details(dataset)
        name = _bare_name(details.filename)
        folder.mkdir(parents=True, exist_ok=True)
        archive, part = folder / name, folder / f"{name}.part"
        size = int(details.sizeBytes or 0)
        with _only_downloader(folder):
            _move_complete_part(archive, part, size)
            _check_disk_space(folder, archive, part, size)
            with contextlib.redirect_stdout(sys.stderr):  # its progress bar: standard output is for results
                client.download_dataset(dataset, str(folder))
            return _accept(archive, part, size, details.checksum)


def _only_downloader(folder: Path) -> filelock.FileLock:
    try:
        return filelock.FileLock(folder / ".lock", timeout=0).acquire()
    except filelock.Timeout:
        raise LabError(
            f"another process is downloading to {folder} right now: wait for it, then run this again"
        ) from None


def _verified(folder: Path) -> Path | None:
    """Return the archive that an earlier run verified, or None; it is hashed if its modification time has changed."""
    try:
        record = json.loads((folder / _RECORD).read_text("utf-8"))
        archive = folder / record["file"]
        stat = archive.stat()
        same = stat.st_size == record["bytes"] and (
            stat.st_mtime_ns == record["mtime_ns"] or manifest.sha256(archive) == record["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return archive if same else None


def _accept(archive: Path, part: Path, size: int, checksum: str | None) -> Path:
    """Compare size and checksum with the announced ones, and record the result."""
    n_bytes = archive.stat().st_size
    if size and n_bytes < size:  # the connection was closed early: keep it as the part that the client resumes
        os.replace(archive, part)
        if checksum:
            archive.with_name(f"{archive.name}.checksum").write_text(checksum)
        raise LabError(_interrupted(archive.name, f"{n_bytes}", f"{size} bytes", bool(checksum)))
    sha256, announced = manifest.sha256(archive), (checksum or "").lower().removeprefix("sha256:")
    comparable = bool(re.fullmatch(r"[0-9a-f]{64}", announced))
    if (size and n_bytes != size) or (comparable and sha256 != announced):
        archive.unlink()
        what = f"sha256 {announced[:12]}…, got {sha256[:12]}…" if comparable else f"{size} bytes, got {n_bytes}"
        raise LabError(f"{archive.name} must have {what}: it was removed, run the same command again")
    record = {"file": archive.name, "bytes": n_bytes, "sha256": sha256, "mtime_ns": archive.stat().st_mtime_ns}
    manifest.write_json(archive.with_name(_RECORD), {**record, "checksum_compared": comparable})
    return archive


def _move_complete_part(archive: Path, part: Path, size: int) -> None:
    """Rename a partial file that is already complete or too large, which the client cannot resume."""
    if part.is_file() and not archive.exists() and 0 < size <= part.stat().st_size:
        os.replace(part, archive)  # the size and the checksum are compared next


def _check_disk_space(folder: Path, archive: Path, part: Path, size: int) -> None:
    downloaded = sum(path.stat().st_size for path in (archive, part) if path.is_file())
    free = shutil.disk_usage(folder).free
    if size - downloaded > free:
        raise LabError(_no_space(archive.name, size - downloaded, free))


@contextlib.contextmanager
def _key() -> Iterator[str]:
    """Yield the API key, and set it in the environment meanwhile for the client."""
    before = os.environ.get(KEY)
    key = (before or _colab_secret() or "").strip()
    if not key:
        raise LabError(
            f"Mozilla Data Collective needs an API key in {KEY} (on Colab: a secret of that name that this notebook "
            f"may read), got none: make one at {_PAGES}/api-reference"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise LabError(f"{KEY} must be one word of ASCII letters, got blanks or other letters in it: copy it again")
    os.environ[KEY] = key
    try:
        yield key
    finally:
        os.environ.pop(KEY, None)
        if before is not None:
            os.environ[KEY] = before


def _colab_secret() -> str | None:
    if environment.host() != "colab":
        return None
    try:
        from google.colab import userdata  # exists only on Colab

        return userdata.get(KEY)
    except Exception:  # Colab raises different exceptions for no secret, no permission and no browser
        return None


def _client() -> ModuleType:
    try:
        import datacollective
    except ImportError:
        raise missing_package("datacollective", "datacollective>=0.6.4", "source.kind = 'mozilla'") from None
    return datacollective


@contextlib.contextmanager
def _client_errors(dataset: str, key: str) -> Iterator[None]:
    """Convert the client's exceptions to a LabError, without its own words: they can contain signed URLs."""
    from datacollective.errors import DownloadError

    try:
        yield
    except DownloadError as error:
        raise _download_error(error) from None
    except (OSError, RuntimeError, ValueError, ArithmeticError, TypeError, AttributeError) as error:
        raise LabError(_explain(error, dataset, key)) from None


def _download_error(error: Any) -> BaseException:
    """Return the error for an interrupted download by its cause: a LabError or a KeyboardInterrupt."""
    cause, n_bytes, total = error.__cause__, error.total_downloaded_bytes, error.total_archive_bytes
    if isinstance(cause, KeyboardInterrupt):
        return KeyboardInterrupt()
    if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
        return LabError(f"{_disk_error(cause)} (at {n_bytes} of {total})")
    return LabError(_interrupted("the archive", n_bytes, total, bool(error.checksum), f" ({type(cause).__name__})"))


def _explain(error: Exception, dataset: str, key: str) -> str:
    import requests
    from datacollective.errors import AuthenticationError, RateLimitError

    page = f"{_PAGES}/datasets/{dataset}"
    if isinstance(error, requests.RequestException):
        return _http_error(error, page)
    if isinstance(error, OSError) and error.errno is not None:  # the client's own exceptions have no errno
        return _disk_error(error)
    if isinstance(error, AuthenticationError):
        return (
            f"Mozilla Data Collective must accept the key in {KEY}, got 401 (wrong, expired or revoked): "
            f"make a new one at {_PAGES}/api-reference"
        )
    if isinstance(error, RateLimitError):
        return "Mozilla Data Collective got too many requests (429). Wait some minutes, run the same command again"
    if isinstance(error, FileNotFoundError):
        return f"source.dataset must be at Mozilla Data Collective, got {dataset!r}: there is no {page}. Correct it"
    if isinstance(error, PermissionError):
        return (
            f"Mozilla Data Collective refuses this data set to this key (403): agree to its terms at {page}, "
            f"then run the same command again{_reason(error, key)}"
        )
    return (
        f"Mozilla Data Collective must respond as datacollective 0.7 expects, got {type(error).__name__}: "
        "run: pip install -U datacollective"
    )


def _http_error(error: Any, page: str) -> str:
    if error.response is None:
        return f"Mozilla Data Collective must respond, got {type(error).__name__}: check the network, run it again"
    status = error.response.status_code
    action = "it has to be bought there" if status == 402 else "run the same command again later"
    return f"Mozilla Data Collective must provide {page}, got HTTP {status}: {action}"


def _disk_error(error: OSError) -> str:
    where = environment.cache_folder()
    if error.errno in _DISK_FULL:
        return f"the disk of {where} is full: make room, run the same command again"
    return f"the download must be written below {where}, got: {error.strerror}. Set LAB_CACHE to another folder"


def _reason(error: Exception, key: str) -> str:
    """Return the server's reason in parentheses: the client's text after the dash, without URLs and the key."""
    reason = str(error).partition(" — ")[2].replace(key, "…")
    reason = re.sub(r"\S*://\S*", "…", " ".join(reason.split()))[:200]
    return f" (reason: {reason})" if reason else ""


def _interrupted(name: str, n_bytes: str, total: str, resumable: bool, cause: str = "") -> str:
    action = "resume it" if resumable else "start over"
    where = f"the download of {name} was interrupted at {n_bytes} of {total}"
    return f"{where}{cause}: run the same command again to {action}"


def _no_space(name: str, needed: int, free: int) -> str:
    return (
        f"{name} needs {needed / 1e9:.2f} GB in {environment.cache_folder()}, which has {free / 1e9:.2f} GB free: "
        "make room, or set LAB_CACHE to a folder on a larger disk"
    )


def _bare_name(name: str | None) -> str:
    """Return the archive's file name. Raises LabError for a path, which the client would follow out of the folder."""
    if not name or name in (_RECORD,) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,200}", name):
        raise LabError(
            f"Mozilla Data Collective must name an archive, got {str(name)[:80]!a}: "
            "check source.dataset, it must be a Common Voice data set"
        )
    return name
