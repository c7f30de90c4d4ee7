"""The rows of a feedback log: its columns, how a row becomes a line, and how a log is read.

    <log>.csv           audio, output, flag, username, timestamp, reference, wer, model
    audio/<random>.wav  recordings that their speakers let us keep

The first five columns are those of Gradio's old flag file. The room feedback writes logs, the source feedback makes
examples of them.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from pathlib import Path

from pipelines.infra.errors import LabError

COLUMNS = ("audio", "output", "flag", "username", "timestamp", "reference", "wer", "model")
FLAGS = ("right", "wrong")
HEADER = ",".join(COLUMNS).encode()

# What a spreadsheet would run as a formula: at the start of a cell, or after the semicolon that Swedish Excel takes
# for the separator. Full-width signs count in some locales. An apostrophe in front makes it text.
_FORMULA = r"(?='*[=+\-@\t\r＝＋－＠])"
_ARM = re.compile(rf"(^|;\s*){_FORMULA}")
_DISARM = re.compile(rf"(^|;\s*)'{_FORMULA}")

_LOG = logging.getLogger(__name__)


def read(log: Path) -> list[dict[str, str]]:
    """The rows of `log` as they were given to `feedback.append`, oldest first; none where there is no log yet.

    Raises LabError for a log with other columns. A row that a crash cut short is left out, with a warning.
    """
    if not log.is_file():
        return []
    header, *lines = log.read_bytes().split(b"\n")
    check_header(log, header)
    rows = [parse(row) for row in lines if row.strip()]
    if None in rows:
        _LOG.warning("%s: %d rows are not whole and were left out", log, rows.count(None))
    return [row for row in rows if row is not None]


def check_header(log: Path, header: bytes) -> None:
    """Raises LabError for a first line that does not name COLUMNS."""
    if header.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r") != HEADER:
        found = header[:200].decode("utf-8", "replace").strip()
        raise LabError(
            f"{log} has the columns {found!r}, expected {HEADER.decode()!r}: move it away or name another log"
        )


def line(row: dict[str, str]) -> bytes:
    """A row as a line of the log, its newline included."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(_ARM.sub(r"\1'", row[name]) for name in COLUMNS)
    return out.getvalue().encode()


def parse(line: bytes) -> dict[str, str] | None:
    """The row in one line of the log, or None where it is not whole."""
    try:
        cells = next(csv.reader([line.decode().rstrip("\r")], strict=True))
    except (csv.Error, UnicodeDecodeError):
        return None
    if len(cells) != len(COLUMNS):
        return None
    return {name: _DISARM.sub(r"\1", cell) for name, cell in zip(COLUMNS, cells, strict=True)}
