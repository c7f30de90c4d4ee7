"""The feedback log: corrections of transcripts that users of the app submit.

    <log>.csv           audio, output, flag, username, timestamp, reference, wer, model
    audio/<random>.wav  recordings that were stored with consent

The first five columns are those of Gradio's flag file. inference/feedback.py writes the log;
features/sources/feedback.py reads it as training examples.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.infra.csv_log import CsvLog

COLUMNS = ("audio", "output", "flag", "username", "timestamp", "reference", "wer", "model")
FLAGS = ("right", "wrong")

# A spreadsheet runs these as formulas at the start of a cell, or after a semicolon, the separator of Swedish Excel.
# Full-width signs count in some locales. An apostrophe before them makes the cell text.
_FORMULA = r"(?='*[=+\-@\t\r＝＋－＠])"
_FORMULA_START = re.compile(rf"(^|;\s*){_FORMULA}")
_ESCAPED_START = re.compile(rf"(^|;\s*)'{_FORMULA}")


def open_log(path: Path) -> CsvLog:
    """Return the feedback log at `path`; cells that a spreadsheet would run as a formula are stored as text."""
    return CsvLog(
        path,
        COLUMNS,
        remedy="free space or name another log",
        foreign_remedy="move it away or name another log",
        encode_cell=encode_cell,
        decode_cell=decode_cell,
    )


def encode_cell(cell: str) -> str:
    """Return a cell that no spreadsheet runs as a formula."""
    return _FORMULA_START.sub(r"\1'", cell)


def decode_cell(cell: str) -> str:
    """Return the cell that `encode_cell` was called with."""
    return _ESCAPED_START.sub(r"\1", cell)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows as passed to `inference.feedback.append`, oldest first; an empty list if there is no log.

    Raises LabError for a log with other columns.
    """
    return open_log(path).read()
