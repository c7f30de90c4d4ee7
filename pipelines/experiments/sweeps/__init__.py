"""Many trials of one recipe, by the validation split: which settings of its `[search]` make the lowest WER?

    record    trials.json: what was tried, and what came of it
    space     the settings of the next trial: at random, or by Optuna's TPE
    halving   which trial goes on, and to which step (ASHA)
    job       a trial that is sent to a step, and what comes of it
    crew      who trains: this process, one trial at a time, or the machines of a Ray cluster, side by side
    results   the table, what mattered, the best recipe

A trial is a run like any other, in a folder that its settings name. At a rung it pauses with the trainer's checkpoint;
if it is among the best there it goes on from it, as if it had never stopped. What comes next is a function of the
record and of seeds alone, and the record is written before and after every piece of work. So a sweep that was killed
goes on with the same command, here or on a cluster, and ends where it would have ended.

That is also why neither Ray Tune nor an Optuna study is in charge. Tune's ASHA ends trials where this one pauses them,
its restore is not meant for a sweep that has changed, as by more trials, and it needs Ray where one process will do; a
study does not keep its sampler's state, and ends trials, too. So Optuna is asked for the next settings only, and needed
for `tpe` alone; Ray carries trials to other machines, and is needed for those alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation
from pipelines.experiments.sweeps import asha, executors, results, search_space
from pipelines.experiments.sweeps.trial_run import Job, Result, refuse_full, unforeseen
from pipelines.experiments.sweeps.trials import Record, Trial
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import console, environment, manifest
from pipelines.infra.errors import LabError, Unfinished
from pipelines.recipes import digest
from pipelines.recipes.settings import Recipe
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_runs
from pipelines.training.checkpoints import sealed as sealed_checkpoints

logger = logging.getLogger(__name__)

_MAKES_THE_CACHE = ("source.", "features.", "curation.", "language", "model.base", "training.seed")
"""First letters of the settings that a feature cache hangs on; the seed, where it names a label model."""
_ATTEMPTS = 2
"""Processes that may die over one trial with no checkpoint between; then it is failed, and the others go on."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to."""

    folder: Path
    trials: list[Trial]
    best: Trial
    best_recipe: Path
    """A recipe's file: what `--recipe` takes."""
    options: str
    """What commands need to be told to go on with it."""
    table: pd.DataFrame = field(repr=False)
    """One row per trial, the best first: see results.table."""
    mattered: list[dict[str, Any]]
    """See results.mattered."""


def run(recipe: Recipe, *, runs: str | Path = "", cluster: str = "", devices: int = 0) -> Sweep:
    """Try settings of the recipe's search space until its number of trials, or its budget, is used up.

    Goes on where an earlier call with the same recipe was cut off, or with more trials where `search.trials` was
    raised. With `cluster`, the address of a Ray cluster, `devices` trials train side by side (0: as many as there are
    GPUs, else machines). Reads the training and the validation split alone. Raises errors.Unfinished where a signal or
    Ctrl-C ended it, and LabError for a recipe without a search.
    """
    search_space.check(recipe)
    folder = folder_of(recipe, runs)
    folder.mkdir(parents=True, exist_ok=True)
    with training_runs.only_trainer(folder), _in_one_line(folder):
        manifest.write_bytes(folder / "recipe.toml", recipes.as_toml(recipe).encode())
        record, jobs = Record(folder), _Jobs(recipe, folder.name, runs)
        if record.trials:
            logger.info(f"going on with {len(record.trials)} trial(s) of {folder}")
        for trial in [trial for trial in record.trials.values() if trial.state == "failed"]:
            record.put(replace(trial, state="begun", reason=""))
        if begun := next((trial for trial in record.trials.values() if trial.run), None):
            jobs.of(begun)  # refuses other data before anything is trained
        with executors.hired(cluster, devices) as workers, _excused(record):
            _work_off(recipe, record, jobs, workers)
        return _finish(recipe, record, jobs, folder)


def folder_of(recipe: Recipe, runs: str | Path = "") -> Path:
    """Where a sweep lies: its name tells all that decides its trials, but for how many there are."""
    return environment.runs_folder(runs) / f"{recipe.name[:45]}-sweep-{digest(_identity(recipe))[:8]}"


def outline(recipe: Recipe, runs: str | Path = "") -> dict[str, Any]:
    """What `run` would do: the space, the rungs and the folder."""
    search_space.check(recipe)
    return {
        "folder": str(folder_of(recipe, runs)),
        "trials": recipe.search.trials,
        "sampler": recipe.search.sampler,
        "rungs": asha.rungs(recipe),
        "space": {name: search_space.in_words(told) for name, told in recipe.search.space.items()},
    }


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Flat; settings are told where they are not at their defaults, so that later ones leave older sweeps' names."""
    plain = Recipe(name="plain").settings()
    unimportant = ({"name", *training_runs.NOT_OF_THE_WEIGHTS} | {"features.workers"}) - {"model.base"}
    told = {name: value for name, value in recipe.settings().items() if value != plain[name]}
    search = recipes.search_settings(recipe)
    for name in ("search.trials", "search.max_hours"):
        search.pop(name)
    return {name: value for name, value in told.items() if name not in unimportant} | search


class _Jobs:
    """Trials as what a worker needs to train them; each feature cache is made, or opened, once."""

    def __init__(self, recipe: Recipe, name: str, runs: str | Path):
        self.recipe, self.name, self.runs = recipe, name, runs
        self.caches: dict[str, FeatureCache] = {}
        self.validation = ""

    def settle(self, settings: dict[str, Any], **more: Any) -> Recipe:
        """The recipe of a trial with these settings; LabError where they do not go together."""
        return recipes.resolve(self.recipe.model_dump(mode="json"), {"name": self.name, **settings, **more})

    def of(self, trial: Trial) -> Job:
        """LabError where the trial cannot be trained, or where its WER would say nothing beside the others'."""
        recipe = self.settle(trial.settings, **{"training.keep_checkpoints": 1})
        cache = self.cache(recipe)
        base = training_pipeline.starting_model(recipe, cache, self.runs)
        self._refuse_other_validation(cache)
        run = training_pipeline.run_folder(recipe, cache, base, self.runs)
        if trial.run not in ("", run.name):
            raise LabError(
                f"trial {trial.number} was {trial.run} and would now be {run.name}: data, base model or the lab's "
                f"code have changed since, and old and new trials do not compare. Remove {run.parent} to begin anew"
            )
        return Job(trial.number, recipe, cache, base, run, trial.target)

    def cache(self, recipe: Recipe) -> FeatureCache:
        settings = {name: value for name, value in recipe.settings().items() if name.startswith(_MAKES_THE_CACHE)}
        key = json.dumps(settings, sort_keys=True)
        if key not in self.caches:
            self.caches[key] = feature_pipeline.run(recipe, runs=self.runs)
        return self.caches[key]

    def _refuse_other_validation(self, cache: FeatureCache) -> None:
        rows = cache.rows.iloc[cache.split("validation")]
        found = evaluation.test_set(rows[["id", "text"]].rename(columns={"text": "reference"}))
        self.validation = self.validation or found
        if found != self.validation:
            raise LabError("its settings change the validation split, and trials are compared on one")


def _work_off(recipe: Recipe, record: Record, jobs: _Jobs, workers: executors.Crew) -> None:
    """Every move that is left, as many at a time as the crew has hands."""
    rungs, under_way, exhausted = asha.rungs(recipe), set(), False
    while True:
        while len(under_way) < workers.hands:
            may_begin = not exhausted and _may_begin(recipe, record)
            move = asha.next_move(record.trials, under_way, rungs, recipe.search.reduction, may_begin)
            if move is None:
                break
            trial = _moved(recipe, record, move)
            exhausted = exhausted or trial is None
            if trial and (job := _prepared(recipe, record, jobs, trial)):
                workers.start(job)
                under_way.add(job.number)
        if not under_way:
            return
        result = workers.wait()
        under_way.remove(result.number)
        _note(recipe, record, result)


def _may_begin(recipe: Recipe, record: Record) -> bool:
    trials, limit = list(record.trials.values()), recipe.search.max_hours
    if any(trial.state == "failed" for trial in trials) and not any(trial.looks for trial in trials):
        return False  # those that are under way are to show first whether any trial can get past that
    spent_h = sum(trial.seconds for trial in trials) / 3600
    return len(trials) < recipe.search.trials and not 0 < limit <= spent_h


def _moved(recipe: Recipe, record: Record, move: tuple[int | None, int]) -> Trial | None:
    """The trial that is sent to its next target, noted; None where there is no new one to try."""
    number, target = move
    if number is not None:
        trial = replace(record.trials[number], state="begun", target=target)
    else:
        number = len(record.trials) + 1
        settings = search_space.proposal(recipe, number, list(record.trials.values()))
        if settings is None:
            logger.info(f"the space holds no more than {number - 1} different trials")
            return None
        trial = Trial(number, settings, target)
    logger.info(f"trial {number} to step {target}: {results.settings_in_words(trial.settings)}")
    record.put(trial)
    return trial


def _prepared(recipe: Recipe, record: Record, jobs: _Jobs, trial: Trial) -> Job | None:
    """What trains the trial; None, and noted, where its settings cannot be trained or have killed who tried."""
    try:
        job = jobs.of(trial)
        trial = _sent(trial, job.run)
    except Unfinished:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, LabError) else unforeseen(error, record.path.parent)
        _note(recipe, record, Result(trial.number, "failed", reason=reason))
        return None
    record.put(trial)
    return job


def _sent(trial: Trial, run: Path) -> Trial:
    """The trial with this attempt counted. LabError where those before it died and came no checkpoint further.

    Those that do come further are a machine that is cut off now and then: they may be as many as it takes.
    """
    sealed = [path for path in sealed_checkpoints.listed(run / "checkpoints") if manifest.read(path)]
    at = sealed_checkpoints.step_of(sealed[-1]) if sealed else 0
    before = trial.attempts if trial.sent_from == at else 0
    if before == _ATTEMPTS:
        raise LabError(
            f"{before} processes in a row died over it with no new checkpoint; most often memory is short. "
            "Run the same command again to try it once more"
        )
    return replace(trial, run=run.name, attempts=before + 1, sent_from=at)


def _note(recipe: Recipe, record: Record, result: Result) -> None:
    """What came of a job. A failure that none has got past, and none is about to, is raised: all would share it."""
    trial = record.trials[result.number]
    if result.state == "died":  # it stays begun, and what is begun is sent off first
        return logger.info(f"trial {trial.number} is sent off again: {result.reason}")
    trial = replace(trial, attempts=0, sent_from=0)
    under_way = [other for other in record.trials.values() if other.state == "begun" and other.number != trial.number]
    if result.state == "failed" and not under_way and not any(other.looks for other in record.trials.values()):
        record.put(trial)
        raise LabError(result.reason)
    looks, seconds = result.looks or trial.looks, result.seconds or trial.seconds
    trial = replace(trial, looks=looks, seconds=seconds, state=result.state, reason=result.reason)
    record.put(trial)
    results.write_table(recipe, list(record.trials.values()), record.path.parent)
    if trial.reason:
        return logger.info(f"trial {trial.number} {trial.state}: {trial.reason}")
    best = min(record.trials.values(), key=lambda other: (other.wer, other.number))
    logger.info(
        f"trial {trial.number} {trial.state} at step {trial.steps} of {recipe.training.steps}: WER {trial.wer:.3f}; "
        f"best so far {best.wer:.3f} (trial {best.number}); {len(record.trials)} of {recipe.search.trials} trials begun"
    )
    return None


def _finish(recipe: Recipe, record: Record, jobs: _Jobs, folder: Path) -> Sweep:
    trials = list(record.trials.values())
    finished = [trial for trial in trials if trial.state == "finished"]
    if not finished:
        reason = trials[-1].reason if trials else "there was none"
        raise LabError(f"no trial of {folder} was trained to its end; the last: {reason}. Look at the search space")
    best = min(finished, key=lambda trial: (trial.wer, trial.number))
    chosen = jobs.settle(best.settings)
    file = folder / "best.toml"
    options = shlex.join(["--recipe", str(file), *(["--runs", str(jobs.runs)] if jobs.runs else [])])
    manifest.write_bytes(file, results.best_toml(recipe, chosen, best, len(trials), options).encode())
    with console.silenced():
        cache = feature_pipeline.run(chosen, runs=jobs.runs)  # recorded for `train` and `evaluate`
        model = Path(training_pipeline.run(chosen, cache, runs=jobs.runs).uri)
    os.utime(model / manifest.MANIFEST)  # the app serves the newest model
    table = results.write_table(recipe, trials, folder)
    results.write_picture(recipe, trials, folder)
    return Sweep(folder, trials, best, file, options, table, results.mattered(recipe, trials))


@contextlib.contextmanager
def _in_one_line(folder: Path):
    """Between two trainings, Ctrl-C and a full disk leave all as resumable as within one."""
    try:
        yield
    except KeyboardInterrupt:
        raise Unfinished("Ctrl-C ended the sweep; all that was told is kept. Run the same command again") from None
    except OSError as error:
        refuse_full(error, folder)
        raise


@contextlib.contextmanager
def _excused(record: Record):
    """That trials are cut off by an end that can be told of is not their doing, and no attempt."""
    try:
        yield
    except (LabError, KeyboardInterrupt):
        for trial in [trial for trial in record.trials.values() if trial.attempts]:
            record.put(replace(trial, attempts=0))
        raise
