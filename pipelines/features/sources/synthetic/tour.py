"""The embedded corpus `tour`: Swedish sentences written for this project, spoken by espeak-ng.

It needs no download and no licence, and has the structure of a real corpus: speakers, voices and sentences of one split
never occur in another. A model learns espeak-ng's Swedish from it, not that of people.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from pipelines.features.sources import SPLITS, Example, lines_sha256
from pipelines.features.sources.synthetic import espeak
from pipelines.features.sources.synthetic.tour_text import grammar_sentences, hand_sentences
from pipelines.infra.errors import LabError

SPLIT_VARIANTS = {
    "train": ("sv+f4", "sv+f5", "sv+m1", "sv+m4", "sv+m5", "sv+m7"),
    "validation": ("sv+f1", "sv+m2"),
    "test": ("sv+f2", "sv+f3", "sv+m3", "sv+m6"),
}
"""Voices of each split. Of similar voices (f3 and f4, f2 and f5, m6 and m1) one is in train and one in test: the test
voices are new but not unusual. Both held-out splits have as many women as men."""
PERSONAS = {"train": 8, "validation": 4, "test": 4}
"""Speakers per variant: 48, 8 and 16 speakers."""

RATE_WPM = (135, 185)
"""Range of the base speaking rate of a persona, in words per minute."""
PITCH = (38, 64)
"""Range of the base pitch of a persona, in espeak-ng's units (default 50): about -2.5 to +3.5 semitones."""
RATE_JITTER_WPM = 5
PITCH_JITTER = 3

HELD_OUT_HAND_PERCENT = 70
"""Share of validation and test, in percent, from the hand-written list; the rest is from the grammar."""
TRAIN_HAND_MINIMUM = 400
"""Minimum of hand-written sentences in train (or the size of train, if that is smaller)."""


@dataclass(frozen=True)
class Persona:
    """A speaker: a variant with a pitch and a speaking rate."""

    speaker: str
    variant: str
    rate_wpm: int
    pitch: int


@dataclass(frozen=True)
class Utterance:
    """One line of the plan: everything that decides an example, without audio."""

    id: str
    split: str
    text: str
    speaker: str
    variant: str
    rate_wpm: int
    pitch: int
    origin: str
    """`hand` or `grammar`."""

    @property
    def gender(self) -> str:
        return "female" if "+f" in self.variant else "male"


class SpokenExample(Example):
    """An example whose audio is synthesised on access. Pickling does not synthesise it."""

    def __init__(
        self,
        id: str,
        split: str,
        text: str,
        audio: Callable[[], bytes] | bytes,
        speaker: str = "",
        meta: Mapping[str, str] = {},
    ):
        """Take the fields of Example, with a picklable function that returns the audio."""
        self.__dict__.update(id=id, split=split, text=text, sound=audio, speaker=speaker, meta=dict(meta))

    @property
    def audio(self) -> bytes:
        sound = self.__dict__["sound"]
        return sound() if callable(sound) else sound

    def with_audio(self) -> Example:
        """Return the example with its audio synthesised (sources.read_ahead)."""
        return Example(self.id, self.split, self.text, self.audio, self.speaker, self.meta)


@dataclass(frozen=True)
class TourSource:
    """The tour corpus with this many sentences per split."""

    train: int = 960
    validation: int = 120
    test: int = 160
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return sizes and seed, digests of the sentences and the plan, and the build of espeak-ng."""
        utterances = self.plan()
        return {
            "kind": "tour",
            "train": str(self.train),
            "validation": str(self.validation),
            "test": str(self.test),
            "seed": str(self.seed),
            "sentences_sha256": lines_sha256(utterance.text for utterance in utterances),
            "plan_sha256": lines_sha256(repr(utterance) for utterance in utterances),
            "espeak": espeak.version(),
            "espeak_build_sha256": espeak.build_sha256(),
        }

    def plan(self) -> tuple[Utterance, ...]:
        """Return every utterance in the corpus's order, without audio."""
        return _plan(self.train, self.validation, self.test, self.seed)

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Yield the examples of these splits in the plan's order. Their audio is synthesised on access."""
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise LabError(f"Unknown split {', '.join(unknown)}: expected some of {', '.join(SPLITS)}")
        return (_spoken(utterance) for utterance in self.plan() if utterance.split in splits)

    def outline(self) -> Iterator[Example]:
        """Yield all examples without audio: nothing is synthesised."""
        return (Example(audio=b"", **_fields(utterance)) for utterance in self.plan())


def plan(train: int = 960, validation: int = 120, test: int = 160, seed: int = 7) -> list[Utterance]:
    """Return the utterances of all splits: a pure function of the sizes, the seed and the sentences.

    Raises LabError for a split without a sentence, or for more sentences than exist.
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
    """Return the (text, origin) pairs of each split in order. Every sentence is in one split only."""
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
    """Return the number of hand-written sentences per split: the held-out splits get their share, train the rest."""
    for split in SPLITS:
        if sizes[split] < 1:
            raise LabError(f"The tour corpus needs at least 1 sentence in {split}, got {split}={sizes[split]}")
    # Rounded up, so that even one held-out sentence is hand-written.
    held_out = {split: -(-sizes[split] * HELD_OUT_HAND_PERCENT // 100) for split in ("validation", "test")}
    remaining = available - sum(held_out.values())
    if remaining < min(TRAIN_HAND_MINIMUM, sizes["train"]):
        raise LabError(
            f"The tour corpus holds {available} hand-written sentences, too few for validation={sizes['validation']} "
            f"and test={sizes['test']} (they take {sum(held_out.values())}; train needs {TRAIN_HAND_MINIMUM}): "
            "lower them"
        )
    return {"train": min(sizes["train"], remaining), **held_out}


def in_turn(voices: Sequence[Persona], n_sentences: int, n_clips: int) -> list[Persona]:
    """Return the voice of each clip, when `n_sentences` repeat and no voice comes back to the same sentence.

    After each round of the sentences the voices go on by the smallest step with which that holds.
    """
    n, rounds = len(voices), min(-(-n_clips // n_sentences), len(voices))
    step = next(step for step in itertools.count(1) if n // math.gcd(n_sentences + step, n) >= rounds)
    return [voices[(index + step * (index // n_sentences)) % n] for index in range(n_clips)]


def turns(
    corpus: str, split: str, texts: Iterable[tuple[str, str]], speakers: Iterable[Persona], seed: int
) -> Iterator[Utterance]:
    """Yield the split's utterances: its speakers take turns, with small variations of rate and pitch."""
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


def personas(
    split: str, seed: int, count: int, variants: Mapping[str, tuple[str, ...]] = SPLIT_VARIANTS
) -> list[Persona]:
    """Return the split's speakers, `count` per variant, in the order of their turns: variants alternate."""
    rng = random.Random(f"tour personas {seed} {split}")
    by_variant = [_variant_personas(variant, count, rng) for variant in variants[split]]
    return [voices[number] for number in range(count) for voices in by_variant]


def _variant_personas(variant: str, count: int, rng: random.Random) -> list[Persona]:
    """Return `count` speakers of one variant, spread evenly over RATE_WPM and PITCH."""
    rates, pitches = _spread(RATE_WPM, count, rng), _spread(PITCH, count, rng)
    name = variant.removeprefix("sv+")
    return [Persona(f"{name}-{number + 1:02d}", variant, rates[number], pitches[number]) for number in range(count)]


def _spread(bounds: tuple[int, int], count: int, rng: random.Random) -> list[int]:
    """Draw one whole number from each of `count` equal parts of `bounds`, in random order."""
    low, high = bounds
    width = (high - low) / count
    values = [round(low + width * (part + rng.random())) for part in range(count)]
    rng.shuffle(values)
    return values


def _spoken(utterance: Utterance) -> SpokenExample:
    voice = (utterance.text, utterance.variant, utterance.rate_wpm, utterance.pitch)
    return SpokenExample(audio=partial(espeak.synthesise, *voice), **_fields(utterance))


def _fields(utterance: Utterance) -> dict[str, Any]:
    """Return the fields of an Example except its audio."""
    return {
        "id": utterance.id,
        "split": utterance.split,
        "text": utterance.text,
        "speaker": utterance.speaker,
        "meta": {
            "gender": utterance.gender,
            "variant": utterance.variant,
            "rate_wpm": str(utterance.rate_wpm),
            "pitch": str(utterance.pitch),
            "origin": utterance.origin,
        },
    }
