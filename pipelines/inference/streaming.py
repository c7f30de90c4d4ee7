"""Transcribe while somebody speaks: final words, words that may still change, and the latency.

A stretch of speech that has ended with a pause is decoded once more and is final. The open stretch is decoded
repeatedly as it grows, which is cheap at the length of a clip. Its words are settled when two decodings in a row agree
on them (LocalAgreement-2: Liu et al. 2020; Macháček et al. 2023).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import Segment
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings import detection, segmentation
from pipelines.speech.recordings.detection import Detector
from pipelines.speech.recordings.segmentation import Window

DecodeWindows = Callable[[list[Window]], list[Segment]]
"""Transcriber.decode_windows."""


@dataclass(frozen=True)
class Partial:
    """The transcript up to now."""

    segments: tuple[Segment, ...]
    """Finished stretches, which do not change any more."""
    settled: str
    """Words of the open stretch on which two decodings in a row agreed."""
    open: str
    """Its other words, which may still change."""
    audio_s: float
    """Audio received."""
    latency_s: float
    """Wall-clock time from the arrival of the newest samples to this text."""

    @property
    def text(self) -> str:
        """Return all words in order."""
        return " ".join(part for part in (*(s.text for s in self.segments), self.settled, self.open) if part)


class Stream:
    """One speaker's stream of samples. Not thread-safe."""

    def __init__(
        self,
        decode_windows: DecodeWindows,
        detector: Detector,
        *,
        longest_s: float,
        every_s: float = 0.5,
        decode_open: DecodeWindows | None = None,
    ):
        """`longest_s` is the longest window; `decode_open`, faster than `decode_windows`, decodes the open stretch.

        The open stretch is decoded again after `every_s` of new audio, or after twice the time of the last decoding, so
        that a slow model does not fall behind.
        """
        self._decode_windows, self._decode_open_windows = decode_windows, decode_open or decode_windows
        self._interval = int(every_s * SAMPLE_RATE_HZ)
        self._cutter = segmentation.WindowCutter(detector, longest_s)
        self._segments: tuple[Segment, ...] = ()
        self._finished: list[Window] = []
        """Finished windows that are not decoded yet."""
        self._has_ended = False
        self._n_samples = 0
        self._n_decoded = 0
        """Samples of the open stretch at its last decoding."""
        self._words: list[str] = []
        """Words of the last decoding of the open stretch."""
        self._settled: list[str] = []
        self._stretch_start: int | None = None
        self._decoding_s = 0.0

    def feed(self, samples: np.ndarray) -> Partial:
        """Add float32 [n] at 16 kHz and return the transcript up to now.

        If decoding fails, the samples count as added, and the next call decodes what is missing.
        """
        started = time.monotonic()
        self._n_samples += len(samples)
        self._finished += self._cutter.feed(samples)
        if self._finished:
            self._decode_finished()
        start, stretch = self._cutter.open_stretch()
        if start != self._stretch_start:
            self._reset_open_stretch(start)
        if len(stretch) - self._n_decoded >= max(self._interval, int(2 * self._decoding_s * SAMPLE_RATE_HZ)):
            self._n_decoded = len(stretch)
            self._decode_open(Window(stretch, (start or 0) / SAMPLE_RATE_HZ))
        return self._partial(started)

    def end(self) -> Partial:
        """Return the final transcript; can be called again if decoding fails."""
        started = time.monotonic()
        if not self._has_ended:
            self._finished += self._cutter.finish()
            self._has_ended = True
        self._decode_finished()
        return self._partial(started)

    def _decode_finished(self) -> None:
        self._segments += tuple(self._decode_windows(self._finished))
        self._finished = []
        self._reset_open_stretch(None)

    def _reset_open_stretch(self, start: int | None) -> None:
        self._stretch_start, self._words, self._settled, self._n_decoded = start, [], [], 0

    def _decode_open(self, window: Window) -> None:
        started = time.monotonic()
        words = " ".join(segment.text for segment in self._decode_open_windows([window])).split()
        self._decoding_s = time.monotonic() - started
        agreed = _common_prefix(self._words, words)
        if len(agreed) > len(self._settled) and agreed[: len(self._settled)] == self._settled:
            self._settled = agreed
        self._words = words

    def _partial(self, started: float) -> Partial:
        return Partial(
            self._segments,
            " ".join(self._settled),
            " ".join(self._words[len(self._settled) :]),
            self._n_samples / SAMPLE_RATE_HZ,
            time.monotonic() - started,
        )


def create_stream(transcriber: Transcriber, every_s: float = 0.5) -> Stream:
    """Create a stream that `transcriber` decodes."""
    detector = detection.open_detector()
    greedy = transcriber.with_options(beam_size=1)
    return Stream(
        transcriber.decode_windows,
        detector,
        longest_s=transcriber.longest_s,
        every_s=every_s,
        decode_open=greedy.decode_windows,
    )


def _common_prefix(a: list[str], b: list[str]) -> list[str]:
    """Return the words with which both lists begin."""
    n = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return b[:n]
