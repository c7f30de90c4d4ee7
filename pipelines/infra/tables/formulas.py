"""Cells that no spreadsheet runs as a formula: every CSV and TSV file of the lab is written and read through these.

A transcript, a file name or a cell of somebody else's table may begin with `=`. An apostrophe before it makes the cell
text for a spreadsheet. Reading removes the apostrophe.
"""

from __future__ import annotations

import re
from typing import Any

# Spreadsheets run these at the start of a cell, or after a semicolon, the separator of Swedish Excel. Full-width signs
# count in some locales. A number with a sign is no formula.
_FORMULA = r"(?='*[=+\-@\t\r＝＋－＠])"
_START = re.compile(rf"(^|;\s*){_FORMULA}")
_ESCAPED_START = re.compile(rf"(^|;\s*)'{_FORMULA}")
_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)?(?:[eE][+-]?\d+)?", re.ASCII)


def encode_cell(cell: Any) -> Any:
    """Return a cell that no spreadsheet runs as a formula; values that are no text stay as they are."""
    if not isinstance(cell, str) or _NUMBER.fullmatch(cell):
        return cell
    return _START.sub(r"\1'", cell)


def decode_cell(cell: Any) -> Any:
    """Return the cell that `encode_cell` was called with."""
    return _ESCAPED_START.sub(r"\1", cell) if isinstance(cell, str) and "'" in cell else cell
