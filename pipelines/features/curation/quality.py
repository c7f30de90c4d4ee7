"""Measurements on one training clip, and the limits that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.features.clips import Rejected
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform

_FRAME_SAMPLES = SAMPLE_RATE_HZ // 50
"""20 ms: long enough for a pitch period, short enough for a pause."""
_FULL_SCALE = 0.99
"""Samples of at least this magnitude count as clipped: resampling makes clipped peaks ring a little."""
_SILENCE_DB = 40.0
"""A frame this far below the loudest one is silence; soft consonants are still louder."""
_FLOOR = 1e-9
"""Lower bound of a power, -90 dBFS: digital silence would make every ratio infinite."""


@dataclass(frozen=True)
class Limits:
    """Limits for a training clip; the defaults set none. Meanings: recipes.data_settings.CurationSettings."""

    min_chars_per_s: float = 0.0
    max_chars_per_s: float = 0.0
    min_level_dbfs: float = -120.0
    max_clipped_share: float = 1.0
    max_silence_share: float = 1.0
    min_snr_db: float = 0.0

    @property
    def active(self) -> bool:
        """True if anything is limited; otherwise the audio of a clip is not measured."""
        return self != _NONE

    def check(self, waveform: Waveform, n_letters: int) -> None:
        """Raise Rejected for the first limit that the clip violates; `n_letters` is the length of its transcript.

        Quantities without a limit are not measured.
        """
        if not self.active:
            return
        self._check_level(waveform.samples)
        self._check_rate(n_letters / waveform.duration_s)
        if self.max_silence_share < 1 or self.min_snr_db > 0:
            self._check_frames(frame_powers(waveform.samples))

    def _check_rate(self, chars_per_s: float) -> None:
        if chars_per_s < self.min_chars_per_s:
            raise Rejected("slow_speech", f"{chars_per_s:.1f} characters/s, at least {self.min_chars_per_s:g} wanted")
        if 0 < self.max_chars_per_s < chars_per_s:
            raise Rejected("fast_speech", f"{chars_per_s:.1f} characters/s, at most {self.max_chars_per_s:g} wanted")

    def _check_level(self, samples: np.ndarray) -> None:
        if self.min_level_dbfs > -120 and (level := level_dbfs(samples)) < self.min_level_dbfs:
            raise Rejected("quiet", f"level {level:.1f} dBFS, at least {self.min_level_dbfs:g} wanted")
        if self.max_clipped_share < 1 and (share := clipped_share(samples)) > self.max_clipped_share:
            raise Rejected("clipped", f"{share:.2%} of the samples at full scale, at most {self.max_clipped_share:.2%}")

    def _check_frames(self, powers: np.ndarray) -> None:
        if (share := edge_silence_share(powers)) > self.max_silence_share:
            wanted = f"at most {self.max_silence_share:.1%} wanted"
            raise Rejected("silence", f"silence before and after the speech is {share:.1%} of the clip, {wanted}")
        if 0 < self.min_snr_db and (snr := snr_db(powers)) < self.min_snr_db:
            raise Rejected("noisy", f"signal-to-noise ratio about {snr:.1f} dB, at least {self.min_snr_db:g} wanted")


_NONE = Limits()


def level_dbfs(samples: np.ndarray) -> float:
    """Return the root mean square of float [n] in dB of full scale; a full-scale square wave has 0, a sine -3."""
    return _db(float(np.mean(np.square(samples, dtype=np.float64))))


def clipped_share(samples: np.ndarray) -> float:
    """Return the share of samples within 1 % of full scale."""
    return float(np.mean(np.abs(samples) >= _FULL_SCALE))


def frame_powers(samples: np.ndarray) -> np.ndarray:
    """Return the mean square of each 20 ms of float [n]: float64 [n_frames]; an incomplete last frame is dropped."""
    count = max(1, len(samples) // _FRAME_SAMPLES)
    framed = samples[: count * _FRAME_SAMPLES].astype(np.float64).reshape(count, -1)
    return np.square(framed).mean(axis=1)


def edge_silence_share(powers: np.ndarray) -> float:
    """Return the share of frames before and after the speech, 0 to 1: speech is within 40 dB of the loudest frame."""
    loud = np.flatnonzero(powers >= powers.max() * 10 ** (-_SILENCE_DB / 10))
    return 1 - (int(loud[-1]) - int(loud[0]) + 1) / len(powers)


def snr_db(powers: np.ndarray) -> float:
    """Estimate the signal-to-noise ratio from frame powers alone, in dB, at least 0.

    NIST's STNR is `10 log10(peak speech power / mean noise power)` over 20 ms windows. Without separate recordings of
    both, percentiles of the powers stand in: the 95th for speech, the 15th (the pauses) for noise, the customary values
    according to the Institute for Signal and Information Processing's note on the signal-to-noise ratio. The estimate
    is too low for a clip without pauses.
    """
    speech, noise = np.percentile(powers, [95, 15])
    return _db(float(speech)) - _db(float(noise))


def _db(power: float) -> float:
    return 10 * float(np.log10(max(power, _FLOOR)))
