"""What several test files make: encoded audio, and a signal that sounds like speech to an extractor."""

from __future__ import annotations

import io

import numpy as np
import pytest


@pytest.fixture(scope="session")
def encoded():
    """`encoded(samples, rate_hz, format="WAV", subtype=None)`: the bytes of an audio file."""
    import soundfile

    def encode(samples, rate_hz: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples, rate_hz, format=format, subtype=subtype)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def speech():
    """`speech(n_samples, seed=0, peak=0.5)`: float32, 16 kHz: gliding harmonics in syllables, over a little noise."""

    def make(n_samples: int, seed: int = 0, peak: float = 0.5) -> np.ndarray:
        rng = np.random.default_rng(seed)
        t = np.arange(n_samples) / 16_000
        phase = 2 * np.pi * np.cumsum(130 + 40 * np.sin(2 * np.pi * 0.7 * t + rng.uniform(0, 6))) / 16_000
        voice = sum(np.sin(k * phase) / k for k in range(1, 20))
        sound = voice * (0.05 + np.sin(2 * np.pi * 2 * t) ** 2) + 0.01 * rng.standard_normal(n_samples)
        return (peak * sound / np.abs(sound).max()).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def tiny_folder():
    """The folder of the real openai/whisper-tiny: from this machine, the Hub or the registry mirror."""
    from pipelines import models

    return models.resolve("openai/whisper-tiny").folder
