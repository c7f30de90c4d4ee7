"""Tables in CSV and TSV files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TextIO

from pipelines.infra.errors import LabError
from pipelines.infra.tables.cells import Cells, check_unique
from pipelines.infra.tables.encoding import detect_encoding, readable
from pipelines.infra.tables.formulas import decode_cell

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


class TextTable:
    """A CSV or TSV file, read in constant memory."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns; empty for one without a name. Raises LabError if there is no header."""
        header = next(self._parsed(), None)
        if header is None:
            raise LabError(f"{self.path.name} is empty: expected a header and rows")
        columns = [cell.strip() for cell in header[1]]
        check_unique(self.path.name, columns)
        return ["", *columns] if self._has_row_names(len(columns)) else columns

    def rows(self) -> Iterator[tuple[str, Cells]]:
        """Yield the position of each row, for errors, and its cells without blanks around them."""
        for line, cells in self.records():
            yield f"{self.path.name} line {line}", dict(zip(self.columns, map(str.strip, cells), strict=True))

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line number and the cells of each row. Raises LabError for an unusable row."""
        n, lines = len(self.columns), self._parsed()
        next(lines)
        for line, cells in lines:
            cells = cells[:n] if not any(cells[n:]) else cells
            if len(cells) != n:
                raise LabError(
                    f"{self.path.name} line {line}: a row must have the header's {n} cells, got {len(cells)}: "
                    f"put quotes around a text that holds {self.delimiter!r} or a line break, or write .jsonl"
                )
            yield line, cells

    @cached_property
    def delimiter(self) -> str:
        return self._layout[1]

    @cached_property
    def quoted(self) -> bool:
        """Return True if `"` around a cell belongs to the format, not to the text."""
        return self.delimiter != "\t" or self._is_quoted()

    @cached_property
    def _layout(self) -> tuple[int, str]:
        """The number of lines before the header, and the delimiter."""
        with self._open() as file:
            first = file.readline()
        if stated := re.fullmatch(r'"?sep=(.)"?', first.strip("\r\n"), re.IGNORECASE):
            return 1, stated[1]
        candidates = "\t,;|" if self.path.suffix.lower() == ".tsv" else ",;\t|"
        return 0, max(candidates, key=lambda delimiter: len(next(csv.reader([first], delimiter=delimiter), [])))

    @cached_property
    def _encoding(self) -> str:
        return detect_encoding(self.path)

    @contextmanager
    def _open(self) -> Iterator[TextIO]:
        with readable(self.path), open(self.path, encoding=self._encoding, newline="") as file:
            yield file

    def _parsed(self) -> Iterator[tuple[int, list[str]]]:
        """Yield line number and cells of each row that is not blank, including the header."""
        if not self.quoted:
            yield from ((line, [decode_cell(unquoted(cell)) for cell in cells]) for line, cells in self._split())
            return
        with self._open() as file:
            lines = (line.replace("\0", "") for line in file)
            n_before = self._layout[0]
            for _ in range(n_before):
                next(lines)
            reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
            try:
                for cells in reader:
                    if any(map(str.strip, cells)):
                        yield n_before + reader.line_num, [*map(decode_cell, cells)]
            except csv.Error as error:
                raise LabError(
                    f"{self.path.name} line {n_before + reader.line_num}: quotes must be balanced, got: {error}. "
                    "Double every quote inside a quoted text, or write .jsonl"
                ) from None

    def _split(self) -> Iterator[tuple[int, list[str]]]:
        """Yield line number and cells of each line that is not blank, as if quotes had no meaning."""
        with self._open() as file:
            for number, line in enumerate(file, 1):
                if line.strip() and number > self._layout[0]:
                    yield number, line.replace("\0", "").rstrip("\r\n").split(self.delimiter)

    def _is_quoted(self) -> bool:
        """Decide whether the cells of a tab-separated file are quoted.

        If all lines have equally many cells, quotes protect nothing. They are the format's if every cell with a quote
        is a well-formed quoted cell, and one of them holds doubled quotes or is in the header. Then a lone quote, which
        Common Voice has, makes all quotes text. Otherwise the file is quoted if it has equal rows when it is read so.
        """
        lines = self._split()
        header = next(lines, (0, []))[1]
        lengths, well_formed, doubled = set(), True, bool(header) and all(map(_QUOTED.fullmatch, header))
        for _, cells in lines:
            lengths.add(len(cells))
            for cell in cells:
                if '"' in cell:
                    well_formed = well_formed and _QUOTED.fullmatch(cell.strip()) is not None
                    doubled = doubled or '""' in cell[1:-1]
        if lengths <= {len(header)} or lengths == {len(header) + 1}:
            return well_formed and doubled
        return self._has_equal_rows_if_quoted()

    def _has_equal_rows_if_quoted(self) -> bool:
        with self._open() as file:
            try:
                rows = csv.reader((line.replace("\0", "") for line in file), delimiter=self.delimiter, strict=True)
                lengths = [len(cells) for cells in rows if any(map(str.strip, cells))][self._layout[0] :]
            except csv.Error:
                return False
        return bool(lengths) and {*lengths[1:]} in ({lengths[0]}, {lengths[0] + 1})

    def _has_row_names(self, n: int) -> bool:
        """Return whether all of several rows have one cell more than the header, the first a distinct integer."""
        names, last_is_filled = set(), False
        rows = self._parsed()
        next(rows)
        for _, cells in rows:
            if len(cells) != n + 1 or not cells[0].isdigit() or cells[0] in names:
                return False
            names.add(cells[0])
            last_is_filled = last_is_filled or bool(cells[-1])
        return last_is_filled and len(names) > 1


def unquoted(cell: str) -> str:
    '''Undo CSV quoting, as in `"""Hej"", sa hon."`; cells without doubled quotes inside stay as they are.'''
    inner = cell.strip()[1:-1]
    if '""' in inner and _QUOTED.fullmatch(cell.strip()):
        return inner.replace('""', '"')
    return cell
