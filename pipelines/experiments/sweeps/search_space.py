"""The settings of the next trial: a function of the search, the trial's number and the record, and of nothing else.

Trial 1 has the recipe's own values, where they lie in the space: what the search is to beat.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines import recipes
from pipelines.experiments.sweeps.trials import Trial
from pipelines.infra.errors import LabError, missing_package
from pipelines.recipes.settings import ParameterSettings, Recipe, SearchSettings
from pipelines.training import run as training_runs

_ATTEMPTS = 100
"""Draws that may repeat an earlier trial before the space counts as exhausted."""
_RANDOM_FIRST = 5
"""Trials that TPE draws at random before it begins to compare: sweeps here have tens of trials, not hundreds."""
_DIGITS = 4
"""Significant digits of a drawn number: a recipe is to be read by people."""


def check(recipe: Recipe) -> None:
    """LabError for a recipe without a space, for one whose ends no recipe takes, or that ASHA cannot compare."""
    search = recipe.search
    if not search.space:
        raise LabError(
            f"recipe {recipe.name} has no search space: add a table such as [search.space.training.learning_rate] with "
            'kind = "loguniform", low = 1e-5, high = 1e-3'
        )
    if recipe.training.fast_dev_run:
        raise LabError("training.fast_dev_run makes two steps whose WER means nothing: sweep without it")
    for name in search.space:
        if name in training_runs.NOT_OF_THE_WEIGHTS and name != "model.base":
            raise LabError(f"search.space.{name}: every trial would have the same weights; search what changes them")
    for name in ("training.steps", "training.eval_every"):
        if name in search.space and search.reduction > 1:
            raise LabError(f"trials with another {name} have no common rungs: set search.reduction=1, or leave it out")
    for name, told in search.space.items():
        for value in _examples(told):
            try:
                recipes.resolve(recipe.model_dump(mode="json"), {name: value})
            except LabError as error:
                raise LabError(f"search.space.{name}: no trial could have {value!r}: {error}") from None


def proposal(recipe: Recipe, number: int, earlier: Sequence[Trial]) -> dict[str, Any] | None:
    """The settings of trial `number`, which no earlier one has; None where the space seems to hold no more."""
    search, known = recipe.search, [trial.settings for trial in earlier]
    own = {name: recipe.settings()[name] for name in search.space}
    if number == 1 and all(_holds(told, own[name]) for name, told in search.space.items()):
        return own
    if search.sampler == "tpe" and (found := _by_tpe(search, number, earlier)) not in known:
        return found
    rng = np.random.default_rng([search.seed, number])
    for _ in range(_ATTEMPTS):
        found = {name: _drawn(told, rng) for name, told in search.space.items()}
        if found not in known:
            return found
    return None


def in_words(told: ParameterSettings) -> str:
    """`loguniform from 1e-05 to 0.001`."""
    if told.kind == "choice":
        return "one of " + ", ".join(json.dumps(value, ensure_ascii=False) for value in told.values)
    return f"{told.kind} from {told.low:g} to {told.high:g}"


def _holds(told: ParameterSettings, value: Any) -> bool:
    if told.kind == "choice":
        return value in _values(told)
    return told.low <= value <= told.high


def _values(told: ParameterSettings) -> list[Any]:
    return told.model_dump(mode="json")["values"]


def _examples(told: ParameterSettings) -> list[Any]:
    """Values that a recipe has to take: every choice; else the ends, and something between."""
    if told.kind == "choice":
        return _values(told)
    between = told.low + 0.3137 * (told.high - told.low)
    return [_rounded(told, value) for value in (told.low, between, told.high)]


def _drawn(told: ParameterSettings, rng: np.random.Generator) -> Any:
    if told.kind == "choice":
        return _values(told)[rng.integers(len(told.values))]
    if told.kind == "int":
        return int(rng.integers(int(told.low), int(told.high), endpoint=True))
    if told.kind == "uniform":
        return _rounded(told, rng.uniform(told.low, told.high))
    return _rounded(told, math.exp(rng.uniform(math.log(told.low), math.log(told.high))))


def _rounded(told: ParameterSettings, value: float) -> int | float:
    if told.kind == "int":
        return int(value)
    return min(max(float(f"{value:.{_DIGITS}g}"), told.low), told.high)


def _by_tpe(search: SearchSettings, number: int, earlier: Sequence[Trial]) -> dict[str, Any]:
    """What Optuna's tree-structured Parzen estimator asks for after the `earlier` trials.

    A trial that is paused stands for what it had reached: TPE holds it behind those that went further. One that
    diverged or failed tells nothing but that it was tried: TPE holds it behind all others.
    """
    try:
        import optuna
        from optuna.trial import TrialState, create_trial
    except ImportError:
        raise missing_package("optuna", "optuna>=4.2", "search.sampler = 'tpe'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {name: _distribution(told) for name, told in search.space.items()}
    sampler = optuna.samplers.TPESampler(seed=1_000_003 * search.seed + number, n_startup_trials=_RANDOM_FIRST)
    study = optuna.create_study(sampler=sampler)
    for trial in (trial for trial in earlier if trial.broke_off or math.isfinite(trial.wer)):
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if trial.state == "finished" else TrialState.PRUNED,
                value=trial.wer if trial.state == "finished" else None,
                params={name: _to_optuna(told, trial.settings[name]) for name, told in search.space.items()},
                distributions=kinds,
                intermediate_values={} if trial.broke_off else {step: trial.wer_at(step) for step in trial.looks},
            )
        )
    asked = study.ask(kinds).params
    return {name: _from_optuna(told, asked[name]) for name, told in search.space.items()}


def _distribution(told: ParameterSettings) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if told.kind == "choice":
        return CategoricalDistribution(tuple(range(len(told.values))))  # it takes no lists
    if told.kind == "int":
        return IntDistribution(int(told.low), int(told.high))
    return FloatDistribution(told.low, told.high, log=told.kind == "loguniform")


def _to_optuna(told: ParameterSettings, value: Any) -> Any:
    return _values(told).index(value) if told.kind == "choice" else value


def _from_optuna(told: ParameterSettings, value: Any) -> Any:
    return _values(told)[value] if told.kind == "choice" else _rounded(told, value)
