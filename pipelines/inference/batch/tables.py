"""Tables of recordings: CSV, TSV or Parquet in, and the same rows with further columns out.

    audio,sentence,client_id          audio,sentence,client_id,transcript,confidence,audio_s,error,wer
    clips/1.mp3,Hej på dig!,anna      clips/1.mp3,Hej på dig!,anna,Hej på dig.,0.97,1.2,,0.0

The recording stands in a column `audio`, `path`, `file` or `file_name`, seen from the table's folder; in Parquet also
as bytes, or as the struct that Hugging Face data sets have. Rows come one after another, so a table may be of any
length, and cells of text tables stay as they are written. Audio files and folders of them are such a table, too.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Protocol, TextIO

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AUDIO_SUFFIXES

SUFFIXES = (".csv", ".tsv", ".parquet")
AUDIO = ("audio", "path", "file", "file_name")
REFERENCE = ("text", "sentence", "transcript_reference", "reference")
SPEAKER = ("speaker", "client_id", "speaker_id")
_BATCH_ROWS = 64
"""Rows of a Parquet file that are held at a time: recordings may lie in them."""
_GROUP_BYTES = 16 << 20
"""Of the groups of rows that are written; readers take them one by one, and small ones slowly."""

Cells = dict[str, Any]
"""Name of a column to its value in a row; None where there is none."""


class Table(Protocol):
    """Rows in order, to be read any number of times."""

    columns: Sequence[str]
    kinds: tuple[str, ...]
    """Endings of the files that `write` can make."""
    folder: Path
    """What the paths in it are seen from."""

    def digest(self) -> str:
        """Names the content: it changes when the table does."""

    def count(self) -> int:
        """How many rows there are. LabError as of `rows`."""

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        """These columns of every row. LabError for a row that is not one."""

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        """A table of the same rows with the columns `names`, of which `added` holds the cells, row by row."""


@dataclass(frozen=True)
class Recording:
    """One row."""

    audio: Path | bytes | None
    """None where the row has none."""
    name: str
    """What the table calls it, or holds instead of it; empty for sound without a name."""
    reference: str = ""
    """What was said, where the table tells."""
    speaker: str = ""


@dataclass(frozen=True)
class Recordings:
    """A table, and which of its columns hold what."""

    table: Table
    audio: str
    reference: str | None = None
    speaker: str | None = None

    def __iter__(self) -> Iterator[Recording]:
        for cells in self.table.rows([self.audio, *self._said]):
            audio, name = _sound(cells[self.audio], self.table.folder)
            yield Recording(audio, name, _text(cells, self.reference), _text(cells, self.speaker))

    def without_audio(self) -> Iterator[Recording]:
        """What was said in each row, and by whom: the column of audio, which may be most of a table, is not read."""
        if not self._said:
            yield from (Recording(None, "") for _ in range(self.count()))
            return
        for cells in self.table.rows(self._said):
            yield Recording(None, "", _text(cells, self.reference), _text(cells, self.speaker))

    def count(self) -> int:
        return self.table.count()

    @property
    def _said(self) -> list[str]:
        return [name for name in (self.reference, self.speaker) if name]


def open_table(path: Path) -> Table:
    """The table in a file. LabError where there is none, or it cannot be read."""
    if not path.is_file():
        raise LabError(f"there is no table {path}: name a file that ends in {', '.join(SUFFIXES)}")
    return Parquet(path) if path.suffix.lower() == ".parquet" else TextTable(path)


def recordings(
    table: Table, audio: str = "", reference: str = "", added: Sequence[str] = (), speaker: str = ""
) -> Recordings:
    """The table with its columns found by their usual names, or by those given; `added` must be new to it."""
    if taken := [name for name in added if name in table.columns]:
        raise LabError(f"the table has a column {taken[0]} already, which would be written: rename it there")
    found = _column(table, AUDIO, audio, "--audio-column")
    if found is None:
        raise LabError(
            f"no column of audio: expected one of {', '.join(AUDIO)}, got {', '.join(table.columns)}. "
            "Name it with --audio-column"
        )
    return Recordings(
        table,
        found,
        _column(table, REFERENCE, reference, "--reference-column"),
        _column(table, SPEAKER, speaker, "--speaker-column"),
    )


def audio_in(folder: Path) -> list[Path]:
    """Every audio file in `folder` and below, sorted; LabError where there is none."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise LabError(f"no audio in {folder}: expected files that end in {', '.join(AUDIO_SUFFIXES)}")
    return found


class Listing:
    """Audio files as a table of one column; `seen_from` is the folder that the paths in it are seen from.

    Without it they stay as they are named.
    """

    columns = ("audio",)
    kinds = (".csv", ".tsv")

    def __init__(self, files: Sequence[Path], seen_from: Path | None = None):
        self.files, self.seen_from, self.folder = files, seen_from, seen_from or Path()

    def digest(self) -> str:
        """Of paths and sizes."""
        known = ((self._name(path), path.stat().st_size if path.is_file() else -1) for path in self.files)
        return hashlib.sha256("".join(f"{name}\t{size}\n" for name, size in known).encode()).hexdigest()

    def count(self) -> int:
        return len(self.files)

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        return ({"audio": self._name(path)} for path in self.files)

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        rows = ([self._name(file), *(cells[name] for name in names)] for file, cells in zip(self.files, added))
        _write_text(path, [*self.columns, *names], rows, "\t" if path.suffix.lower() == ".tsv" else ",")

    def _name(self, path: Path) -> str:
        if self.seen_from is None:
            return str(path)
        try:
            return PurePath(os.path.relpath(at_home(path), self.folder)).as_posix()
        except ValueError:  # on another drive of Windows
            return str(at_home(path).absolute())


class TextTable:
    """CSV with `,` or (Swedish Excel) `;` and quotes; TSV without: there a `"` is a letter like any other."""

    def __init__(self, path: Path):
        self.path, self.folder, self.kinds = path, path.absolute().parent, (path.suffix.lower(),)

    @cached_property
    def columns(self) -> list[str]:
        header = next(self._lines(), None)
        if header is None:
            raise LabError(f"{self.path} is empty: expected a header and rows")
        if len({*header[1]}) < len(header[1]):
            raise LabError(f"{self.path} names a column twice: got {', '.join(header[1])}")
        return header[1]

    def digest(self) -> str:
        return manifest.sha256(self.path)

    def count(self) -> int:
        return sum(1 for _ in self._rows())

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        places = {name: self.columns.index(name) for name in columns}
        return ({name: cells[place].strip() for name, place in places.items()} for cells in self._rows())

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        rows = ([*cells, *(more[name] for name in names)] for cells, more in zip(self._rows(), added, strict=True))
        _write_text(path, [*self.columns, *names], rows, self._delimiter)

    def _rows(self) -> Iterator[list[str]]:
        n = len(self.columns)
        lines = self._lines()
        next(lines)
        for line, cells in lines:
            if len(cells) != n:
                raise LabError(
                    f"{self.path.name} line {line}: a row must have the header's {n} cells, got {len(cells)}: "
                    f"put quotes round a text that holds {self._delimiter!r}"
                )
            yield cells

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Number and cells of each row that is not blank, the header first."""
        with _readable(self.path) as file:
            if self._delimiter == "\t":
                yield from ((n, line.rstrip("\r\n").split("\t")) for n, line in enumerate(file, 1) if line.strip())
                return
            reader = csv.reader(file, delimiter=self._delimiter, strict=True)
            yield from ((reader.line_num, cells) for cells in reader if any(cells))

    @cached_property
    def _delimiter(self) -> str:
        if self.path.suffix.lower() == ".tsv":
            return "\t"
        with _readable(self.path) as file:
            first = file.readline()
        return ";" if ";" in first and "," not in first else ","


class Parquet:
    """A Parquet file, read some rows at a time."""

    kinds = (".parquet",)

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
                yield from batch.to_pylist()

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        import pyarrow
        import pyarrow.parquet

        added = iter(added)
        with self._open() as file:
            fields = [pyarrow.field(n, pyarrow.string() if n in _OF_TEXT else pyarrow.float64()) for n in names]
            schema = pyarrow.schema([*file.schema_arrow, *fields], metadata=file.schema_arrow.metadata)
            with pyarrow.parquet.ParquetWriter(path, schema) as writer:
                for batches in _groups(file.iter_batches(_BATCH_ROWS)):
                    group = pyarrow.Table.from_batches(batches)
                    more = [next(added) for _ in range(group.num_rows)]
                    arrays = [pyarrow.array([cells[f.name] for cells in more], f.type) for f in fields]
                    writer.write_table(pyarrow.Table.from_arrays([*group.columns, *arrays], schema=schema))

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            # through a buffer, a group of rows is read as it is asked for: others' files may be one group
            with pyarrow.parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                yield file
        except pyarrow.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise LabError(f"{self.path} cannot be read as Parquet: {reason}. Write it again") from None


def _groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Batches of rows collected to some _GROUP_BYTES."""
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


_OF_TEXT = ("transcript", "error")


def _column(table: Table, usual: Sequence[str], asked: str, option: str) -> str | None:
    if asked:
        if asked in table.columns:
            return asked
        raise LabError(f"{option}: no column {asked!r}, the table has {', '.join(table.columns)}")
    known = {name.strip().lower(): name for name in reversed(table.columns)}
    return next((known[name] for name in usual if name in known), None)


def _sound(cell: Any, folder: Path) -> tuple[Path | bytes | None, str]:
    """What a cell holds, and what it calls it."""
    if isinstance(cell, dict):
        name, held = cell.get("path"), cell.get("bytes")
        return (held, str(name or "")) if isinstance(held, bytes) else _sound(name, folder)
    if isinstance(cell, bytes):
        return cell, ""
    if isinstance(cell, str) and cell:
        return folder / at_home(Path(cell)), cell
    return None, "" if cell in (None, "") else str(cell)


def at_home(path: Path) -> Path:
    """`path` with what `~` stands for, or as it is where that is nobody's."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _text(cells: Cells, column: str | None) -> str:
    value = cells[column] if column else None
    return "" if value is None else str(value)


def _write_text(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], delimiter: str) -> None:
    """A cell of TSV holds no tab and no line break, and needs no quotes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if delimiter == "\t":
            file.write("\t".join(header) + "\n")
            file.writelines("\t".join(_one_line(cell) for cell in cells) + "\n" for cells in rows)
            return
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if cell is None else cell for cell in cells] for cells in rows)


def _one_line(cell: Any) -> str:
    return "" if cell is None else " ".join(str(cell).split()) if "\t" in str(cell) or "\n" in str(cell) else str(cell)


@contextmanager
def _readable(path: Path) -> Iterator[TextIO]:
    """A text file open for reading; what is wrong with its letters or its quotes is one line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        raise LabError(f"{path} is not UTF-8: save it as UTF-8") from None
    except csv.Error as error:
        raise LabError(f"{path} is no CSV: {error}. Mind its quotes") from None
