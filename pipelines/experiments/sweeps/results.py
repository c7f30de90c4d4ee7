"""What a sweep shows: a table of all trials, what mattered, a picture, and the best recipe as a file."""

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
from pipelines.recipes import as_toml
from pipelines.recipes.settings import Recipe

TABLE, PICTURE = "trials.csv", "trials.png"


def table(recipe: Recipe, trials: Sequence[Trial]) -> pd.DataFrame:
    """One row per trial, those that came furthest first and the best of them before the others.

    `trial, state, steps, wer` (the best up to there), `best_step`, `wer_<step>` for each rung, `seconds`, a column for
    each searched setting, `run` (its folder), `reason` (why it diverged or failed).
    """
    order = sorted(
        trials, key=lambda trial: (trial.state != "finished", trial.wer == math.inf, -trial.steps, trial.wer)
    )
    return pd.DataFrame([_row(trial, asha.rungs(recipe)) for trial in order])


def mattered(recipe: Recipe, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """For each searched setting, the share of the variance of WER ranks that it explains alone, the largest first.

    Over all trials at the first rung, the only one that all have reached; those that diverged rank last, those that
    failed otherwise are left out: `setting, explained` (0 to 1), `direction`
    (+1: larger values made a larger WER; 0 for a choice), `trials`, `step`. Of numbers it is the square of Spearman's
    correlation, of choices the correlation ratio of the ranks, which is above 0 by chance alone. A share says little
    where trials are few: 8 trials that have nothing to do with a number explain half of it once in twenty times.
    """
    first = asha.rungs(recipe)[0]
    known = [trial for trial in trials if trial.reached(first) and trial.state != "failed"]
    told = []
    for name, parameter in recipe.search.space.items():
        values = [trial.settings[name] for trial in known]
        ranks = pd.Series([trial.wer_at(first) for trial in known], dtype=float).rank()
        explained, direction = _explained(values, ranks, parameter.kind == "choice")
        told.append(
            {"setting": name, "explained": explained, "direction": direction, "trials": len(known), "step": first}
        )
    return sorted(told, key=lambda row: -row["explained"])


def _explained(values: list[Any], ranks: pd.Series, is_choice: bool) -> tuple[float, int]:
    if len(set(map(json.dumps, values))) < 2 or ranks.nunique() < 2:
        return 0.0, 0
    if not is_choice:
        correlation = float(np.corrcoef(pd.Series(values, dtype=float).rank(), ranks)[0, 1])
        return correlation**2, int(np.sign(correlation))
    means = ranks.groupby([json.dumps(value) for value in values]).transform("mean")
    return float(means.var(ddof=0) / ranks.var(ddof=0)), 0


def write_table(recipe: Recipe, trials: Sequence[Trial], folder: Path) -> pd.DataFrame:
    """The table, also as a file in the sweep's folder."""
    made = table(recipe, trials)
    manifest.write_bytes(folder / TABLE, made.to_csv(index=False).encode())
    return made


def write_picture(recipe: Recipe, trials: Sequence[Trial], folder: Path) -> None:
    """Each searched setting and the WER, in the sweep's folder."""
    picture = figures.of_sweep(table(recipe, trials), recipe.search.space, mattered(recipe, trials))
    manifest.write_bytes(folder / PICTURE, plots.png(picture))


def best_toml(recipe: Recipe, chosen: Recipe, best: Trial, n_trials: int, options: str) -> str:
    """The best trial's recipe as a file that says where it comes from, and how to train and score it.

    `options` is what commands need to be told to use it.
    """
    step = min(best.looks, key=lambda step: (best.looks[step], step))
    opening = f"""\
Trial {best.number}, the best of {n_trials} of `{recipe.name}`: validation WER {best.wer:.3f} at step {step}.
{settings_in_words(best.settings)}
It was chosen by that very figure, so it is flattering; the test split, which no trial has read, tells what it is worth.

  python -m pipelines features {options}
  python -m pipelines train {options}
  python -m pipelines evaluate {options}
"""
    return as_toml(chosen, opening)


def settings_in_words(settings: dict[str, Any]) -> str:
    """`training.learning_rate=0.0001, model.adapter=lora`."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    )


def in_words(shown: pd.DataFrame, told: Sequence[dict[str, Any]]) -> str:
    """The table and what mattered, as lines for a terminal."""
    short = shown.drop(columns=["run", "reason", "best_step"])
    short.columns = [name.rpartition(".")[2] for name in short]
    for name in [name for name in short if name.startswith("wer")]:
        short[name] = [f"{wer:.3f}" if wer == wer else "" for wer in short[name].astype(float)]
    better = {1: "smaller was better", -1: "larger was better", 0: ""}
    lines = [f"  {row['setting']:<32}{row['explained']:.2f}  {better[row['direction']]}".rstrip() for row in told]
    head = f"share of the WER's ranks that each explains, {told[0]['trials']} trials at step {told[0]['step']}:"
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
