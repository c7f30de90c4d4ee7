"""ModelRef to Transcript: one class for the notebook, the app and the command line."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import audio, decoding, environment, features, models
from pipelines.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.batches import padded_frames
from pipelines.features import FULL_FRAMES, FULL_SAMPLES
from pipelines.models import ModelRef

_SEARCH_S = 5
"""A long recording is cut at the quietest moment of the last seconds before each 30 s are full."""
_QUIET_S = 0.1


@dataclass(frozen=True)
class Transcript:
    """What was heard."""

    text: str
    audio_s: float
    """Duration of the recording."""
    elapsed_s: float
    """Wall-clock time of decoding, extraction and generation."""


class Transcriber:
    """A loaded model that turns recordings into text; safe to call from one thread at a time."""

    def __init__(self, ref: ModelRef, language: str = "sv", *, device: str | None = None, max_new_tokens: int = 224):
        self.ref, self.language, self.max_new_tokens = ref, language, max_new_tokens
        self.processor = models.load_processor(ref, language)
        self.model = models.load(ref, device=device or environment.detect().device)
        self.n_mels = self.model.config.num_mel_bins

    def transcribe(self, recording: bytes | str | Path | Waveform, max_duration_s: float = float("inf")) -> Transcript:
        """The transcript of a file's bytes, a path or a Waveform of any length.

        Raises audio.AudioError for what is not audio, empty, not finite or longer than `max_duration_s`.
        """
        started = time.monotonic()
        waveform = recording if isinstance(recording, Waveform) else audio.decode(recording, max_duration_s)
        parts = [self._window(window) for window in windows(waveform.samples)]
        return Transcript(" ".join(part for part in parts if part), waveform.duration_s, time.monotonic() - started)

    def _window(self, samples: np.ndarray) -> str:
        import torch

        log_mel = features.extract(Waveform(samples), self.n_mels)
        frames = padded_frames(len(log_mel.frames)) if self.ref.context == "clip" else FULL_FRAMES
        tensor = torch.from_numpy(log_mel.padded(frames))[None]
        return decoding.decode(
            self.model, self.processor, tensor, language=self.language, max_new_tokens=self.max_new_tokens
        )[0]


def windows(samples: np.ndarray) -> list[np.ndarray]:
    """Cut float32 [n] into pieces of at most 30 s, each cut at the quietest tenth of a second of the last five."""
    pieces, start = [], 0
    while len(samples) - start > FULL_SAMPLES:
        end = start + _quietest(samples[start : start + FULL_SAMPLES])
        pieces.append(samples[start:end])
        start = end
    return [*pieces, samples[start:]] if start < len(samples) else pieces


def _quietest(window: np.ndarray) -> int:
    """The middle of the quietest tenth of a second near the window's end, in samples from its start."""
    step = int(_QUIET_S * SAMPLE_RATE_HZ)
    tail = window[len(window) - _SEARCH_S * SAMPLE_RATE_HZ :]
    energy = np.square(tail[: len(tail) // step * step], dtype=np.float64).reshape(-1, step).sum(axis=1)
    return len(window) - len(tail) + int(energy.argmin()) * step + step // 2
