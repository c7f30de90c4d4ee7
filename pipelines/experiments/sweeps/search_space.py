"""The settings of the next trial: a function of the search settings, the trial's number and the earlier trials.

Trial 1 has the recipe's values, if they are in the space: the baseline of the search.
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
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.search_settings import ParameterSettings, SearchSettings
from pipelines.recipes.settings import Recipe
from pipelines.training import run as training_runs

_ATTEMPTS = 100
"""Draws that repeat an earlier trial before the space counts as exhausted."""
_RANDOM_FIRST = 5
"""Random trials before TPE starts to model: sweeps here have tens of trials, not hundreds."""
_DIGITS = 4
"""Significant digits of a drawn number, to keep recipes readable."""


def check(recipe: Recipe) -> None:
    """Raise LabError for a recipe without a search space, with invalid values in it, or that ASHA cannot compare."""
    search = recipe.search
    if not search.space:
        raise LabError(
            f"recipe {recipe.name} has no search space: add a table such as [search.space.training.learning_rate] with "
            'kind = "loguniform", low = 1e-5, high = 1e-3'
        )
    if recipe.training.fast_dev_run:
        raise LabError("training.fast_dev_run trains two steps, whose WER means nothing: sweep without it")
    for name in ("training.steps", "training.eval_every"):
        if name not in search.space and recipe.settings()[name] == AUTO:
            raise LabError(f"a sweep compares trials at fixed steps, got {name}=auto: set a number, such as {name}=100")
    for name in search.space:
        if name in training_runs.NOT_IN_IDENTITY and name != "model.base":
            raise LabError(
                f"search.space.{name}: every trial would have the same weights; search a setting that changes them"
            )
    for name in ("training.steps", "training.eval_every"):
        if name in search.space and search.reduction > 1:
            raise LabError(f"trials with another {name} have no common rungs: set search.reduction=1, or leave it out")
    for name, parameter in search.space.items():
        for value in _examples(parameter):
            try:
                recipes.resolve(recipe.model_dump(mode="json"), {name: value})
            except LabError as error:
                raise LabError(f"search.space.{name}: {value!r} is not valid: {error}") from None


def proposal(recipe: Recipe, number: int, earlier: Sequence[Trial]) -> dict[str, Any] | None:
    """Return new settings for trial `number`, or None if the space seems to be exhausted."""
    search, tried = recipe.search, [trial.settings for trial in earlier]
    default = {name: recipe.settings()[name] for name in search.space}
    if number == 1 and all(_contains(parameter, default[name]) for name, parameter in search.space.items()):
        return default
    if search.sampler == "tpe" and (settings := _propose_by_tpe(search, number, earlier)) not in tried:
        return settings
    rng = np.random.default_rng([search.seed, number])
    for _ in range(_ATTEMPTS):
        settings = {name: _draw(parameter, rng) for name, parameter in search.space.items()}
        if settings not in tried:
            return settings
    return None


def describe(parameter: ParameterSettings) -> str:
    """Return the range of a parameter as text: `loguniform from 1e-05 to 0.001`."""
    if parameter.kind == "choice":
        return "one of " + ", ".join(json.dumps(value, ensure_ascii=False) for value in parameter.values)
    return f"{parameter.kind} from {parameter.low:g} to {parameter.high:g}"


def _contains(parameter: ParameterSettings, value: Any) -> bool:
    if parameter.kind == "choice":
        return value in _values(parameter)
    return parameter.low <= value <= parameter.high


def _values(parameter: ParameterSettings) -> list[Any]:
    return parameter.model_dump(mode="json")["values"]


def _examples(parameter: ParameterSettings) -> list[Any]:
    """Return values that must be valid in a recipe: all choices, or both ends and a value between them."""
    if parameter.kind == "choice":
        return _values(parameter)
    between = parameter.low + 0.3137 * (parameter.high - parameter.low)
    return [_round(parameter, value) for value in (parameter.low, between, parameter.high)]


def _draw(parameter: ParameterSettings, rng: np.random.Generator) -> Any:
    if parameter.kind == "choice":
        return _values(parameter)[rng.integers(len(parameter.values))]
    if parameter.kind == "int":
        return int(rng.integers(int(parameter.low), int(parameter.high), endpoint=True))
    if parameter.kind == "uniform":
        return _round(parameter, rng.uniform(parameter.low, parameter.high))
    return _round(parameter, math.exp(rng.uniform(math.log(parameter.low), math.log(parameter.high))))


def _round(parameter: ParameterSettings, value: float) -> int | float:
    if parameter.kind == "int":
        return int(value)
    return min(max(float(f"{value:.{_DIGITS}g}"), parameter.low), parameter.high)


def _propose_by_tpe(search: SearchSettings, number: int, earlier: Sequence[Trial]) -> dict[str, Any]:
    """Return the proposal of Optuna's tree-structured Parzen estimator after the `earlier` trials.

    TPE ranks a paused trial, by the step it reached, behind those with more steps, and a diverged or failed trial
    behind all others.
    """
    try:
        import optuna
        from optuna.trial import TrialState, create_trial
    except ImportError:
        raise missing_package("optuna", "optuna>=4.2", "search.sampler = 'tpe'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {name: _distribution(parameter) for name, parameter in search.space.items()}
    sampler = optuna.samplers.TPESampler(
        seed=(1_000_003 * search.seed + number) % 2**32, n_startup_trials=_RANDOM_FIRST
    )
    study = optuna.create_study(sampler=sampler)
    for trial in (trial for trial in earlier if trial.has_no_score or math.isfinite(trial.wer)):
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if trial.state == "finished" else TrialState.PRUNED,
                value=trial.wer if trial.state == "finished" else None,
                params={name: _to_optuna(parameter, trial.settings[name]) for name, parameter in search.space.items()},
                distributions=kinds,
                intermediate_values={} if trial.has_no_score else {step: trial.wer_at(step) for step in trial.looks},
            )
        )
    proposed = study.ask(kinds).params
    return {name: _from_optuna(parameter, proposed[name]) for name, parameter in search.space.items()}


def _distribution(parameter: ParameterSettings) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(tuple(range(len(parameter.values))))  # it takes no lists
    if parameter.kind == "int":
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high, log=parameter.kind == "loguniform")


def _to_optuna(parameter: ParameterSettings, value: Any) -> Any:
    return _values(parameter).index(value) if parameter.kind == "choice" else value


def _from_optuna(parameter: ParameterSettings, value: Any) -> Any:
    return _values(parameter)[value] if parameter.kind == "choice" else _round(parameter, value)
