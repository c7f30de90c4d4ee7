"""Decode a recording window by window, with the start of each word (sources/journal.py stores the windows)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.features.sources import journal as journals
from pipelines.speech.audio import Waveform
from pipelines.speech.recordings import detection, segmentation
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

CODE_VERSION = "5"
"""Raised when the same recording and model would give other windows."""
LONGEST_S = 28.0
"""Longest window; Whisper's has 30 s."""
_PAUSE_S = 0.16
"""Silence that ends a stretch of speech. Of 738 sentences at least 0.3 s apart, 6 % share a stretch with segmentation's
0.25 s, 2 % with 0.2 s, none with 0.16 s. A pause within a line does no harm: the line holds both parts.
"""


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


def decode(path: Path, journal: Path, open_engine: Callable[[], Decoder]) -> Recording:
    """Return the hypotheses of a recording, those of windows that `journal` lacks decoded now and appended to it.

    The engine is opened if a window is to be decoded. Raises AudioError for a recording that cannot be decoded. Several
    processes may call it: one waits for the other.
    """

    def cut(blocks: Iterator[np.ndarray]) -> Iterator[segmentation.Window]:
        return segmentation.windows(
            blocks, detection.open_detector(), longest_s=LONGEST_S, joined_s=LONGEST_S, pause_s=_PAUSE_S
        )

    records, end = journals.decode(path, journal, cut, lambda windows: _decoded(windows, open_engine()))
    return Recording([DecodedWindow(**record) for record in records], **end)


def _decoded(windows: list[segmentation.Window], engine: Decoder) -> Iterator[dict[str, Any]]:
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
