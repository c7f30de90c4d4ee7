"""Decoded audio: its type, its errors, and the checks that every decoder applies to samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pipelines.infra.errors import LabError

SAMPLE_RATE_HZ = 16_000
"""Sampling rate of Whisper's input."""
MAX_RATE_HZ, MAX_CHANNELS = 384_000, 16
"""The most that recorders offer. With a larger rate in its header, hours of samples would count as a second."""
MAX_LEVEL = 32.0
"""Largest sample, in multiples of full scale. Float samples above it are not on the scale -1 to 1."""
DAMAGED = "damaged"
"""Reason of an AudioError: parts of the recording cannot be read."""
_CANCELLED = 0.25
"""Channels cancel if their mean has less than this share of the energy that the mean of unrelated channels has."""
_LOUD_ENOUGH = 0.5
"""Of channels that cancel, the first is used that has this share of the loudest one's energy."""
_JOINED_S = 0.5
"""Gaps that are closer are reported as one."""
_MAX_LISTED_GAPS = 4


Mix = Callable[[np.ndarray, int], np.ndarray]
"""Takes samples, float32 [n, channels], and their rate in Hz; returns float32 [n]."""


class AudioError(LabError):
    """A clip that cannot be used."""

    def __init__(self, reason: str, detail: str):
        """`reason` is one word for tables, `detail` completes the message."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Gap:
    """A part of a recording that cannot be read, in seconds."""

    start_s: float
    end_s: float | None = None
    """None: everything after `start_s`. Equal to `start_s`: the length is unknown, the sound goes on there."""

    def __str__(self) -> str:
        if self.end_s is None:
            return f"after {self.start_s:.1f} s"
        if round(self.start_s, 1) == round(self.end_s, 1):
            return f"at {self.start_s:.1f} s"
        return f"from {self.start_s:.1f} to {self.end_s:.1f} s"


class DamagedAudio(AudioError):
    """A recording with gaps. `blocks` raises it after the last block that can be read."""

    def __init__(self, gaps: Iterable[Gap], hint: str = ""):
        """`hint` says what to do."""
        self.gaps = joined_gaps(gaps)
        listed = [str(gap) for gap in self.gaps[:_MAX_LISTED_GAPS]]
        if more := len(self.gaps) - len(listed):
            listed.append(f"at {more} more places")
        joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
        super().__init__(DAMAGED, f"it cannot be read {joined}{hint}")


def joined_gaps(gaps: Iterable[Gap]) -> tuple[Gap, ...]:
    """Return gaps in order of time, with those joined that overlap or are close."""
    joined: list[Gap] = []
    for gap in sorted(gaps, key=lambda gap: gap.start_s):
        last = joined[-1] if joined else None
        if last is None or (last.end_s is not None and gap.start_s - last.end_s > _JOINED_S):
            joined.append(gap)
        elif last.end_s is not None:
            joined[-1] = Gap(last.start_s, None if gap.end_s is None else max(gap.end_s, last.end_s))
    return tuple(joined)


@dataclass(frozen=True)
class Waveform:
    """A decoded clip."""

    samples: np.ndarray
    """float32 [n], mono at SAMPLE_RATE_HZ, nominally from -1 to 1, all finite."""

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ


def to_mono(samples: np.ndarray) -> np.ndarray:
    """Return float32 [n] from samples [n] or [n, channels]: the mean of the channels.

    If the channels cancel, as those of a cable with exchanged wires do, one that is loud is returned. Raises
    AudioError `not_finite` for NaN, infinite and extremely large samples.
    """
    if samples.ndim == 1:
        mono = samples
    elif samples.shape[1] == 1:  # a mean over one channel would take a tenth of the time of decoding
        mono = samples[:, 0]
    else:
        mono = samples.mean(axis=1, dtype=np.float32)
        if _cancels(samples, mono):
            energies = np.einsum("nc,nc->c", samples, samples)
            # the first that is loud enough: the same one in all blocks of a recording
            mono = samples[:, int((energies >= _LOUD_ENOUGH * energies.max()).argmax())]
    check_level(mono)
    return mono


def check_level(samples: np.ndarray) -> None:
    """Raise AudioError `not_finite` for NaN, infinite and extremely large samples."""
    if not len(samples):
        return
    peak = max(float(samples.max()), -float(samples.min()))  # NaN if there is one
    if not peak < float("inf"):
        raise AudioError("not_finite", "the recording holds NaN or infinite samples")
    if peak > MAX_LEVEL:
        raise AudioError(
            "not_finite", f"a sample is {peak:.3g} times full scale: float samples must lie between -1 and 1"
        )


def _cancels(samples: np.ndarray, mono: np.ndarray) -> bool:
    flat = samples.ravel()
    # the mean of c unrelated channels of equal energy has the c-th part of that energy
    return float(np.dot(mono, mono)) * samples.shape[1] ** 2 < _CANCELLED * float(np.dot(flat, flat))


def check_duration(duration_s: float, max_duration_s: float) -> None:
    """Raise AudioError `too_long` above `max_duration_s`."""
    if duration_s > max_duration_s:
        raise AudioError("too_long", f"{duration_s:.1f} s, at most {max_duration_s:g} s can be used")


def check_header(rate_hz: int, channels: int) -> None:
    """Raise AudioError `unreadable` for a rate or a number of channels that no recorder offers."""
    if rate_hz > MAX_RATE_HZ or channels > MAX_CHANNELS:
        raise AudioError(
            "unreadable",
            f"{channels} channel(s) at {rate_hz} Hz; at most {MAX_CHANNELS} at {MAX_RATE_HZ} Hz can be used",
        )
