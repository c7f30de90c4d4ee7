"""Voice activity detectors: the probability of speech in each chunk of 32 ms of a recording.

Silero's model loses quiet speech: of 40 short words (benchmarks/non_speech.py) at a peak of -40 dBFS it detects 7, at
-50 dBFS none. `Levelled` therefore amplifies a recording before detection, by a gain that follows its level. Noise that
is amplified remains noise to the detector.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.speech.audio import SAMPLE_RATE_HZ

CHUNK_SAMPLES = 512
"""32 ms, the chunk length of Silero's detector."""
_MODEL_FILE = "silero_vad_16k_sequence.onnx"
_CONTEXT_SAMPLES = 64
"""Samples of the previous chunk that Silero's model also receives."""
_TARGET_PEAK = 0.5
"""Share of full scale to which `Levelled` amplifies. With 0.3 the detector loses short words; with 0.9 it takes more
music for speech."""
_MAX_GAIN = 316.0
"""50 dB: a peak of -56 dBFS reaches the target."""
_HALF_LIFE_S = 2.0
"""Time in which the level halves after a loud sound. With 1 to 5 s the detector decides alike."""
_SILENT_PEAK = 1e-3
"""-60 dBFS, below which a chunk is silence to `AnySound`; the app refuses such recordings too."""


class Detector(Protocol):
    """A voice activity detector that keeps its state between calls, until `reset`."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """Return probabilities of speech, float32 [n], for `samples`, float32 [n * CHUNK_SAMPLES].

        The samples follow those of the previous call.
        """

    def reset(self) -> None:
        """Forget the previous samples."""


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


@dataclass
class Levelled:
    """A detector that receives its samples amplified to about the same level, and without their mean.

    The gain of a chunk depends on that chunk and earlier ones alone. So live speech is treated as a file is, and the
    length of the blocks in which samples arrive does not matter.
    """

    detector: Detector
    level: float = 0.0
    """Peak of the samples so far, halved every _HALF_LIFE_S."""

    def reset(self) -> None:
        self.level = 0.0
        self.detector.reset()

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        chunks = samples.reshape(-1, CHUNK_SAMPLES)
        chunks = (chunks - chunks.mean(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        gains = np.array([self._gain(float(peak)) for peak in np.abs(chunks).max(axis=1)], dtype=np.float32)
        return self.detector.probabilities((chunks * gains[:, None]).reshape(-1))

    def _gain(self, peak: float) -> float:
        """Return the gain of the next chunk: 1 for peaks from _TARGET_PEAK to full scale, at most _MAX_GAIN."""
        self.level = max(peak, self.level * 0.5 ** (CHUNK_SAMPLES / SAMPLE_RATE_HZ / _HALF_LIFE_S))
        if not self.level or _TARGET_PEAK <= self.level <= 1:
            return 1.0
        return min(_MAX_GAIN, _TARGET_PEAK / self.level)


class AnySound:
    """A detector for machines without Silero: everything but silence is speech."""

    def reset(self) -> None:
        pass

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        return (np.abs(samples.reshape(-1, CHUNK_SAMPLES)).max(axis=1) >= _SILENT_PEAK).astype(np.float32)


def substitute() -> str:
    """Return the name of the detector that takes the place of Silero's on this machine; "" if Silero's is installed.

    Other windows are cut with it: what is stored of them needs another key.
    """
    return "" if is_packaged() else "any sound"


def open_detector() -> Detector:
    """Return Silero's detector, levelled, if it is installed, else AnySound."""
    return Levelled(Silero()) if is_packaged() else AnySound()


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
