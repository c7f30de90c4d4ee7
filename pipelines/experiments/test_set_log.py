"""Every scoring of a test split: a line of `runs/test_scorings.csv`, a file that only grows.

A test split answers once. Whoever scores many models, or one model with many settings, and keeps the best, has selected
on it, and its figure is no longer one of unseen speech. The lab never selects by it; what people do shows here.

A line is written at once, under a lock. One that a crash cut short stays where it is, is passed over, and the next
begins on a line of its own.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.experiments.evaluation import EvalReport
from pipelines.infra.errors import LabError
from pipelines.recipes import digest
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

NAME = "test_scorings.csv"
COLUMNS = ("when", "recipe", "model", "model_digest", "tuned", "report", "test_set")
"""`when` in UTC; `model_digest` names the weights, whatever they are called; `report` as seen from the runs folder."""
LOCK_TIMEOUT_S = 10.0
_TEST_SET = re.compile(r"[0-9a-f]{16}")
"""The last cell of every whole line: a shorter one was cut."""


@dataclass(frozen=True)
class Looks:
    """How often a test set was scored, a report's own scoring included."""

    test_set: str
    """Its digest (evaluation.test_set)."""
    recipe: str
    scorings: int
    """Of any model, by any recipe."""
    of_model: int
    """Of the report's model; of an untuned one those of this recipe: each recipe scores its own base once."""
    models: int
    """Different models that this recipe scored on it, the untuned one included."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"test set {self.test_set}: scoring number {self.scorings}, {self.of_model} of them of this model; "
            f"models that recipe {self.recipe} scored on it: {self.models}"
        )

    def warning(self) -> str:
        """What is to be said after a scoring that was not this model's first; empty after the first."""
        return (
            f"warning: this model was scored on this test set {self.of_model} times, and recipe {self.recipe} scored "
            f"{self.models} models on it: whoever picks the best of them selects on the test split; pick by validation"
            if self.of_model > 1
            else ""
        )


def note(
    runs: Path, report: EvalReport, ref: ModelRef, recipe: str, *, made: bool, now: datetime | None = None
) -> Looks:
    """Add the report's scoring to the log of the folder `runs`, and count.

    A report that was read and not `made` is no scoring; one that the log does not know is added all the same. `now` is
    the clock's time unless told. Raises LabError for a log that cannot be written.
    """
    row = {
        "when": (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "recipe": recipe,
        "model": " ".join(report.model.split()),
        "model_digest": digest(whisper_model.identity(ref)),
        "tuned": "yes" if "digest" in report.lineage else "no",
        "report": _seen_from(runs, report.folder),
        "test_set": report.test_set,
    }
    log = runs / NAME

    def lacking() -> bool:
        return made or not any(_same(row, other, "report", "test_set") for other in read(log))

    if lacking():
        with _locked(log):
            if lacking():
                _append(log, row)
    return _count(read(log), row)


def looks(runs: Path, report: EvalReport) -> Looks | None:
    """The counts for a report's model and test set; None for a report that the log does not know."""
    told, rows = {"report": _seen_from(runs, report.folder), "test_set": report.test_set}, read(runs / NAME)
    own = next((row for row in rows if _same(row, told, *told)), None)
    return own and _count(rows, own)


def read(log: Path) -> list[dict[str, str]]:
    """The whole lines of a log, oldest first; none where there is no log."""
    lines = log.read_bytes().split(b"\n") if log.is_file() else []
    return [row for line in lines if (row := _parsed(line))]


def _count(rows: list[dict[str, str]], own: dict[str, str]) -> Looks:
    here = [row for row in rows if _same(row, own, "test_set")]
    among = ("model_digest",) if own["tuned"] == "yes" else ("model_digest", "recipe")
    return Looks(
        own["test_set"],
        own["recipe"],
        len(here),
        sum(_same(row, own, *among) for row in here),
        len({row["model_digest"] for row in here if _same(row, own, "recipe")}),
    )


def _same(one: dict[str, str], other: dict[str, str], *columns: str) -> bool:
    return all(one[name] == other[name] for name in columns)


def _seen_from(runs: Path, folder: Path) -> str:
    return folder.relative_to(runs).as_posix() if folder.is_relative_to(runs) else str(folder)


def _parsed(line: bytes) -> dict[str, str] | None:
    """The row in a line; None for the header, and for one that is not whole."""
    try:
        cells = next(csv.reader([line.decode()], strict=True), [])
    except (csv.Error, UnicodeDecodeError):
        return None
    whole = len(cells) == len(COLUMNS) and _TEST_SET.fullmatch(cells[-1])
    return dict(zip(COLUMNS, cells, strict=True)) if whole else None


def _line(cells: tuple[str, ...]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode()


def _append(log: Path, row: dict[str, str]) -> None:
    """In one write, on a line of its own, down to the disk."""
    with open(log, "ab+", buffering=0) as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        head = {b"": _line(COLUMNS), b"\n": b""}.get(file.read(1), b"\n")
        file.write(head + _line(tuple(row[name] for name in COLUMNS)))
        os.fsync(file.fileno())


@contextmanager
def _locked(log: Path) -> Iterator[None]:
    """Alone with the log, among all threads and processes. What the disk refuses becomes one line."""
    import filelock

    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(log.with_name(f".{log.name}.lock"), timeout=LOCK_TIMEOUT_S):
            yield
    except filelock.Timeout:
        raise LabError(f"{log} was locked by another process for {LOCK_TIMEOUT_S:g} s: try again") from None
    except OSError as error:
        raise LabError(f"{log} cannot be written ({error.strerror or error}): free space or make it writable") from None
