"""Corrections: what people decided about transcripts while they listened, as a table that curation reads.

    id, before, verdict, after, reviewer, time, model, heard

One row for each decision, appended in one write under a lock: several people can review at once, and a crash loses at
most the row that was being written. The last row of a clip counts. A row counts only while the clip's transcript is
still `before`: a corpus that has changed since then is not spoilt.

A table that a spreadsheet saved is read too, with semicolons, another order of columns or Windows-1252. The review page
writes it in the lab's form again before it appends to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.infra import manifest
from pipelines.infra.csv_log import CsvLog
from pipelines.infra.errors import LabError
from pipelines.infra.tables import TextTable

logger = logging.getLogger(__name__)

COLUMNS = ("id", "before", "verdict", "after", "reviewer", "time", "model", "heard")
VERDICTS = ("accept", "correct", "reject")


@dataclass(frozen=True)
class Correction:
    """The last decision about a clip."""

    before: str
    verdict: str
    """One of VERDICTS."""
    after: str
    """The transcript of `correct`; otherwise empty."""


def open_log(path: Path) -> CsvLog:
    """Return the table at `path`, to append to."""
    return CsvLog(
        path,
        COLUMNS,
        remedy="free space or name another table",
        foreign_remedy="restore the columns, or name another table",
    )


def take_over(path: Path) -> None:
    """Write a table that a spreadsheet saved in the lab's form; the spreadsheet's stays beside it as `.edited`.

    Call it within the lock of the log. Raises LabError for a table with other columns, OSError for a full disk.
    """
    if _is_foreign(path):
        rows, log = _rows(path), open_log(path)
        shutil.copyfile(path, path.with_name(f"{path.name}.edited"))
        manifest.write_bytes(path, log.header_line() + b"".join(map(log.line, rows)))
        logger.info(f"note: {path} was saved by another program: its {len(rows)} rows are kept, with commas in UTF-8")


def _rows(path: Path) -> list[dict[str, str]]:
    if not _is_foreign(path):
        return open_log(path).read()
    table = TextTable(path)
    if {*COLUMNS} - {*table.columns}:
        open_log(path).check_header(path.read_bytes().partition(b"\n")[0])
    return [{name: str(cells[name] or "") for name in COLUMNS} for _, cells in table.rows()]


def _is_foreign(path: Path) -> bool:
    """Return whether another program wrote the table: its header or its encoding differs.

    The last line does not count: a crash may have cut it within a letter.
    """
    content = path.read_bytes() if path.is_file() else b""
    header, end, _ = content.partition(b"\n")
    expected = open_log(path).header_line().rstrip()
    if not end and expected.startswith(content):
        return False
    try:
        content[: content.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError:
        return True
    return header.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r") != expected


def read(path: Path) -> dict[str, Correction]:
    """Return the last decision about each clip by its id; empty if there is no table.

    Raises LabError for a table with other columns, with an unknown verdict or with a correction without text.
    """
    decisions: dict[str, Correction] = {}
    for row in _rows(path):
        if row["verdict"] not in VERDICTS:
            raise LabError(
                f"{path}, clip {row['id'][:60]!r}: verdict must be one of {', '.join(VERDICTS)}, got "
                f"{row['verdict'][:40]!r}: correct it"
            )
        if row["verdict"] == "correct" and not row["after"].strip():
            raise LabError(
                f"{path}, clip {row['id'][:60]!r}: a correction needs a text in `after`, got none: write it, or make "
                "the verdict reject"
            )
        after = row["after"] if row["verdict"] == "correct" else ""
        decisions[row["id"]] = Correction(row["before"], row["verdict"], after)
    return decisions


def load(path: str) -> dict[str, Correction]:
    """Read the table of `curation.corrections`. Raises LabError if it is missing."""
    if not path:
        return {}
    table = Path(path).expanduser()
    if not table.is_file():
        raise LabError(
            f"curation.corrections must name the table that the command review writes, got {path!r}, which is no file"
        )
    return read(table)


def digest_of(decisions: Mapping[str, Correction]) -> str:
    """Return 16 hexadecimal digits of what the decisions do; reviewers and times do not count."""
    lines = sorted(json.dumps([name, *vars(one).values()]) for name, one in decisions.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
