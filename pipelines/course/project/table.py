"""The table of a class: one row per project, with the figures of its comparison and the lines of the rubric."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipelines.course.project.rubric import RULES, Line, Missing, Project
from pipelines.course.project.template import PAGE
from pipelines.infra.errors import LabError
from pipelines.infra.tables import formulas

FIGURES = ("settings", "wer_before", "wer_baseline", "wer_idea", "delta_wer", "low", "high", "verdict")
"""The settings that differ; the WER of the base model and of both recipes; idea minus baseline, with 95 % interval."""
COLUMNS = ("project", "met", *FIGURES, *RULES, "page", "error")


def row(project: Project, lines: Iterable[Line]) -> dict[str, str | int]:
    """Return the row of a project, by the names in COLUMNS. A line of the rubric is `met`, or what is missing."""
    lines = list(lines)
    return {
        "project": str(project.folder),
        "met": sum(line.is_met for line in lines),
        **_figures(project),
        **{line.key: line.missing or "met" for line in lines},
        "page": str(project.folder / PAGE),
        "error": "",
    }


def row_of_error(folder: Path, error: LabError) -> dict[str, str | int]:
    """Return the row of a folder that cannot be checked."""
    return dict.fromkeys(COLUMNS, "") | {"project": str(folder), "met": 0, "error": str(error)}


def write(path: Path, rows: Iterable[Mapping[str, str | int]]) -> None:
    """Write the rows as csv, in UTF-8. Raises LabError if it cannot be written."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: formulas.encode_cell(cell) for name, cell in row.items()} for row in rows)
    except OSError as error:
        raise LabError(f"--table must be a file that can be written, got {path}: {error.strerror}") from None


def _figures(project: Project) -> dict[str, str]:
    """Return the figures of the comparison; empty texts where there are none."""
    figures = dict.fromkeys(FIGURES, "")
    try:
        figures["settings"] = ", ".join(project.changes)
        figures["wer_before"] = f"{project.scores['before'].score.wer:.3f}"
    except (Missing, LabError, KeyError):
        pass
    try:
        baseline, idea, *_ = project.comparison.findings
    except (Missing, LabError, ValueError):
        return figures
    low, high = idea.difference.ci95
    return figures | {
        "wer_baseline": f"{baseline.score.wer:.3f}",
        "wer_idea": f"{idea.score.wer:.3f}",
        "delta_wer": f"{idea.difference.delta:+.3f}",
        **({"low": f"{low:+.3f}", "high": f"{high:+.3f}"} if idea.units.enough else {}),
        "verdict": idea.verdict,
    }
