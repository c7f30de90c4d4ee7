"""Parts of a long recording, read in order in constant memory."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ

PIECE_NAME = r"^(?P<recording>.*)@(?P<start_s>\d+\.\d\d)-(?P<end_s>\d+\.\d\d)$"
"""Pattern of `piece_name`, for rows of a cache: they know their recording and their place in it."""


def piece_name(recording: str, start_s: float, end_s: float) -> str:
    """Return the id of a clip that is cut from a recording."""
    return f"{recording}@{start_s:.2f}-{end_s:.2f}"


class PieceReader:
    """Reads parts of one recording; one that begins before the last one starts the file again."""

    def __init__(self, path: Path):
        self.path = path
        self._restart()

    def read(self, start_s: float, end_s: float) -> np.ndarray:
        """Return float32 [n] at 16 kHz; shorter if the recording ends. Raises AudioError as `audio.blocks` does."""
        start, end = round(start_s * SAMPLE_RATE_HZ), round(end_s * SAMPLE_RATE_HZ)
        if start < self._offset:
            self._restart()
        while self._offset + len(self._samples) < end and (block := next(self._blocks, None)) is not None:
            dropped = min(max(start - self._offset, 0), len(self._samples))
            self._offset += dropped
            self._samples = np.concatenate([self._samples[dropped:], block])
        return self._samples[max(start - self._offset, 0) : max(end - self._offset, 0)].copy()

    def _restart(self) -> None:
        self._offset, self._samples = 0, np.zeros(0, dtype=np.float32)
        self._blocks = _blocks(self.path)


@dataclass(frozen=True)
class Piece:
    """A part of a recording, in seconds; it takes the place of an Excerpt for recordings of hours."""

    start_s: float
    end_s: float

    def cut(self, source: Path, keep_channels: bool = False) -> bytes:
        """Return the part as a wav file: 16 kHz, mono, float32."""
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, read_piece(source, self.start_s, self.end_s), SAMPLE_RATE_HZ, "FLOAT", format="WAV")
        return file.getvalue()


_open: dict[Path, PieceReader] = {}
"""The reader of the last file."""
_lock = threading.Lock()


def read_piece(path: Path, start_s: float, end_s: float) -> np.ndarray:
    """Return a part of a recording; the next part of the same file is read on from there. Thread-safe."""
    with _lock:
        reader = _open.pop(path, None) or PieceReader(path)
        _open.clear()
        samples = reader.read(start_s, end_s)
        _open[path] = reader  # not after an error, which would pass for the end of the recording
        return samples


def _blocks(path: Path) -> Iterator[np.ndarray]:
    """Yield the blocks of a recording; parts that cannot be read are silence, as the aligner noted."""
    try:
        yield from audio.blocks(path)
    except audio.DamagedAudio:
        return
