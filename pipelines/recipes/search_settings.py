"""Settings of a sweep, the search for better values of other settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.recipes.base_settings import Seed, Settings


class ParameterSettings(Settings):
    """The values that a sweep may give to one setting."""

    kind: Literal["choice", "uniform", "loguniform", "int"]
    """`choice`: one of `values`. `uniform`: a number from `low` to `high`. `loguniform`: a number whose logarithm is
    uniform, for ranges over several powers of ten. `int`: an integer, both ends included."""
    values: tuple[Any, ...] = ()
    """choice: the values, two or more."""
    low: float | None = None
    """uniform, loguniform, int: the lowest value."""
    high: float | None = None
    """uniform, loguniform, int: the highest value."""

    @model_validator(mode="after")
    def _range_fits_the_kind(self) -> ParameterSettings:
        if self.kind == "choice":
            if len(self.values) < 2 or self.low is not None or self.high is not None:
                raise ValueError("a choice needs two or more `values`, and neither `low` nor `high`")
            return self
        if self.values or self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"{self.kind} needs `low` below `high`, and no `values`")
        if self.kind == "loguniform" and self.low <= 0:
            raise ValueError("loguniform needs a `low` above 0")
        if self.kind == "int" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("int needs whole numbers")
        return self


class SearchSettings(Settings):
    """What a sweep tries (see experiments/sweeps/); it does not affect a single run."""

    trials: int = Field(16, ge=1)
    """Number of trials, at least 1; with a higher number a finished sweep continues."""
    sampler: Literal["random", "tpe"] = "random"
    """`tpe`: Optuna's tree-structured Parzen estimator, which samples near the values of earlier good trials."""
    reduction: int = Field(3, ge=1)
    """ASHA: one trial in this number is promoted at each rung, and the next rung has this multiple of steps. 1: every
    trial is trained to the end."""
    min_steps: int = Field(0, ge=0)
    """ASHA: steps of the first rung; 0: `training.eval_every`. Every rung is a multiple of `training.eval_every`."""
    max_hours: float = Field(0.0, ge=0)
    """Start no new trial after this number of training hours, summed over all trials; 0: no limit."""
    seed: Seed = 19
    """Seed of the sampled values."""
    space: dict[str, ParameterSettings] = {}
    """Each searched setting by its dotted name, as a table: `[search.space.training.learning_rate]`."""
