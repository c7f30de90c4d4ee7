"""Find the encoding of a text file that a spreadsheet may have saved, and read it."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.infra import files
from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

_NOT_WINDOWS_1252 = re.compile(r"[†‡ŒŠšŽžƒ™ˆ˜]|(?<=[^\W\d_])[€‚„…‰‹“”•›¢-¦¨-ª¬-¯±-³µ¶¸-º¿](?=[^\W\d_])")
"""Characters that come from decoding another code page (Mac, DOS, Central Europe) as Windows-1252."""


def read_text(path: Path) -> str:
    """Return the text of a file in any encoding that tables may have; NUL characters are dropped."""
    with readable(path):
        return path.read_bytes().decode(detect_encoding(path)).replace("\0", "")


def detect_encoding(path: Path) -> str:
    """Return Python's name of the encoding of a text file. Raises LabError if it is none that is read."""
    if files.is_lfs_pointer(path):
        raise LabError(f"{path.name} is {files.LFS_ADVICE}")
    decoder = codecs.getincrementaldecoder("utf-8")()
    with readable(path), open(path, "rb") as file:
        sample = file.read(4096)
        if sample[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        if len(sample) > 8 and sample.count(0) > 0.3 * len(sample):
            return "utf-16-le" if sample[1::2].count(0) > sample[::2].count(0) else "utf-16-be"
        file.seek(0)
        try:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            file.seek(0)
            return _other_encoding(path.name, file.read())
    return "utf-8-sig"


def _other_encoding(name: str, content: bytes) -> str:
    """Return the encoding of a text that is not UTF-8, and log it. Raises LabError if it is not known."""
    if text := _windows_1252(content):
        example = next(line for line in text.splitlines() if not line.isascii())
        logger.info(f"note: {name} is not UTF-8; it is read as Windows-1252, as Excel saves CSV: {example[:80]!r}")
        return "cp1252"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise LabError(
            f"{name} must be UTF-8, got the byte 0x{content[error.start]:02x} at {error.start}: "
            "save it as UTF-8 (Excel: 'CSV UTF-8')"
        ) from None
    return "utf-8-sig"


def _windows_1252(content: bytes) -> str:
    """Return the text if Windows-1252 is its likely encoding: western letters, fewer than others. Else nothing."""
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    letters = [char for char in text if char.isalpha()]
    is_likely = sum(not char.isascii() for char in letters) < 0.4 * len(letters)
    return text if is_likely and "\0" not in text and not _NOT_WINDOWS_1252.search(text) else ""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise LabError for errors while a file is opened or read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise LabError(f"{path.name} cannot be decoded ({error.reason}): save it as UTF-8") from None
    except OSError as error:
        if not files.is_absent(error):
            raise files.Unavailable.of(path, error) from None
        raise LabError(f"{path.name} must be a readable file, got: {error.strerror}. Replace it") from None
