"""Every scoring of a test split: a line of `runs/test_scorings.csv`, a file that only grows.

A test split answers once. Whoever scores many models, or one model with many settings, and keeps the best, has selected
on it, and its figure is no longer one of unseen speech. The lab never selects by it; what people do shows here.

Rows are appended as infra/csv_log.py describes.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.experiments.evaluation import EvalReport
from pipelines.infra.csv_log import CsvLog
from pipelines.recipes import digest
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

NAME = "test_scorings.csv"
COLUMNS = ("when", "recipe", "model", "model_digest", "tuned", "report", "test_set")
"""`when` in UTC; `model_digest` names the weights, whatever they are called; `report` as seen from the runs folder."""
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
    log = _log(runs)

    def lacking() -> bool:
        return made or not any(_same(row, other, "report", "test_set") for other in log.read())

    if lacking():
        with log.locked():
            if lacking():
                log.append(row)
    return _count(log.read(), row)


def looks(runs: Path, report: EvalReport) -> Looks | None:
    """The counts for a report's model and test set; None for a report that the log does not know."""
    told, rows = {"report": _seen_from(runs, report.folder), "test_set": report.test_set}, read(runs)
    own = next((row for row in rows if _same(row, told, *told)), None)
    return own and _count(rows, own)


def read(runs: Path) -> list[dict[str, str]]:
    """Return the rows of the log in the folder `runs`, oldest first; an empty list if there is no log."""
    return _log(runs).read()


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


def _log(runs: Path) -> CsvLog:
    return CsvLog(runs / NAME, COLUMNS, is_complete=lambda row: bool(_TEST_SET.fullmatch(row["test_set"])))
