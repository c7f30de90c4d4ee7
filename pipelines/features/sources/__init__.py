"""Where Examples come from: every source yields the same type, whatever it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One utterance as its source holds it: nothing decoded, nothing cleaned."""

    id: str
    """Unique within the source."""
    split: str
    """One of SPLITS."""
    text: str
    """The transcript as the source has it."""
    audio: bytes | Path
    """An encoded audio file (wav, flac, mp3, ogg): its bytes, or where it lies."""
    speaker: str = ""
    """Who speaks: the unit of every bootstrap and of every leak check. Empty where unknown."""
    meta: dict[str, str] = field(default_factory=dict)
    """What slices are made of: gender, variant, accent, ..."""


class Source(Protocol):
    """A corpus: it knows what it is, and yields its examples in a fixed order."""

    def identity(self) -> dict[str, str]:
        """What made this corpus (versions, digests, seeds): part of every cache digest."""

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """The examples of these splits, in an order that never changes for one identity."""

    # A source that can tell its rows without reading or making any audio also has
    #     def outline(self) -> Iterator[Example]: the same examples in the same order, audio b"" or a path
    # and curation chooses among them before anything is decoded.
