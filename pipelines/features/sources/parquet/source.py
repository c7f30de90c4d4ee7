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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol

from pipelines.features.sources import SPLITS, Audio, Example, NoAudio, NoTranscript
from pipelines.features.sources.parquet.columns import Columns, check_excerpts, is_string, unequal
from pipelines.features.sources.parquet.columns import split_column as split_column_of
from pipelines.features.sources.parquet.layout import NOTHING, Declared, Layout, LayoutSettings, infer_layout
from pipelines.features.sources.parquet.readers import Reader, open_reader
from pipelines.features.sources.splits import canonical_split
from pipelines.infra.errors import LabError
from pipelines.speech import audio_cells
from pipelines.speech import text as speech_text
from pipelines.speech.audio import AudioError
from pipelines.speech.intervals import MIN_SPEAKERS

logger = logging.getLogger(__name__)

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

    # Files on a disk also have `beside` and `stamp_recordings`, see local.py: rows may name recordings beside them.


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
            **({"split_column": layout.split_column} if layout.split_column else {}),
            "columns": json.dumps([columns.audio, columns.text, columns.speaker, *columns.meta]),
            **self._recordings(),
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the examples of these splits: train, validation, test, each in the order of its files and rows.

        Rows drawn from train, and all rows if a column decides, keep their position. Rows with an unknown split are
        included only if `splits` are all of SPLITS: curation rejects them. Raises LabError at once for files that
        cannot be used, and during iteration for one that cannot be read.
        """
        layout = self._layout
        read = {"", *splits, *(["train"] if {*splits} & layout.drawn.keys() else [])}
        files = [(split, name) for name, split in layout.files.items() if split in read]
        rows = (example for split, name in files for example in self._rows(split, name))
        every = {*SPLITS} <= {*splits}
        return (example for example in rows if example.split in splits or (every and example.split not in SPLITS))

    def outline(self) -> Iterator[Example]:
        """Return all examples; their audio is not read before it is accessed."""
        return self.examples()

    @cached_property
    def _schemas(self) -> dict[str, Any]:
        return {}

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
        with_paths = hasattr(files, "beside")
        layout = infer_layout(files.where, files.names(), self, self.settings, files.declared(), with_paths)
        self._log(layout)
        check_excerpts(files.where, self.schema(next(iter(layout.files))), layout.columns.audio)
        return layout

    def schema(self, name: str) -> Any:
        """Return the pyarrow schema of a file, which is opened once for it."""
        if name not in self._schemas:
            self._schemas[name] = self._opened(name).schema
        return self._schemas[name]

    def values(self, name: str, column: str) -> set[str]:
        """Return the values of a column of text."""
        file = self._opened(name)
        cells = (cell for group in range(file.groups) for cell in file.read(group, [column]).column(0).to_pylist())
        return {_string(cell) for cell in cells}

    def _recordings(self) -> dict[str, str]:
        """Return the identity of the recordings that rows without bytes name; empty if none of them exists."""
        if not hasattr(self.files, "beside"):
            return {}
        recordings: set[Path] = set()
        for name in self._layout.files:
            file = self._opened(name)
            path_column, bytes_column = _path_column(file.schema, self._layout.columns.audio)
            if path_column:
                groups = (n for n in range(file.groups) if not bytes_column or file.may_lack_bytes(n, bytes_column))
                tables = (file.read(group, [path_column]) for group in groups)
                named = {_path_cell(cell) for one in tables for cell in one.column(0).to_pylist()}
                recordings |= {path for one in named if one and (path := self.files.beside(name, one))}
        return self.files.stamp_recordings(sorted(recordings))

    def _log(self, layout: Layout) -> None:
        where, columns = self.files.where, layout.columns
        splits = ", ".join(f"{split} = {name}" for split, name in layout.names.items())
        splits += f" (column {layout.split_column})" if layout.split_column else ""
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

    def _opened(self, name: str) -> Reader:
        return open_reader(f"{self.files.where}/{name}", self.files.open(name))

    def _rows(self, split: str, name: str) -> Iterator[Example]:
        layout, columns, file = self._layout, self._layout.columns, self._opened(name)
        if difference := unequal(file.schema, columns, self.settings.columns):
            raise LabError(f"{file.where} must have the columns of the first file, {difference}: make them equal")
        split_column = layout.split_column or split_column_of(file.schema)
        wanted = [columns.text, columns.speaker, *columns.meta, split_column]
        light = [column for column in dict.fromkeys(wanted) if column in file.schema.names]
        number = 0
        for group in range(file.groups):
            audio = _AudioColumn(self.files, name, file, group, columns)
            for index, row in enumerate(file.read(group, light).to_pylist()):
                row_split = self._split(file.where, number, split, _string(row.get(split_column)))
                id = f"{name.removesuffix('.parquet').removesuffix('.arrow')}:{number}"
                number += 1
                if row_split is not None:
                    yield self._example(id, row_split, row, _AudioCell(audio, index))

    def _split(self, where: str, number: int, split: str, cell: str) -> str | None:
        """Return the split of a row; None if it is not used. Raises LabError if file and column disagree."""
        layout, is_set = self._layout, any(self.settings.splits.values())
        if layout.split_column:
            return layout.split_of.get(cell, None if is_set else canonical_split(cell))
        if not is_set and canonical_split(cell) in SPLITS and canonical_split(cell) != split:
            raise LabError(
                f"{where} row {number}: the column split says {cell!r}, and the file is read as {split}: correct it, "
                f"or keep the file's split with source.splits.{split}={layout.names[split]!r}"
            )
        return split

    def _example(self, id: str, split: str, row: dict[str, Any], audio: _AudioCell) -> RowExample:
        columns, drawn = self._layout.columns, self._layout.drawn
        speaker = _string(row[columns.speaker]) if columns.speaker else ""
        if drawn and split == "train":
            sentence = speech_text.normalise(_string(row[columns.text])) if self._few_speakers else ""
            split = _drawn_split(drawn, sentence or speaker or id, self.seed)
        meta = {column: _meta_cell(columns.labels.get(column), column, row.get(column)) for column in columns.meta}
        meta = {column: value for column, value in meta.items() if value}
        text = NoTranscript() if row[columns.text] is None else str(row[columns.text])
        return RowExample(id, split, text, audio, speaker, meta)


class RowExample(Example):
    """An Example whose audio is read from its row group on access; pickling includes the bytes."""

    def __init__(
        self,
        id: str,
        split: str,
        text: str,
        audio: Audio | _AudioCell,
        speaker: str = "",
        meta: Mapping[str, str] = _NO_META,
    ):
        self.__dict__.update(id=id, split=split, text=text, cell=audio, speaker=speaker, meta=dict(meta))

    @property
    def audio(self) -> Audio:
        cell = self.__dict__["cell"]
        return cell.read() if isinstance(cell, _AudioCell) else cell

    def __reduce__(self):
        return Example, (self.id, self.split, self.text, self.audio, self.speaker, self.meta)


@dataclass(frozen=True)
class _AudioCell:
    """The audio of one row, read on access."""

    column: _AudioColumn
    index: int

    def read(self) -> Audio:
        return self.column[self.index]


class _AudioColumn:
    """The audio column of one row group, read once on first access and freed with the last of its examples."""

    def __init__(self, files: Files, name: str, file: Reader, group: int, columns: Columns):
        self._files, self._name, self._file, self._group = files, name, file, group
        self._columns = [column for column in (columns.audio, columns.rate) if column]
        self._values, self._lock = None, threading.Lock()

    def __getitem__(self, index: int) -> Audio:
        """Return the audio of a row, or NoAudio with the reason."""
        with self._lock:
            if self._values is None:
                self._values = self._file.read(self._group, self._columns)
        try:
            cell, *rate = (_value(column[index]) for column in self._values.columns)
            audio = audio_cells.parse(cell, *rate)
        except AudioError as error:
            return NoAudio(error.reason, error.detail)
        return (
            self._recording(audio)
            if isinstance(audio, str)
            else audio or NoAudio("missing", "the row holds neither the bytes of a recording nor a path")
        )

    def _recording(self, path: str) -> Path | NoAudio:
        beside = getattr(self._files, "beside", None)
        where = "beside its Parquet file" if beside else "in the data set"
        recording = beside(self._name, path) if beside else None
        return recording or NoAudio("missing", f"the row holds no bytes, and there is no file {path!r} {where}")


def _value(scalar: Any) -> Any:
    """Return a pyarrow scalar as a Python value; a list of numbers as an array."""
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _value(scalar[name]) for name in scalar.type.names} if scalar.is_valid else None
    values = getattr(scalar, "values", None)
    if not isinstance(values, pyarrow.Array):
        return scalar.as_py()
    nested = hasattr(values, "offsets")
    return [_value(one) for one in values] if nested else values.to_numpy(zero_copy_only=False)


def _path_column(schema: Any, audio: str) -> tuple[str, str]:
    """Return the column of paths of recordings and that of their bytes; empty if there is none."""
    import pyarrow.types as types

    if is_string(schema.field(audio).type):
        return audio, ""
    kind = schema.field(audio).type
    fields = {kind.field(n).name for n in range(kind.num_fields)} if types.is_struct(kind) else set()
    return (f"{audio}.path", f"{audio}.bytes") if {"path", "bytes"} <= fields else ("", "")


def _path_cell(cell: Any) -> str:
    """Return the path in a cell of a column of paths, or of a struct that was read for its path."""
    return _string(cell.get("path") if isinstance(cell, dict) else cell)


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
    return "" if value is None or value != value else str(value)
