"""Log-mel features of a waveform, equal to those of Whisper's feature extractor, trimmed without loss.

Whisper's extractor pads every clip to 30 s. After the clip's last real frame the log-mel has one constant value,
`max - 2.0` (never below that of digital silence). The trimmed frames and that value therefore rebuild the padded
tensor: a clip of 4 s takes 130 kB instead of 960 kB.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError, Waveform

if TYPE_CHECKING:
    import torch
    from transformers import WhisperFeatureExtractor


HOP_SAMPLES = 160
"""Samples from one frame to the next: 10 ms."""
WINDOW_SAMPLES = 400
"""Samples under the Hann window of one frame: 25 ms. Also the FFT size."""
FULL_S = 30
"""Duration of the window that Whisper was trained on."""
FULL_SAMPLES = FULL_S * SAMPLE_RATE_HZ
"""480,000 samples."""
FULL_FRAMES = FULL_SAMPLES // HOP_SAMPLES
"""3,000 frames."""
FRAMES_PER_POSITION = 2
"""Frames per encoder position: the stride of the second convolution."""
POSITION_S = FRAMES_PER_POSITION * HOP_SAMPLES / SAMPLE_RATE_HZ
"""Duration of one encoder position: 20 ms."""

_MIN_POWER = 1e-10
"""Smaller mel powers are raised to this before the logarithm."""
_DYNAMIC_RANGE = 8.0
"""Values more than this below the clip's maximum are raised, in units of log10: 80 dB."""
_OFFSET, _SCALE = 4.0, 4.0
"""The features are (log10(power) + _OFFSET) / _SCALE."""
_SILENCE = np.float32((math.log10(_MIN_POWER) + _OFFSET) / _SCALE)
"""The feature of digital silence: -1.5."""


@dataclass(frozen=True)
class LogMel:
    """The real frames of a clip, and the value of all later frames in the extractor's 30 s tensor."""

    frames: np.ndarray
    """float32 or float16 [n_frames, n_mels], one frame per 10 ms, time first so that clips can be concatenated."""
    pad_value: float
    """The extractor's value in every later frame."""

    def padded(self, n_frames: int = FULL_FRAMES) -> np.ndarray:
        """Return the model's input: float32 [n_mels, n_frames]. Raises ValueError if the clip is longer."""
        tensor = np.full((self.frames.shape[1], n_frames), self.pad_value, dtype=np.float32)
        tensor[:, : len(self.frames)] = self.frames.T
        return tensor


def extract(waveform: Waveform, n_mels: int = 80) -> LogMel:
    """Return the trimmed log-mel of a clip of 1 to 480,000 samples; `padded()` equals the extractor's tensor.

    Keeps ceil((N + 200) / 160) frames of N samples: those whose 400-sample window reaches a real sample. 400 zeros are
    appended, so that the last window contains silence. A clip of almost 30 s gets fewer zeros, because the total is cut
    at 30 s; its end is then reflected, as in the extractor. Raises AudioError `empty` or `too_long`.
    """
    samples = waveform.samples
    if len(samples) == 0:
        raise AudioError("empty", "the clip holds no samples")
    if len(samples) > FULL_SAMPLES:
        raise AudioError("too_long", f"{waveform.duration_s:.1f} s, at most {FULL_S} s fit Whisper's window")
    log_mel = _log_mel_torch(_with_silence(samples), n_mels)
    frames = np.ascontiguousarray(log_mel[:, : _real_frames(len(samples))].T, dtype=np.float32)
    return LogMel(frames, pad_value(log_mel))


def extract_light(waveform: Waveform, n_mels: int = 80) -> LogMel:
    """Return the result of `extract` within 2e-5, by NumPy alone: importing torch takes a second and 200 MB."""
    samples = waveform.samples
    if not 0 < len(samples) <= FULL_SAMPLES:
        return extract(waveform, n_mels)  # raises
    padded = np.pad(_with_silence(samples), WINDOW_SAMPLES // 2, mode="reflect")
    # without the last frame, which torch.stft computes and the extractor drops
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[:-1:HOP_SAMPLES]
    bins, weights, starts, hann = _sparse_filters(n_mels)
    spectrum = np.fft.rfft(windows * hann, axis=1)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    # weighted sums over each filter's few bins: a matrix product would start BLAS's threads, which spin for a while
    # beside the decoder's (two cores, whole clip: 143 to 188 ms with it, 137 to 142 ms without)
    mel = np.add.reduceat(power[:, bins] * weights, starts, axis=1, dtype=np.float32)
    log_mel = np.log10(np.maximum(mel, np.float32(_MIN_POWER)))
    log_mel = np.maximum(log_mel, log_mel.max() - np.float32(_DYNAMIC_RANGE))
    log_mel = (log_mel + np.float32(_OFFSET)) / np.float32(_SCALE)
    return LogMel(np.ascontiguousarray(log_mel[: _real_frames(len(samples))], dtype=np.float32), pad_value(log_mel))


@functools.lru_cache(maxsize=4)
def extractor(n_mels: int = 80) -> WhisperFeatureExtractor:
    """Return transformers' extractor, against which `extract` is tested."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=n_mels)


def mel_filters(n_mels: int) -> np.ndarray:
    """Return float64 [201, n_mels]: triangles of equal area, evenly spaced on Slaney's mel scale from 0 to 8 kHz.

    The scale is linear to 1 kHz (15 mel) and logarithmic above, 27 mel to a factor of 6.4 (Slaney, Auditory Toolbox,
    1998). Equal bit for bit to the extractor's filters, without importing transformers: the processes that write
    shards start in half the time.
    """
    nyquist_hz = SAMPLE_RATE_HZ // 2
    step_mel = np.log(6.4) / 27.0
    top_mel = 15.0 + np.log(nyquist_hz / 1_000) / step_mel
    mels = np.linspace(0.0, top_mel, n_mels + 2)
    edges_hz = np.where(mels < 15.0, 200.0 * mels / 3.0, 1_000.0 * np.exp(step_mel * (mels - 15.0)))
    bins_hz = np.linspace(0, nyquist_hz, WINDOW_SAMPLES // 2 + 1)
    widths_hz, slopes = np.diff(edges_hz), edges_hz[None] - bins_hz[:, None]
    rising, falling = -slopes[:, :-2] / widths_hz[:-1], slopes[:, 2:] / widths_hz[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges_hz[2:] - edges_hz[:-2]))


def pad_value(log_mel: np.ndarray) -> float:
    """Return the feature of silence after the clip: 8 / 4 below the maximum, at least that of digital silence."""
    return float(np.maximum(log_mel.max() - np.float32(_DYNAMIC_RANGE / _SCALE), _SILENCE))


def _with_silence(samples: np.ndarray) -> np.ndarray:
    """Append one window of zeros, up to 30 s in all."""
    return np.concatenate([samples, np.zeros(WINDOW_SAMPLES, dtype=np.float32)])[:FULL_SAMPLES]


def _real_frames(n_samples: int) -> int:
    """Return the number of frames whose window, centred on the frame, reaches one of `n_samples`."""
    return min(FULL_FRAMES, math.ceil((n_samples + WINDOW_SAMPLES // 2) / HOP_SAMPLES))


def _log_mel_torch(samples: np.ndarray, n_mels: int) -> np.ndarray:
    """Return float32 [n_mels, n_samples // 160] by the extractor's own operations, bit for bit.

    It takes four fifths of the extractor's time: less overhead, and the spectrum is squared in place. Magnitudes are
    squared, as in the extractor; the sum of squared real and imaginary parts would be faster, but it changes the last
    bit of 5 % of the values.
    """
    import torch

    filters, hann = _torch_filters(n_mels)
    with torch.inference_mode():
        spectrum = torch.stft(torch.from_numpy(samples), WINDOW_SAMPLES, HOP_SAMPLES, window=hann, return_complex=True)
        power = spectrum.abs().square_()[:, :-1]
        log_mel = (filters @ power).clamp_(min=_MIN_POWER).log10_()
        log_mel = torch.maximum(log_mel, log_mel.max() - _DYNAMIC_RANGE)
        return log_mel.add_(_OFFSET).div_(_SCALE).numpy()


@functools.lru_cache(maxsize=4)
def _torch_filters(n_mels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mel filters, float32 [n_mels, 201], and the Hann window, float32 [400]."""
    import torch

    return torch.from_numpy(mel_filters(n_mels)).to(torch.float32).T, torch.hann_window(WINDOW_SAMPLES)


@functools.lru_cache(maxsize=4)
def _sparse_filters(n_mels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the non-zero entries of the mel filters and the Hann window.

    Frequency bins int [k], one filter after another; their weights float32 [k]; each filter's offset int [n_mels]; the
    periodic Hann window float32 [400].
    """
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)
    filters = mel_filters(n_mels).astype(np.float32).T
    bins = [np.flatnonzero(row) if row.any() else np.array([0]) for row in filters]
    weights = np.concatenate([row[nonzero] for row, nonzero in zip(filters, bins, strict=True)])
    starts = np.cumsum([0, *(len(nonzero) for nonzero in bins[:-1])])
    return np.concatenate(bins), weights, starts, hann.astype(np.float32)
