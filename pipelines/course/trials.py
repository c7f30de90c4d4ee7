"""Short trainings that notebook 02 offers for a try: each predicts something, trains for minutes, and checks it.

    trials.run("overfitting", recipe, cache, PREDICTION)      resume, learning_rate or overfitting; "" lists them

They train the recipe's base model on a part of the cache, in a temporary folder: no result of the recipe changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipelines.course.predictions import compare
from pipelines.features import derived
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.infra.plots import figure_with_axes, start_at_zero
from pipelines.recipes.settings import Recipe
from pipelines.recipes.training_settings import DistillationSettings, TrainingSettings
from pipelines.training import figures
from pipelines.training import loop as training_loop
from pipelines.training.callbacks.console import progress_bar
from pipelines.training.callbacks.interruptions import Paused
from pipelines.training.run import TrainingRun
from pipelines.whisper import model as whisper_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = list[dict[str, float]]

FACTORS = (1, 4, 16, 64)
"""The learning rate of the recipe is multiplied by these."""
_STEPS = 20
_BROKEN = 1.5
"""A training is called broken if it ends with a loss that is higher than the best one's by this factor."""
_WINDOWS_OFF = {name: field.default for name, field in TrainingSettings.model_fields.items() if "window_" in name}


@dataclass(frozen=True)
class Trial:
    """One short training."""

    question: str
    seconds: int
    """About how long it takes with whisper-tiny on two CPU cores."""
    run: Callable[[Recipe, FeatureCache, Path, Any], Figure | None]
    """Takes recipe, cache, an empty folder and the prediction; prints the check."""


def run(name: str, recipe: Recipe, cache: FeatureCache, prediction: Any = None, *, runs: str | Path = "") -> Any:
    """Run one of TRIALS and check the prediction; return its plot, if it has one. An empty name lists the trials."""
    if not name:
        for key, trial in TRIALS.items():
            print(f"{key}: {trial.question} (about {trial.seconds} s on two CPU cores)")
        return None
    if name not in TRIALS:
        raise LabError(f"TRIAL must be one of {', '.join(TRIALS)}, or empty, got {name!r}")
    parent = environment.runs_folder(runs)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=parent, ignore_cleanup_errors=True) as folder:
        return TRIALS[name].run(recipe, cache, Path(folder), prediction)


def _resume(recipe: Recipe, cache: FeatureCache, folder: Path, prediction: Any) -> None:
    """Train eight steps at once, and eight that are interrupted after four; compare the weights."""
    recipe, cache = _reduced(recipe, cache, steps=8, eval_every=4, warmup_steps=2), _part(cache, 64, 8)
    uninterrupted = _train(recipe, cache, folder / "uninterrupted")
    with contextlib.suppress(Paused):
        _train(recipe, cache, folder / "interrupted", until=4)
    print("Interrupted after step 4. Everything in memory is gone; the same call continues.")
    resumed = _train(recipe, cache, folder / "interrupted")
    for label, model in (("at once", uninterrupted), ("resumed", resumed)):
        print(f"{label}: sha256 {hashlib.sha256((model / 'model.safetensors').read_bytes()).hexdigest()[:16]}")
    n = _n_different(uninterrupted, resumed)
    why = "A checkpoint holds weights, optimizer state, random states and the position in the data."
    compare(prediction, n, within=0.5, unit=" different arrays", why=why)


def _learning_rate(recipe: Recipe, cache: FeatureCache, folder: Path, prediction: Any) -> Figure:
    """Train with several learning rates; plot the losses."""
    cache, losses = _part(cache, len(cache.rows), 8), {}
    for factor in FACTORS:
        rate = factor * recipe.training.learning_rate
        settings = _reduced(recipe, cache, steps=_STEPS, eval_every=_STEPS, warmup_steps=4, learning_rate=rate)
        history: History = []
        with contextlib.suppress(LabError):  # a loss that is not finite ends the training: that is the answer
            _train(settings, cache, folder / str(factor), history=history)
        losses[factor] = [(row["step"], row["loss"]) for row in history if "loss" in row]
    ends = {factor: _end_of(points) for factor, points in losses.items()}
    best = min(ends.values())
    broken = [factor for factor in FACTORS if math.isinf(ends[factor]) or ends[factor] > _BROKEN * best]
    why = "The steps jump over the minimum, and the model loses what it knew. Too low a rate only costs time."
    if broken:
        compare(prediction, broken[0], within=4.0, unit=" times", why=why)
    else:
        print(f"No training broke up to {FACTORS[-1]} times the recipe's learning rate.")
    figure, axes = figure_with_axes(9, 3)
    for factor, points in losses.items():
        if points:
            rate = factor * recipe.training.learning_rate
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{rate:.1e}")
    axes.set(xlabel="step", ylabel="loss per token")
    start_at_zero(axes, "y")
    axes.legend(frameon=False, title="learning rate")
    return figure


def _overfitting(recipe: Recipe, cache: FeatureCache, folder: Path, prediction: Any) -> Figure:
    """Train on 64 clips again and again; plot both losses."""
    cache, history = _part(cache, 64, 40), []
    recipe = _reduced(recipe, cache, steps=100, eval_every=10)
    _train(recipe, cache, folder / "run", history=history)
    validations = [row for row in history if "eval_loss" in row]
    best = min(validations, key=lambda row: row["eval_loss"])
    why = "Then it learns these clips by heart. The WER may still fall: the loss punishes errors made with certainty."
    compare(prediction, best["step"], within=1.7, unit=" steps", why=why)
    return figures.curves(history)


TRIALS = {
    "resume": Trial("how many arrays of weights differ after an interruption and a resume?", 40, _resume),
    "learning_rate": Trial(
        f"by which of the factors {', '.join(map(str, FACTORS))} must the learning rate be raised until training "
        "breaks?",
        80,
        _learning_rate,
    ),
    "overfitting": Trial(
        "after how many of 100 steps on 64 clips is the validation loss at its lowest?", 120, _overfitting
    ),
}


def _train(
    recipe: Recipe, cache: FeatureCache, folder: Path, *, until: int = 0, history: History | None = None
) -> Path:
    """Train in a folder and return that of the model. `history` receives all log lines, also if training fails."""

    def keep(lines: History) -> None:
        if history is not None:
            history[:] = lines

    base = whisper_model.resolve(recipe.model.base)
    progress = progress_bar(keep)
    return Path(training_loop.train(TrainingRun(recipe, cache, base, folder, progress, until=until)).uri)


def _reduced(recipe: Recipe, cache: FeatureCache, **training: Any) -> Recipe:
    """Return the recipe with these settings of training, without windows, teacher, early stop and time limit."""
    recipe = derived.resolve(recipe, cache)
    fixed = {**_WINDOWS_OFF, "patience": 0, "max_hours": 0.0, "fast_dev_run": False, "tracker": ""}
    settings = recipe.training.model_copy(update={**fixed, **training})
    return recipe.model_copy(update={"training": settings, "distillation": DistillationSettings()})


def _part(cache: FeatureCache, n_train: int, n_validation: int) -> FeatureCache:
    """Return the cache with the first clips of training and validation, and all others."""
    rows, sizes = cache.rows, {"train": n_train, "validation": n_validation}
    parts = [rows[rows["split"] == split].head(sizes.get(split, 1)) for split in rows["split"].unique()]
    return replace(cache, rows=pd.concat(parts).reset_index(drop=True))


def _end_of(points: list[tuple[float, float]]) -> float:
    """Return the mean of the last losses; infinite if training ended before its last step."""
    if not points or points[-1][0] < _STEPS:
        return math.inf
    mean = sum(loss for _, loss in points[-4:]) / len(points[-4:])
    return mean if math.isfinite(mean) else math.inf


def _n_different(first: Path, second: Path) -> int:
    """Return the number of arrays that differ between the weights of two models."""
    return sum(not equal for equal in _equal_arrays(first, second))


def _equal_arrays(first: Path, second: Path) -> Iterator[bool]:
    from safetensors.numpy import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    return ((weights == theirs[name]).all() for name, weights in ours.items())
