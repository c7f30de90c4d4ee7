"""Decode a recording window by window, in constant memory. A window that is stored is never decoded again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np

from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.speech.recordings import detection, segmentation
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

LONGEST_S = 28.0
"""Longest window; Whisper's has 30 s."""
_BATCH = 8
_AUDIBLE_PEAK = 0.02
"""-34 dBFS: a second with a higher peak, outside speech, is music or another sound."""


class Decoder(Protocol):
    """The part of an engine (whisper/engines/) that this module needs."""

    def log_mel(self, waveform: Waveform) -> LogMel: ...
    def decode(self, windows: np.ndarray) -> list[Any]: ...
    def word_starts(self, windows: np.ndarray, frames: list[int], texts: list[str]) -> list[list[float]]: ...


@dataclass(frozen=True)
class DecodedWindow:
    """A window with its hypothesis; times are seconds from the start of the recording."""

    start_s: float
    end_s: float
    stretches: list[list[float]]
    """Start and end of each stretch of speech."""
    words: list[str]
    starts_s: list[float]
    """Of each word."""


@dataclass(frozen=True)
class Recording:
    """The hypotheses of a recording."""

    windows: list[DecodedWindow]
    duration_s: float
    audible: list[int] = field(default_factory=list)
    """Seconds with sound outside the windows."""
    gaps: list[list[float]] = field(default_factory=list)
    """Parts that cannot be read."""


def decode(path: Path, journal: Path, engine: Decoder) -> Recording:
    """Return the hypotheses of a recording, those of windows that `journal` lacks decoded now and appended to it.

    Raises AudioError for a recording that cannot be decoded. Several processes may call it: one waits for the other.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{journal}.lock"):
        stored, end = _read(journal)
        if end is None:
            end = _extend(path, journal, engine, stored)
    windows = [DecodedWindow(**stored[start]) for start in sorted(stored)]
    return Recording(windows, **end)


def _extend(path: Path, journal: Path, engine: Decoder, stored: dict[float, Any]) -> dict[str, Any]:
    sound = _Sound()
    waiting: list[segmentation.Window] = []
    with open(journal, "a", encoding="utf-8") as file:

        def flush() -> None:
            for window in _decoded(waiting, engine):
                stored[window["start_s"]] = window
                _append(file, window)
            waiting.clear()

        cut = segmentation.windows(
            sound.blocks(path), detection.open_detector(), longest_s=LONGEST_S, joined_s=LONGEST_S
        )
        for window in cut:
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


def _decoded(windows: Iterable[segmentation.Window], engine: Decoder) -> Iterator[dict[str, Any]]:
    windows = list(windows)
    if not windows:
        return
    log_mels = [engine.log_mel(Waveform(window.samples)) for window in windows]
    features = np.stack([log_mel.padded(FULL_FRAMES) for log_mel in log_mels])
    texts = [hypothesis.text for hypothesis in engine.decode(features)]
    starts = engine.word_starts(features, [len(log_mel.frames) for log_mel in log_mels], texts)
    for window, text, word_starts in zip(windows, texts, starts, strict=True):
        words = text.split()
        if len(word_starts) != len(words):  # the model cannot align: the words are spread over the window
            word_starts = np.linspace(0, window.end_s - window.start_s, len(words), endpoint=False).tolist()
        yield {
            "start_s": window.start_s,
            "end_s": window.end_s,
            "stretches": [list(one) for one in window.speech],
            "words": words,
            "starts_s": [window.start_s + start for start in word_starts],
        }


def _append(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _read(journal: Path) -> tuple[dict[float, Any], dict[str, Any] | None]:
    """Return the windows of a journal by their start, and its end record; a torn last line is removed."""
    stored: dict[float, Any] = {}
    end = None
    content = journal.read_bytes() if journal.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(journal, "r+b") as file:
            file.truncate(len(whole))
    for row in whole.decode().splitlines():
        record = json.loads(row)
        if "end" in record:
            end = record["end"]
        else:
            stored[record["start_s"]] = record
    return stored, end
