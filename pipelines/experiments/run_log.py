"""The history of experiments: `runs/experiments.csv`, one row for each tuned model that was scored on a test set.

Rows are only ever added. Any number of processes may add to it, and what a crash left of a last row is removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import manifest
from pipelines.infra.csv_log import CsvLog
from pipelines.recipes import digest
from pipelines.recipes.base_settings import flatten

FILE = "experiments.csv"
COLUMNS = (
    "when", "recipe", "recipe_digest", "cache", "model", "code", "seed", "test_set", "normaliser", "n", "wer", "low",
    "high", "machine", "training_seconds", "steps", "report",
)  # fmt: skip
"""`recipe_digest` is that of all settings but the seed; `cache` and `model` are digests; `code` is that of the lab's
sources when it scored; `low` and `high` end the 95 % interval of `wer`; `report` is a folder, as seen from the runs."""
LOCK_TIMEOUT_S = 60.0
_SHOWN = ("when", "recipe", "seed", "model", "test_set", "n", "wer", "low", "high", "training_seconds", "report")


def add(report: EvalReport, runs: Path) -> bool:
    """Add the row of a tuned model's test report; whether there was one to add.

    An untuned model, a rehearsal and another split have no row; a model has one row per test set and normaliser.
    """
    told = report.lineage
    rehearsed = flatten(told.get("settings") or {}).get("training.fast_dev_run")
    if report.split != "test" or not told.get("digest") or not report.test_set or rehearsed:
        return False
    row = {name: " ".join(str(value).split()) for name, value in _row(report, runs).items()}
    if _is_known(row, read(runs)):  # without the lock: a second call touches nothing
        return False
    log = _log(runs)
    with log.locked():
        if _is_known(row, log.read()):
            return False
        log.append(row)
        return True


def read(runs: Path) -> list[dict[str, str]]:
    """The rows, oldest first; none where there is no history yet. What a crash left of a row is left out.

    Raises LabError for a file with other columns.
    """
    return _log(runs).read()


def in_words(rows: list[dict[str, str]]) -> str:
    """The rows as a table for a terminal, and what to do with them."""
    if not rows:
        return "no tuned model was scored on a test set yet\nNext: python -m pipelines run --recipe tour"
    shown = [[row[name] for name in _SHOWN] for row in rows]
    widths = [max(map(len, column)) for column in zip(_SHOWN, *shown, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (_SHOWN, *shown)]
    recipes = [row["recipe"] for row in rows if row["test_set"] == rows[-1]["test_set"]]
    return "\n".join([*lines, f"Next: python -m pipelines compare {' '.join(dict.fromkeys(recipes))}"])


def _row(report: EvalReport, runs: Path) -> dict[str, Any]:
    told, (low, high) = report.lineage, report.score.ci95
    settings = flatten(told["settings"])
    lasting = {name: value for name, value in settings.items() if name != "training.seed"}
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": told["recipe"],
        "recipe_digest": digest(lasting),
        "cache": told["cache"],
        "model": told["digest"],
        "code": manifest.code_sha256(),
        "seed": told["seed"],
        "test_set": report.test_set,
        "normaliser": report.normaliser,
        "n": report.score.n,
        "wer": f"{report.score.wer:.6f}",
        "low": f"{low:.6f}",
        "high": f"{high:.6f}",
        "machine": told["machine"],
        "training_seconds": told["training_seconds"],
        "steps": settings["training.steps"],
        "report": Path(os.path.relpath(report.folder, runs)).as_posix(),
    }


def _is_known(row: Mapping[str, str], rows: list[dict[str, str]]) -> bool:
    named = ("model", "test_set", "normaliser")
    return any(all(row[name] == other[name] for name in named) for other in rows)


def _log(runs: Path) -> CsvLog:
    return CsvLog(
        runs / FILE,
        COLUMNS,
        is_complete=lambda row: bool(row["report"]) and (runs / row["report"]).is_dir(),
        lock_timeout_s=LOCK_TIMEOUT_S,
    )
