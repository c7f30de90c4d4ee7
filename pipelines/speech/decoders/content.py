"""The bytes of an audio file, and pieces of them that a decoder reads as files of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.infra import files
from pipelines.speech.decoders.waveform import AudioError, Gap, Mix, check_level, to_mono

CHUNK_BYTES = 1 << 20
Part = bytes | tuple[int, int]
"""Bytes, or start and end of a range of the file."""


class Content:
    """Random access to the bytes of a file: in memory, or on the disk in constant memory."""

    def __init__(self, source: bytes | str, file: BinaryIO | None, size: int):
        self.source, self._file, self.size = source, file, size

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return Path(self.source).name if isinstance(self.source, str) else "the file"

    def read(self, start: int, n_bytes: int) -> bytes:
        """Return the bytes from `start` on; fewer than `n_bytes` at the end of the file."""
        if start < 0:
            return b""
        if self._file is None:
            return self.source[start : start + n_bytes]
        return files.retry(lambda: self._read_file(start, n_bytes), self.source)

    def _read_file(self, start: int, n_bytes: int) -> bytes:
        self._file.seek(start)
        return self._file.read(n_bytes)

    def check_available(self) -> None:
        """Raise Unavailable if the file cannot be read at the moment: then its content is not at fault."""
        if self._file is not None:
            files.check_readable(self.source)

    def chunks(self, start: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield offset and bytes of the rest of the file, in chunks that share `overlap` bytes with the next one."""
        while start < self.size:
            chunk = self.read(start, CHUNK_BYTES)
            yield start, chunk
            start += max(len(chunk) - overlap, 1) if start + len(chunk) < self.size else len(chunk) or self.size

    def find(self, pattern: bytes, start: int) -> int:
        """Return the offset of the first occurrence of `pattern` from `start` on, or -1."""
        for offset, chunk in self.chunks(start, len(pattern) - 1):
            if (position := chunk.find(pattern)) >= 0:
                return offset + position
        return -1

    def is_zero(self, start: int) -> bool:
        """Return whether all bytes from `start` on are zero."""
        return all(chunk.count(0) == len(chunk) for _, chunk in self.chunks(start))


@contextlib.contextmanager
def open_content(source: bytes | Path | str) -> Iterator[Content]:
    """Open bytes or a file. Raises AudioError `missing`, `empty` or `lfs_pointer`, Unavailable after I/O errors."""
    if isinstance(source, bytes):
        if not source:
            raise AudioError("empty", "the file has 0 bytes")
        if files.is_lfs_pointer(source):
            raise AudioError("lfs_pointer", files.LFS_ADVICE)
        yield Content(source, None, len(source))
        return
    path = Path(source)
    if not files.is_file(path):
        raise AudioError("missing", f"there is no file {path.name}")
    if files.is_lfs_pointer(path):
        raise AudioError("lfs_pointer", files.LFS_ADVICE)
    with files.retry(lambda: open(path, "rb"), path) as file:
        size = path.stat().st_size
        if size == 0:
            raise AudioError("empty", "the file has 0 bytes")
        yield Content(str(path), file, size)


@dataclass(frozen=True)
class Piece:
    """A part of a file that a decoder reads as a separate file."""

    parts: tuple[Part, ...] = ()
    """Its bytes; empty: the file as it is."""
    duration_s: float | None = None
    """Duration by its structure, None if that is unknown."""
    tolerance_s: float = 0.02
    """What a decoder may trim of `duration_s`."""
    gaps: tuple[Gap, ...] = ()
    """Gaps that its structure shows, in seconds from its start. Silence stands in for the lost sound."""
    is_cut: bool = False
    """The file ends before this piece does."""
    before_s: float = 0.0
    """Silence before it, for lost sound."""


@dataclass(frozen=True)
class Layout:
    """What a file holds."""

    kind: str = ""
    """A name of containers.py, "" if it is unknown."""
    pieces: tuple[Piece, ...] = field(default=(Piece(),))
    """Decoded one after another."""
    only_ffmpeg: bool = False
    """libsndfile does not read it, or not rightly."""

    @property
    def is_plain(self) -> bool:
        """Return whether the file can be decoded as it is, and nothing is wrong with it."""
        piece = self.pieces[0]
        return len(self.pieces) == 1 and not (piece.parts or piece.gaps or piece.is_cut or self.only_ffmpeg)


@dataclass(frozen=True)
class Request:
    """What is decoded of a file."""

    track: int = 0
    """Audio track; 1: the first; 0: the first, and further ones are logged."""
    max_duration_s: float = float("inf")
    block_s: float = 30.0
    """Duration of the blocks."""
    mix: Mix | None = None
    """Makes one channel of several; None: `to_mono`."""

    def to_mono(self, samples: np.ndarray, rate_hz: int) -> np.ndarray:
        """Return float32 [n] from samples [n, channels]. Raises AudioError `not_finite`."""
        if self.mix is None:
            return to_mono(samples)
        check_level(samples)
        return self.mix(samples, rate_hz)


class Spliced(files.ReadOnlyFile):
    """The parts of a piece as a file that can be read."""

    def __init__(self, content: Content, parts: tuple[Part, ...]):
        self._content, self._parts = content, parts
        self._ends: list[int] = []
        for part in parts:
            n_bytes = len(part) if isinstance(part, bytes) else part[1] - part[0]
            self._ends.append((self._ends[-1] if self._ends else 0) + n_bytes)
        super().__init__(self._ends[-1])

    def readinto(self, buffer: memoryview) -> int:
        import bisect

        n_read = 0
        while n_read < len(buffer) and self._position < self._ends[-1]:
            number = bisect.bisect_right(self._ends, self._position)
            part, end = self._parts[number], self._ends[number]
            n_bytes = min(end - self._position, len(buffer) - n_read)
            if isinstance(part, bytes):
                at = len(part) - (end - self._position)
                piece = part[at : at + n_bytes]
            else:
                piece = self._content.read(part[1] - (end - self._position), n_bytes)
            if not piece:
                break
            buffer[n_read : n_read + len(piece)] = piece
            self._position += len(piece)
            n_read += len(piece)
        return n_read
