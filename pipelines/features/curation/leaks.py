"""Leaks: training rows that share a speaker, a sentence or the very audio with a row that is held out.

A model that has heard a test speaker, or read a test sentence, scores better than it is. Held out are the validation
and test rows of the corpus itself and whatever else the recipe names: another release, another corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipelines.features.curation.selection import Drop, Step
from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.speech import text
from pipelines.whisper.log_mel import LogMel

HELD_OUT = ("validation", "test")
_FRAME_STEP = 8
"""A fingerprint reads every eighth frame: no two recordings agree in all of those, and it costs microseconds."""


@dataclass
class HeldOut:
    """What must not be trained on; each value says where it is held out, for messages."""

    speakers: dict[str, str] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    """Normalised (text.normalise): case and punctuation make no other sentence."""
    audio: dict[str, str] = field(default_factory=dict)
    """By what names a sound: equal names, equal sounds (corpus.py)."""

    def add(self, where: str, speaker: str = "", sentence: str = "", audio: str = "") -> None:
        """Hold out a row; what is empty is not known and holds out nothing."""
        for values, value in (
            (self.speakers, speaker),
            (self.sentences, text.normalise(sentence)),
            (self.audio, audio),
        ):
            if value:
                values.setdefault(value, where)

    def where_read(self, sentence: str) -> str | None:
        """Where the sentence is held out, whatever its case and punctuation."""
        return self.sentences.get(text.normalise(sentence))


@dataclass
class SpeakerLeak(Step):
    """Training clips of a speaker who is heard in a held-out row. Unknown speakers cannot be compared."""

    held_out: HeldOut
    name: str = "leak_speaker"

    def observe(self, example: Example) -> None:
        if example.split in HELD_OUT:
            self.held_out.add(f"{example.split} row {example.id}", speaker=example.speaker)

    def verdict(self, example: Example) -> str | None:
        where = self.held_out.speakers.get(example.speaker)
        return where and f"speaker {_shown(example.speaker)} is in {where}"


@dataclass
class SentenceLeak(Step):
    """Training clips whose normalised sentence is read in a held-out row, by whomever."""

    held_out: HeldOut
    name: str = "leak_sentence"

    def observe(self, example: Example) -> None:
        if example.split in HELD_OUT:
            self.held_out.add(f"{example.split} row {example.id}", sentence=example.text)

    def verdict(self, example: Example) -> str | None:
        where = self.held_out.where_read(example.text)
        return where and f"sentence {_shown(example.text)} is in {where}"


@dataclass
class AudioLeak(Step):
    """Training clips whose sound is that of a held-out row; `prints` maps an id to what names its sound."""

    held_out: HeldOut
    prints: Callable[[str], str]
    name: str = "leak_audio"

    def observe(self, example: Example) -> None:
        if example.split in HELD_OUT:
            self.held_out.add(f"{example.split} row {example.id}", audio=self.prints(example.id))

    def verdict(self, example: Example) -> str | None:
        where = self.held_out.audio.get(self.prints(example.id))
        return where and f"the same audio is in {where}"


def fingerprint(log_mel: LogMel) -> str:
    """32 hexadecimal digits that name a clip's sound: equal for equal samples at 16 kHz, in whatever container.

    It is taken from the frames, which equal samples share to the last bit, at half precision, so that caches of both
    precisions can be compared. Lossy coding, another gain or a cut make another sound.
    """
    frames = np.ascontiguousarray(log_mel.frames[::_FRAME_STEP], dtype=np.float16)
    ends = f"{log_mel.frames.shape} {np.float32(log_mel.pad_value)}".encode()
    return hashlib.blake2b(frames, digest_size=16, key=hashlib.blake2b(ends, digest_size=16).digest()).hexdigest()


def refuse(dropped: Mapping[str, Drop]) -> None:
    """LabError with counts and first examples where any of `dropped` is a leak."""
    leaks = [drop for drop in dropped.values() if drop.reason.startswith("leak_")]
    if not leaks:
        return
    firsts: dict[str, Drop] = {}
    counts: dict[str, int] = {}
    for drop in leaks:
        firsts.setdefault(drop.reason, drop)
        counts[drop.reason] = counts.get(drop.reason, 0) + 1
    told = "; ".join(f"{counts[reason]} by {reason} ({drop.id}: {drop.detail})" for reason, drop in firsts.items())
    raise LabError(
        f"training rows must share nothing with validation and test, got {len(leaks)} that do: {told}. "
        "Leave them out with curation.leaks=drop, or keep them with curation.leaks=ignore"
    )


def _shown(value: str) -> str:
    line = " ".join(value.split())
    return repr(line if len(line) <= 40 else line[:37] + "...")
