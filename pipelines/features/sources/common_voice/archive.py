"""Read a tar from the internet in one forward pass: nothing is written, no link is followed, damage is an error.

tarfile alone takes a broken header for the end of the archive, and compares a gzip's checksum only after its last byte
is read; here both are errors.
"""

from __future__ import annotations

import contextlib
import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from pipelines.infra import files
from pipelines.infra.errors import LabError

MAX_HEADER_BYTES = 1 << 20
"""A longer name or pax header would exhaust the memory."""
_BLOCK_BYTES = 1 << 16
_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. It can be opened until the iteration continues."""

    name: PurePosixPath
    """Relative, without `.` and `..`."""
    bytes: int
    _tar: tarfile.TarFile
    _info: tarfile.TarInfo

    def open(self) -> IO[bytes]:
        return self._tar.extractfile(self._info)


def members(path: Path) -> Iterator[Member]:
    """Yield every regular file of the tar `path` (gzipped or not) in its order; memory is that of one header.

    Raises LabError for a file that is not a tar, is truncated or damaged, or holds links, devices or names that are
    absolute or contain `..`. After a complete iteration every checksum of the gzip has been compared.
    """
    with damage_named(path), _decompressed(path) as file:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_StrictInfo)
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps every header it has seen
            if not info.isdir():
                yield Member(_safe_name(path, info), info.size, tar, info)
        while file.read(_BLOCK_BYTES):
            pass


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Convert the exceptions of a damaged archive to one LabError."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        files.check_readable(path)
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise LabError(
            f"{path.name} must be a whole .tar.gz, got: {' '.join(cause.split())}. Download it again"
        ) from None


class _StrictInfo(tarfile.TarInfo):
    """A header reader that accepts only the end mark as the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _LONG_HEADERS and info.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {info.size} bytes")
        return info

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except (tarfile.HeaderError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise tarfile.ReadError(f"the tar is cut or damaged ({error})") from None


def _safe_name(path: Path, info: tarfile.TarInfo) -> PurePosixPath:
    name = PurePosixPath(info.name)
    fault = (
        "a link" if info.islnk() or info.issym()
        else "no plain file" if not info.isreg() or info.issparse()
        else "an absolute name" if name.is_absolute() or "\\" in info.name or info.name[1:2] == ":"
        else "a name that leads upwards" if ".." in name.parts
        else None
    )  # fmt: skip
    if fault:
        raise LabError(
            f"{path.name} must hold plain files below one folder, got {info.name[:80]!a}, {fault}: "
            "do not unpack it, and download the corpus from its publisher"
        )
    return name


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as file:
        magic = file.read(2)
        file.seek(0)
        if magic != b"\x1f\x8b":
            yield file  # some browsers unpack a gzip while they download it
        else:
            with gzip.open(file) as unzipped:
                yield unzipped
