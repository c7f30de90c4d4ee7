"""TODO: describe this module."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.features.cache import FeatureCache
from pipelines.infra import stores
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes import digest
from pipelines.recipes.runs import REHEARSAL_FOLDER, experiment_folder, record_stage
from pipelines.recipes.settings import Recipe
from pipelines.training import distillation, ray_train
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training.callbacks.console import with_progress_file
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints import fork as checkpoints_fork
from pipelines.training.run import TrainedModel
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef, _vocabulary_sha256

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    cache: FeatureCache,
    *,
    runs: str | Path = "",
    resume: str = "",
    publish: str = "",
    fork: str = "",
    cluster: str = "",
    devices: int = 1,
    progress: Progress | None = None,
) -> TrainedModel:
    """Stage 02: tune the recipe's base model on the cache; resumes by itself inside its own run folder.

    With the URI `resume` checkpoints are copied there in the background, and an empty machine goes on from there. With
    `publish` the finished model is copied to that URI. With `fork`, the URI of a run's folder, a checkpoint or a model,
    a new run starts from those weights. With the setting `training.fast_dev_run`, two steps are made anew each time, in
    a folder that no later stage looks into, and nothing is copied anywhere. With `cluster`, a Ray cluster's address,
    `devices` of its workers train together.

    A recipe that names a teacher trains its student, and raises LabError where that teacher is not trained yet.
    """
    if recipe.distillation.teacher and fork:
        raise LabError("a student starts from its teacher's layers: leave out --fork, or distillation.teacher")
    if devices > 1 and not cluster:
        raise LabError(
            f"devices={devices} needs a cluster; on one machine: python -m pipelines train --devices {devices}"
        )
    if cluster and distributed.world_size() > 1:
        raise LabError("torchrun and --cluster both start processes: leave one of them out")
    progress = with_progress_file(progress or Progress()) if distributed.is_main_process() else Progress()
    if recipe.training.fast_dev_run:
        recipe, cache = apply_fast_dev_run(recipe, cache)
        resume = publish = ""
        distributed.broadcast_from_main(
            lambda: shutil.rmtree(experiment_folder(recipe, runs) / REHEARSAL_FOLDER, ignore_errors=True)
        )
    with record_stage(recipe, runs, "training") as note:
        with distributed.local_main_process_first():
            base = starting_model(recipe, cache, runs)
            parent = checkpoints_fork.find(fork, base) if fork else None
        folder = run_folder(recipe, cache, base, runs, parent)
        if cluster:
            trained = ray_train.train(
                cluster, devices, ray_train.Job(recipe, cache, base, folder, resume, parent), progress
            )
        else:
            trained = training_loop.train(recipe, cache, base, folder, progress, resume, fork=parent)
        note |= {
            "model_uri": trained.uri,
            "digest": trained.digest,
            "best_step": trained.best_step,
            "validation_wer": trained.validation["eval_wer"],
            "training_seconds": trained.seconds,
        }
    if publish and distributed.is_main_process():
        with record_stage(recipe, runs, "model publication") as note:
            logger.info(f"the model is finished: {trained.uri}")
            published = stores.open_store(publish).publish(Path(trained.uri), publish)
            logger.info(f"published as {published}")
            note["model_uri"] = published
    return trained


def distill(
    recipe: Recipe,
    cache: FeatureCache,
    *,
    runs: str | Path = "",
    progress: Progress | None = None,
    **how: Any,
) -> TrainedModel:
    """`run` for a recipe that names a teacher; one that a recipe is to make is trained first, where there is none.

    With the URI `resume` that teacher's checkpoints and its model are kept at the same URI with `-teacher` after it, so
    that an empty machine goes on with the very weights that the student began to learn from.
    """
    if not recipe.distillation.teacher:
        raise LabError(
            f"recipe {recipe.name} names no teacher: take --recipe tour-distil, or give one with --teacher (a model's "
            "URI, or run:<recipe>) and --set distillation.decoder_layers=2"
        )
    own = _recipe_of_teacher(recipe)
    made = own and _finished_teacher(own, cache, runs)
    kept = how.get("resume") and not recipe.training.fast_dev_run
    resume = f"{how['resume'].rstrip('/')}-teacher" if kept else ""
    if own is None or made:
        logger.info("the teacher is at hand: none is trained")
    else:
        fetched = f", where {resume} has none" if resume else ""
        logger.info(f"no finished run of {own.name} on this cache is here: the teacher is trained first{fetched}")
    if own and (resume or not made):  # one that is finished is only copied, where it is not there yet
        alike = {name: how[name] for name in ("cluster", "devices") if name in how}
        run(made[0] if made else own, cache, runs=runs, progress=progress, resume=resume, **alike)
    return run(recipe, cache, runs=runs, progress=progress, **how)


def starting_model(recipe: Recipe, cache: FeatureCache, runs: str | Path = "") -> ModelRef:
    """What training starts from: the recipe's base model, or its teacher. LabError where that is not to be had."""
    if not recipe.distillation.teacher:
        return whisper_model.resolve(recipe.model.base)
    own = _recipe_of_teacher(recipe)
    made = own and _finished_teacher(own, cache, runs)
    uri = made[1] if made else None if own else recipe.distillation.teacher
    if uri is None:
        raise LabError(
            f"distillation.teacher is {recipe.distillation.teacher!r}, and no finished run of it on this cache is on "
            f"this machine: python -m pipelines distill --recipe {recipe.name} trains it first"
        )
    teacher = whisper_model.resolve(uri)
    distillation.refuse_unfit(recipe, cache, teacher)
    prepared = whisper_model.load_processor(teacher, recipe.language)
    found = {
        "features.n_mels": prepared.feature_extractor.feature_size,
        "features.vocabulary": _vocabulary_sha256(prepared),
    }
    if unlike := recipes.differences({name: cache.identity.get(name) for name in found}, found):
        raise LabError(f"the teacher {teacher.title} cannot read this cache: {'; '.join(unlike)}. Take another teacher")
    return teacher


_FOR = "-for-"


def _recipe_of_teacher(recipe: Recipe) -> Recipe | None:
    """The recipe that makes the teacher, on the student's data; None where the teacher is a model's URI."""
    name, of_run = recipe.distillation.teacher, "run:"
    if not name.startswith(of_run):
        return None
    told = recipes.load(name.removeprefix(of_run))
    if told.distillation.teacher or told.name == recipe.name:
        raise LabError(
            f"distillation.teacher must name a recipe that tunes a whole model under another name, got {name!r}: "
            f"call the student something else (--set name={recipe.name}-distil), or name another teacher"
        )
    kept = {name: getattr(recipe, name) for name in ("language", "source", "features", "curation")}
    rehearsed = {"fast_dev_run": recipe.training.fast_dev_run}
    other = told.model.base != recipe.model.base or any(getattr(told, name) != value for name, value in kept.items())
    return told.model_copy(
        update={
            **kept,
            # on other data it is not that recipe's own model, and must not lie where that would be looked for
            "name": f"{told.name}{_FOR}{recipe.name}"[:64] if other else told.name,
            "model": told.model.model_copy(update={"base": recipe.model.base}),
            "training": told.training.model_copy(update=rehearsed),
        }
    )


def _finished_teacher(own: Recipe, cache: FeatureCache, runs: str | Path) -> tuple[Recipe, str] | None:
    """The recipe that made the teacher of this cache, which may be called otherwise than `own`, and the model's URI; in
    a rehearsal one that was rehearsed will do."""
    plain = own.model_copy(update={"training": own.training.model_copy(update={"fast_dev_run": False})})
    base = whisper_model.resolve(own.model.base)
    asked = own.model_copy(update={"name": own.name.partition(_FOR)[0]})  # somebody may have trained it so by hand
    for wanted in (plain, own, asked):
        if made := training_run.finished(run_folder(wanted, cache, base, runs)):
            return wanted, made.uri
    return None


def run_folder(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    runs: str | Path = "",
    fork: checkpoints_fork.Fork | None = None,
) -> Path:
    """The folder of one training run, named by all that decides its weights."""
    if recipe.training.fast_dev_run:
        return experiment_folder(recipe, runs) / REHEARSAL_FOLDER / "run"
    return experiment_folder(recipe, runs) / f"train-{digest(training_run.run_identity(recipe, cache, base, fork))}"


def apply_fast_dev_run(recipe: Recipe, cache: FeatureCache) -> tuple[Recipe, FeatureCache]:
    logger.info(NOTE)
    return shortened(recipe), few(cache, bool(recipe.distillation.teacher))


CLIPS = 4
"""Validation and test clips that are looked at."""
TAUGHT = 64
"""Training clips that a teacher is asked for its transcripts of."""
NOTE = f"fast_dev_run: 2 steps, a look at {CLIPS} clips, folders of its own. Its figures mean nothing"


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with two steps and short transcripts."""
    training = {"steps": 2, "eval_every": 2, "warmup_steps": 0}
    evaluation = {"max_new_tokens": min(16, recipe.evaluation.max_new_tokens)}
    student = {"max_label_wer": 0.0} if recipe.distillation.teacher else {}  # a rehearsed teacher hears nothing right
    return recipe.model_copy(
        update={
            "distillation": recipe.distillation.model_copy(update=student),
            "training": recipe.training.model_copy(update=training),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
        }
    )


def few(cache: FeatureCache, taught: bool = False) -> FeatureCache:
    """The cache with all of its training clips and the first few of the others; of those, too, where `taught`."""
    rows = cache.rows
    kept = [
        rows[rows["split"] == "train"].head(TAUGHT if taught else len(rows)),
        *(rows[rows["split"] == name].head(CLIPS) for name in ("validation", "test")),
    ]
    return replace(cache, rows=pd.concat(kept).reset_index(drop=True))
