"""Augment training clips in every epoch: speed, gain, noise and masks, on the cache's log-mels.

The cache stores no waveforms, so the augmentations work on log-mels:
- gain is a shift, exact above the extractor's floor;
- noise adds its power to the speech's power: exact except for the phases between the two, which average out;
- speed stretches time and moves the mel bands as resampling would, by linear interpolation. The error is a few
  hundredths, on a scale where a log-mel spans 2 (tests/training/data/test_augmentation.py compares real resampling);
- masks are those of SpecAugment (Park et al. 2019) without time warping, filled with the clip's mean.

Only seed, epoch and row decide an augmentation, not the worker that computes it nor interruptions of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.features.cache import FeatureCache
from pipelines.training.data.bpe_dropout import MergeDropout
from pipelines.whisper.batching import BucketSampler, ClipDataset, Collator
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

CODE = "1"
"""Version of this code: raised when the same seed, epoch and row would give other frames."""
_FLOOR = np.float32(-1.5)
"""Value of digital silence in Whisper's extractor: (log10(1e-10) + 4) / 4."""
_RANGE = np.float32(2.0)
"""Distance below a clip's maximum at which the extractor clamps: 80 dB."""
_NOISE_SPAN_DB = 20.0
_TOP_HZ = 8_000.0
_BIN_HZ = 40.0
"""Distance of the bins of the 400-point transform. The number of bins in a band decides how noise fluctuates in it."""


@dataclass(frozen=True)
class Variation:
    """Largest augmentation of a clip; the fields are described in recipes.settings.AugmentSettings."""

    speed: float = 0.0
    gain_db: float = 0.0
    noise_share: float = 0.0
    noise_snr_db: float = 15.0
    time_masks: int = 0
    time_mask_share: float = 0.1
    mel_masks: int = 0
    mel_mask_bands: int = 10
    seed: int = 17

    def __bool__(self) -> bool:
        """Return True if any augmentation is on."""
        return bool(self.speed or self.gain_db or self.noise_share or self.time_masks or self.mel_masks)

    def apply(self, log_mel: LogMel, epoch: int, row: int) -> LogMel:
        """Return the row's augmented log-mel for an epoch, a float32 copy."""
        rng = np.random.default_rng([self.seed, epoch, row])
        # all random numbers are drawn in any case, so that one setting does not change the draws of another
        requested = 1 + self.speed * rng.uniform(-1, 1)
        rate = max(requested, len(log_mel.frames) / FULL_FRAMES)  # beyond 30 s the clip's end would be lost
        gain_db = self.gain_db * rng.uniform(-1, 1)
        noisy, snr_db = rng.uniform() < self.noise_share, self.noise_snr_db + _NOISE_SPAN_DB * rng.uniform()
        frames = log_mel.frames.astype(np.float32)
        if rate != 1:
            frames = at_speed(frames, rate)
        if noisy:
            frames = with_noise(frames, snr_db, rng)
        if gain_db:
            frames = with_gain(frames, gain_db)
        pad_value = float(max(frames.max() - _RANGE, _FLOOR)) if rate != 1 or noisy or gain_db else log_mel.pad_value
        time_width, mel_width = int(self.time_mask_share * len(frames)), self.mel_mask_bands
        frames = masked(frames, self.time_masks, time_width, self.mel_masks, mel_width, rng)
        return LogMel(frames, pad_value)


class EpochSampler(BucketSampler):
    """Sampler of batches of (epoch, index), so that loader workers receive the epoch with every clip."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in super().__iter__():
            yield [(epoch, index) for index in batch]


class EpochClips(ClipDataset):
    """Data set that returns (epoch, row) for (epoch, position)."""

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, int]:
        epoch, position = item
        return epoch, int(self.rows[position])


class AugmentingCollator(Collator):
    """Collator of (epoch, row) pairs that augments every clip, and its labels if there are `merges` to drop."""

    def __init__(
        self,
        cache: FeatureCache,
        variation: Variation,
        merges: MergeDropout | None = None,
        *,
        full_context: bool = False,
    ):
        super().__init__(cache, full_context=full_context)
        self.variation, self.merges = variation, merges
        self.transcripts = cache.rows["text"].to_numpy()

    def log_mel(self, clip: tuple[int, int]) -> LogMel:
        """Return the augmented log-mel of (epoch, row)."""
        epoch, row = clip
        log_mel = self.cache.log_mel(row)
        return self.variation.apply(log_mel, epoch, row) if self.variation else log_mel

    def labels(self, clip: tuple[int, int]) -> list[int]:
        """Return the label ids of (epoch, row)."""
        epoch, row = clip
        return self.merges.labels(self.transcripts[row], epoch, row) if self.merges else self.cache.labels(row)


def at_speed(frames: np.ndarray, rate: float) -> np.ndarray:
    """Return float32 [n, n_mels] as if the recording were played at `rate` (above 1: shorter, higher), at most 30 s."""
    n, n_mels = frames.shape
    length = max(1, min(FULL_FRAMES, round(n / rate)))
    stretched = _interpolate(frames, np.arange(length) * rate)
    step = _mel(_TOP_HZ) / (n_mels + 1)
    source = _mel(_band_hz(n_mels) / rate) / step - 1
    moved = _interpolate(stretched.T, source).T
    moved[:, source > n_mels - 1] = max(frames.max() - _RANGE, _FLOOR)  # slower: there is no content from above 8 kHz
    return np.ascontiguousarray(moved, dtype=np.float32)


def with_gain(frames: np.ndarray, gain_db: float) -> np.ndarray:
    """Return float32 frames that are louder by `gain_db`; a log-mel is (log10(power) + 4) / 4."""
    return np.maximum(frames + np.float32(gain_db / 40), _FLOOR)


def with_noise(frames: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Return float32 frames [n, n_mels] with white noise `snr_db` below the clip's mean power.

    The mel filters have equal areas, so white noise has the same mean in all bands. It fluctuates less in wide bands,
    which average more bins.
    """
    power = 10.0 ** (4 * frames.astype(np.float64) - 4)
    width_hz = np.gradient(_band_hz(frames.shape[1]))
    level = (power.mean(axis=0) @ width_hz) / width_hz.sum() / 10 ** (snr_db / 10)
    bins = np.maximum(1.0, width_hz / _BIN_HZ)
    noise = level * rng.gamma(bins, 1 / bins, size=frames.shape)
    noisy = (np.log10(np.maximum(power + noise, 1e-10)) + 4) / 4
    return np.maximum(noisy, noisy.max() - _RANGE).astype(np.float32)


def masked(
    frames: np.ndarray, time_masks: int, time_width: int, mel_masks: int, mel_width: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a copy of frames [n, n_mels] with masked stretches set to its mean, of random widths up to those given."""
    out, mean = frames.copy(), frames.mean()
    for _ in range(time_masks):
        start, end = _stretch(len(frames), time_width, rng)
        out[start:end] = mean
    for _ in range(mel_masks):
        start, end = _stretch(frames.shape[1], mel_width, rng)
        out[:, start:end] = mean
    return out


def _stretch(size: int, max_width: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(0, min(size, max_width) + 1))
    start = int(rng.integers(0, size - width + 1))
    return start, start + width


def _interpolate(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return rows of `values` at fractional positions, linearly interpolated; beyond the ends, the end's row."""
    positions = np.clip(positions, 0, len(values) - 1)
    low = np.floor(positions).astype(np.int64)
    high = np.minimum(low + 1, len(values) - 1)
    weight = (positions - low).astype(np.float32)[:, None]
    return values[low] * (1 - weight) + values[high] * weight


def _mel(hz: np.ndarray | float) -> np.ndarray:
    """Convert Hz to Slaney's mel scale, which Whisper's filters use: linear up to 1 kHz, logarithmic above."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1_000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1_000) / 1_000) / np.log(6.4))


@lru_cache(maxsize=4)
def _band_hz(n_mels: int) -> np.ndarray:
    """Return the centres of the mel bands in Hz."""
    mels = np.linspace(0, _mel(_TOP_HZ), n_mels + 2)[1:-1]
    return np.where(mels < 15, mels * 200 / 3, 1_000 * np.exp((mels - 15) * np.log(6.4) / 27))
