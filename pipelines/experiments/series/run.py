"""Run several recipes with several seeds, one after another. Finished experiments are skipped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import recipes
from pipelines.experiments import pipeline
from pipelines.experiments.evaluation import EvalReport
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import console
from pipelines.infra.errors import LabError, Unfinished
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.settings import Recipe
from pipelines.training import pipeline as training_pipeline

logger = logging.getLogger(__name__)

RECIPES = tuple(
    f"planted-{name}"
    for name in "raw checked filtered repaired augmented balanced more cleaned clean lr lora frozen".split()
)
"""Recipes that run by default. The model of the first one is the label model of others."""
SEEDS = (42, 43)


class SeriesError(LabError):
    """An error that ends the series, because the other experiments would have it too."""


@dataclass(frozen=True)
class SeriesResult:
    """The result of a series."""

    reports: tuple[EvalReport, ...]
    """Reports on this machine."""
    failed: tuple[str, ...]
    """One line per failed experiment."""
    in_tables: int = 0
    """Number of experiments that were skipped because earlier tables have their results."""

    def as_dict(self) -> dict[str, Any]:
        reports = [str(report.folder) for report in self.reports]
        return {"reports": reports, "failed": list(self.failed), "in_tables": self.in_tables}

    def __str__(self) -> str:
        skipped = f", {self.in_tables} in the tables already" if self.in_tables else ""
        return f"{len(self.reports)} finished, {len(self.failed)} failed{skipped}"


def plan(
    names: Sequence[str] = RECIPES, seeds: Sequence[int] = SEEDS, overrides: dict[str, Any] | None = None
) -> list[Recipe]:
    """Return every recipe with every training seed: all recipes with one seed before the next seed.

    A folder stands for its recipes (`.toml`), by name. Raises LabError for one without any.
    """
    files = [file for name in names for file in _expand(name)]
    return [recipes.load(file, {**(overrides or {}), "training.seed": seed}) for seed in seeds for file in files]


def _expand(name: str) -> list[str]:
    if not Path(name).is_dir():
        return [name]
    files = sorted(map(str, Path(name).glob("*.toml")))
    if not files:
        raise LabError(f"the folder {name} has no recipe: expected files that end in .toml, name another")
    return files


def name_of(recipe: Recipe) -> str:
    """Return the name of an experiment: `recipe/seed`."""
    return f"{recipe.name}/{recipe.training.seed}"


def pending(experiments: Sequence[Recipe], in_tables: Collection[str]) -> list[Recipe]:
    """Return the experiments that are to be run if those in `in_tables` (`recipe/seed`) are finished elsewhere.

    One of those is run nevertheless if one that is run needs its model, which a setting names as `run:<recipe>`.
    """
    by_name = {name_of(recipe): recipe for recipe in experiments}
    needed = [name for name in by_name if name not in in_tables]
    for name in needed:  # grows: a model may need the model of an earlier round
        recipe = by_name[name]
        models = (f"{other}/{recipe.training.seed}" for other in _named_runs(recipe.model_dump()))
        needed += [model for model in dict.fromkeys(models) if model in by_name and model not in needed]
    return [recipe for recipe in experiments if name_of(recipe) in needed]


def _named_runs(settings: Any) -> Iterator[str]:
    """Yield the recipes that nested settings name as `run:<recipe>`."""
    if isinstance(settings, str) and settings.startswith("run:"):
        yield settings.removeprefix("run:")
    elif isinstance(settings, Mapping):
        yield from _named_runs(list(settings.values()))
    elif isinstance(settings, Sequence) and not isinstance(settings, str):
        for value in settings:
            yield from _named_runs(value)


def run(
    experiments: Sequence[Recipe],
    *,
    runs: str | Path = "",
    in_tables: Collection[str] = (),
    on_cache: Callable[[Recipe, FeatureCache], None] = lambda recipe, cache: None,
    on_report: Callable[[Recipe, EvalReport], None] = lambda recipe, report: None,
) -> SeriesResult:
    """Run features, training and the test score of each experiment, except those whose `recipe/seed` is in `in_tables`.

    `on_cache` is called with the features of each experiment before it is trained, `on_report` with each report. A
    failed experiment does not end the series, unless it raised SeriesError. Raise errors.Unfinished if a signal ended a
    training.
    """
    n_planned, experiments = len(experiments), pending(experiments, in_tables)
    reports, failed, minutes_spent = [], [], []
    for number, recipe in enumerate(experiments, 1):
        started = time.monotonic()
        title = f"{recipe.name}, seed {recipe.training.seed}"
        counter = f"[{number}/{len(experiments)}]"
        try:
            report, is_new = _run_one(recipe, runs, on_cache)
        except (Unfinished, SeriesError):
            raise
        except (LabError, OSError, MemoryError, RuntimeError) as error:  # others are defects of the code
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            failed.append(f"{title}: {reason}")
            logger.info(f"{counter} {title}: failed: {reason}")
            continue
        reports.append(report)
        on_report(recipe, report)
        minutes = (time.monotonic() - started) / 60
        minutes_spent += [minutes] if is_new else []
        mean = sum(minutes_spent) / len(minutes_spent) if minutes_spent else 0.0
        took = f"{minutes:.1f} min" if is_new else "existing report"
        left = (len(experiments) - number) * mean
        logger.info(f"{counter} {title}: {report.score}; {took}, about {left:.0f} min left")
    return SeriesResult(tuple(reports), tuple(failed), n_planned - len(experiments))


def _run_one(
    recipe: Recipe, runs: str | Path, on_cache: Callable[[Recipe, FeatureCache], None]
) -> tuple[EvalReport, bool]:
    """Return the test report of one experiment, and True if it is new."""
    with console.silenced():
        cache = feature_pipeline.run(recipe, runs=runs)
        on_cache(recipe, cache)
        model = training_pipeline.run(recipe, cache, runs=runs)
        existing = set((recipe_runs.experiment_folder(recipe, runs) / "reports").glob("test-*"))
        report = pipeline.evaluate(recipe, cache, model.uri, "test", runs=runs)
    return report, report.folder not in existing
