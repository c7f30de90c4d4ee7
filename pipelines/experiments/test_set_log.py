"""The log of test-set scorings: `runs/test_scorings.csv`, one row each time a test split is scored.

Scoring many models on a test split and keeping the best one selects on it; its score is then no longer that of unseen
speech. The lab itself never selects on a test split. This log shows how often people looked at it.
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
"""`when` in UTC; `model_digest` identifies the weights; `report` is a folder relative to the runs."""
_TEST_SET = re.compile(r"[0-9a-f]{16}")
"""The last cell of a complete row."""


@dataclass(frozen=True)
class ScoringCounts:
    """How often a test set was scored, including the scoring of a given report."""

    test_set: str
    """Digest of the test set (evaluation.test_set)."""
    recipe: str
    scorings: int
    """Scorings of any model, by any recipe."""
    of_model: int
    """Scorings of the report's model; of an untuned model only those by this recipe, as each recipe scores its base."""
    models: int
    """Number of different models that this recipe scored on it, including the untuned one."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"test set {self.test_set}: scoring number {self.scorings}, {self.of_model} of them of this model; "
            f"models that recipe {self.recipe} scored on it: {self.models}"
        )

    def warning(self) -> str:
        """Return a warning if this model was scored more than once, else an empty string."""
        return (
            f"warning: this model was scored on this test set {self.of_model} times, and recipe {self.recipe} scored "
            f"{self.models} models on it: choosing the best one selects on the test split; choose by validation instead"
            if self.of_model > 1
            else ""
        )


def add(
    runs: Path, report: EvalReport, ref: ModelRef, recipe: str, *, is_new: bool, now: datetime | None = None
) -> ScoringCounts:
    """Add a scoring to the log of the folder `runs` and return the counts.

    A report that is not new is added only if it is missing from the log. `now` defaults to the current time. Raise
    LabError for a log that cannot be written.
    """
    row = {
        "when": (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "recipe": recipe,
        "model": " ".join(report.model.split()),
        "model_digest": digest(whisper_model.identity(ref)),
        "tuned": "yes" if "digest" in report.lineage else "no",
        "report": _relative_to(runs, report.folder),
        "test_set": report.test_set,
    }
    log = _log(runs)

    def is_missing() -> bool:
        return is_new or not any(_same(row, other, "report", "test_set") for other in log.read())

    if is_missing():
        with log.locked():
            if is_missing():
                log.append(row)
    return _count(log.read(), row)


def counts_of(runs: Path, report: EvalReport) -> ScoringCounts | None:
    """Return the counts for a report's model and test set, or None if the report is not in the log."""
    key, rows = {"report": _relative_to(runs, report.folder), "test_set": report.test_set}, read(runs)
    row = next((row for row in rows if _same(row, key, *key)), None)
    return row and _count(rows, row)


def read(runs: Path) -> list[dict[str, str]]:
    """Return the rows of the log in the folder `runs`, oldest first; an empty list if there is no log."""
    return _log(runs).read()


def _count(rows: list[dict[str, str]], scoring: dict[str, str]) -> ScoringCounts:
    of_test_set = [row for row in rows if _same(row, scoring, "test_set")]
    same_model = ("model_digest",) if scoring["tuned"] == "yes" else ("model_digest", "recipe")
    return ScoringCounts(
        scoring["test_set"],
        scoring["recipe"],
        len(of_test_set),
        sum(_same(row, scoring, *same_model) for row in of_test_set),
        len({row["model_digest"] for row in of_test_set if _same(row, scoring, "recipe")}),
    )


def _same(one: dict[str, str], other: dict[str, str], *columns: str) -> bool:
    return all(one[name] == other[name] for name in columns)


def _relative_to(runs: Path, folder: Path) -> str:
    return folder.relative_to(runs).as_posix() if folder.is_relative_to(runs) else str(folder)


def _log(runs: Path) -> CsvLog:
    return CsvLog(runs / NAME, COLUMNS, is_complete=lambda row: bool(_TEST_SET.fullmatch(row["test_set"])))
