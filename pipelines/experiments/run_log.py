"""The log of experiments: `runs/experiments.csv`, one row for each tuned model that was scored on a test set.

Rows are only added (infra/csv_log.py): failed ideas stay in the log.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import environment, manifest
from pipelines.infra.csv_log import CsvLog
from pipelines.recipes import digest
from pipelines.recipes.base_settings import flatten
from pipelines.recipes.commands import command
from pipelines.speech.intervals import SPEAKERS

FILE = "experiments.csv"
COLUMNS = (
    "when", "recipe", "recipe_digest", "cache", "model", "code", "seed", "test_set", "normaliser", "n", "wer", "low",
    "high", "machine", "training_seconds", "steps", "report",
)  # fmt: skip
"""`recipe_digest` covers all settings except the seed; `cache` and `model` are digests; `code` is the digest of the
lab's sources at scoring time; `low` and `high` are the 95 % interval of `wer` over speakers, empty if there is one
speaker or they are unknown; `report` is a path relative to the runs.
"""
LOCK_TIMEOUT_S = 60.0
_PRINTED = (
    "when",
    "recipe",
    "seed",
    "model",
    "test_set",
    "n",
    "wer",
    "low",
    "high",
    "training_seconds",
    "report",
)


def add(report: EvalReport, runs: Path) -> bool:
    """Add a row for a tuned model's test report; return True if a row was added.

    Untuned models, fast-dev runs and other splits get no row. A model has one row per test set and normaliser.
    """
    lineage = report.lineage
    is_dev_run = flatten(lineage.get("settings") or {}).get("training.fast_dev_run")
    if report.split != "test" or not lineage.get("digest") or not report.test_set or is_dev_run:
        return False
    row = {name: " ".join(str(value).split()) for name, value in _row(report, runs).items()}
    if _is_logged(row, read(runs)):  # without the lock: a repeated call writes nothing
        return False
    log = _log(runs)
    with log.locked():
        if _is_logged(row, log.read()):
            return False
        log.append(row)
        return True


def read(runs: Path) -> list[dict[str, str]]:
    """Return the rows, oldest first; empty if there is no log. Incomplete rows of a crash are left out.

    Raise LabError for a file with other columns.
    """
    return _log(runs).read()


def format_table(rows: list[dict[str, str]], runs: str | Path = "") -> str:
    """Return the rows as a text table, with the next command."""
    if not rows:
        return f"no tuned model was scored on a test set yet\nNext: {command('run', '--recipe', 'tour', runs=runs)}"
    table = [[row[name] for name in _PRINTED] for row in rows]
    widths = [max(map(len, column)) for column in zip(_PRINTED, *table, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (_PRINTED, *table)]
    names = [_name(row, runs) for row in rows if row["test_set"] == rows[-1]["test_set"]]
    return "\n".join([*lines, f"Next: {command('compare', *dict.fromkeys(names), runs=runs)}"])


def _name(row: Mapping[str, str], runs: str | Path) -> str:
    """Return the recipe of a row, or the folder of its report if that is not among the recipe's own reports."""
    report = Path(row["report"])
    return row["recipe"] if report.parts[0] == row["recipe"] else str(environment.runs_folder(runs) / report)


def _row(report: EvalReport, runs: Path) -> dict[str, Any]:
    lineage, over_speakers = report.lineage, report.score.over == SPEAKERS and report.score.ci95
    low, high = (f"{end:.6f}" for end in report.score.ci95) if over_speakers else ("", "")
    settings = flatten(lineage["settings"])
    without_seed = {name: value for name, value in settings.items() if name != "training.seed"}
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": lineage["recipe"],
        "recipe_digest": digest(without_seed),
        "cache": lineage["cache"],
        "model": lineage["digest"],
        "code": manifest.code_sha256(),
        "seed": lineage["seed"],
        "test_set": report.test_set,
        "normaliser": report.normaliser,
        "n": report.score.n,
        "wer": f"{report.score.wer:.6f}",
        "low": low,
        "high": high,
        "machine": lineage["machine"],
        "training_seconds": lineage["training_seconds"],
        "steps": settings["training.steps"],
        "report": Path(os.path.relpath(report.folder, runs)).as_posix(),
    }


def _is_logged(row: Mapping[str, str], rows: list[dict[str, str]]) -> bool:
    key = ("model", "test_set", "normaliser")
    return any(all(row[name] == other[name] for name in key) for other in rows)


def _log(runs: Path) -> CsvLog:
    return CsvLog(
        runs / FILE,
        COLUMNS,
        is_complete=lambda row: bool(row["report"]) and (runs / row["report"]).is_dir(),
        lock_timeout_s=LOCK_TIMEOUT_S,
    )
