"""Sources of examples: every source yields the same type, Example."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.infra import files

if TYPE_CHECKING:
    from pipelines.speech.recordings.excerpts import Excerpt

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class NoAudio:
    """Stands for the audio of an example that has none."""

    reason: str
    """One word, as the clip filter rejects it."""
    detail: str


Audio = bytes | Path | NoAudio
"""An encoded audio file (wav, flac, mp3, ogg): its bytes or its path; or why there is none."""


class NoTranscript(str):
    """The text of a recording for which the source has no transcript, not even an empty one."""


@dataclass(frozen=True)
class Example:
    """One utterance as its source holds it: not decoded, not cleaned."""

    id: str
    """Unique within the source."""
    split: str
    """One of SPLITS."""
    text: str
    """The transcript as the source has it."""
    audio: Audio
    speaker: str = ""
    """Speaker id, the unit of bootstraps and leak checks. Empty if unknown."""
    meta: dict[str, str] = field(default_factory=dict)
    """Columns for slices: gender, variant, accent, ..."""


class PartExample(Example):
    """An example whose audio is a part of a file, which is decoded on access. It can be pickled without the audio."""

    file: Path
    excerpt: Excerpt

    def __init__(self, *fields: Any):
        """Take the fields of Example in their order, with the path of the file as `audio`, then the part."""
        names = ("id", "split", "text", "file", "speaker", "meta", "excerpt")
        self.__dict__.update(zip(names, fields, strict=True))

    @property
    def audio(self) -> bytes:
        """The part as a wav file. Raises AudioError if the file cannot be read or has no such part."""
        return self.excerpt.cut(self.file)


class Source(Protocol):
    """A corpus that yields its examples in a fixed order."""

    def identity(self) -> dict[str, str]:
        """Return everything that decides the corpus (versions, digests, seeds): part of every cache digest."""

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the examples of these splits, in an order that never changes for one identity."""

    # A source that can list its rows without reading or synthesising audio also has
    #     def outline(self) -> Iterator[Example]: the same examples in the same order, audio b"" or a path
    # so that curation can select among them before anything is decoded, and one that draws sentences instead of
    # speakers has
    #     shared_speakers: frozenset[str]: speakers whose rows are in several splits for that reason


def file_of(example: Example) -> Path | None:
    """Return the file of an example's audio, which is not read; None if it is part of a table or an archive."""
    fields = vars(example)
    path = fields.get("file") or fields.get("audio")
    return path if isinstance(path, Path) else None


def is_available(example: Example) -> bool:
    """Return True if the example's audio exists; audio within a data set is read for that."""
    audio = file_of(example) or example.audio
    return files.is_file(audio) if isinstance(audio, Path) else isinstance(audio, bytes)


def read_ahead(examples: Iterable[Example], n: int = 8) -> Iterator[Example]:
    """Yield the examples in order; those that synthesise their audio do so in a thread, up to `n` ahead.

    An example has `with_audio` if that is worth it. Its errors are raised in its turn.
    """
    waiting: deque[Future[Example]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for example in examples:
            waiting.append(thread.submit(getattr(example, "with_audio", lambda example=example: example)))
            if len(waiting) > n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def lines_sha256(lines: Iterable[str]) -> str:
    """Return the sha256 of lines, joined with line breaks: the digest of a corpus's rows or files."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
