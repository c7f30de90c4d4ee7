"""Parquet files with an audio column and a text column, on the Hub or on a disk, read row group by row group.

Splits and columns are taken from the settings, else guessed from names and types; every guess is logged and is part of
the identity. The audio of a row is read on first access, with that of its row group: rows that an earlier run finished
are skipped without fetching it, and memory is that of the row groups in use.
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

from pipelines.features.sources import SPLITS, Example, lines_sha256
from pipelines.features.sources.parquet.layout import NOTHING, Declared, Layout, LayoutSettings, infer_layout
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.manifest import sha256
from pipelines.speech import text as speech_text
from pipelines.speech.intervals import MIN_SPEAKERS

logger = logging.getLogger(__name__)

HASHED_BYTES = 200_000_000
"""Below this size of all local files, `identity` hashes their content; from it on, sizes and modification times."""
_NO_META: Mapping[str, str] = MappingProxyType({})


class Files(Protocol):
    """Parquet files in a folder or on the Hub."""

    where: str
    """Path or URI, for messages."""

    def identity(self) -> dict[str, str]:
        """Return everything that decides the content of the files."""

    def names(self) -> list[str]:
        """Return the relative paths of the Parquet files, with `/`, sorted."""

    def declared(self) -> Declared:
        """Return configuration to split to files as the data set declares them, or nothing."""

    def open(self, name: str) -> Any:
        """Open a file for pyarrow, with random access."""


@dataclass(frozen=True)
class LocalFiles:
    """A Parquet file, or a folder with Parquet files at any depth."""

    path: str

    @property
    def where(self) -> str:
        return self.path

    def identity(self) -> dict[str, str]:
        """Return a digest of path, size and sha256 of every file; from HASHED_BYTES on, of modification times."""
        files = [self._folder / name for name in self.names()]
        by_content = sum(path.stat().st_size for path in files) < HASHED_BYTES
        stamps = (
            f"{name} {path.stat().st_size} {sha256(path) if by_content else path.stat().st_mtime_ns}"
            for name, path in zip(self.names(), files, strict=True)
        )
        files_by = "content" if by_content else "size and time"
        return {"kind": "parquet", "files_by": files_by, "files_sha256": lines_sha256(stamps)}

    def names(self) -> list[str]:
        path = Path(self.path).expanduser()
        if path.is_file():
            return [path.name]
        if not path.is_dir():
            raise LabError(f"source.path must name a Parquet file or a folder of them, got {self.path!r}: correct it")
        files = (file.relative_to(path) for file in path.rglob("*.parquet") if file.is_file())
        return sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))

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
    """The corpus in `files`. `seed` draws speakers, or rows without a speaker, from train for a split such as `5%`."""

    files: Files
    settings: LayoutSettings = field(default_factory=LayoutSettings)
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return the identity of the files, the splits and the columns. Raises LabError for an ambiguous choice."""
        layout, columns = self._layout, self._layout.columns
        return {
            **self.files.identity(),
            **({"seed": str(self.seed)} if layout.drawn else {}),
            **({"drawn": "sentences"} if self._few_speakers else {}),
            "config": layout.config,
            **{f"splits.{split}": layout.names.get(split, NOTHING) for split in SPLITS},
            "columns": json.dumps([columns.audio, columns.text, columns.speaker, *columns.meta]),
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the examples of these splits: train, validation, test, each in the order of its files and rows.

        Rows drawn from train keep their position in it. Raises LabError at once for files that cannot be used, and
        during iteration for one that cannot be read.
        """
        layout = self._layout
        read = {*splits, *(["train"] if {*splits} & layout.drawn.keys() else [])}
        files = [(split, name) for split in SPLITS if split in read for name in layout.splits.get(split, ())]
        rows = (example for split, name in files for example in self._rows(split, name))
        return (example for example in rows if example.split in splits)

    def outline(self) -> Iterator[Example]:
        """Return all examples; their audio is not read before it is accessed."""
        return self.examples()

    @cached_property
    def _few_speakers(self) -> frozenset[str]:
        """The training speakers, if they are too few to hold some out: sentences are drawn then. Else an empty set.

        Row groups are read until there are enough speakers, which is one or two in most data sets.
        """
        layout, column = self._layout, self._layout.columns.speaker
        if not (layout.drawn and column):
            return frozenset()
        speakers: set[str] = set()
        for name in layout.splits.get("train", ()):
            file = self._opened(name)
            for group in range(file.groups):
                speakers |= {_string(value) for value in file.read(group, [column]).column(0).unique().to_pylist()}
                if len(speakers - {""}) >= MIN_SPEAKERS:
                    return frozenset()
        return frozenset(speakers - {""})

    @property
    def shared_speakers(self) -> frozenset[str]:
        """Speakers in several splits, because sentences were drawn and not speakers."""
        return self._few_speakers

    @cached_property
    def _layout(self) -> Layout:
        files = self.files
        layout = infer_layout(
            files.where, files.names(), lambda name: self._opened(name).schema, self.settings, files.declared()
        )
        self._log(layout)
        return layout

    def _log(self, layout: Layout) -> None:
        where, columns = self.files.where, layout.columns
        splits = ", ".join(f"{split} = {name}" for split, name in layout.names.items())
        logger.info(
            f"{where}{f' ({layout.config})' if layout.config else ''}: {splits}; "
            f"audio = {columns.audio}, text = {columns.text}, speaker = {columns.speaker or 'unknown'}"
            + (f"; not used: {', '.join(layout.unused)}" if layout.unused else "")
        )
        if partial := [name for name in layout.names.values() if "partial-" in name]:
            logger.info(
                f"note: {', '.join(partial)} is only the head of the data set that the Hub converted, not all of it"
            )
        if missing := [split for split in SPLITS if split not in layout.names]:
            logger.info(
                f"note: {where} has no {' and no '.join(missing)}: mix it with a source that does, or draw "
                "held-out rows from train (source.splits.validation = '5%')"
            )

    def _opened(self, name: str) -> _OpenFile:
        return _OpenFile(f"{self.files.where}/{name}", self.files.open(name))

    def _rows(self, split: str, name: str) -> Iterator[Example]:
        columns, file = self._layout.columns, self._opened(name)
        needed = [column for column in (columns.text, columns.speaker, columns.audio) if column]
        if missing := {*needed} - {*file.schema.names}:
            raise LabError(f"{file.where} must have the columns of the first file, lacks {', '.join(sorted(missing))}")
        light = [*needed[:-1], *(column for column in columns.meta if column in file.schema.names)]
        number = 0
        for group in range(file.groups):
            audio = _AudioColumn(file, group, columns.audio)
            for index, row in enumerate(file.read(group, light).to_pylist()):
                yield self._example(f"{name.removesuffix('.parquet')}:{number}", split, row, _AudioCell(audio, index))
                number += 1

    def _example(self, id: str, split: str, row: dict[str, Any], audio: _AudioCell) -> RowExample:
        columns, drawn = self._layout.columns, self._layout.drawn
        speaker = _string(row[columns.speaker]) if columns.speaker else ""
        if drawn and split == "train":
            sentence = speech_text.normalise(_string(row[columns.text])) if self._few_speakers else ""
            split = _drawn_split(drawn, sentence or speaker or id, self.seed)
        meta = {column: _meta_cell(columns.labels.get(column), column, row.get(column)) for column in columns.meta}
        meta = {column: value for column, value in meta.items() if value}
        return RowExample(id, split, _string(row[columns.text]), audio, speaker, meta)


class RowExample(Example):
    """An Example whose audio is read from its row group on access; pickling includes the bytes."""

    def __init__(
        self,
        id: str,
        split: str,
        text: str,
        audio: bytes | _AudioCell,
        speaker: str = "",
        meta: Mapping[str, str] = _NO_META,
    ):
        self.__dict__.update(id=id, split=split, text=text, cell=audio, speaker=speaker, meta=dict(meta))

    @property
    def audio(self) -> bytes:
        cell = self.__dict__["cell"]
        return cell if isinstance(cell, bytes) else cell.read()

    def __reduce__(self):
        return Example, (self.id, self.split, self.text, self.audio, self.speaker, self.meta)


@dataclass(frozen=True)
class _AudioCell:
    """The audio of one row, read on access."""

    column: _AudioColumn
    index: int

    def read(self) -> bytes:
        return self.column[self.index]


class _AudioColumn:
    """The audio column of one row group, read once on first access and freed with the last of its examples."""

    def __init__(self, file: _OpenFile, group: int, column: str):
        self._file, self._group, self._column = file, group, column
        self._values, self._lock = None, threading.Lock()

    def __getitem__(self, index: int) -> bytes:
        """Return the bytes of a row; empty if it has none: curation rejects it."""
        with self._lock:
            if self._values is None:
                self._values = self._file.read(self._group, [self._column]).column(0)
        value = self._values[index].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value or b""


class _OpenFile:
    """A Parquet file for several threads; pyarrow's reader serves one at a time."""

    def __init__(self, where: str, file: Any):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise missing_package("pyarrow", "pyarrow>=18", "reading Parquet") from None
        self.where, self._lock = where, threading.Lock()
        # pre_buffer combines reads of neighbouring columns: each request over a network takes time
        self._file = self._read(lambda: parquet.ParquetFile(file, pre_buffer=True))
        self.schema, self.groups = self._file.schema_arrow, self._file.num_row_groups

    def read(self, group: int, columns: list[str]) -> Any:
        """Read columns of a row group as a pyarrow Table."""
        with self._lock:
            return self._read(lambda: self._file.read_row_group(group, columns=columns))

    def _read(self, action: Callable[[], Any]) -> Any:
        """Return the result of `action`. Raises LabError for a damaged file."""
        import pyarrow

        try:
            return action()
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            cause = str(error).partition("\n")[0][:200]
            raise LabError(f"{self.where} must be a whole Parquet file, got: {cause}. Replace it") from None


def _drawn_split(drawn: Mapping[str, float], speaker: str, seed: int) -> str:
    """Draw the split by a hash of the speaker, or of what is drawn instead: independent of all other rows."""
    draw = int(hashlib.sha256(f"{seed}\n{speaker}".encode()).hexdigest()[:12], 16) / 16**12
    for split, share in drawn.items():
        if draw < share:
            return split
        draw -= share
    return "train"


def _meta_cell(labels: list[str] | None, column: str, value: Any) -> str:
    """Format a cell for slices: the name of a class label, the file name of a path."""
    if labels and isinstance(value, int):
        return labels[value] if 0 <= value < len(labels) else ""
    return PurePosixPath(value).name if column.lower() == "path" and value else _string(value)


def _string(value: Any) -> str:
    return "" if value is None else str(value)
