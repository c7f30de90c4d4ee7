"""Recordings that the benchmarks use: joined clips of the tour, long recordings of them, and synthetic tones."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.synthetic.planted import PlantedSource
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.speech import audio, text
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.edits import Edits

PAUSE_S = 0.6
"""Between the clips of a long recording."""
TEST_VOICES = 16
"""Speakers of the tour's test split."""


@dataclass(frozen=True)
class Clip:
    """A recording of one speaker, float32 at 16 kHz, and what is said in it."""

    samples: np.ndarray
    text: str
    speaker: str


def joined_pairs(examples: Iterable[Example], size: int = 2) -> Iterator[tuple[Example, np.ndarray, str]]:
    """Yield `size` consecutive clips joined: the first example, float32 samples at 16 kHz, and the text of all."""
    clips = list(examples)
    for parts in zip(*(clips[start::size] for start in range(size))):
        samples = np.concatenate([audio.decode(clip.audio).samples for clip in parts])
        yield parts[0], samples, " ".join(clip.text for clip in parts)


def write_pairs(folder: Path, sizes: dict[str, int], size: int = 2) -> Path:
    """Write pairs of the tour's clips, 4 s on average, as a folder of recordings with a table; return the folder.

    `size` clips of 2 s may be joined instead of two.
    """
    import soundfile

    tour = TourSource(**sizes)
    with open(folder / "transcripts.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "text", "split", "speaker"])
        for split in SPLITS:
            for first, samples, text in joined_pairs(tour.examples((split,)), size):
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


def test_clips(n: int, voices: int) -> list[Clip]:
    """Return up to `n` clips of 2 to 10 s: one to four sentences of a speaker of the tour's test split.

    More than its 16 `voices` speak seven of the planted corpus's test sentences each, without the sentences that the
    tour trains or validates on.
    """
    by_speaker: dict[str, list[tuple[np.ndarray, str]]] = {}
    for example in test_examples(voices):
        by_speaker.setdefault(example.speaker, []).append((audio.decode(example.audio).samples, example.text))
    clips: list[Clip] = []
    turn = 0
    while len(clips) < n and any(by_speaker.values()):
        for speaker, left in by_speaker.items():
            take = left[: 1 + turn % 4]
            by_speaker[speaker] = left[1 + turn % 4 :]
            turn += 1
            if take and len(clips) < n:
                samples = np.concatenate([part for sound, _ in take for part in (sound, _silence(0.3))])
                if len(samples) <= 10 * SAMPLE_RATE_HZ:
                    clips.append(Clip(samples, " ".join(sentence for _, sentence in take), speaker))
    return clips


def test_examples(voices: int) -> Iterator[Example]:
    """Yield the test clips of `voices` speakers, without sentences that the tour trains or validates on."""
    tour = TourSource()
    if voices <= TEST_VOICES:
        yield from tour.examples(("test",))
        return
    used = {text.normalise(example.text) for example in tour.outline() if example.split != "test"}
    planted = PlantedSource(test=7 * voices, test_voices=voices)
    yield from (clip for clip in planted.examples(("test",)) if text.normalise(clip.text) not in used)


def joined(clips: Sequence[Clip], minutes: float) -> tuple[np.ndarray, list[Clip]]:
    """Return all clips one after the other, repeated until they last `minutes`: the samples, and the clips in order."""
    parts: list[np.ndarray] = []
    used: list[Clip] = []
    n_samples = 0
    while n_samples < minutes * 60 * SAMPLE_RATE_HZ:
        clip = clips[len(used) % len(clips)]
        used.append(clip)
        parts += [clip.samples, _silence(PAUSE_S)]
        n_samples += len(clip.samples) + len(parts[-1])
    return np.concatenate(parts), used


def aligned_edits(references: Sequence[str], transcript: str) -> Edits:
    """Return the word edits of each of `references`, spoken one after the other, in the transcript of them all.

    The words of all references are aligned with those of the transcript. An inserted word belongs to the reference of
    the word before it. Characters are not counted.
    """
    import jiwer

    sentences = [text.normalise(reference) for reference in references]
    words = np.array([len(sentence.split()) for sentence in sentences])
    owner = np.repeat(np.arange(len(sentences)), words)
    counts = {kind: np.zeros(len(sentences), dtype=np.int64) for kind in ("substitute", "insert", "delete")}
    (alignment,) = jiwer.process_words(" ".join(sentences), text.normalise(transcript)).alignments
    for chunk in alignment:
        if chunk.type == "insert":
            inserted = chunk.hyp_end_idx - chunk.hyp_start_idx
            counts["insert"][owner[max(chunk.ref_start_idx - 1, 0)]] += inserted
        elif chunk.type != "equal":
            np.add.at(counts[chunk.type], owner[chunk.ref_start_idx : chunk.ref_end_idx], 1)
    zeros = np.zeros_like(words)
    chars = np.array([len(sentence) for sentence in sentences])
    return Edits(counts["substitute"], counts["insert"], counts["delete"], words, zeros, chars)


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE_HZ), dtype=np.float32)
