"""A folder of recordings, and an engine that writes one sentence for those that are loud enough."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from pipelines.features.sources.unlabelled import labeller
from pipelines.speech.recordings import detection

SURE, UNSURE, NOTHING = 0.5, 0.25, 0.125
"""Peaks of recordings; the fake engine is sure of the first, unsure of the second, and writes nothing for the third."""
TEXT = "Sjön är full av näckrosor."


class FakeEngine:
    """Writes TEXT with a probability that follows the peak of the window."""

    def __init__(self):
        self.n_decoded, self.other = 0, TEXT

    def log_mel(self, waveform):
        peak, n = float(np.abs(waveform.samples).max()), len(waveform.samples) // 160
        return SimpleNamespace(frames=range(n), padded=lambda frames: np.full((1, frames), peak, np.float32))

    def decode(self, windows, options):
        self.n_decoded += len(windows)
        return [self._hypothesis(float(window.max()), options) for window in windows]

    def detect_language(self, window):
        return "da"

    def _hypothesis(self, peak, options):
        text = "" if peak <= NOTHING else TEXT if options.beam_size == 1 else self.other
        logprob = np.log(0.95 if peak > UNSURE else 0.4)
        words = tuple((word, logprob) for word in text.split())
        return SimpleNamespace(text=text, logprob=logprob, tokens=8, words=words)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    fake = FakeEngine()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(labeller, "open_labeller", lambda ref, language: fake)
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)
    return fake


@pytest.fixture
def folder(tmp_path, speech):
    """A short recording that the model is sure of, one that it is not, and a long one of two parts, and noise."""
    path = tmp_path / "radio"
    path.mkdir()
    write(path / "sure.wav", speech(32_000, 1, SURE))
    write(path / "unsure.wav", speech(32_000, 2, UNSURE))
    silence = np.zeros(4 * 16_000, np.float32)
    parts = [silence, speech(48_000, 3, SURE), silence, speech(48_000, 4, NOTHING), *[silence] * 6]
    write(path / "long.flac", np.concatenate(parts))
    return path


def write(path, samples):
    soundfile.write(path, samples, 16_000, "FLOAT" if path.suffix == ".wav" else None)
