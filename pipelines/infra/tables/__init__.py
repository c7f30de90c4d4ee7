"""Read the tables that people and programs write, row by row: CSV, TSV, JSON lines and .xlsx.

| question | rule, for each file |
|---|---|
| encoding | a byte order mark (UTF-8, UTF-16), else UTF-8, else Windows-1252 if only its usual letters occur (Excel) |
| delimiter | Excel's first line `sep=;`, else the one of `,` `;` tab `|` that splits the header into most columns |
| quotes, not tabs | a cell may be quoted, with quotes in it doubled (RFC 4180) |
| quotes, tabs | see `text_table.py`: pandas and Excel quote, Common Voice and Google Sheets do not |
| row names | R writes them without a header: a first column of distinct integers gets an empty name |
| missing values | an empty cell, JSON's null and NaN; in metadata also the words of MISSING_WORDS |
| one column twice | refused, regardless of case and blanks; columns without a name are not used |
| unequal rows | refused with the number of the line; surplus empty cells are dropped |
"""

from __future__ import annotations

from pathlib import Path

from pipelines.infra.errors import LabError
from pipelines.infra.tables.cells import Cells, is_missing
from pipelines.infra.tables.encoding import read_text
from pipelines.infra.tables.json_table import JsonTable
from pipelines.infra.tables.text_table import TextTable
from pipelines.infra.tables.workbook import Workbook

__all__ = ["SUFFIXES", "Cells", "JsonTable", "TextTable", "Workbook", "is_missing", "open_table", "read_text"]

TEXT_SUFFIXES, JSON_SUFFIXES, WORKBOOK_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".json"), (".xlsx", ".xlsm")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *WORKBOOK_SUFFIXES)
FOREIGN_SUFFIXES = (".xls", ".xlsb", ".ods", ".numbers")
"""Tables of other programs, which are refused with the way to convert them."""


def open_table(path: Path) -> TextTable | JsonTable | Workbook:
    """Open the table in a file; nothing is read yet. Raises LabError for a format that is not read."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LabError(
            f"the table {path.name} must be one of {', '.join(SUFFIXES)}: save it as .xlsx or as CSV in UTF-8"
        )
    if suffix in JSON_SUFFIXES:
        return JsonTable(path)
    return Workbook(path) if suffix in WORKBOOK_SUFFIXES else TextTable(path)
