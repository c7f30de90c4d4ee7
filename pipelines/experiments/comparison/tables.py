"""The tables of a comparison, and tables as plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipelines.experiments.comparison import lookup
from pipelines.experiments.comparison.findings import Finding
from pipelines.experiments.comparison.lookup import Experiment
from pipelines.speech.intervals import CLIPS, MIN_SPEAKERS


def align_columns(table: pd.DataFrame) -> str:
    """Return a table as plain text with left-aligned columns."""
    frame = table.reset_index().fillna("")
    rows = [frame.columns.tolist(), *frame.astype(str).to_numpy().tolist()]
    rows = [["".join(c if c.isprintable() else " " for c in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def score_table(findings: Iterable[Finding]) -> pd.DataFrame:
    """Return one row per experiment: seeds, WER and ΔWER with intervals, p, p corrected (Holm), and the verdict."""
    return pd.DataFrame([_score_row(finding) for finding in findings]).set_index("experiment")


def cost_table(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Return one row per experiment: training data, training time, machine, and models."""
    return pd.DataFrame([_cost_row(experiment) for experiment in experiments]).set_index("experiment")


def slice_table(slices: pd.DataFrame) -> pd.DataFrame:
    """Return WER and ΔWER per slice value, one column per experiment; values with too few speakers are left out."""
    rows = slices[slices["speakers"] >= MIN_SPEAKERS]
    cells = rows.assign(cell=[_slice_cell(row) for row in rows.to_dict("records")])
    cells["value"] = cells["value"].replace("", "not told")
    table = cells.pivot_table(
        index=["slice", "value", "n", "speakers"], columns="experiment", values="cell", aggfunc="first", sort=False
    )
    return table.reset_index(["n", "speakers"]).rename_axis(columns=None)


def guard_table(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Return one row per experiment, report and guard set: WER of the base and of the model, increase and verdict."""
    rows = [
        {
            "experiment": experiment.name,
            "guard": guard.name,
            "base": f"{guard.before:.3f}",
            "model": f"{guard.after:.3f}",
            "increase": f"{guard.delta:+.3f}",
            "95 %": guard.interval,
            "verdict": guard.verdict,
        }
        for experiment in experiments
        for report in experiment.reports
        for guard in report.guards
    ]
    return pd.DataFrame(rows).set_index("experiment") if rows else pd.DataFrame()


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the different values in their order, without empty ones."""
    return [value for value in dict.fromkeys(values) if value]


def _score_row(finding: Finding) -> dict[str, str]:
    difference, enough = finding.difference, finding.enough_speakers
    shown = enough or finding.units.over == CLIPS
    return {
        "experiment": finding.experiment.name,
        "seeds": ", ".join(map(str, finding.experiment.seeds)) or "untuned",
        "WER": f"{finding.score.wer:.3f}",
        "95 %": finding.units.interval(finding.score.ci95) if shown else "",
        "ΔWER": f"{difference.delta:+.3f}" if difference else "",
        "95 % of Δ": finding.units.interval(difference.ci95, "{:+.3f}") if difference and shown else "",
        "p": _p(difference.p) if difference and enough else "",
        "p (Holm)": _p(finding.p_holm) if difference and enough else "",
        "verdict": finding.verdict,
    }


def _cost_row(experiment: Experiment) -> dict[str, str]:
    train = (experiment.lineages[0].get("data") or {}).get("train") or {}
    seconds = [lineage["training_seconds"] for lineage in experiment.lineages if lookup.is_tuned(lineage)]
    return {
        "experiment": experiment.name,
        "clips": f"{train['clips']:,}" if train else "",
        "hours": f"{train['hours']:.2f}" if train else "",
        "cache": ", ".join(distinct(lineage.get("cache") for lineage in experiment.lineages)),
        "training (s)": f"{np.mean(seconds):.0f}" if seconds else "",
        "machine": ", ".join(distinct(lineage.get("machine") for lineage in experiment.lineages)),
        "models": ", ".join(experiment.models),
    }


def _slice_cell(row: Mapping[str, Any]) -> str:
    if math.isnan(row["delta"]):
        return f"{row['wer']:.3f}"
    return f"{row['wer']:.3f} ({_interval((row['low'], row['high']), '{:+.3f}')})"


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return f"{form.format(interval[0])} to {form.format(interval[1])}" if interval else ""


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
