"""The rows of a feedback log: its columns, how a row becomes a line, and how a log is read.

    <log>.csv           audio, output, flag, username, timestamp, reference, wer, model
    audio/<random>.wav  recordings that their speakers let us keep

The first five columns are those of Gradio's old flag file. The room feedback writes logs, the source feedback makes
examples of them.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.infra.csv_log import CsvLog

COLUMNS = ("audio", "output", "flag", "username", "timestamp", "reference", "wer", "model")
FLAGS = ("right", "wrong")

# What a spreadsheet would run as a formula: at the start of a cell, or after the semicolon that Swedish Excel takes
# for the separator. Full-width signs count in some locales. An apostrophe in front makes it text.
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
        encode_cell=lambda cell: _FORMULA_START.sub(r"\1'", cell),
        decode_cell=lambda cell: _ESCAPED_START.sub(r"\1", cell),
    )


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows as they were given to `feedback.append`, oldest first; an empty list if there is no log.

    Raises LabError for a log with other columns.
    """
    return open_log(path).read()
