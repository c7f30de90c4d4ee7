"""Results of a sweep: the table of trials, the importance of settings, a figure, and the best recipe as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.experiments import figures
from pipelines.experiments.sweeps import asha
from pipelines.experiments.sweeps.trials import Trial
from pipelines.infra import manifest, plots
from pipelines.infra.tables.formulas import encode_cell
from pipelines.recipes import as_toml
from pipelines.recipes.settings import Recipe

TABLE, FIGURE = "trials.csv", "trials.png"


def table(recipe: Recipe, trials: Sequence[Trial]) -> pd.DataFrame:
    """Return one row per trial: those with the most steps first, and among them the lowest WER first.

    Columns: `trial, state, steps, wer` (best so far), `best_step`, `wer_<step>` for each rung, `seconds`, one column
    per searched setting, `run` (its folder), `reason` (why it diverged or failed).
    """
    order = sorted(
        trials, key=lambda trial: (trial.state != "finished", trial.wer == math.inf, -trial.steps, trial.wer)
    )
    return pd.DataFrame([_row(trial, asha.rungs(recipe)) for trial in order])


def importances(recipe: Recipe, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the share of the variance of WER ranks that each searched setting explains alone, the largest first.

    All trials are compared at the first rung, the only one that all have reached. Diverged trials rank last, failed
    trials are left out. Fields: `setting, explained` (0 to 1), `direction` (+1: larger values gave a larger WER; 0 for
    a choice), `trials`, `step`. For numbers the share is the square of Spearman's correlation, for choices the
    correlation ratio of the ranks, which is above 0 by chance. With few trials a share means little: a setting without
    any effect explains half of the variance of 8 trials once in twenty times.
    """
    first = asha.rungs(recipe)[0]
    scored = [trial for trial in trials if trial.reached(first) and trial.state != "failed"]
    rows = []
    for name, parameter in recipe.search.space.items():
        values = [trial.settings[name] for trial in scored]
        ranks = pd.Series([trial.wer_at(first) for trial in scored], dtype=float).rank()
        explained, direction = _explained(values, ranks, parameter.kind == "choice")
        rows.append(
            {"setting": name, "explained": explained, "direction": direction, "trials": len(scored), "step": first}
        )
    return sorted(rows, key=lambda row: -row["explained"])


def _explained(values: list[Any], ranks: pd.Series, is_choice: bool) -> tuple[float, int]:
    if len(set(map(json.dumps, values))) < 2 or ranks.nunique() < 2:
        return 0.0, 0
    if not is_choice:
        correlation = float(np.corrcoef(pd.Series(values, dtype=float).rank(), ranks)[0, 1])
        return correlation**2, int(np.sign(correlation))
    means = ranks.groupby([json.dumps(value) for value in values]).transform("mean")
    return float(means.var(ddof=0) / ranks.var(ddof=0)), 0


def write_table(recipe: Recipe, trials: Sequence[Trial], folder: Path) -> pd.DataFrame:
    """Write the table to the sweep's folder and return it."""
    rows = table(recipe, trials)
    manifest.write_bytes(folder / TABLE, rows.map(encode_cell).to_csv(index=False).encode())
    return rows


def write_figure(recipe: Recipe, trials: Sequence[Trial], folder: Path) -> None:
    """Write a figure of each searched setting and the WER to the sweep's folder."""
    figure = figures.sweep_figure(table(recipe, trials), recipe.search.space, importances(recipe, trials))
    manifest.write_bytes(folder / FIGURE, plots.png(figure))


def best_toml(recipe: Recipe, best_recipe: Recipe, best: Trial, n_trials: int, options: str) -> str:
    """Return the best trial's recipe as TOML, with comments on its origin and on how to train and score it.

    `options` are the command options that select it.
    """
    step = min(best.looks, key=lambda step: (best.looks[step], step))
    comment = f"""\
Trial {best.number}, the best of {n_trials} of `{recipe.name}`: validation WER {best.wer:.3f} at step {step}.
{format_settings(best.settings)}
It was selected by this WER, which is therefore optimistic. No trial has read the test split: evaluate on that.

  python -m pipelines features {options}
  python -m pipelines train {options}
  python -m pipelines evaluate {options}
"""
    return as_toml(best_recipe, comment)


def format_settings(settings: dict[str, Any]) -> str:
    """Return settings as text: `training.learning_rate=0.0001, model.adapter=lora`."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    )


def format_results(trials: pd.DataFrame, importances: Sequence[dict[str, Any]]) -> str:
    """Return the table of trials and the importances as text for a terminal."""
    short = trials.drop(columns=["run", "reason", "best_step"])
    short.columns = [name.rpartition(".")[2] for name in short]
    for name in [name for name in short if name.startswith("wer")]:
        short[name] = [f"{wer:.3f}" if wer == wer else "" for wer in short[name].astype(float)]
    better = {1: "smaller was better", -1: "larger was better", 0: ""}
    lines = [
        f"  {row['setting']:<32}{row['explained']:.2f}  {better[row['direction']]}".rstrip() for row in importances
    ]
    n_trials, step = importances[0]["trials"], importances[0]["step"]
    head = f"share of the variance of WER ranks that each explains, {n_trials} trials at step {step}:"
    return "\n".join([short.to_string(index=False, na_rep="", float_format="{:.4g}".format), "", head, *lines])


def _row(trial: Trial, rungs: list[int]) -> dict[str, Any]:
    reached = [rung for rung in rungs if trial.steps >= rung and math.isfinite(trial.wer)]
    return {
        "trial": trial.number,
        "state": trial.state,
        "steps": trial.steps,
        "wer": round(trial.wer, 4) if math.isfinite(trial.wer) else None,
        "best_step": min(trial.looks, key=lambda step: (trial.looks[step], step), default=None),
        **{f"wer_{rung}": round(trial.wer_at(rung), 4) if rung in reached else None for rung in rungs},
        "seconds": round(trial.seconds, 1),
        **{
            name: value if isinstance(value, int | float | str) else json.dumps(value)
            for name, value in trial.settings.items()
        },
        "run": trial.run,
        "reason": trial.reason,
    }
