"""Tables in files, and lists of audio files as tables. Cells of text tables keep their text."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from pipelines.inference.batch.tables import Cells, Table, expand_user
from pipelines.infra import files, manifest, tables
from pipelines.infra.downloads.urls import Url
from pipelines.infra.errors import LabError, is_disk_full
from pipelines.infra.tables.formulas import encode_cell
from pipelines.speech.audio_files import AUDIO_SUFFIXES, find_audio

logger = logging.getLogger(__name__)

SUFFIXES, WRITTEN_SUFFIXES = (*tables.SUFFIXES, ".parquet"), (".csv", ".tsv", ".jsonl", ".parquet")
_BATCH_ROWS = 64
"""Rows of a Parquet file that are read at a time; they may contain audio."""
_GROUP_BYTES = 16 << 20
"""Size of the row groups that are written; readers load them one by one, and small ones are slow."""
_TEXT_COLUMNS = ("transcript", "error")
"""Added columns of type string; the others are float64."""


def open_table(path: Path) -> Table:
    """Open the table in a file. Raises LabError if it does not exist."""
    if not path.is_file():
        raise LabError(f"there is no table {path}: name a file that ends in {', '.join(SUFFIXES)}")
    if (suffix := path.suffix.lower()) == ".parquet":
        return ParquetTable(path)
    return TextTable(path) if suffix in tables.TEXT_SUFFIXES else RowTable(path)


def find_audio_files(folder: Path) -> list[Path]:
    """Return all audio files in `folder` and its subfolders, sorted; log what is skipped.

    Raises LabError if there are none.
    """
    found = find_audio(folder)
    if skipped := found.describe_skipped():
        logger.info(f"{folder}: {len(found.files)} recordings; skipped: {skipped}")
    if not found.files:
        raise LabError(
            f"no audio in {folder}: expected files that end in {', '.join(AUDIO_SUFFIXES)}"
            + (f"; skipped: {skipped}" if skipped else "")
        )
    return found.files


class FileList:
    """Audio files and addresses as a table with one column.

    Its paths are relative to `base`, or unchanged without it. Addresses are written without their secrets.
    """

    columns = ("audio",)
    suffixes = (".csv", ".tsv")

    def __init__(self, files: Sequence[Path | Url], base: Path | None = None):
        self.files, self.base, self.folder = files, base, base or Path()

    def digest(self) -> str:
        """Return a digest of the paths, addresses and sizes."""
        lines = (f"{self._name(file)}\t{_state(file)}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def count(self) -> int:
        return len(self.files)

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        return ({"audio": file if isinstance(file, Url) else self._name(file)} for file in self.files)

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        rows = ([self._name(file), *(cells[name] for name in names)] for file, cells in zip(self.files, added))
        _write_text(path, [*self.columns, *names], rows, "\t" if path.suffix.lower() == ".tsv" else ",")

    def _name(self, path: Path | Url) -> str:
        if self.base is None or isinstance(path, Url):
            return str(path)
        try:
            return PurePath(os.path.relpath(expand_user(path), self.folder)).as_posix()
        except ValueError:  # another drive on Windows
            return str(expand_user(path).absolute())


def _state(file: Path | Url) -> int | str:
    """Return the size of a file, -1 if there is none, or what identifies an address."""
    if isinstance(file, Url):
        return file.identity
    return file.stat().st_size if file.is_file() else -1


class _TableFile:
    """A table in one file."""

    def __init__(self, path: Path):
        self.path, self.folder, self._table = path, path.absolute().parent, tables.open_table(path)

    @property
    def columns(self) -> list[str]:
        return self._table.columns

    def digest(self) -> str:
        return manifest.sha256(self.path)


class TextTable(_TableFile):
    """A CSV or TSV file, which is written as it was read: same delimiter, same quoting."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.suffixes = (path.suffix.lower(),)

    def count(self) -> int:
        return sum(1 for _ in self._table.records())

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        indices = {name: self.columns.index(name) for name in columns}
        return ({name: cells[i].strip() for name, i in indices.items()} for _, cells in self._table.records())

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        records = zip(self._table.records(), added, strict=True)
        rows = ([*cells, *(more[name] for name in names)] for (_, cells), more in records)
        _write_text(path, [*self.columns, *names], rows, self._table.delimiter, self._table.quoted)


class RowTable(_TableFile):
    """A table of JSON lines, which is written as such, or an Excel workbook, which is written as CSV."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.suffixes = (".jsonl",) if isinstance(self._table, tables.JsonTable) else (".csv", ".tsv")

    def count(self) -> int:
        return sum(1 for _ in self._table.rows())

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        return ({name: cells.get(name) for name in columns} for _, cells in self._table.rows())

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        rows = ({**cells, **more} for (_, cells), more in zip(self._table.rows(), added, strict=True))
        if self.suffixes == (".jsonl",):
            with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            return
        columns = [*self.columns, *names]
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        _write_text(path, columns, ([row[name] for name in columns] for row in rows), delimiter)


class ParquetTable:
    """A Parquet file, read a few rows at a time."""

    suffixes = (".parquet",)

    def __init__(self, path: Path):
        self.path, self.folder = path, path.absolute().parent

    @cached_property
    def columns(self) -> list[str]:
        with self._open() as file:
            return file.schema_arrow.names

    def digest(self) -> str:
        return manifest.sha256(self.path)

    def count(self) -> int:
        with self._open() as file:
            return file.metadata.num_rows

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        with self._open() as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                batch.validate(full=True)  # text that is not UTF-8 is an ArrowInvalid
                yield from batch.to_pylist()

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        import pyarrow
        import pyarrow.parquet

        added = iter(added)
        with self._open() as file:
            fields = [pyarrow.field(n, pyarrow.string() if n in _TEXT_COLUMNS else pyarrow.float64()) for n in names]
            schema = pyarrow.schema([*file.schema_arrow, *fields], metadata=file.schema_arrow.metadata)
            with pyarrow.parquet.ParquetWriter(path, schema) as writer:
                for batches in _row_groups(file.iter_batches(_BATCH_ROWS)):
                    group = pyarrow.Table.from_batches(batches)
                    cells = [next(added) for _ in range(group.num_rows)]
                    arrays = [pyarrow.array([row[f.name] for row in cells], f.type) for f in fields]
                    writer.write_table(pyarrow.Table.from_arrays([*group.columns, *arrays], schema=schema))

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        if files.is_lfs_pointer(self.path):
            raise LabError(f"{self.path} is {files.LFS_ADVICE}")
        try:
            # with a buffer, a row group is read gradually: other writers may store everything in one group
            with pyarrow.parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            if is_disk_full(error):
                raise
            files.check_readable(self.path)
            reason = str(error).splitlines()[0]
            raise LabError(f"{self.path} cannot be read as Parquet: {reason}. Write it again") from None


def _row_groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Collect record batches to groups of about _GROUP_BYTES."""
    group: list[Any] = []
    n_bytes = 0
    for batch in batches:
        group.append(batch)
        n_bytes += batch.nbytes
        if n_bytes >= _GROUP_BYTES:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group


def _write_text(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], delimiter: str, quoted: bool | None = None
) -> None:
    """Write CSV, or TSV without quotes: its cells contain no tab and no line break. `quoted`: TSV with quotes.

    Cells that a spreadsheet would run as a formula are written as text (infra/tables/formulas.py).
    """
    header, rows = [*map(encode_cell, header)], (map(encode_cell, cells) for cells in rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        if delimiter == "\t" and not quoted:
            file.write("\t".join(header) + "\n")
            file.writelines("\t".join(_tsv_cell(cell) for cell in cells) + "\n" for cells in rows)
            return
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if cell is None else cell for cell in cells] for cells in rows)


def _tsv_cell(value: Any) -> str:
    cell = "" if value is None else str(value)
    return " ".join(cell.split()) if re.search("[\t\n\r]", cell) else cell
