"""Recordings that the benchmarks use: joined clips of the tour, and synthetic tones."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.speech import audio


def joined_pairs(examples: Iterable[Example]) -> Iterator[tuple[Example, np.ndarray, str]]:
    """Yield two consecutive clips joined: the first example, float32 samples at 16 kHz, and the text of both."""
    clips = list(examples)
    for first, second in zip(clips[::2], clips[1::2]):
        samples = np.concatenate([audio.decode(clip.audio).samples for clip in (first, second)])
        yield first, samples, f"{first.text} {second.text}"


def write_pairs(folder: Path, sizes: dict[str, int]) -> Path:
    """Write pairs of the tour's clips, 4 s on average, as a folder of recordings with a table; return the folder."""
    import soundfile

    tour = TourSource(**sizes)
    with open(folder / "transcripts.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "text", "split", "speaker"])
        for split in SPLITS:
            for first, samples, text in joined_pairs(tour.examples((split,))):
                soundfile.write(folder / f"{first.id}.wav", samples, audio.SAMPLE_RATE_HZ)
                table.writerow([f"{first.id}.wav", text, split, first.speaker])
    return folder


def tones(n: int) -> Iterator[Example]:
    """Yield synthetic clips of 1 s at 16 kHz, all different."""
    import soundfile

    t = np.arange(audio.SAMPLE_RATE_HZ) / audio.SAMPLE_RATE_HZ
    voices = [0.3 * np.sin(2 * np.pi * (100 + 7 * i) * t) for i in range(32)]
    for i in range(n):
        file = io.BytesIO()
        voice = voices[i % 32].copy()
        voice[i % len(voice)] = 0.5
        soundfile.write(file, voice, audio.SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
        yield Example(
            f"tone-{i:07d}", "train", f"ton nummer {i} av {n}, tydligt uttalad", file.getvalue(), f"s{i % 99}"
        )
