"""Decode a recording window by window, in constant memory. A window that is stored is never decoded again.

A journal is a file of JSON lines: one record per window, written when it is decoded, and a last one for the recording.
What a record holds besides `start_s` is decided by the function that decodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings.segmentation import Window

_BATCH = 8
_TAIL_BYTES = 100_000
"""Longer than any record."""
_AUDIBLE_PEAK = 0.02
"""-34 dBFS: a second with a higher peak, outside speech, is music or another sound."""

Cut = Callable[[Iterable[np.ndarray]], Iterable[Window]]
"""Cuts blocks of samples into windows."""
DecodeWindows = Callable[[list[Window]], Iterable[dict[str, Any]]]
"""Returns one record per window, in order, with its `start_s`."""


def decode(
    path: Path, journal: Path, cut: Cut, decode_windows: DecodeWindows
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the records of a recording's windows by time, those that `journal` lacks decoded now and appended to it.

    The second value describes the recording: duration_s, audible (seconds with sound outside the windows), gaps (start
    and end of parts that cannot be read). Raises AudioError for a recording that cannot be decoded. Several processes
    may call it: one waits for the other.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{journal}.lock"):
        stored, end = _read(journal)
        if end is None:
            end = _extend(path, journal, cut, decode_windows, stored)
    return [stored[start] for start in sorted(stored)], end


def decoded_s(journal: Path) -> float:
    """Return the time up to which a recording is decoded; 0 before it begins and after it ends."""
    try:
        with open(journal, "rb") as file:
            file.seek(max(0, journal.stat().st_size - _TAIL_BYTES))
            rows = file.read().splitlines(keepends=True)
        last = next((row for row in reversed(rows) if row.endswith(b"\n")), b"{}")
        return float(json.loads(last).get("end_s", 0))
    except (OSError, ValueError):
        return 0.0


def _extend(
    path: Path, journal: Path, cut: Cut, decode_windows: DecodeWindows, stored: dict[float, Any]
) -> dict[str, Any]:
    sound = _Sound()
    waiting: list[Window] = []
    with open(journal, "a", encoding="utf-8") as file:

        def flush() -> None:
            for record in decode_windows([*waiting]) if waiting else ():
                stored[record["start_s"]] = record
                _append(file, record)
            waiting.clear()

        for window in cut(sound.blocks(path)):
            sound.windows.append((window.start_s, window.end_s))
            if window.start_s not in stored:
                waiting.append(window)
            if len(waiting) == _BATCH:
                flush()
        flush()
        end = {"duration_s": sound.n_samples / SAMPLE_RATE_HZ, "audible": sound.audible(), "gaps": sound.gaps}
        _append(file, {"end": end})
    return end


class _Sound:
    """The blocks of a recording, and what is noted while they pass."""

    def __init__(self) -> None:
        self.n_samples, self.peaks, self.gaps = 0, [], []
        self.windows: list[tuple[float, float]] = []
        self._rest = np.zeros(0, dtype=np.float32)

    def blocks(self, path: Path) -> Iterator[np.ndarray]:
        """Yield the samples; parts that cannot be read are silence and become `gaps`."""
        try:
            for block in audio.blocks(path):
                self._note(block)
                yield block
        except audio.DamagedAudio as error:
            end_s = self.n_samples / SAMPLE_RATE_HZ
            self.gaps = [[gap.start_s, end_s if gap.end_s is None else gap.end_s] for gap in error.gaps]

    def audible(self) -> list[int]:
        """Return the seconds with sound that no window overlaps."""
        loud = np.array(self.peaks) >= _AUDIBLE_PEAK
        for start_s, end_s in self.windows:
            loud[int(start_s) : int(end_s) + 1] = False
        return np.flatnonzero(loud).tolist()

    def _note(self, block: np.ndarray) -> None:
        self.n_samples += len(block)
        samples = np.concatenate([self._rest, block])
        n = len(samples) // SAMPLE_RATE_HZ
        seconds = samples[: n * SAMPLE_RATE_HZ].reshape(n, SAMPLE_RATE_HZ)
        self.peaks += np.abs(seconds).max(axis=1, initial=0.0).tolist()
        self._rest = samples[n * SAMPLE_RATE_HZ :]


def _append(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _read(journal: Path) -> tuple[dict[float, Any], dict[str, Any] | None]:
    """Return the windows of a journal by their start, and its end record.

    A line that is torn or damaged is removed with all that follow it: their windows are decoded again.
    """
    stored: dict[float, Any] = {}
    end, n_read = None, 0
    content = journal.read_bytes() if journal.is_file() else b""
    for row in content.splitlines(keepends=True):  # of bytes: a text may hold other line breaks of Unicode
        try:
            record = json.loads(row if row.endswith(b"\n") else b"")
            if "end" in record:
                end = record["end"]
            else:
                stored[float(record["start_s"])] = record
        except (ValueError, TypeError, KeyError):
            break
        n_read += len(row)
    if n_read < len(content):
        end = None
        with open(journal, "r+b") as file:
            file.truncate(n_read)
    return stored, end
