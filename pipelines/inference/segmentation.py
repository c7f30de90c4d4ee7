"""Where a recording is spoken, and the windows that are cut from it: any length in constant memory.

Blocks of samples come in, windows of speech go out. A voice activity detector gives each 32 ms a probability of
speech; a stretch begins where it reaches 0.5 and ends where it stays below 0.35 for long enough, Silero's own rule.
What lies between stretches is not decoded at all: no time is spent on it, and nothing can be invented for it. A
stretch longer than a window is cut at its quietest moment. No sample of speech is in two windows, or in none;
a click, shorter than a tenth of a second, is no speech.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.speech.audio import SAMPLE_RATE_HZ

CHUNK_SAMPLES = 512
"""32 ms: what Silero's detector judges at a time."""
START, STOP = 0.5, 0.35
PAUSE_S = 0.25
"""A stretch of speech ends with so much silence. A model tuned on single sentences wants single sentences: on four
minutes of the tour's validation sentences, 0.3 and 0.6 s apart, WER is 0.256 so, 0.348 with stretches that end after
0.4 s, and 0.464 where these may be 12 s long instead of 3.7 s (one model, 489 words)."""
_PAD_S = 0.2
"""Kept of the silence before and after a stretch, where there is so much."""
_SHORTEST_S = 0.1
_SEARCH = 1 / 3
"""A stretch that fills a window is cut at the quietest moment of this last share of it."""
_QUIET_S = 0.1
_MODEL = "silero_vad_16k_sequence.onnx"
_CONTEXT_SAMPLES = 64
"""What Silero's model sees of the chunk before."""


class Detector(Protocol):
    """Chunks of samples to probabilities of speech; it remembers what came before, until `reset`."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """float32 [n] for `samples`, float32 [n * CHUNK_SAMPLES], which follow those of the last call."""

    def reset(self) -> None: ...


@dataclass(frozen=True)
class Window:
    """A piece of a recording with speech in it."""

    samples: np.ndarray
    """float32 [n] at 16 kHz."""
    start_s: float
    """Where it begins in the recording."""

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples) / SAMPLE_RATE_HZ


class Silero:
    """Silero's packaged model for whole sequences of chunks, by ONNX Runtime: a block in one call, without torch.

    The result is that of chunk after chunk; the memory of its LSTM is handed on from block to block.
    """

    def __init__(self) -> None:
        self._model = _session()
        self.reset()

    def reset(self) -> None:
        self._before = np.zeros(_CONTEXT_SAMPLES, dtype=np.float32)
        self._h = self._c = np.zeros((1, 1, 128), dtype=np.float32)

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        if not len(samples):
            return np.zeros(0, dtype=np.float32)
        known = np.concatenate([self._before, samples])
        self._before = known[-_CONTEXT_SAMPLES:].copy()
        chunks = np.lib.stride_tricks.sliding_window_view(known, _CONTEXT_SAMPLES + CHUNK_SAMPLES)[::CHUNK_SAMPLES]
        asked = {"input": np.ascontiguousarray(chunks), "h": self._h, "c": self._c}
        told, self._h, self._c = self._model.run(["speech_probs", "hn", "cn"], asked)
        return told


class Everything:
    """Where no detector is installed: all is speech, and only the cuts at quiet moments are left."""

    def reset(self) -> None:
        pass

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        return np.ones(len(samples) // CHUNK_SAMPLES, dtype=np.float32)


def detector() -> Detector:
    """Silero's where it is installed."""
    return Silero() if is_packaged() else Everything()


def is_packaged() -> bool:
    """Whether Silero's model and what runs it are installed."""
    return _model_file() is not None and importlib.util.find_spec("onnxruntime") is not None


def _model_file() -> Path | None:
    """The packaged file; the package itself is not imported, which would import torch."""
    package = importlib.util.find_spec("silero_vad")
    places = package.submodule_search_locations or [] if package else []
    return next((path for place in places if (path := Path(place) / "data" / _MODEL).is_file()), None)


@functools.cache
def _session() -> Any:
    # its telemetry is on otherwise: a file in the temporary folder, and an address to report to
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # an LSTM's steps follow each other
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(_model_file()), options, providers=["CPUExecutionProvider"])


def windows(
    blocks: Iterable[np.ndarray],
    detector: Detector,
    *,
    longest_s: float,
    joined_s: float = 0.0,
    pause_s: float = PAUSE_S,
) -> Iterator[Window]:
    """The windows of a recording that comes in `blocks` (float32 [n], 16 kHz, any lengths), in order.

    A stretch of speech ends with a pause of `pause_s`. Stretches are joined, with what lies between them, as long as
    that makes at most `joined_s`; nothing is longer than `longest_s`.
    """
    cutter = Cutter(detector, longest_s, joined_s, pause_s)
    for block in blocks:
        yield from cutter.take(block)
    yield from cutter.end()


class Cutter:
    """What `windows` does, for samples that come in bit by bit: it holds those that may still be needed."""

    def __init__(self, detector: Detector, longest_s: float, joined_s: float = 0.0, pause_s: float = PAUSE_S):
        detector.reset()
        self.detector = detector
        self.longest, self.joined = int(longest_s * SAMPLE_RATE_HZ), int(joined_s * SAMPLE_RATE_HZ)
        self.pause, self.pad = int(pause_s * SAMPLE_RATE_HZ), int(_PAD_S * SAMPLE_RATE_HZ)
        self.shortest = int(_SHORTEST_S * SAMPLE_RATE_HZ)
        self.held, self.offset = np.zeros(0, dtype=np.float32), 0  # samples, and the place of the first of them
        self.judged = 0  # place up to which the detector has looked
        self.begin: int | None = None  # of the open stretch
        self.onset = 0  # where speech began in it: `begin` less the silence before
        self.quiet: int | None = None  # where it fell silent, perhaps for good
        self.last_end = 0  # of what was given out
        self.waiting: tuple[int, int] | None = None  # a finished stretch that others may join

    def take(self, block: np.ndarray) -> Iterator[Window]:
        """The windows that end with these samples."""
        self.held = np.concatenate([self.held, np.asarray(block, dtype=np.float32)])
        whole = (self.offset + len(self.held) - self.judged) // CHUNK_SAMPLES * CHUNK_SAMPLES
        yield from self._judge(self._piece(self.judged, self.judged + whole))
        self._forget()

    def open_stretch(self) -> tuple[int | None, np.ndarray]:
        """Where the stretch that is being spoken begins, in samples, and what has come of it; None, and nothing."""
        if self.begin is None:
            return None, np.zeros(0, dtype=np.float32)
        return self.begin, self._piece(self.begin, self.judged).copy()

    def end(self) -> Iterator[Window]:
        """The windows of what is left: no more samples come."""
        rest = self.offset + len(self.held) - self.judged
        total = self.judged + rest
        if rest:
            last = np.zeros(CHUNK_SAMPLES, dtype=np.float32)
            last[:rest] = self._piece(self.judged, total)
            yield from self._judge(last)
        if self.begin is not None:
            yield from self._finish(self.quiet or total, total)
        yield from self._release(total)

    def _judge(self, samples: np.ndarray) -> Iterator[Window]:
        for probability in self.detector.probabilities(samples):
            here = self.judged
            self.judged += CHUNK_SAMPLES
            if self.begin is None:
                if self.waiting and self.judged - self.waiting[0] >= self.joined:
                    yield from self._release(self.judged)  # nothing can join it any more
                if probability >= START:
                    self.begin, self.onset, self.quiet = max(here - self.pad, self.last_end), here, None
                continue
            if probability >= START:
                self.quiet = None
            elif probability < STOP and self.quiet is None:
                self.quiet = here
            if self.quiet is not None and self.judged - self.quiet >= self.pause:
                yield from self._finish(self.quiet, self.judged)
            elif self.judged - self.begin >= self.longest:
                cut = self.begin + _quietest(self._piece(self.begin, self.begin + self.longest))
                yield from self._add(self.begin, cut)
                self.begin, self.onset = cut, cut - self.shortest  # what is left is speech, however short

    def _finish(self, spoken_until: int, known_until: int) -> Iterator[Window]:
        """The open stretch is over."""
        begin, self.begin = self.begin, None
        end = min(spoken_until + self.pad, known_until, begin + self.longest)
        if spoken_until - self.onset >= self.shortest:
            yield from self._add(begin, end)

    def _add(self, begin: int, end: int) -> Iterator[Window]:
        if self.waiting and end - self.waiting[0] <= self.joined:
            self.waiting = (self.waiting[0], end)
        else:
            yield from self._release(end)
            self.waiting = (begin, end)
        self.last_end = end
        if not self.joined:
            yield from self._release(end)

    def _release(self, known_until: int) -> Iterator[Window]:
        if self.waiting:
            begin, end = self.waiting
            self.waiting = None
            yield Window(self._piece(begin, min(end, known_until)).copy(), begin / SAMPLE_RATE_HZ)

    def _piece(self, begin: int, end: int) -> np.ndarray:
        return self.held[begin - self.offset : end - self.offset]

    def _forget(self) -> None:
        needed = [self.judged - self.pad]
        needed += [self.begin] if self.begin is not None else []
        needed += [self.waiting[0]] if self.waiting else []
        keep = max(min(needed), self.offset)
        self.held, self.offset = self.held[keep - self.offset :], keep


def _quietest(window: np.ndarray) -> int:
    """The middle of the quietest tenth of a second in the last third of `window`, in samples from its start."""
    step = int(_QUIET_S * SAMPLE_RATE_HZ)
    tail = window[int(len(window) * (1 - _SEARCH)) :]
    energy = np.square(tail[: len(tail) // step * step], dtype=np.float64).reshape(-1, step).sum(axis=1)
    return len(window) - len(tail) + int(energy.argmin()) * step + step // 2
