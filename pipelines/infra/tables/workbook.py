"""Tables in .xlsx files. openpyxl reads them; it is optional."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.tables.cells import Cells, check_unique
from pipelines.infra.tables.encoding import readable

_MAX_UNPACKED_BYTES, _MAX_RATIO = 50_000_000, 100
"""A workbook may unpack to this many bytes, or to this many times its size: tables reach about 20 times."""


class Workbook:
    """The only sheet with rows of an Excel workbook, as values, not formulas."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def columns(self) -> list[str]:
        """The cells of the first row that is not empty; empty for a column without a name."""
        columns = ["" if cell is None else str(cell) for cell in self._records[0][1]]
        check_unique(self.path.name, columns)
        return columns

    def rows(self) -> Iterator[tuple[str, Cells]]:
        """Yield the position of each row, for errors, and its cells: str, int, float, or None if empty."""
        columns = self.columns
        for number, cells in self._records[1:]:
            where = f"{self.path.name} row {number}"
            if any(cell is not None for cell in cells[len(columns) :]):
                raise LabError(f"{where}: a row must have the header's {len(columns)} cells, got more: correct it")
            cells = [*cells[: len(columns)], *[None] * (len(columns) - len(cells))]
            yield where, dict(zip(columns, cells, strict=True))

    @cached_property
    def _records(self) -> list[tuple[int, list[Any]]]:
        """The number and the cells of each row that is not empty."""
        try:
            import openpyxl
        except ImportError:
            raise missing_package("openpyxl", "openpyxl>=3.1", f"reading {self.path.name}") from None
        try:
            with readable(self.path), open(self.path, "rb") as file:
                self._refuse_bomb(file)
                book = openpyxl.load_workbook(file, read_only=True, data_only=True)
                sheets = {sheet.title: list(_sheet_rows(sheet)) for sheet in book.worksheets}
        except (ValueError, LookupError, TypeError, AttributeError, SyntaxError, zipfile.BadZipFile) as error:
            raise LabError(f"{self.path.name} cannot be read as .xlsx: {error}. Save it again, or as CSV") from None
        filled = [title for title, rows in sheets.items() if rows]
        if len(filled) != 1:
            raise LabError(
                f"{self.path.name} must have rows on one sheet, got {' and '.join(filled) or 'none'}: keep one sheet"
            )
        return sheets[filled[0]]

    def _refuse_bomb(self, file: Any) -> None:
        """Raise LabError if the workbook's XML is far larger than the file, as no table is."""
        size, unpacked = self.path.stat().st_size, sum(one.file_size for one in zipfile.ZipFile(file).infolist())
        if unpacked > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * size):
            raise LabError(
                f"{self.path.name} has {size / 1e6:.1f} MB and unpacks to {unpacked / 1e6:.0f} MB, which no table "
                "does: save it again, or as CSV"
            )


def _sheet_rows(sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    sheet.reset_dimensions()  # some programs state too few
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        values = [_workbook_value(cell) for cell in cells]
        while values and values[-1] is None:
            values.pop()
        if values:
            yield number, values


def _workbook_value(cell: Any) -> Any:
    """Return a cell as str, int, float, bool or None; whole numbers as int, because Excel knows only floats."""
    if isinstance(cell, str):
        return cell.replace("_x000D_", "").replace("\0", "").strip() or None
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    return cell if cell is None or isinstance(cell, int | float) else str(cell)
