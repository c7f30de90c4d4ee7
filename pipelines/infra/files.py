"""Read files that may be away for a moment (Drive, a network disk), and recognise pointers of Git LFS.

An I/O error says nothing about a file's content, so it must not become a result: reads are repeated for a few seconds,
then the work ends unfinished and continues later.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipelines.infra.errors import Unfinished

WAITS_S = (0.2, 0.8, 2.0)
"""Waits before a failed read is repeated."""
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
"""Errors that say that there is no such file; all others are faults of the disk, the network or the permissions."""
_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_MAX_BYTES = 1024
LFS_ADVICE = "a pointer of Git LFS instead of the content: run git lfs pull in the repository that it comes from"
Result = TypeVar("Result")


class Unavailable(Unfinished):
    """A file cannot be read at the moment."""

    def __init__(self, line: str):
        """`line` names the file and the error."""
        super().__init__(line)

    @classmethod
    def of(cls, path: Path | str, error: OSError) -> Unavailable:
        """Return the exception for an I/O error of a file."""
        advice = (
            "allow reading it, or take it out" if isinstance(error, PermissionError) else "see that its disk is there"
        )
        return cls(
            f"{path} cannot be read at the moment ({error.strerror or error}): {advice}, then run the same command "
            "again; what is done is kept"
        )


def is_absent(error: OSError) -> bool:
    """Return True if the error says that there is no such file."""
    return error.errno in _ABSENT


def retry(action: Callable[[], Result], path: Path | str) -> Result:
    """Return `action()`, repeated after I/O errors. Raises Unavailable, or the OSError of a file that is absent."""
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except OSError as error:
            if is_absent(error):
                raise
            if wait_s is None:
                raise Unavailable.of(path, error) from None
            time.sleep(wait_s)
    raise AssertionError


def is_file(path: Path | str) -> bool:
    """Return True for a regular file, False if there is none. Raises Unavailable if that cannot be determined."""
    try:
        return stat.S_ISREG(retry(lambda: os.stat(path), path).st_mode)
    except (OSError, ValueError):
        return False


def check_readable(path: Path | str) -> None:
    """Read a whole file. Raises Unavailable if that fails; an absent file passes."""

    def read() -> None:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass

    if is_file(path):
        try:
            retry(read, path)
        except OSError:
            return


def is_lfs_pointer(source: bytes | Path | str) -> bool:
    """Return True for a pointer of Git LFS, as a clone without `git lfs pull` contains it."""
    if isinstance(source, bytes):
        return len(source) < _LFS_MAX_BYTES and source.startswith(_LFS)
    try:
        if os.path.getsize(source) >= _LFS_MAX_BYTES:
            return False
        with open(source, "rb") as file:
            return file.read(len(_LFS)) == _LFS
    except (OSError, ValueError):
        return False


class ReadOnlyFile(io.RawIOBase):
    """The position in a file of `size` bytes; subclasses read."""

    def __init__(self, size: int):
        super().__init__()
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position
