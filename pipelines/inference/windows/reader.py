"""Read a recording in blocks of samples, and store what could not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError, Waveform


@dataclass
class Reader:
    """Counts the samples of a recording that were read, and stores the error about parts that cannot be read."""

    n_samples: int = 0
    damage: AudioError | None = None

    @property
    def seconds(self) -> float:
        return self.n_samples / SAMPLE_RATE_HZ

    def read(self, blocks: Iterable[np.ndarray], on_audio: Callable[[float], None]) -> Iterator[np.ndarray]:
        """Yield the blocks; an error about damage, which comes after the last one, is stored."""
        try:
            for block in blocks:
                self.n_samples += len(block)
                yield block
                on_audio(self.seconds)
        except AudioError as error:
            if error.reason != audio.DAMAGED:
                raise
            self.damage = error


def blocks_of(recording: bytes | str | Path | Waveform, max_duration_s: float, track: int = 0) -> Iterator[np.ndarray]:
    """Yield the samples of a path, the bytes of a file or a Waveform in blocks of float32 [n] at 16 kHz."""
    if not isinstance(recording, Waveform):
        return audio.blocks(recording, max_duration_s, track=track)
    samples = audio.from_array(recording.samples, SAMPLE_RATE_HZ, max_duration_s).samples
    step = int(audio.BLOCK_S * SAMPLE_RATE_HZ)
    return (samples[at : at + step] for at in range(0, len(samples), step))
