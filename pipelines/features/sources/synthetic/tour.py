"""The embedded corpus `tour`: Swedish sentences written for this project, spoken by espeak-ng.

It needs no download and no licence, and it is a fair miniature of a real corpus: speakers, voices and sentences of
one split never occur in another. What it teaches a model is espeak-ng's Swedish, not people's.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.synthetic import espeak
from pipelines.features.sources.synthetic.tour_text import grammar_sentences, hand_sentences
from pipelines.infra.errors import LabError

# Who speaks in which split. Neighbouring timbres (f3 and f4, f2 and f5, m6 and m1) are kept on the two sides, so that
# test asks for new voices of a known kind; both held-out splits hold as many women as men.
SPLIT_VARIANTS = {
    "train": ("sv+f4", "sv+f5", "sv+m1", "sv+m4", "sv+m5", "sv+m7"),
    "validation": ("sv+f1", "sv+m2"),
    "test": ("sv+f2", "sv+f3", "sv+m3", "sv+m6"),
}
PERSONAS = {"train": 8, "validation": 4, "test": 4}
"""Speakers per variant: 48, 8 and 16 speakers."""

RATE_WPM = (135, 185)
"""Base speaking rate of every persona of every split, in words a minute."""
PITCH = (38, 64)
"""Base pitch of every persona, in espeak-ng's units (50 is the variant's own): about -2.5 to +3.5 semitones."""
RATE_JITTER_WPM = 5
PITCH_JITTER = 3

HELD_OUT_HAND_PERCENT = 70
"""Part of validation and test taken from the hand-written list; the rest is the grammar's."""
TRAIN_HAND_MINIMUM = 400
"""Hand-written sentences that the held-out splits leave to train (or train's size, when that is smaller)."""


@dataclass(frozen=True)
class Persona:
    """A speaker: a variant at a pitch and a rate of its own."""

    speaker: str
    variant: str
    rate_wpm: int
    pitch: int


@dataclass(frozen=True)
class Utterance:
    """One line of the plan: all that decides an example, before any audio exists."""

    id: str
    split: str
    text: str
    speaker: str
    variant: str
    rate_wpm: int
    pitch: int
    origin: str
    """hand or grammar."""

    @property
    def gender(self) -> str:
        return "female" if self.variant.startswith("sv+f") else "male"


@dataclass(frozen=True)
class TourSource:
    """The tour corpus with this many sentences per split."""

    train: int = 960
    validation: int = 120
    test: int = 160
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Sizes, seed, the sentences, the whole plan, and the build of espeak-ng that speaks it."""
        utterances = self.plan()
        return {
            "kind": "tour",
            "train": str(self.train),
            "validation": str(self.validation),
            "test": str(self.test),
            "seed": str(self.seed),
            "sentences_sha256": _sha256(utterance.text for utterance in utterances),
            "plan_sha256": _sha256(repr(utterance) for utterance in utterances),
            "espeak": espeak.version(),
            "espeak_build_sha256": espeak.build_sha256(),
        }

    def plan(self) -> tuple[Utterance, ...]:
        """Every utterance in the corpus's order, without audio."""
        return _plan(self.train, self.validation, self.test, self.seed)

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """The examples of these splits in the plan's order, each synthesised when it is asked for."""
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise LabError(f"Unknown split {', '.join(unknown)}: expected some of {', '.join(SPLITS)}")
        return (_spoken(utterance) for utterance in self.plan() if utterance.split in splits)

    def outline(self) -> Iterator[Example]:
        """All examples without their audio: nothing is synthesised."""
        return (_example(utterance, b"") for utterance in self.plan())


def plan(train: int = 960, validation: int = 120, test: int = 160, seed: int = 7) -> list[Utterance]:
    """Who says what, and how: a pure function of the sizes, the seed and the sentences. No audio.

    Raises LabError for a split below one sentence, or for more sentences than there are.
    """
    return list(_plan(train, validation, test, seed))


@lru_cache(maxsize=8)
def _plan(train: int, validation: int, test: int, seed: int) -> tuple[Utterance, ...]:
    sizes = {"train": train, "validation": validation, "test": test}
    texts = split_texts(sizes, seed)
    return tuple(
        utterance
        for split in SPLITS
        for utterance in turns("tour", split, texts[split], personas(split, seed, PERSONAS[split]), seed)
    )


def split_texts(sizes: dict[str, int], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Per split, its (text, origin) pairs in order. Every sentence goes to one split."""
    hand = list(hand_sentences())
    hand_sizes = _hand_sizes(sizes, len(hand))
    grammar_sizes = {split: sizes[split] - hand_sizes[split] for split in SPLITS}
    random.Random(f"tour hand {seed}").shuffle(hand)
    grammar = grammar_sentences(sum(grammar_sizes.values()), seed)
    texts = {}
    for split in ("test", "validation", "train"):
        pairs = [(hand.pop(), "hand") for _ in range(hand_sizes[split])]
        pairs += [(grammar.pop(), "grammar") for _ in range(grammar_sizes[split])]
        random.Random(f"tour order {seed} {split}").shuffle(pairs)
        texts[split] = pairs
    return texts


def _hand_sizes(sizes: dict[str, int], available: int) -> dict[str, int]:
    """How many hand-written sentences each split gets: the held-out splits their share, train the rest."""
    for split in SPLITS:
        if sizes[split] < 1:
            raise LabError(f"The tour corpus needs at least 1 sentence in {split}, got {split}={sizes[split]}")
    # Rounded up, so that even one held-out sentence is hand-written.
    held_out = {split: -(-sizes[split] * HELD_OUT_HAND_PERCENT // 100) for split in ("validation", "test")}
    left = available - sum(held_out.values())
    if left < min(TRAIN_HAND_MINIMUM, sizes["train"]):
        raise LabError(
            f"The tour corpus holds {available} hand-written sentences, too few for validation={sizes['validation']} "
            f"and test={sizes['test']} (they take {sum(held_out.values())}; train keeps {TRAIN_HAND_MINIMUM}): "
            "ask for less"
        )
    return {"train": min(sizes["train"], left), **held_out}


def turns(
    corpus: str, split: str, texts: Iterable[tuple[str, str]], speakers: Iterable[Persona], seed: int
) -> Iterator[Utterance]:
    """The split's utterances: its speakers take turns, again and again, and vary a little from one to the next."""
    rng = random.Random(f"tour jitter {seed} {split}")
    for index, ((text, origin), persona) in enumerate(zip(texts, itertools.cycle(speakers), strict=False)):
        yield Utterance(
            id=f"{corpus}-{split}-{index + 1:05d}",
            split=split,
            text=text,
            speaker=persona.speaker,
            variant=persona.variant,
            rate_wpm=persona.rate_wpm + rng.randint(-RATE_JITTER_WPM, RATE_JITTER_WPM),
            pitch=persona.pitch + rng.randint(-PITCH_JITTER, PITCH_JITTER),
            origin=origin,
        )


def personas(split: str, seed: int, count: int) -> list[Persona]:
    """The split's speakers, `count` of each variant, in the order they take turns: variants alternate."""
    rng = random.Random(f"tour personas {seed} {split}")
    by_variant = [_variant_personas(variant, count, rng) for variant in SPLIT_VARIANTS[split]]
    return [voices[number] for number in range(count) for voices in by_variant]


def _variant_personas(variant: str, count: int, rng: random.Random) -> list[Persona]:
    """`count` speakers of one variant, spread evenly over RATE_WPM and PITCH so that every split covers both."""
    rates, pitches = _spread(RATE_WPM, count, rng), _spread(PITCH, count, rng)
    name = variant.removeprefix("sv+")
    return [Persona(f"{name}-{number + 1:02d}", variant, rates[number], pitches[number]) for number in range(count)]


def _spread(bounds: tuple[int, int], count: int, rng: random.Random) -> list[int]:
    """One whole number at random from each of `count` equal parts of `bounds`, in random order."""
    low, high = bounds
    width = (high - low) / count
    values = [round(low + width * (part + rng.random())) for part in range(count)]
    rng.shuffle(values)
    return values


def _spoken(utterance: Utterance) -> Example:
    sound = espeak.synthesise(utterance.text, utterance.variant, utterance.rate_wpm, utterance.pitch)
    return _example(utterance, sound)


def _example(utterance: Utterance, sound: bytes) -> Example:
    return Example(
        id=utterance.id,
        split=utterance.split,
        text=utterance.text,
        audio=sound,
        speaker=utterance.speaker,
        meta={
            "gender": utterance.gender,
            "variant": utterance.variant,
            "rate_wpm": str(utterance.rate_wpm),
            "pitch": str(utterance.pitch),
            "origin": utterance.origin,
        },
    )


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
