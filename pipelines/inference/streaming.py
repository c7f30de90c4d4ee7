"""Text while somebody is still speaking: what is certain by now, what may yet change, and how late it comes.

Samples come in as they are recorded. A stretch that has ended with a pause is decoded once more and is final. The open
stretch is decoded again and again as it grows, which is cheap at the length of a clip; of its words those count as
settled on which two decodings in a row agree (LocalAgreement-2: Liu et al. 2020; Macháček et al. 2023).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.inference import segmentation
from pipelines.inference.segmentation import Detector, Window
from pipelines.inference.transcriber import Segment, Transcriber
from pipelines.speech.audio import SAMPLE_RATE_HZ

Decode = Callable[[list[Window]], list[Segment]]
"""Windows to segments: Transcriber.decode_windows."""


@dataclass(frozen=True)
class Partial:
    """What has been heard up to now."""

    segments: tuple[Segment, ...]
    """Finished stretches; they do not change any more."""
    settled: str
    """The words of the open stretch on which two decodings in a row agreed."""
    open: str
    """Its other words, which may yet change."""
    audio_s: float
    """How much has come in."""
    latency_s: float
    """From the arrival of the newest samples to this text, wall-clock."""

    @property
    def text(self) -> str:
        """All words in order."""
        return " ".join(part for part in (*(s.text for s in self.segments), self.settled, self.open) if part)


class Stream:
    """One speaker's stream of samples. Not safe for several threads at once."""

    def __init__(self, decode: Decode, detector: Detector, *, longest_s: float, every_s: float = 0.5):
        """`longest_s`: of a window. `every_s`: the open stretch is decoded again after so many seconds of it, or after
        twice as many as the last decoding took, so that a slow model does not fall behind the speaker."""
        self._decode, self._every = decode, int(every_s * SAMPLE_RATE_HZ)
        self._cutter = segmentation.Cutter(detector, longest_s)
        self._segments: tuple[Segment, ...] = ()
        self._finished: list[Window] = []
        self._ended = False
        self._samples, self._decoded_at = 0, 0
        self._before: list[str] = []
        self._settled: list[str] = []
        self._open_since: int | None = None
        self._took_s = 0.0

    def feed(self, samples: np.ndarray) -> Partial:
        """Take float32 [n] at 16 kHz, and tell what has been heard.

        Where decoding fails the samples are taken nevertheless, and the next call decodes what is still to be decoded.
        """
        started = time.monotonic()
        self._samples += len(samples)
        self._finished += self._cutter.take(samples)
        if self._finished:
            self._close()
        begin, stretch = self._cutter.open_stretch()
        if begin != self._open_since:
            self._open_since, self._before, self._settled, self._decoded_at = begin, [], [], 0
        if len(stretch) - self._decoded_at >= max(self._every, int(2 * self._took_s * SAMPLE_RATE_HZ)):
            self._decoded_at = len(stretch)
            self._hear(Window(stretch, (begin or 0) / SAMPLE_RATE_HZ))
        return self._told(started)

    def end(self) -> Partial:
        """Nothing more comes: what is open is final. Where decoding fails it can be called again."""
        started = time.monotonic()
        if not self._ended:
            self._finished += self._cutter.end()
            self._ended = True
        self._close()
        return self._told(started)

    def _close(self) -> None:
        self._segments += tuple(self._decode(self._finished))
        self._finished = []
        self._open_since, self._before, self._settled, self._decoded_at = None, [], [], 0

    def _hear(self, window: Window) -> None:
        started = time.monotonic()
        words = " ".join(segment.text for segment in self._decode([window])).split()
        self._took_s = time.monotonic() - started
        agreed = _shared(self._before, words)
        if len(agreed) > len(self._settled) and agreed[: len(self._settled)] == self._settled:
            self._settled = agreed
        self._before = words

    def _told(self, started: float) -> Partial:
        rest = self._before[len(self._settled) :]
        return Partial(
            self._segments,
            " ".join(self._settled),
            " ".join(rest),
            self._samples / SAMPLE_RATE_HZ,
            time.monotonic() - started,
        )


def create_stream(transcriber: Transcriber, every_s: float = 0.5) -> Stream:
    """Create a stream that `transcriber` decodes."""
    return Stream(transcriber.decode_windows, segmentation.detector(), longest_s=transcriber.longest_s, every_s=every_s)


def _shared(a: list[str], b: list[str]) -> list[str]:
    """The words with which both begin."""
    n = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return b[:n]
