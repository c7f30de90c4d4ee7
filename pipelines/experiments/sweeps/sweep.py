"""Run a sweep: start or resume trials until the number of trials or the budget is used up."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation
from pipelines.experiments.sweeps import asha, executors, results, search_space
from pipelines.experiments.sweeps.trial_run import Job, Result, describe_unexpected, refuse_full_disk
from pipelines.experiments.sweeps.trials import Record, Trial
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import console, environment, manifest
from pipelines.infra.errors import LabError, Unfinished
from pipelines.recipes import digest
from pipelines.recipes.commands import runs_options
from pipelines.recipes.settings import Recipe
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_runs
from pipelines.training.checkpoints import sealed as sealed_checkpoints

logger = logging.getLogger(__name__)

_CACHE_SETTINGS = ("source.", "features.", "curation.", "language", "model.base", "training.seed")
"""Prefixes of the settings that determine a feature cache; the seed does if it selects a label model."""
_MAX_ATTEMPTS = 2
"""Attempts that may die without a new checkpoint; then the trial has failed, and the others continue."""


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep."""

    folder: Path
    trials: list[Trial]
    best: Trial
    best_recipe: Path
    """Path of a recipe file for `--recipe`."""
    table: pd.DataFrame = field(repr=False)
    """One row per trial, the best first: see results.table."""
    importances: list[dict[str, Any]]
    """See results.importances."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "best": asdict(self.best),
            "best_recipe": str(self.best_recipe),
            "trials": [asdict(trial) for trial in self.trials],
            "mattered": self.importances,
        }

    def __str__(self) -> str:
        return (
            f"{results.format_results(self.table, self.importances)}\n\nbest: trial {self.best.number}, validation WER "
            f"{self.best.wer:.3f} (optimistic: it was selected by this score)\ntable and picture in {self.folder}"
        )


@dataclass(frozen=True)
class Outline:
    """The plan of a sweep."""

    folder: Path
    trials: int
    sampler: str
    rungs: list[int]
    """Steps at which trials are compared."""
    space: dict[str, str]
    """Setting to a description of its range."""

    def as_dict(self) -> dict[str, Any]:
        plan = {"dry_run": True, "would": f"try up to {self.trials} settings", "writes": str(self.folder)}
        return {**plan, **asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        steps = ", ".join(map(str, self.rungs))
        return "\n".join(
            [
                f"would try up to {self.trials} settings ({self.sampler}), compared after {steps} steps",
                *(f"  {name}: {text}" for name, text in self.space.items()),
                f"would write below {self.folder}",
                "nothing was done",
            ]
        )


def run(recipe: Recipe, *, runs: str | Path = "", cluster: str = "", devices: int = 0) -> Sweep:
    """Try settings of the recipe's search space until its number of trials, or its budget, is used up.

    An interrupted sweep of the same recipe is resumed; if `search.trials` was raised, more trials are added. With
    `cluster`, the address of a Ray cluster, `devices` trials train in parallel (0: the number of GPUs, or of machines
    without GPUs). Only the training and validation splits are read. Raise errors.Unfinished if a signal or Ctrl-C ended
    the sweep, and LabError for a recipe without a search space.
    """
    search_space.check(recipe)
    folder = folder_of(recipe, runs)
    folder.mkdir(parents=True, exist_ok=True)
    with training_runs.lock_run(folder), _resumable(folder):
        manifest.write_bytes(folder / "recipe.toml", recipes.as_toml(recipe).encode())
        record, jobs = Record(folder), _Jobs(recipe, folder.name, runs)
        if record.trials:
            logger.info(f"resuming {len(record.trials)} trial(s) of {folder}")
        for trial in [trial for trial in record.trials.values() if trial.state == "failed"]:
            record.put(replace(trial, state="begun", reason=""))
        if started := next((trial for trial in record.trials.values() if trial.run), None):
            jobs.of(started)  # raises an error if the data has changed, before anything is trained
        with executors.open_executor(cluster, devices) as executor, _reset_attempts_on_error(record):
            _run_trials(recipe, record, jobs, executor)
        return _finish(recipe, record, jobs, folder)


def folder_of(recipe: Recipe, runs: str | Path = "") -> Path:
    """Return the folder of a sweep, named by everything that determines its trials except their number."""
    return environment.runs_folder(runs) / f"{recipe.name[:45]}-sweep-{digest(_identity(recipe))[:8]}"


def outline(recipe: Recipe, runs: str | Path = "") -> Outline:
    """Return what `run` would do."""
    search_space.check(recipe)
    return Outline(
        folder_of(recipe, runs),
        recipe.search.trials,
        recipe.search.sampler,
        asha.rungs(recipe),
        {name: search_space.describe(parameter) for name, parameter in recipe.search.space.items()},
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that determine the trials, flat, without defaults: a new setting leaves old names
    unchanged."""
    defaults = Recipe(name="plain").settings()
    irrelevant = {"name", *training_runs.NOT_IN_IDENTITY} | {"features.workers", "features.max_rejected_share"}
    changed = {name: value for name, value in recipe.settings().items() if value != defaults[name]}
    search = recipe.search_settings()
    for name in ("search.trials", "search.max_hours"):
        search.pop(name)
    return {name: value for name, value in changed.items() if name not in irrelevant - {"model.base"}} | search


class _Jobs:
    """Create the jobs of trials; each feature cache is built or opened once."""

    def __init__(self, recipe: Recipe, name: str, runs: str | Path):
        self.recipe, self.name, self.runs = recipe, name, runs
        self.caches: dict[str, FeatureCache] = {}
        self.validation = ""

    def recipe_of(self, settings: dict[str, Any], **more: Any) -> Recipe:
        """Return the recipe of a trial. Raise LabError if its settings are incompatible."""
        return recipes.resolve(self.recipe.model_dump(mode="json"), {"name": self.name, **settings, **more})

    def of(self, trial: Trial) -> Job:
        """Return the job of a trial. Raise LabError if it cannot be trained, or is not comparable with the others."""
        recipe = self.recipe_of(trial.settings, **{"training.keep_checkpoints": 1})
        cache = self.cache(recipe)
        base = training_pipeline.starting_model(recipe, cache, self.runs)
        self._require_same_validation(cache)
        run = training_pipeline.run_folder(recipe, cache, base, self.runs)
        if trial.run not in ("", run.name):
            raise LabError(
                f"trial {trial.number} was {trial.run} and would now be {run.name}: data, base model or the lab's "
                f"code have changed, and old and new trials are not comparable. Remove {run.parent} to start over"
            )
        return Job(trial.number, recipe, cache, base, run, trial.target)

    def cache(self, recipe: Recipe) -> FeatureCache:
        settings = {name: value for name, value in recipe.settings().items() if name.startswith(_CACHE_SETTINGS)}
        key = json.dumps(settings, sort_keys=True)
        if key not in self.caches:
            self.caches[key] = feature_pipeline.run(recipe, runs=self.runs)
        return self.caches[key]

    def _require_same_validation(self, cache: FeatureCache) -> None:
        rows = cache.rows.iloc[cache.split("validation")]
        digest_of_split = evaluation.test_set(rows[["id", "text"]].rename(columns={"text": "reference"}))
        self.validation = self.validation or digest_of_split
        if digest_of_split != self.validation:
            raise LabError("its settings change the validation split, on which trials are compared")


def _run_trials(recipe: Recipe, record: Record, jobs: _Jobs, executor: executors.Executor) -> None:
    """Run all remaining moves, as many in parallel as the executor has slots."""
    rungs, running, exhausted = asha.rungs(recipe), set(), False
    while True:
        while len(running) < executor.slots:
            may_start = not exhausted and _may_start_trial(recipe, record)
            move = asha.next_move(record.trials, running, rungs, recipe.search.reduction, may_start)
            if move is None:
                break
            trial = _apply_move(recipe, record, move)
            exhausted = exhausted or trial is None
            if trial and (job := _prepare_job(recipe, record, jobs, trial)):
                executor.start(job)
                running.add(job.number)
        if not running:
            return
        result = executor.wait()
        running.remove(result.number)
        _record_result(recipe, record, result)


def _may_start_trial(recipe: Recipe, record: Record) -> bool:
    trials, limit = list(record.trials.values()), recipe.search.max_hours
    if any(trial.state == "failed" for trial in trials) and not any(trial.looks for trial in trials):
        return False  # wait until a running trial shows whether any trial can succeed
    spent_h = sum(trial.seconds for trial in trials) / 3600
    return len(trials) < recipe.search.trials and not 0 < limit <= spent_h


def _apply_move(recipe: Recipe, record: Record, move: tuple[int | None, int]) -> Trial | None:
    """Record a trial's next target and return the trial; None if the space has no more different settings."""
    number, target = move
    if number is not None:
        trial = replace(record.trials[number], state="begun", target=target)
    else:
        number = len(record.trials) + 1
        settings = search_space.proposal(recipe, number, list(record.trials.values()))
        if settings is None:
            logger.info(f"the space has no more than {number - 1} different trials")
            return None
        trial = Trial(number, settings, target)
    logger.info(f"trial {number} to step {target}: {results.format_settings(trial.settings)}")
    record.put(trial)
    return trial


def _prepare_job(recipe: Recipe, record: Record, jobs: _Jobs, trial: Trial) -> Job | None:
    """Return the trial's job. If it cannot be trained, or its processes keep dying, record that and return None."""
    try:
        job = jobs.of(trial)
        trial = _count_attempt(trial, job.run)
    except Unfinished:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, LabError) else describe_unexpected(error, record.path.parent)
        _record_result(recipe, record, Result(trial.number, "failed", reason=reason))
        return None
    record.put(trial)
    return job


def _count_attempt(trial: Trial, run: Path) -> Trial:
    """Return the trial with this attempt counted. Raise LabError if earlier attempts died without a new checkpoint.

    Attempts that reached a new checkpoint do not count: they are ordinary interruptions.
    """
    sealed = [path for path in sealed_checkpoints.listed(run / "checkpoints") if manifest.read(path)]
    step = sealed_checkpoints.step_of(sealed[-1]) if sealed else 0
    attempts = trial.attempts if trial.sent_from == step else 0
    if attempts == _MAX_ATTEMPTS:
        raise LabError(
            f"{attempts} processes in a row died in this trial without a new checkpoint, most often for lack of "
            "memory. Run the same command again to try it once more"
        )
    return replace(trial, run=run.name, attempts=attempts + 1, sent_from=step)


def _record_result(recipe: Recipe, record: Record, result: Result) -> None:
    """Record the result of a job. Raise LabError for a failure if no other trial has succeeded or is running."""
    trial = record.trials[result.number]
    if result.state == "died":  # its state stays "begun": it is started again first
        return logger.info(f"trial {trial.number} is started again: {result.reason}")
    trial = replace(trial, attempts=0, sent_from=0)
    running = [other for other in record.trials.values() if other.state == "begun" and other.number != trial.number]
    if result.state == "failed" and not running and not any(other.looks for other in record.trials.values()):
        record.put(trial)
        raise LabError(result.reason)
    trial = replace(
        trial,
        looks=result.wers or trial.looks,
        seconds=result.seconds or trial.seconds,
        state=result.state,
        reason=result.reason,
    )
    record.put(trial)
    results.write_table(recipe, list(record.trials.values()), record.path.parent)
    if trial.reason:
        return logger.info(f"trial {trial.number} {trial.state}: {trial.reason}")
    best = min(record.trials.values(), key=lambda other: (other.wer, other.number))
    logger.info(
        f"trial {trial.number} {trial.state} at step {trial.steps} of {recipe.training.steps}: WER {trial.wer:.3f}; "
        f"best so far {best.wer:.3f} (trial {best.number}); {len(record.trials)} of {recipe.search.trials} started"
    )
    return None


def _finish(recipe: Recipe, record: Record, jobs: _Jobs, folder: Path) -> Sweep:
    trials = list(record.trials.values())
    finished = [trial for trial in trials if trial.state == "finished"]
    if not finished:
        reason = trials[-1].reason if trials else "there was none"
        raise LabError(f"no trial of {folder} finished; the last: {reason}. Check the search space")
    best = min(finished, key=lambda trial: (trial.wer, trial.number))
    best_recipe = jobs.recipe_of(best.settings)
    path = folder / "best.toml"
    options = shlex.join(["--recipe", str(path), *runs_options(jobs.runs)])
    manifest.write_bytes(path, results.best_toml(recipe, best_recipe, best, len(trials), options).encode())
    with console.silenced():
        cache = feature_pipeline.run(best_recipe, runs=jobs.runs)  # recorded for `train` and `evaluate`
        model = Path(training_pipeline.run(best_recipe, cache, runs=jobs.runs).uri)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    manifest.amend(model, made=now)  # the app serves the newest model
    table = results.write_table(recipe, trials, folder)
    results.write_figure(recipe, trials, folder)
    return Sweep(folder, trials, best, path, table, results.importances(recipe, trials))


@contextlib.contextmanager
def _resumable(folder: Path):
    """Turn Ctrl-C and a full disk between two trainings into errors after which the sweep can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        raise Unfinished("Ctrl-C ended the sweep; all results are kept. Run the same command again") from None
    except OSError as error:
        refuse_full_disk(error, folder)
        raise


@contextlib.contextmanager
def _reset_attempts_on_error(record: Record):
    """Do not count the attempts of trials that are interrupted by an error of the sweep or by Ctrl-C."""
    try:
        yield
    except (LabError, KeyboardInterrupt):
        for trial in [trial for trial in record.trials.values() if trial.attempts]:
            record.put(replace(trial, attempts=0))
        raise
