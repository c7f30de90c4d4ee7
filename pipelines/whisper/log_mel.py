"""Waveform to log-mel, trimmed without loss; the only place that builds a feature extractor.

Whisper's extractor pads every clip to 30 s. What follows the clip's last real frame is one value, `max - 2.0`
(never below that of digital silence), so the trimmed frames and that value rebuild the padded tensor: a 4 s clip takes
130 kB instead of 960 kB.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipelines.speech.audio import AudioError, Waveform

if TYPE_CHECKING:
    import torch
    from transformers import WhisperFeatureExtractor


HOP_SAMPLES = 160
"""Samples between two frames: 10 ms."""
WINDOW_SAMPLES = 400
"""Samples under one frame: 25 ms."""
FULL_FRAMES = 3_000
"""Frames in Whisper's window of 30 s."""
FULL_SAMPLES = FULL_FRAMES * HOP_SAMPLES
_SILENCE = np.float32(-1.5)
"""The extractor's floor: (log10(1e-10) + 4) / 4."""


@dataclass(frozen=True)
class LogMel:
    """The frames of a clip, and the value of all that follows them in the stock 30 s tensor."""

    frames: np.ndarray
    """float32 or float16 [n_frames, n_mels], one frame each 10 ms, time first so that clips can be concatenated."""
    pad_value: float
    """What the stock extractor has in every later frame."""

    def padded(self, n_frames: int = FULL_FRAMES) -> np.ndarray:
        """float32 [n_mels, n_frames] as the model takes it; longer frames are an error, not a cut."""
        tensor = np.full((self.frames.shape[1], n_frames), self.pad_value, dtype=np.float32)
        tensor[:, : len(self.frames)] = self.frames.T
        return tensor


def extract(waveform: Waveform, n_mels: int = 80) -> LogMel:
    """The trimmed log-mel of a clip of 1 to 480,000 samples; `padded()` equals the stock extractor's tensor.

    Keeps ceil((N + 200) / 160) frames of N samples: those that any real sample reaches through the 400-sample window.
    The 400 zeros that are appended are enough for the last of them to see silence; where they reach beyond 30 s
    they are cut, as the extractor cuts, and real signal is reflected at the edge, as it is for a stock clip.
    Raises AudioError `empty` or `too_long`.
    """
    samples = waveform.samples
    if len(samples) == 0:
        raise AudioError("empty", "the clip holds no samples")
    if len(samples) > FULL_SAMPLES:
        raise AudioError("too_long", f"{waveform.duration_s:.1f} s, at most 30 s fit Whisper's window")
    longer = np.concatenate([samples, np.zeros(WINDOW_SAMPLES, dtype=np.float32)])[:FULL_SAMPLES]
    log_mel = _run(longer, n_mels)
    return LogMel(_time_first(log_mel[:, : _real_frames(len(samples))]), pad_value(log_mel))


def extract_light(waveform: Waveform, n_mels: int = 80) -> LogMel:
    """What `extract` gives, within 2e-5, by NumPy alone: torch takes a second to import, and 200 MB."""
    samples = waveform.samples
    if not 0 < len(samples) <= FULL_SAMPLES:
        return extract(waveform, n_mels)  # which says what is wrong
    longer = np.concatenate([samples, np.zeros(WINDOW_SAMPLES, dtype=np.float32)])[:FULL_SAMPLES]
    padded = np.pad(longer, WINDOW_SAMPLES // 2, mode="reflect")
    # torch gives one frame more, which the extractor drops
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[:-1:HOP_SAMPLES]
    bins, weights, starts, window = _light_filters(n_mels)
    spectrum = np.fft.rfft(frames * window, axis=1)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    # each filter's few bins, weighted and summed: a matrix product would wake BLAS's threads, which spin for a while
    # beside the decoder's (two cores, a clip in all: 143 to 188 ms so, 137 to 142 ms without)
    mel = np.add.reduceat(power[:, bins] * weights, starts, axis=1, dtype=np.float32)
    log_mel = np.log10(np.maximum(mel, np.float32(1e-10)))
    log_mel = (np.maximum(log_mel, log_mel.max() - np.float32(8.0)) + np.float32(4.0)) / np.float32(4.0)
    return LogMel(np.ascontiguousarray(log_mel[: _real_frames(len(samples))], dtype=np.float32), pad_value(log_mel))


@functools.lru_cache(maxsize=4)
def _light_filters(n_mels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The bins that the mel filters see, one filter's after the other's, int [k]; their weights, float32 [k]; where
    each filter's begin, int [n_mels]; and the periodic Hann window, float32 [400]."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)
    filters = mel_filters(n_mels).astype(np.float32)
    seen = [np.flatnonzero(column) if column.any() else np.array([0]) for column in filters.T]
    weights = np.concatenate([column[bins] for column, bins in zip(filters.T, seen, strict=True)])
    starts = np.cumsum([0, *(len(bins) for bins in seen[:-1])])
    return np.concatenate(seen), weights, starts, window.astype(np.float32)


@functools.lru_cache(maxsize=4)
def extractor(n_mels: int = 80) -> WhisperFeatureExtractor:
    """The stock extractor, on the CPU, in float32."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=n_mels)


def _run(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """float32 [n_mels, n // 160]: the stock extractor's own operations on its own filters, bit for bit, without its
    wrapping, and with the spectrum squared in place: four fifths of its time.

    Magnitudes are squared, not real and imaginary parts: that would be faster, and 5 % of the values a bit off.
    """
    import torch

    filters, window = _filters(n_mels)
    with torch.inference_mode():
        spectrum = torch.stft(
            torch.from_numpy(samples), WINDOW_SAMPLES, HOP_SAMPLES, window=window, return_complex=True
        )
        power = spectrum.abs().square_()[:, :-1]
        log_mel = (filters @ power).clamp_(min=1e-10).log10_()
        log_mel = torch.maximum(log_mel, log_mel.max() - 8.0)
        return log_mel.add_(4.0).div_(4.0).numpy()


@functools.lru_cache(maxsize=4)
def _filters(n_mels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mel filters, float32 [n_mels, 201], and the window, as the extractor has them."""
    import torch

    return torch.from_numpy(mel_filters(n_mels)).to(torch.float32).T, torch.hann_window(WINDOW_SAMPLES)


def mel_filters(n_mels: int) -> np.ndarray:
    """float64 [201, n_mels]: triangles of equal area, evenly spaced on Slaney's mel scale from 0 to 8 kHz.

    The scale is linear to 1 kHz (15 mel) and logarithmic above, 27 mel to a factor of 6.4 (Slaney, Auditory Toolbox,
    1998). These are the stock extractor's filters bit for bit, without importing transformers: the processes that make
    shards start in half the time.
    """
    step_mel = np.log(6.4) / 27.0
    top_mel = 15.0 + np.log(8_000 / 1_000) / step_mel
    mels = np.linspace(0.0, top_mel, n_mels + 2)
    edges_hz = np.where(mels < 15.0, 200.0 * mels / 3.0, 1_000.0 * np.exp(step_mel * (mels - 15.0)))
    bins_hz = np.linspace(0, 8_000, WINDOW_SAMPLES // 2 + 1)
    widths_hz, slopes = np.diff(edges_hz), edges_hz[None] - bins_hz[:, None]
    rising, falling = -slopes[:, :-2] / widths_hz[:-1], slopes[:, 2:] / widths_hz[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges_hz[2:] - edges_hz[:-2]))


def _real_frames(n_samples: int) -> int:
    return min(FULL_FRAMES, math.ceil((n_samples + WINDOW_SAMPLES // 2) / HOP_SAMPLES))


def pad_value(log_mel: np.ndarray) -> float:
    """Silence after the clip: the extractor clamps at 8 below the maximum, or at its floor if that is higher."""
    return float(np.maximum(log_mel.max() - np.float32(2.0), _SILENCE))


def _time_first(log_mel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(log_mel.T, dtype=np.float32)
