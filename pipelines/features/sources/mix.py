"""Several sources as one: training rows drawn in turn from each part, held-out rows from the parts that give some.

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

Every row records its part: as `origin` in its meta and as prefix of its id. The order depends on the seed alone. A part
with `own_names` keeps ids and speakers unchanged: a test set is the same within the mix and without it.
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
"""A hash, Common Voice's name of a speaker: equal hashes in two corpora are the same person."""


@dataclass(frozen=True)
class Part:
    """One source of a mix."""

    name: str
    """Unique in the mix."""
    source: Source
    gives: tuple[str, ...] = ("train",)
    """The splits taken from it."""
    weight: float = 0.0
    """Weight of its training rows relative to the other parts; 0 in all parts: every row is taken."""
    count: int = 0
    """Number of training rows taken, the first in the source's order; 0: all."""
    own_names: bool = False
    """Keep ids and speakers unchanged."""


Read = Callable[[Part, tuple[str, ...]], Iterator[Example]]
"""Reads the rows of a part that belong to these splits."""


@dataclass(frozen=True)
class MixSource:
    """The corpus of all `parts`. With weights, training rows keep these ratios, until the first part ends."""

    parts: tuple[Part, ...]
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return the identity of every part, prefixed by its name, and the settings. Raises LabError for a conflict."""
        _check(self.parts)
        fields = {"kind": "mix", "seed": str(self.seed), "parts": " ".join(part.name for part in self.parts)}
        for part in self.parts:
            fields |= {
                f"{part.name}.gives": " ".join(sorted(part.gives, key=SPLITS.index)),
                f"{part.name}.weight": f"{part.weight:g}",
                f"{part.name}.count": str(part.count),
                **({f"{part.name}.own_names": "true"} if part.own_names else {}),
                **{f"{part.name}.{name}": value for name, value in part.source.identity().items()},
            }
        return fields

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the training rows of all parts in turn, then the held-out rows of each part that gives some.

        All splits of a part that gives all of SPLITS are read at once, so that rows with an unknown split are included
        and rejected. Raises LabError at once for conflicting parts, and at the end for a part with fewer rows than its
        `count`.
        """
        _check(self.parts)
        return self._examples(splits, lambda part, names: part.source.examples(names))

    @property
    def outline(self) -> Callable[[], Iterator[Example]] | None:
        """A function that returns all examples without audio; None if a part has no outline."""
        if not all(getattr(part.source, "outline", None) for part in self.parts):
            return None
        _check(self.parts)
        return lambda: self._examples(SPLITS, _outline)

    @property
    def shared_speakers(self) -> frozenset[str]:
        """Speakers in several splits of a part that drew sentences (FolderSource.shared_speakers), as named here."""
        return frozenset(
            _speaker(part, speaker)
            for part in self.parts
            for speaker in getattr(part.source, "shared_speakers", frozenset())
        )

    def _examples(self, splits: tuple[str, ...], read: Read) -> Iterator[Example]:
        if "train" in splits:
            yield from self._interleaved([part for part in self.parts if "train" in part.gives], read)
        for part in self.parts:
            included = tuple(split for split in SPLITS if split in part.gives and split in splits)
            if included not in ((), ("train",)):
                held_out = included if included == SPLITS else tuple(split for split in included if split != "train")
                rows = (example for example in read(part, held_out) if example.split != "train")
                yield from (_from(part, example) for example in rows)

    def _interleaved(self, parts: list[Part], read: Read) -> Iterator[Example]:
        """Yield one row at a time of a part drawn by weight; without weights, equally likely until all parts end."""
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
            _check_count(part, taken[part.name])
            if part.weight:
                self._log_end(part, taken)
                return
            parts = [other for other in parts if other is not part]

    def _log_end(self, part: Part, taken: dict[str, int]) -> None:
        counts = ", ".join(f"{name} {count:,}" for name, count in taken.items())
        logger.info(f"mix: {part.name} has no more training rows, so the mix ends with {counts}; the rest is left out")


def _check(parts: tuple[Part, ...]) -> None:
    names = [part.name for part in parts]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise LabError(f"source.parts must have unique names, got {duplicates[0]!r} twice: rename one")
    if len(names := [part.name for part in parts if part.own_names]) > 1:
        raise LabError(f"source.parts: one part may have own_names, got {', '.join(names)}: choose one")
    weighted = {bool(part.weight) for part in parts if "train" in part.gives}
    if len(weighted) > 1:
        missing = [part.name for part in parts if "train" in part.gives and not part.weight]
        raise LabError(f"source.parts must all have a weight or none, got none for {', '.join(missing)}: add it")


def _outline(part: Part, splits: tuple[str, ...]) -> Iterator[Example]:
    """Yield the outline of a part; rows with an unknown split only if `splits` are all of SPLITS."""
    return (example for example in part.source.outline() if example.split in splits or {*SPLITS} <= {*splits})


def _check_count(part: Part, taken: int) -> None:
    if taken < part.count:
        raise LabError(f"source.parts: {part.name} must give {part.count:,} training rows, has {taken:,}: lower count")


def _prefix(part: Part) -> str:
    return "" if part.own_names else f"{part.name}/"


def _speaker(part: Part, speaker: str) -> str:
    """Return the name within the mix of a part's speaker."""
    return f"{_prefix(part)}{speaker}" if speaker and not _GLOBAL_SPEAKER.fullmatch(speaker) else speaker


def _from(part: Part, example: Example) -> Example:
    """Return the example with its part's name. Its audio is not accessed: it may be read on demand."""
    prefix, speaker = _prefix(part), _speaker(part, example.speaker)
    named = {"id": f"{prefix}{example.id}", "speaker": speaker, "meta": {**example.meta, "origin": part.name}}
    copy = object.__new__(type(example))
    copy.__dict__.update({**example.__dict__, **named})
    return copy
