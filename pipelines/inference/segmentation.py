"""Find speech in a recording of any length and cut it into windows, in constant memory.

A voice activity detector gives each chunk of 32 ms a probability of speech. A stretch of speech begins where it reaches
0.5. It ends where it falls below 0.35 and does not reach 0.5 again for a quarter of a second (PAUSE_S), as in Silero's
own code. Audio between stretches is not decoded, which saves time and prevents invented text. A stretch longer than a
window is cut at the quietest moment of the window's last third. Every sample of speech is in exactly one window; sounds
shorter than a tenth of a second, such as clicks, do not count as speech.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.speech.audio import SAMPLE_RATE_HZ

CHUNK_SAMPLES = 512
"""32 ms, the chunk length of Silero's detector."""
START, STOP = 0.5, 0.35
"""Probabilities of speech at which a stretch begins and ends."""
PAUSE_S = 0.25
"""Silence that ends a stretch of speech. A model tuned on single sentences needs single sentences: on four minutes of
the tour's validation sentences, 0.3 and 0.6 s apart, WER is 0.256 with this value, 0.348 with 0.4 s, and 0.464 if
stretches may be 12 s long instead of 3.7 s (one model, 489 words)."""
_PAD_S = 0.2
"""Silence included before and after a stretch, if there is that much."""
_MIN_SPEECH_S = 0.1
_CUT_SHARE = 1 / 3
"""A stretch that fills a window is cut at the quietest moment of this last share of it."""
_CUT_STEP_S = 0.1
_MODEL_FILE = "silero_vad_16k_sequence.onnx"
_CONTEXT_SAMPLES = 64
"""Samples of the previous chunk that Silero's model also receives."""


class Detector(Protocol):
    """A voice activity detector that keeps its state between calls, until `reset`."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """Return probabilities of speech, float32 [n], for `samples`, float32 [n * CHUNK_SAMPLES].

        The samples follow those of the previous call.
        """

    def reset(self) -> None:
        """Forget the previous samples."""


@dataclass(frozen=True)
class Window:
    """A part of a recording that contains speech."""

    samples: np.ndarray
    """float32 [n] at 16 kHz."""
    start_s: float
    """Start in the recording."""

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples) / SAMPLE_RATE_HZ


class Silero:
    """Silero's packaged model for sequences of chunks, run by ONNX Runtime, without torch.

    The result equals that of chunk after chunk; the state of its LSTM is passed on between calls.
    """

    def __init__(self) -> None:
        self._model = _session()
        self.reset()

    def reset(self) -> None:
        self._context = np.zeros(_CONTEXT_SAMPLES, dtype=np.float32)
        self._h = self._c = np.zeros((1, 1, 128), dtype=np.float32)

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        if not len(samples):
            return np.zeros(0, dtype=np.float32)
        with_context = np.concatenate([self._context, samples])
        self._context = with_context[-_CONTEXT_SAMPLES:].copy()
        chunks = np.lib.stride_tricks.sliding_window_view(with_context, _CONTEXT_SAMPLES + CHUNK_SAMPLES)
        inputs = {"input": np.ascontiguousarray(chunks[::CHUNK_SAMPLES]), "h": self._h, "c": self._c}
        probabilities, self._h, self._c = self._model.run(["speech_probs", "hn", "cn"], inputs)
        return probabilities


class AlwaysSpeech:
    """A detector for machines without Silero: everything is speech, so length alone decides where windows are cut."""

    def reset(self) -> None:
        pass

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        return np.ones(len(samples) // CHUNK_SAMPLES, dtype=np.float32)


def open_detector() -> Detector:
    """Return Silero's detector if it is installed, else AlwaysSpeech."""
    return Silero() if is_packaged() else AlwaysSpeech()


def is_packaged() -> bool:
    """Return whether Silero's model and ONNX Runtime are installed."""
    return _model_file() is not None and importlib.util.find_spec("onnxruntime") is not None


def _model_file() -> Path | None:
    """Return the packaged file without importing the package, which would import torch."""
    package = importlib.util.find_spec("silero_vad")
    folders = package.submodule_search_locations or [] if package else []
    return next((path for folder in folders if (path := Path(folder) / "data" / _MODEL_FILE).is_file()), None)


@functools.cache
def _session() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # an LSTM's steps are sequential
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
    """Yield the windows of a recording, given as `blocks` (float32 [n], 16 kHz, any lengths), in order.

    A pause of `pause_s` ends a stretch of speech. Stretches are joined, with the audio between them, up to `joined_s`.
    No window is longer than `longest_s`.
    """
    cutter = WindowCutter(detector, longest_s, joined_s, pause_s)
    for block in blocks:
        yield from cutter.feed(block)
    yield from cutter.finish()


class WindowCutter:
    """Cuts windows from samples that arrive in blocks; stores only the samples that may still be needed.

    Positions are counted in samples from the start of the recording.
    """

    def __init__(self, detector: Detector, longest_s: float, joined_s: float = 0.0, pause_s: float = PAUSE_S):
        detector.reset()
        self.detector = detector
        self.longest, self.joined = int(longest_s * SAMPLE_RATE_HZ), int(joined_s * SAMPLE_RATE_HZ)
        self.pause, self.pad = int(pause_s * SAMPLE_RATE_HZ), int(_PAD_S * SAMPLE_RATE_HZ)
        self.min_speech = int(_MIN_SPEECH_S * SAMPLE_RATE_HZ)
        self.buffer, self.offset = np.zeros(0, dtype=np.float32), 0
        """Stored samples, and the position of the first of them."""
        self.position = 0
        """End of the chunks that the detector has processed."""
        self.start: int | None = None
        """Start of the open stretch, padding included; None during silence."""
        self.onset = 0
        """Start of speech in the open stretch."""
        self.silence_start: int | None = None
        """Start of the silence at the end of the open stretch."""
        self.last_end = 0
        """End of the last finished stretch."""
        self.pending: tuple[int, int] | None = None
        """Start and end of the finished stretches that are joined so far; the next stretch may join them."""

    def feed(self, block: np.ndarray) -> Iterator[Window]:
        """Yield the windows that end in these samples."""
        self.buffer = np.concatenate([self.buffer, np.asarray(block, dtype=np.float32)])
        n_samples = (self.offset + len(self.buffer) - self.position) // CHUNK_SAMPLES * CHUNK_SAMPLES
        yield from self._process(self._samples(self.position, self.position + n_samples))
        self._drop_unneeded()

    def open_stretch(self) -> tuple[int | None, np.ndarray]:
        """Return start and samples of the open stretch, or None and an empty array."""
        if self.start is None:
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
                if self.pending and self.position - self.pending[0] >= self.joined:
                    yield from self._release(self.position)  # nothing can join it any more
                if probability >= START:
                    self.start, self.onset = max(chunk_start - self.pad, self.last_end), chunk_start
                    self.silence_start = None
                continue
            if probability >= START:
                self.silence_start = None
            elif probability < STOP and self.silence_start is None:
                self.silence_start = chunk_start
            if self.silence_start is not None and self.position - self.silence_start >= self.pause:
                yield from self._close_stretch(self.silence_start, self.position)
            elif self.position - self.start >= self.longest:
                cut = self.start + _quietest_moment(self._samples(self.start, self.start + self.longest))
                yield from self._add(self.start, cut)
                self.start, self.onset = cut, cut - self.min_speech  # the rest is speech, however short

    def _close_stretch(self, speech_end: int, available_end: int) -> Iterator[Window]:
        start, self.start = self.start, None
        end = min(speech_end + self.pad, available_end, start + self.longest)
        if speech_end - self.onset >= self.min_speech:
            yield from self._add(start, end)

    def _add(self, start: int, end: int) -> Iterator[Window]:
        """Join a finished stretch with the pending ones, or release those first."""
        if self.pending and end - self.pending[0] <= self.joined:
            self.pending = (self.pending[0], end)
        else:
            yield from self._release(end)
            self.pending = (start, end)
        self.last_end = end
        if not self.joined:
            yield from self._release(end)

    def _release(self, available_end: int) -> Iterator[Window]:
        if self.pending:
            start, end = self.pending
            self.pending = None
            yield Window(self._samples(start, min(end, available_end)).copy(), start / SAMPLE_RATE_HZ)

    def _samples(self, start: int, end: int) -> np.ndarray:
        return self.buffer[start - self.offset : end - self.offset]

    def _drop_unneeded(self) -> None:
        needed = [self.position - self.pad]
        needed += [self.start] if self.start is not None else []
        needed += [self.pending[0]] if self.pending else []
        first = max(min(needed), self.offset)
        self.buffer, self.offset = self.buffer[first - self.offset :], first


def _quietest_moment(window: np.ndarray) -> int:
    """Return the middle of the quietest tenth of a second in the last third of `window`, in samples."""
    step = int(_CUT_STEP_S * SAMPLE_RATE_HZ)
    tail = window[int(len(window) * (1 - _CUT_SHARE)) :]
    energy = np.square(tail[: len(tail) // step * step], dtype=np.float64).reshape(-1, step).sum(axis=1)
    return len(window) - len(tail) + int(energy.argmin()) * step + step // 2
