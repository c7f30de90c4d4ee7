"""Several sources as one: training rows drawn in turn from each, held-out rows from those that are named for it.

    [source]
    kind = "mix"

    [[source.parts]]
    name = "cv"
    kind = "folder"
    path = "my_recordings"
    gives = ["train", "validation", "test"]

    [[source.parts]]
    name = "nst"
    kind = "hub"
    path = "jzju/nst"
    count = 20000

Every row keeps where it is from: `origin` in its meta, and before its id. Nothing but the seed decides the order.
A part with `own_names` keeps ids and speakers as they are: a test set is the same within the mix and without it.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from pipelines.features.sources import SPLITS, Example, Source
from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

_GLOBAL_SPEAKER = re.compile(r"[0-9a-f]{32,}")
"""A hash, as Common Voice names its speakers: the same one in two corpora is the same person."""


@dataclass(frozen=True)
class Part:
    """One source of a mix."""

    name: str
    """Unique in the mix."""
    source: Source
    gives: tuple[str, ...] = ("train",)
    """The splits that are taken from it."""
    weight: float = 0.0
    """Share of the training rows, relative to the other parts'; 0 in all of them: every row is taken."""
    count: int = 0
    """Training rows that are taken, the first in the source's order; 0 takes them all."""
    own_names: bool = False
    """Ids and speakers are kept as they are."""


Read = Callable[[Part, tuple[str, ...]], Iterator[Example]]
"""Gives the rows of a part that belong to these splits."""


@dataclass(frozen=True)
class MixSource:
    """The corpus of all `parts`. With weights, training rows keep these shares, and end where the first part does."""

    parts: tuple[Part, ...]
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """The identity of every part below its name, and how they are drawn. Raises LabError for parts that clash."""
        _check(self.parts)
        told = {"kind": "mix", "seed": str(self.seed), "parts": " ".join(part.name for part in self.parts)}
        for part in self.parts:
            told |= {
                f"{part.name}.gives": " ".join(sorted(part.gives, key=SPLITS.index)),
                f"{part.name}.weight": f"{part.weight:g}",
                f"{part.name}.count": str(part.count),
                **({f"{part.name}.own_names": "true"} if part.own_names else {}),
                **{f"{part.name}.{name}": value for name, value in part.source.identity().items()},
            }
        return told

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Training rows of all parts in turn, then the held-out rows of each part that gives some.

        A part that gives all of SPLITS is asked for all of them, so that rows of no split come out to be rejected.
        Raises LabError at once for parts that clash, and at the end for a part with fewer rows than its `count`.
        """
        _check(self.parts)
        return self._examples(splits, lambda part, wanted: part.source.examples(wanted))

    @property
    def outline(self) -> Callable[[], Iterator[Example]] | None:
        """What gives all examples without their sound; None where a part cannot tell its rows without it."""
        if not all(getattr(part.source, "outline", None) for part in self.parts):
            return None
        _check(self.parts)
        return lambda: self._examples(SPLITS, _outlined)

    def _examples(self, splits: tuple[str, ...], read: Read) -> Iterator[Example]:
        if "train" in splits:
            yield from self._interleaved([part for part in self.parts if "train" in part.gives], read)
        for part in self.parts:
            asked = tuple(split for split in SPLITS if split in part.gives and split in splits)
            if asked not in ((), ("train",)):
                held_out = asked if asked == SPLITS else tuple(split for split in asked if split != "train")
                rows = (example for example in read(part, held_out) if example.split != "train")
                yield from (_from(part, example) for example in rows)

    def _interleaved(self, parts: list[Part], read: Read) -> Iterator[Example]:
        """One row at a time of a part drawn by weight; parts without weights are drawn alike until all have ended."""
        rng = random.Random(f"mix {self.seed}")
        rows = {part.name: islice(read(part, ("train",)), part.count or None) for part in parts}
        taken = dict.fromkeys(rows, 0)
        while parts:
            part = rng.choices(parts, [part.weight or 1.0 for part in parts])[0]
            example = next(rows[part.name], None)
            if example is not None:
                taken[part.name] += 1
                yield _from(part, example)
                continue
            _refuse_too_few(part, taken[part.name])
            if part.weight:
                self._tell_end(part, taken)
                return
            parts = [other for other in parts if other is not part]

    def _tell_end(self, ended: Part, taken: dict[str, int]) -> None:
        told = ", ".join(f"{name} {count:,}" for name, count in taken.items())
        logger.info(
            f"mix: {ended.name} has no more training rows, so that the mix ends with {told}; the rest is left out"
        )


def _check(parts: tuple[Part, ...]) -> None:
    names = [part.name for part in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LabError(f"source.parts must have names of their own, got {twice[0]!r} twice: rename one")
    if len(kept := [part.name for part in parts if part.own_names]) > 1:
        raise LabError(f"source.parts: one part may have own_names, got {', '.join(kept)}: choose one")
    weighted = {bool(part.weight) for part in parts if "train" in part.gives}
    if len(weighted) > 1:
        lacking = [part.name for part in parts if "train" in part.gives and not part.weight]
        raise LabError(f"source.parts must all have a weight or none, got none for {', '.join(lacking)}: add it")


def _outlined(part: Part, splits: tuple[str, ...]) -> Iterator[Example]:
    """The outline of a part as its examples would come: rows of no split only where all of SPLITS are asked for."""
    return (example for example in part.source.outline() if example.split in splits or {*SPLITS} <= {*splits})


def _refuse_too_few(part: Part, taken: int) -> None:
    if taken < part.count:
        raise LabError(f"source.parts: {part.name} must give {part.count:,} training rows, has {taken:,}: lower count")


def _from(part: Part, example: Example) -> Example:
    """The example under its part's name. Its sound is not touched: it may not be read yet."""
    prefix, speaker = "" if part.own_names else f"{part.name}/", example.speaker
    if speaker and not _GLOBAL_SPEAKER.fullmatch(speaker):
        speaker = f"{prefix}{speaker}"
    named = {"id": f"{prefix}{example.id}", "speaker": speaker, "meta": {**example.meta, "origin": part.name}}
    copy = object.__new__(type(example))
    copy.__dict__.update({**example.__dict__, **named})
    return copy
