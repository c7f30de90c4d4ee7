"""Parquet files with an audio column and a text column, on the Hub or on a disk, read row group by row group.

Which files make which split, and which column is which, is taken from the settings, else guessed from names and types;
every guess is told and is part of the identity. The sound of a row is read when it is asked for, with that of its row
group: what another run has finished is passed over without fetching it, and memory is that of the row groups in use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.parquet.layout import NOTHING, Declared, Layout, Wishes, understand
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.manifest import sha256

logger = logging.getLogger(__name__)

HASHED_BYTES = 200_000_000
"""Below this many bytes of local Parquet, `identity` reads every byte; from here on it trusts sizes and times."""
_NOTHING_KNOWN: Mapping[str, str] = MappingProxyType({})


class Files(Protocol):
    """Parquet files somewhere."""

    where: str
    """The place, for messages."""

    def identity(self) -> dict[str, str]:
        """What decides every byte of the files."""

    def names(self) -> list[str]:
        """Paths of the Parquet files below the place, with `/`, sorted."""

    def declared(self) -> Declared:
        """Which file is which configuration and split, where the data set says so; empty where it does not."""

    def open(self, name: str) -> Any:
        """Something that pyarrow reads with random access."""


@dataclass(frozen=True)
class LocalFiles:
    """A Parquet file, or a folder that holds some at any depth."""

    path: str

    @property
    def where(self) -> str:
        return self.path

    def identity(self) -> dict[str, str]:
        """(path, size, sha256) of every file; from HASHED_BYTES on the time of change stands in for the sha256."""
        files = [self._folder / name for name in self.names()]
        by_content = sum(path.stat().st_size for path in files) < HASHED_BYTES
        stamps = (
            f"{name} {path.stat().st_size} {sha256(path) if by_content else path.stat().st_mtime_ns}"
            for name, path in zip(self.names(), files, strict=True)
        )
        digest = hashlib.sha256("\n".join(stamps).encode()).hexdigest()
        return {"kind": "parquet", "files_by": "content" if by_content else "size and time", "files_sha256": digest}

    def names(self) -> list[str]:
        path = Path(self.path).expanduser()
        if path.is_file():
            return [path.name]
        if not path.is_dir():
            raise LabError(f"source.path must name a Parquet file or a folder of them, got {self.path!r}: correct it")
        found = (file.relative_to(path) for file in path.rglob("*.parquet") if file.is_file())
        return sorted(file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts))

    def declared(self) -> Declared:
        return {}

    def open(self, name: str) -> Any:
        return str(self._folder / name)

    @property
    def _folder(self) -> Path:
        path = Path(self.path).expanduser()
        return path.parent if path.is_file() else path


@dataclass(frozen=True)
class ParquetSource:
    """The corpus in `files`. `seed` draws held-out speakers from train where that is wished (rows, where speakers are
    unknown); `log` is told what was understood."""

    files: Files
    wishes: Wishes = field(default_factory=Wishes)
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """The files' identity, and what was chosen of them. Raises LabError where a choice cannot be made."""
        layout, columns = self._layout, self._layout.columns
        return {
            **self.files.identity(),
            **({"seed": str(self.seed)} if layout.drawn else {}),
            "config": layout.config,
            **{f"splits.{split}": layout.names.get(split, NOTHING) for split in SPLITS},
            "columns": json.dumps([columns.audio, columns.text, columns.speaker, *columns.meta]),
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """The examples of these splits: train, validation, test, each in the order of its files and rows.

        Rows that are drawn from train stand where they stood there. Raises LabError at once for files that cannot be
        used, and in the middle where one cannot be read.
        """
        layout = self._layout
        read = {*splits, *(["train"] if {*splits} & layout.drawn.keys() else [])}
        files = [(split, name) for split in SPLITS if split in read for name in layout.splits.get(split, ())]
        rows = (example for split, name in files for example in self._rows(split, name))
        return (example for example in rows if example.split in splits)

    def outline(self) -> Iterator[Example]:
        """All examples; no sound is read as long as nobody asks for it."""
        return self.examples()

    @cached_property
    def _layout(self) -> Layout:
        files = self.files
        layout = understand(
            files.where, files.names(), lambda name: self._opened(name).schema, self.wishes, files.declared()
        )
        self._tell(layout)
        return layout

    def _tell(self, layout: Layout) -> None:
        where, columns = self.files.where, layout.columns
        splits = ", ".join(f"{split} = {name}" for split, name in layout.names.items())
        logger.info(
            f"{where}{f' ({layout.config})' if layout.config else ''}: {splits}; "
            f"audio = {columns.audio}, text = {columns.text}, speaker = {columns.speaker or 'unknown'}"
            + (f"; not used: {', '.join(layout.unused)}" if layout.unused else "")
        )
        if heads := [name for name in layout.names.values() if "partial-" in name]:
            logger.info(
                f"note: {', '.join(heads)} is only the head of the data set that the Hub converted, not all of it"
            )
        if lacking := [split for split in SPLITS if split not in layout.names]:
            logger.info(
                f"note: {where} gives no {' and no '.join(lacking)}: mix it with a source that does, or draw "
                "held-out rows from train (source.splits.validation = '5%')"
            )

    def _opened(self, name: str) -> _OpenFile:
        return _OpenFile(f"{self.files.where}/{name}", self.files.open(name))

    def _rows(self, split: str, name: str) -> Iterator[Example]:
        columns, file = self._layout.columns, self._opened(name)
        needed = [column for column in (columns.text, columns.speaker, columns.audio) if column]
        if lacking := {*needed} - {*file.schema.names}:
            raise LabError(f"{file.place} must have the columns of the first file, lacks {', '.join(sorted(lacking))}")
        light = [*needed[:-1], *(column for column in columns.meta if column in file.schema.names)]
        number = 0
        for group in range(file.groups):
            sounds = _Sounds(file, group, columns.audio)
            for index, row in enumerate(file.read(group, light).to_pylist()):
                yield self._example(f"{name.removesuffix('.parquet')}:{number}", split, row, _Sound(sounds, index))
                number += 1

    def _example(self, id: str, split: str, row: dict[str, Any], sound: _Sound) -> RowExample:
        columns, drawn = self._layout.columns, self._layout.drawn
        speaker = _string(row[columns.speaker]) if columns.speaker else ""
        split = _drawn_split(drawn, speaker or id, self.seed) if split == "train" else split
        meta = {column: _named(columns.labels.get(column), column, row.get(column)) for column in columns.meta}
        meta = {column: value for column, value in meta.items() if value}
        return RowExample(id, split, _string(row[columns.text]), sound, speaker, meta)


class RowExample(Example):
    """An Example whose sound is read from its row group when it is asked for; pickled, it takes the bytes along."""

    def __init__(
        self,
        id: str,
        split: str,
        text: str,
        audio: bytes | _Sound,
        speaker: str = "",
        meta: Mapping[str, str] = _NOTHING_KNOWN,
    ):
        self.__dict__.update(id=id, split=split, text=text, sound=audio, speaker=speaker, meta=dict(meta))

    @property
    def audio(self) -> bytes:
        sound = self.__dict__["sound"]
        return sound if isinstance(sound, bytes) else sound.read()

    def __reduce__(self):
        return Example, (self.id, self.split, self.text, self.audio, self.speaker, self.meta)


@dataclass(frozen=True)
class _Sound:
    """Where the sound of a row lies."""

    sounds: _Sounds
    index: int

    def read(self) -> bytes:
        return self.sounds[self.index]


class _Sounds:
    """The audio column of one row group, read once, at the first question; it goes with the last of its examples."""

    def __init__(self, file: _OpenFile, group: int, column: str):
        self._file, self._group, self._column = file, group, column
        self._values, self._lock = None, threading.Lock()

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a row; empty where the row has none: curation rejects it."""
        with self._lock:
            if self._values is None:
                self._values = self._file.read(self._group, [self._column]).column(0)
        value = self._values[index].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value or b""


class _OpenFile:
    """A Parquet file that any number of threads may ask; pyarrow's reader answers one at a time."""

    def __init__(self, place: str, file: Any):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise missing_package("pyarrow", "pyarrow>=18", "reading Parquet") from None
        self.place, self._lock = place, threading.Lock()
        # pre_buffer asks for neighbouring columns at once: over a network every question counts
        self._file = self._whole(lambda: parquet.ParquetFile(file, pre_buffer=True))
        self.schema, self.groups = self._file.schema_arrow, self._file.num_row_groups

    def read(self, group: int, columns: list[str]) -> Any:
        """These columns of a row group as a pyarrow Table."""
        with self._lock:
            return self._whole(lambda: self._file.read_row_group(group, columns=columns))

    def _whole(self, action: Callable[[], Any]) -> Any:
        """What pyarrow gives, or one line where the file is broken."""
        import pyarrow

        try:
            return action()
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            told = str(error).partition("\n")[0][:200]
            raise LabError(f"{self.place} must be a whole Parquet file, got: {told}. Replace it") from None


def _drawn_split(drawn: Mapping[str, float], who: str, seed: int) -> str:
    """By a hash of who speaks: no other row can change it, and each speaker is wholly in one split."""
    place = int(hashlib.sha256(f"{seed}\n{who}".encode()).hexdigest()[:12], 16) / 16**12
    for split, share in drawn.items():
        if place < share:
            return split
        place -= share
    return "train"


def _named(labels: list[str] | None, column: str, value: Any) -> str:
    """A cell for slices: the name behind a class label, the last part of a path."""
    if labels and isinstance(value, int):
        return labels[value] if 0 <= value < len(labels) else ""
    return PurePosixPath(value).name if column.lower() == "path" and value else _string(value)


def _string(value: Any) -> str:
    return "" if value is None else str(value)
