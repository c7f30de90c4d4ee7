"""Temporary files of the app: one folder for all, a folder for each upload, a limit on their total size, and deletion.

Examples are never deleted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.infra.downloads import download
from pipelines.infra.downloads.download import Limits
from pipelines.infra.downloads.urls import Url

EXAMPLES = {
    "boat.ogg": "Båten går klockan sju.",
    "bread.ogg": "Hon köper bröd och ost på torget.",
    "snow.ogg": "I morgon ska det snöa i hela Norrland.",
}
"""File name to sentence of the page's examples: eSpeak NG voices, 16 kHz, in examples/."""
_PREFIX = "lab-upload-"
_FOLDER_PREFIX, _LOCK = "lab-app-", ".lock"
_MIN_COUNTED_BYTES = 1_000_000
"""A smaller file counts as this many bytes, since a large number of small files is a burden, too."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder for all temporary files of this process, and delete it at the end.

    Folders of processes that were killed are deleted first. A running process holds the lock in its folder.
    """
    parent, previous = Path(tempfile.gettempdir()), tempfile.tempdir
    for folder in parent.glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, or deleted meanwhile
            _delete_abandoned(folder)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
    lock = FileLock(folder / _LOCK)
    lock.acquire()
    tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = previous
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _delete_abandoned(folder: Path) -> None:
    """Delete a temporary folder whose process is gone; one without a lock was just created, unless it is a day old."""
    status = folder.lstat()
    is_old = status.st_mtime < time.time() - 86_400
    if not stat.S_ISDIR(status.st_mode) or not (is_old or (folder / _LOCK).exists()):
        return
    try:
        with FileLock(folder / _LOCK, timeout=0):
            pass
    except Timeout:
        return
    shutil.rmtree(folder)


def example_path(name: str) -> str:
    """Return the path of an example."""
    return str(Path(__file__).parent / "examples" / name)


def store_upload(path: Path, folder: Path) -> str:
    """Move an upload to its own folder below `folder` and return the new path.

    Gradio stores identical files of two visitors at one path, so that one visitor would delete the other's.
    """
    target = folder / f"{_PREFIX}{secrets.token_hex(16)}" / path.name
    target.parent.mkdir()
    try:
        os.rename(path, target)
    except FileNotFoundError:  # the request names the same file twice
        return str(path)
    with contextlib.suppress(OSError):  # not empty
        path.parent.rmdir()
    return str(target)


def delete_old_uploads(folder: Path, max_age_s: float) -> int:
    """Delete uploads older than `max_age_s`, including incomplete ones, and return the bytes that remain.

    Other files in the folder are left alone: the pages of a notebook share it.
    """
    n_bytes, oldest = 0, time.time() - max_age_s
    for path in [*folder.glob(f"{_PREFIX}*/*"), *folder.glob("tmp*"), *folder.glob(f"{_PREFIX}*")]:
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            status, is_file = path.stat(), path.is_file()
            if status.st_ctime >= oldest:
                n_bytes += max(status.st_size, _MIN_COUNTED_BYTES) if is_file else 0
            elif is_file:
                path.unlink()
            elif path.name.startswith(_PREFIX):
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
    return n_bytes


def fetch_upload(address: str, folder: Path, limits: Limits) -> str:
    """Download a recording to its own folder below `folder`, as an upload, and return its path.

    Raises DownloadError.
    """
    url = Url(address)
    path = folder / f"{_PREFIX}{secrets.token_hex(16)}" / url.file_name
    path.parent.mkdir(parents=True)
    try:
        with open(path, "wb") as file:
            download.fetch(url, file, limits)
    except BaseException:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise
    return str(path)


def discard_upload(upload: str | None) -> None:
    """Delete an upload and its folder, if it is in Gradio's folder of uploads and not one of the examples."""
    from gradio.utils import get_upload_folder

    if upload is None or not Path(upload).is_relative_to(get_upload_folder()) or _is_example(Path(upload)):
        return
    Path(upload).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        Path(upload).parent.rmdir()


def _is_example(upload: Path) -> bool:
    """Return whether the upload is an example, which other visitors may be using."""
    if upload.name not in EXAMPLES:
        return False
    try:
        return upload.read_bytes() == Path(example_path(upload.name)).read_bytes()
    except FileNotFoundError:
        return False
