"""The embedded corpus `tour-english`: English sentences written for this project, spoken by espeak-ng.

It is a guard set: it shows how much English a model forgets that is tuned on another language. Its sentences come from
a small grammar. Voices, speakers and sentences of one split never occur in another.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import lru_cache

from pipelines.features.sources import SPLITS
from pipelines.features.sources.synthetic import espeak, tour
from pipelines.features.sources.synthetic.tour import TourSource, Utterance
from pipelines.infra.errors import LabError

VARIANTS = {
    split: tuple(variant.replace("sv+", "en+") for variant in names) for split, names in tour.SPLIT_VARIANTS.items()
}
"""Voices of each split: those of the tour, with the English of espeak-ng."""
_SUBJECTS = (
    "The old teacher", "My younger sister", "Our neighbour", "The bus driver", "A friend from school", "The doctor",
    "Their grandmother", "The new manager", "A quiet student", "The fisherman", "The woman next door", "His brother",
    "The captain", "An engineer", "The baker", "Everybody in the village", "The tall gardener", "Your cousin",
)  # fmt: skip
_ACTIONS = (
    "bought a loaf of bread", "forgot the key", "wrote a long letter", "found an empty seat", "painted the kitchen",
    "asked for the bill", "waited at the station", "read the morning paper", "cooked a pot of soup", "fed the horses",
    "repaired the bicycle", "walked along the river", "closed all the windows", "planted two apple trees",
    "told a funny story", "looked for a warm coat", "answered the telephone", "missed the last train",
    "carried the heavy boxes", "watched the football match", "paid for the coffee", "cut the wet grass",
)  # fmt: skip
_TIMES = (
    "before breakfast", "yesterday evening", "in the early summer", "after a long meeting", "on a rainy Monday",
    "during the holidays", "last winter", "at half past seven", "while it was snowing", "just before midnight",
    "without saying a word", "for the third time", "with great care", "in front of the library", "near the old bridge",
    "on the way to work",
)  # fmt: skip


@dataclass(frozen=True)
class EnglishSource(TourSource):
    """English sentences, this many per split."""

    def identity(self) -> dict[str, str]:
        """Return the fields of the tour's identity, with the English build of espeak-ng."""
        return {**super().identity(), "kind": "tour-english", "espeak_build_sha256": espeak.build_sha256("en")}

    def plan(self) -> tuple[Utterance, ...]:
        """Return every utterance in the corpus's order, without audio."""
        return _plan(self.train, self.validation, self.test, self.seed)


@lru_cache(maxsize=8)
def _plan(*sizes_and_seed: int) -> tuple[Utterance, ...]:
    *sizes, seed = sizes_and_seed
    texts = [f"{' '.join(words)}." for words in itertools.product(_SUBJECTS, _ACTIONS, _TIMES)]
    if sum(sizes) > len(texts):
        raise LabError(
            f"tour-english has {len(texts):,} sentences, got train, validation and test of {sum(sizes):,}: lower them"
        )
    random.Random(f"tour-english {seed}").shuffle(texts)
    by_split = dict(zip(SPLITS, sizes, strict=True))
    return tuple(
        utterance
        for split in reversed(SPLITS)  # more training sentences change no test sentence
        for utterance in tour.turns(
            "english",
            split,
            [(texts.pop(), "grammar") for _ in range(by_split[split])],
            tour.personas(split, seed, tour.PERSONAS[split], VARIANTS),
            seed,
        )
    )
