"""What is measured on one training clip, and the limits that it is held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.features.clips import Rejected
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform

_FRAME_SAMPLES = SAMPLE_RATE_HZ // 50
"""20 ms: long enough for a pitch period, short enough for a pause."""
_FULL_SCALE = 0.99
"""A sample from here on counts as clipped: resampling lets clipped peaks ring a little."""
_SILENCE_DB = 40.0
"""A frame this far below the loudest one is silence: where soft consonants still lie above it."""
_FLOOR = 1e-9
"""The lowest power that is told apart, -90 dBFS: digital silence would make every ratio infinite."""


@dataclass(frozen=True)
class Limits:
    """What a training clip must keep to; the defaults set no limit. Meanings: recipe.CurationSettings."""

    min_chars_per_s: float = 0.0
    max_chars_per_s: float = 0.0
    min_level_dbfs: float = -120.0
    max_clipped_share: float = 1.0
    max_silence_share: float = 1.0
    min_snr_db: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is limited: only then is a clip's audio looked at."""
        return self != _NONE

    def check(self, waveform: Waveform, letters: int) -> None:
        """Raise Rejected for the first limit that the clip, whose transcript has so many letters, does not keep.

        Nothing is measured that has no limit: with the defaults this costs a comparison.
        """
        if not self.active:
            return
        self._check_level(waveform.samples)
        self._check_rate(letters / waveform.duration_s)
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
            raise Rejected("silence", f"{share:.0%} of the clip before and after the speech is silent")
        if 0 < self.min_snr_db and (snr := snr_db(powers)) < self.min_snr_db:
            raise Rejected("noisy", f"signal over noise about {snr:.1f} dB, at least {self.min_snr_db:g} wanted")


_NONE = Limits()


def level_dbfs(samples: np.ndarray) -> float:
    """Root mean square of float [n] in dB of full scale; a full-scale square wave has 0, a sine -3."""
    return _db(float(np.mean(np.square(samples, dtype=np.float64))))


def clipped_share(samples: np.ndarray) -> float:
    """Share of samples within 1 % of full scale."""
    return float(np.mean(np.abs(samples) >= _FULL_SCALE))


def frame_powers(samples: np.ndarray) -> np.ndarray:
    """Mean square of each 20 ms of float [n]: float64 [n_frames]; what is left at the end is not counted."""
    count = max(1, len(samples) // _FRAME_SAMPLES)
    framed = samples[: count * _FRAME_SAMPLES].astype(np.float64).reshape(count, -1)
    return np.square(framed).mean(axis=1)


def edge_silence_share(powers: np.ndarray) -> float:
    """Share of frames before the first and after the last that is less than 40 dB below the loudest, 0 to 1."""
    loud = np.flatnonzero(powers >= powers.max() * 10 ** (-_SILENCE_DB / 10))
    return 1 - (int(loud[-1]) - int(loud[0]) + 1) / len(powers)


def snr_db(powers: np.ndarray) -> float:
    """Signal over noise, estimated from frame powers alone, in dB, never below 0.

    NIST's STNR is `10 log10(peak speech power / mean noise power)` over 20 ms windows; where signal and noise never
    lay apart, both are read from the distribution of the powers: what 95 % of the frames stay below stands for speech,
    what 15 % stay below (the pauses) for noise, the shares that the Institute for Signal and Information Processing
    gives as customary (its note on signal-to-noise ratio). It says how far speech stands out of its pauses: a clip
    without pauses is judged noisier than it is.
    """
    speech, noise = np.percentile(powers, [95, 15])
    return _db(float(speech)) - _db(float(noise))


def _db(power: float) -> float:
    return 10 * float(np.log10(max(power, _FLOOR)))
