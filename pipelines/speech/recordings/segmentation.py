"""Find speech in a recording of any length and cut it into windows, in constant memory.

A voice activity detector (detection.py) gives each chunk of 32 ms a probability of speech. A stretch of speech begins
where it reaches 0.5. It ends where it falls below 0.35 and does not reach 0.5 again for a quarter of a second
(PAUSE_S), as in Silero's own code. Audio between stretches is not decoded, which saves time and prevents invented text.
A stretch longer than a window is cut at the quietest moment of the window's last third. Every sample of speech is in
exactly one window. A sound for which the detector is never sure for long, such as a click or a chord, is not speech.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings.detection import CHUNK_SAMPLES, Detector

START, STOP = 0.5, 0.35
"""Probabilities of speech at which a stretch begins and ends."""
PAUSE_S = 0.25
"""Silence that ends a stretch of speech. A model tuned on single sentences needs single sentences: on four minutes of
the tour's validation sentences, 0.3 and 0.6 s apart, WER is 0.256 with this value, 0.348 with 0.4 s, and 0.464 if
stretches may be 12 s long instead of 3.7 s (one model, 489 words)."""
_PAD_S = 0.2
"""Silence included before and after a stretch, if there is that much."""
_MIN_SPEECH = 3.0
"""A stretch with a smaller sum of probabilities, over its chunks of at least START, is no speech: three sure chunks are
96 ms. Of 780 generated sounds without speech none reaches it, of 206 words spoken alone all do; the shortest word
lasts 0.22 s. With a limit for the number of chunks alone, five sounds of music are taken for speech."""
_MAX_JOINED_PAUSE_S = 2.0
"""Stretches further apart are not joined: a window of words and long silence invites invented text and wrong times."""
_CUT_SHARE = 1 / 3
"""A stretch that fills a window is cut at the quietest moment of this last share of it."""
_CUT_STEP_S = 0.1
_EDGE_S = 1.0
"""Silence before and after the speech of a short recording up to which it is a window as a whole."""


@dataclass(frozen=True)
class Window:
    """A part of a recording that contains speech."""

    samples: np.ndarray
    """float32 [n] at 16 kHz."""
    start_s: float
    """Start in the recording."""
    stretches: tuple[tuple[float, float], ...] = ()
    """Start and end, in the recording, of each stretch of speech, padding included; empty if they are not known."""
    is_cut: bool = False
    """Whether its end lies within speech, because the stretch was longer than a window."""

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples) / SAMPLE_RATE_HZ

    @property
    def speech(self) -> tuple[tuple[float, float], ...]:
        """Return the stretches of speech, or the whole window if they are not known."""
        return self.stretches or ((self.start_s, self.end_s),)


def windows(
    blocks: Iterable[np.ndarray],
    detector: Detector,
    *,
    longest_s: float,
    joined_s: float = 0.0,
    pause_s: float = PAUSE_S,
) -> Iterator[Window]:
    """Yield the windows of a recording, given as `blocks` (float32 [n], 16 kHz, any lengths), in order.

    A pause of `pause_s` ends a stretch of speech. Stretches are joined, with the audio between them, up to `joined_s`
    and over pauses of at most two seconds. No window is longer than `longest_s`.
    """
    cutter = WindowCutter(detector, longest_s, joined_s, pause_s)
    for block in blocks:
        yield from cutter.feed(block)
    yield from cutter.finish()


def windows_or_whole(
    blocks: Iterable[np.ndarray], detector: Detector, longest_s: float, *, cut_s: float, joined_s: float
) -> Iterator[Window]:
    """Yield the windows of a recording as `windows` does, of at most `cut_s`, with stretches joined up to `joined_s`.

    A recording of at most `longest_s`, if it has at most two blocks, is not cut: its first and last window reach to
    its edges if these are at most a second away.
    """
    blocks = iter(blocks)
    first_blocks = list(islice(blocks, 2))
    samples = np.concatenate(first_blocks) if first_blocks else np.zeros(0, dtype=np.float32)
    third = next(blocks, None)
    if third is None and len(samples) <= longest_s * SAMPLE_RATE_HZ:
        # twice the limit: a recording that fits into a window is not cut
        whole = windows([samples], detector, longest_s=2 * longest_s, joined_s=longest_s)
        yield from _with_edges(list(whole), samples)
        return
    all_blocks = chain([samples], [] if third is None else [third], blocks)
    yield from windows(all_blocks, detector, longest_s=cut_s, joined_s=min(joined_s, cut_s))


class WindowCutter:
    """Cuts windows from samples that arrive in blocks; stores only the samples that may still be needed.

    Positions are counted in samples from the start of the recording.
    """

    def __init__(self, detector: Detector, longest_s: float, joined_s: float = 0.0, pause_s: float = PAUSE_S):
        detector.reset()
        self.detector = detector
        self.longest, self.joined = int(longest_s * SAMPLE_RATE_HZ), int(joined_s * SAMPLE_RATE_HZ)
        self.pause, self.pad = int(pause_s * SAMPLE_RATE_HZ), int(_PAD_S * SAMPLE_RATE_HZ)
        self.max_joined_pause = int(_MAX_JOINED_PAUSE_S * SAMPLE_RATE_HZ)
        self.buffer, self.offset = np.zeros(0, dtype=np.float32), 0
        """Stored samples, and the position of the first of them."""
        self.position = 0
        """End of the chunks that the detector has processed."""
        self.start: int | None = None
        """Start of the open stretch, padding included; None during silence."""
        self.evidence = 0.0
        """Sum of the probabilities of speech in the open stretch (_MIN_SPEECH)."""
        self.silence_start: int | None = None
        """Start of the silence at the end of the open stretch."""
        self.last_end = 0
        """End of the last finished stretch."""
        self.is_cut = False
        """Whether the last of the pending stretches was cut."""
        self.pending: list[tuple[int, int]] = []
        """Start and end of the finished stretches that are joined so far; the next stretch may join them."""

    def feed(self, block: np.ndarray) -> Iterator[Window]:
        """Yield the windows that end in these samples."""
        self.buffer = np.concatenate([self.buffer, np.asarray(block, dtype=np.float32)])
        n_samples = (self.offset + len(self.buffer) - self.position) // CHUNK_SAMPLES * CHUNK_SAMPLES
        yield from self._process(self._samples(self.position, self.position + n_samples))
        self._drop_unneeded()

    def open_stretch(self) -> tuple[int | None, np.ndarray]:
        """Return start and samples of the open stretch; None and an empty array as long as it may not be speech."""
        if self.start is None or self.evidence < _MIN_SPEECH:
            return None, np.zeros(0, dtype=np.float32)
        return self.start, self._samples(self.start, self.position).copy()

    def finish(self) -> Iterator[Window]:
        """Yield the remaining windows after the last sample."""
        n_rest = self.offset + len(self.buffer) - self.position
        total = self.position + n_rest
        if n_rest:
            last_chunk = np.zeros(CHUNK_SAMPLES, dtype=np.float32)
            last_chunk[:n_rest] = self._samples(self.position, total)
            yield from self._process(last_chunk)
        if self.start is not None:
            yield from self._close_stretch(self.silence_start or total, total)
        yield from self._release(total)

    def _process(self, samples: np.ndarray) -> Iterator[Window]:
        for probability in self.detector.probabilities(samples):
            chunk_start = self.position
            self.position += CHUNK_SAMPLES
            if self.start is None:
                if self.pending and not self._can_join(self.position, self.position):
                    yield from self._release(self.position)
                if probability < START:
                    continue
                self.start, self.evidence = max(chunk_start - self.pad, self.last_end), 0.0
            if probability >= START:
                self.silence_start = None
                self.evidence += float(probability)
            elif probability < STOP and self.silence_start is None:
                self.silence_start = chunk_start
            if self.silence_start is not None and self.position - self.silence_start >= self.pause:
                yield from self._close_stretch(self.silence_start, self.position)
            elif self.position - self.start >= self.longest:
                cut = self.start + _quietest_moment(self._samples(self.start, self.start + self.longest))
                yield from self._add(self.start, cut, is_cut=True)
                self.start, self.evidence = cut, _MIN_SPEECH  # the rest is speech, however short

    def _close_stretch(self, speech_end: int, available_end: int) -> Iterator[Window]:
        start, self.start = self.start, None
        end = min(speech_end + self.pad, available_end, start + self.longest)
        if self.evidence >= _MIN_SPEECH:
            yield from self._add(start, end)

    def _add(self, start: int, end: int, is_cut: bool = False) -> Iterator[Window]:
        """Join a finished stretch with the pending ones, or release those first."""
        if self.pending and not self._can_join(start, end):
            yield from self._release(end)
        self.pending.append((start, end))
        self.last_end, self.is_cut = end, is_cut
        if not self.joined:
            yield from self._release(end)

    def _can_join(self, start: int, end: int) -> bool:
        """Return whether a stretch from `start` to `end` can be joined with the pending ones."""
        return end - self.pending[0][0] <= self.joined and start - self.pending[-1][1] <= self.max_joined_pause

    def _release(self, available_end: int) -> Iterator[Window]:
        stretches = [(start, min(end, available_end)) for start, end in self.pending]
        self.pending = []
        if stretches:
            start, end = stretches[0][0], stretches[-1][1]
            times_s = tuple((a / SAMPLE_RATE_HZ, b / SAMPLE_RATE_HZ) for a, b in stretches)
            yield Window(self._samples(start, end).copy(), start / SAMPLE_RATE_HZ, times_s, self.is_cut)

    def _samples(self, start: int, end: int) -> np.ndarray:
        return self.buffer[start - self.offset : end - self.offset]

    def _drop_unneeded(self) -> None:
        needed = [self.position - self.pad]
        needed += [self.start] if self.start is not None else []
        needed += [self.pending[0][0]] if self.pending else []
        first = max(min(needed), self.offset)
        self.buffer, self.offset = self.buffer[first - self.offset :], first


def _with_edges(windows: list[Window], samples: np.ndarray) -> list[Window]:
    """Extend the first and last window to the edges of the recording `samples` if these are at most _EDGE_S away."""
    if not windows:
        return []
    starts = [round(window.start_s * SAMPLE_RATE_HZ) for window in windows]
    ends = [start + len(window.samples) for start, window in zip(starts, windows, strict=True)]
    edge = int(_EDGE_S * SAMPLE_RATE_HZ)
    starts[0] = 0 if starts[0] <= edge else starts[0]
    ends[-1] = len(samples) if len(samples) - ends[-1] <= edge else ends[-1]
    return [
        Window(samples[start:end], start / SAMPLE_RATE_HZ, window.stretches)
        for window, start, end in zip(windows, starts, ends, strict=True)
    ]


def _quietest_moment(window: np.ndarray) -> int:
    """Return the middle of the quietest tenth of a second in the last third of `window`, in samples."""
    step = int(_CUT_STEP_S * SAMPLE_RATE_HZ)
    tail = window[int(len(window) * (1 - _CUT_SHARE)) :]
    energy = np.square(tail[: len(tail) // step * step], dtype=np.float64).reshape(-1, step).sum(axis=1)
    return len(window) - len(tail) + int(energy.argmin()) * step + step // 2
