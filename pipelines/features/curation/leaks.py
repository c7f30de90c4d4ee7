"""Leaks: training rows that share a speaker, a sentence or the audio with a held-out row.

A model that was trained on a test speaker or a test sentence gets a better score than it deserves. Held out are the
validation and test rows of the corpus, and the tables and caches of `curation.held_out`: another release or corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from pipelines.features.curation.selection import Drop, Step
from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.speech import marks, text
from pipelines.speech.intervals import MIN_SPEAKERS
from pipelines.whisper.log_mel import LogMel

HELD_OUT = ("validation", "test")
_FRAME_STEP = 8
"""A fingerprint reads every eighth frame: two recordings never agree in all of them, and it takes microseconds."""


@dataclass
class HeldOut:
    """Values that must not occur in training rows; each maps to the row that holds it out, for messages."""

    speakers: dict[str, str] = field(default_factory=dict)
    """By text.speaker_key: one key for all spellings."""
    sentences: dict[str, str] = field(default_factory=dict)
    """By marks.sentence_key: without case, punctuation and marks."""
    audio: dict[str, str] = field(default_factory=dict)
    """Audio keys, equal for equal audio (see corpus.py)."""

    def add(self, row: str, speaker: str = "", sentence: str = "", audio: str = "") -> None:
        """Hold out a row; empty values are unknown and hold out nothing."""
        for values, value in (
            (self.speakers, text.speaker_key(speaker)),
            (self.sentences, marks.sentence_key(sentence)),
            (self.audio, audio),
        ):
            if value:
                values.setdefault(value, row)

    def row_of_sentence(self, sentence: str) -> str | None:
        """Return the row that holds out the sentence, regardless of case and punctuation, or None."""
        return self.sentences.get(marks.sentence_key(sentence))


@dataclass
class SpeakerLeak(Step):
    """Drop training rows of a speaker of a held-out row. Unknown speakers cannot be compared.

    A corpus of few speakers cannot hold any of them out: rows of its `shared` speakers stay, and so do all rows if
    each of fewer than MIN_SPEAKERS training speakers is in validation or test. They must not share a sentence then.
    """

    held_out: HeldOut
    shared: frozenset[str] = frozenset()
    """Speakers whose sentences were divided between the splits (Source.shared_speakers)."""
    name: str = "leak_speaker"

    def __post_init__(self):
        self._elsewhere = frozenset(self.held_out.speakers)  # held out by other tables: no reason to keep them
        self._by_origin: dict[str, tuple[set[str], set[str]]] = {}

    def observe(self, example: Example) -> None:
        if not (speaker := text.speaker_key(example.speaker)):
            return
        sets = self._by_origin.setdefault(example.meta.get("origin", ""), (set(), set()))
        sets[example.split in HELD_OUT].add(speaker)
        if example.split in HELD_OUT:
            self.held_out.add(f"{example.split} row {example.id}", speaker=example.speaker)

    def verdict(self, example: Example) -> str | None:
        speaker = text.speaker_key(example.speaker)
        row = self.held_out.speakers.get(speaker)
        if row is None or speaker in self._exempt:
            return None
        return f"speaker {_quote(example.speaker)} is in {row}"

    @cached_property
    def _exempt(self) -> frozenset[str]:
        exempt = set(map(text.speaker_key, self.shared))
        for train, held_out in self._by_origin.values():
            if len(train | held_out) < MIN_SPEAKERS and train <= held_out:
                exempt |= train
        return frozenset(exempt - self._elsewhere)


@dataclass
class SentenceLeak(Step):
    """Drop training rows whose normalised sentence occurs in a held-out row, by any speaker."""

    held_out: HeldOut
    name: str = "leak_sentence"

    def observe(self, example: Example) -> None:
        if example.split in HELD_OUT:
            self.held_out.add(f"{example.split} row {example.id}", sentence=example.text)

    def verdict(self, example: Example) -> str | None:
        row = self.held_out.row_of_sentence(example.text)
        return row and f"sentence {_quote(example.text)} is in {row}"


@dataclass
class AudioLeak(Step):
    """Drop training rows with the audio of a held-out row, or cut from the file of one.

    `audio_key` maps an id to a key, equal for equal audio; `file_key` to one of the file, empty if it is not known.
    """

    held_out: HeldOut
    audio_key: Callable[[str], str]
    file_key: Callable[[str], str] = lambda name: ""
    name: str = "leak_audio"
    _files: dict[str, str] = field(default_factory=dict)

    def observe(self, example: Example) -> None:
        if example.split in HELD_OUT:
            row = f"{example.split} row {example.id}"
            self.held_out.add(row, audio=self.audio_key(example.id))
            if key := self.file_key(example.id):
                self._files.setdefault(key, row)

    def verdict(self, example: Example) -> str | None:
        if row := self.held_out.audio.get(self.audio_key(example.id)):
            return f"the same audio is in {row}"
        row = self._files.get(self.file_key(example.id))
        return row and f"it was cut from the recording of {row}"


def shared_speakers(rows: pd.DataFrame, split: str = "test") -> str:
    """Return in one sentence what scores on a split mean if training rows have its speakers; empty if they have none.

    `rows`: the columns split and speaker of a cache.
    """
    scored, train = (
        {text.speaker_key(speaker) for speaker in rows["speaker"][rows["split"] == name]} - {""}
        for name in (split, "train")
    )
    if not (shared := scored & train):
        return ""
    many = len(shared) > 1
    speakers, voices = (f"{len(shared)} speakers are", "these voices") if many else ("1 speaker is", "this voice")
    return f"{speakers} in train and in {split}: the scores hold for {voices} in other sentences, not for other voices"


def fingerprint(log_mel: LogMel) -> str:
    """Return 32 hexadecimal digits that are equal for equal samples at 16 kHz, in any container.

    Computed from the frames, which are equal to the last bit for equal samples, at half precision, so that caches of
    both precisions can be compared. Lossy coding, another gain or a cut change the fingerprint.
    """
    frames = np.ascontiguousarray(log_mel.frames[::_FRAME_STEP], dtype=np.float16)
    ends = f"{log_mel.frames.shape} {np.float32(log_mel.pad_value)}".encode()
    return hashlib.blake2b(frames, digest_size=16, key=hashlib.blake2b(ends, digest_size=16).digest()).hexdigest()


def refuse(dropped: Mapping[str, Drop]) -> None:
    """Raise LabError with counts and first examples if any of `dropped` is a leak."""
    leaks = [drop for drop in dropped.values() if drop.reason.startswith("leak_")]
    if not leaks:
        return
    firsts: dict[str, Drop] = {}
    counts: dict[str, int] = {}
    for drop in leaks:
        firsts.setdefault(drop.reason, drop)
        counts[drop.reason] = counts.get(drop.reason, 0) + 1
    summary = "; ".join(f"{counts[reason]} by {reason} ({drop.id}: {drop.detail})" for reason, drop in firsts.items())
    raise LabError(
        f"training rows must share nothing with validation and test, got {len(leaks)} that do: {summary}. "
        "Leave them out with curation.leaks=drop, or keep them with curation.leaks=ignore"
    )


def _quote(value: str) -> str:
    line = " ".join(value.split())
    return repr(line if len(line) <= 40 else line[:37] + "...")
