"""Channels of a recording, each read as a separate recording, without the speech that leaks into it from others.

Each speaker of an interview has a microphone, which picks up the other one too, more quietly. Where a channel holds
only such crosstalk, its samples are set to zero. Crosstalk is found block by block: while another channel is much
louder, the levels of both rise and fall together, at a ratio that hardly changes. Two people who talk at the same time
have levels of their own, so that quiet speech below loud speech is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.speech import audio
from pipelines.speech.audio import DAMAGED, SAMPLE_RATE_HZ, AudioError, DamagedAudio, Gap, Mixed

_FRAMES_PER_S = 50
_SMOOTHED_FRAMES, _HELD_FRAMES = 11, 15
"""Levels are means over 0.22 s; a loud level counts for 0.3 s more, as long as a room reverberates."""
_ACTIVE = 0.01
"""Share of the energy of a block's loudest moment above which a channel counts as active."""
_QUIETER = 0.25
"""Crosstalk has at most this share of the energy in the other channel (-6 dB)."""
_MIN_FRAMES = 25
"""Frames that it takes to recognise crosstalk: half a second."""
_MIN_CORRELATION = 0.6
"""Of the logarithms of levels. Crosstalk through a room has 0.8 to 1, two independent speakers 0 to 0.3."""
_USUAL_PERCENTILE, _ABOVE_USUAL = 25, 4.0
"""Crosstalk is up to 6 dB louder than its usual share, which is the lower quartile: own speech raises the others."""
_SAME_CORRELATION, _SAME_LEVEL = 0.998, 0.25
"""From this correlation of samples on, and this ratio of energies, channels hold the same sound."""


@dataclass
class Channels:
    """Number and similarity of the channels of a recording."""

    n: int = 0
    duration_s: float = 0.0
    products: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """Sums of the products of the samples of each two channels."""

    @property
    def are_same(self) -> bool:
        """Return whether all channels hold the same sound, as those of a mono recording in a stereo file do."""
        energies = self.products.diagonal()
        if not energies.size or energies.min() <= _SAME_LEVEL * energies.max():
            return False
        return bool((np.abs(self.products) >= _SAME_CORRELATION * np.sqrt(np.outer(energies, energies))).all())

    def add(self, samples: np.ndarray, rate_hz: int) -> np.ndarray:
        """Add samples [n, channels]; return the first channel. A Mix for audio.blocks."""
        if (n := samples.shape[1]) > self.n:
            self.products = np.pad(self.products, (0, n - self.n))
            self.n = n
        self.products[:n, :n] += np.asarray(samples.T @ samples, dtype=np.float64)
        return samples[:, 0]


def examine(
    source: bytes | Path | str,
    max_duration_s: float = float("inf"),
    track: int = 0,
    on_block: Callable[[], None] = lambda: None,
) -> Channels:
    """Read a recording once and return what its channels are, also if a part cannot be read. Raises AudioError."""
    channels = Channels()
    try:
        for block in audio.blocks(Mixed(source, channels.add), max_duration_s, track=track):
            channels.duration_s += len(block) / SAMPLE_RATE_HZ
            on_block()
    except AudioError as error:
        if error.reason != DAMAGED or not channels.n:
            raise
    return channels


def select(source: bytes | Path | str, number: int) -> Mixed:
    """Return channel `number`, from 0, as a recording for `audio.blocks`, without crosstalk."""
    return Mixed(source, lambda samples, rate_hz: without_crosstalk(samples, number, rate_hz))


def decode(source: bytes | Path | str) -> tuple[np.ndarray, tuple[Gap, ...]]:
    """Return all channels of a recording, float32 [n, channels] at 16 kHz, and its parts that cannot be read."""
    columns, gaps = [], ()
    for number in range(examine(source).n):
        blocks = [np.zeros(0, np.float32)]
        try:
            blocks.extend(audio.blocks(Mixed(source, lambda samples, rate_hz, number=number: _one(samples, number))))
        except DamagedAudio as error:
            gaps = error.gaps
        columns.append(np.concatenate(blocks))
    return np.stack(columns, axis=1), gaps


def _one(samples: np.ndarray, number: int) -> np.ndarray:
    """Return a channel; silence where a file that is joined from several has fewer channels."""
    return samples[:, number] if number < samples.shape[1] else np.zeros(len(samples), dtype=np.float32)


def without_crosstalk(samples: np.ndarray, number: int, rate_hz: int) -> np.ndarray:
    """Return a channel of float32 [n, channels]: zero where it holds only what another channel holds much louder."""
    channel = _one(samples, number)
    if number >= samples.shape[1]:
        return channel
    size = max(rate_hz // _FRAMES_PER_S, 1)
    levels = _levels(samples, size)
    is_crosstalk = np.zeros(len(levels), dtype=bool)
    for other in range(samples.shape[1]):
        if other != number and len(levels):
            is_crosstalk |= _crosstalk(levels[:, number], levels[:, other])
    return np.where(np.repeat(is_crosstalk, size)[: len(samples)], np.float32(0), channel)


def _levels(samples: np.ndarray, size: int) -> np.ndarray:
    """Return the smoothed mean energies [frames, channels] of frames of `size` samples; the last frame may be short."""
    edges = np.arange(0, len(samples), size)
    if not len(edges):
        return np.zeros((0, samples.shape[1]))
    energies = np.add.reduceat(np.square(samples, dtype=np.float64), edges, axis=0) / size
    window = np.ones(_SMOOTHED_FRAMES) / _SMOOTHED_FRAMES
    half = _SMOOTHED_FRAMES // 2
    padded = np.pad(energies, ((half, half), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, window, "valid") for column in padded.T], axis=1)


def _crosstalk(levels: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each frame whether a channel holds only crosstalk of another; both are levels [frames]."""
    is_louder = (other > _ACTIVE * other.max()) & (levels < _QUIETER * other) & (levels > 0)
    if is_louder.sum() < _MIN_FRAMES:
        return np.zeros(len(levels), dtype=bool)
    logarithms = np.log(levels[is_louder]), np.log(other[is_louder])
    if min(np.ptp(one) for one in logarithms) == 0 or np.corrcoef(*logarithms)[0, 1] < _MIN_CORRELATION:
        return np.zeros(len(levels), dtype=bool)
    usual = np.percentile(levels[is_louder] / other[is_louder], _USUAL_PERCENTILE)
    held = np.lib.stride_tricks.sliding_window_view(np.pad(other, (_HELD_FRAMES, 0)), _HELD_FRAMES + 1).max(axis=1)
    return levels <= min(_ABOVE_USUAL * usual, _QUIETER) * held
