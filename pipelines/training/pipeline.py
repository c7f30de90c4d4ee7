"""Entry points of the training pipeline: run a recipe, or distill a student from its teacher.

run(recipe, cache)      -> TrainedModel; resumes in its own folder
distill(recipe, cache)  -> TrainedModel of the student; trains a missing teacher first
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from pipelines import recipes
from pipelines.features import derived
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.features.clips import MAX_LABEL_TOKENS
from pipelines.infra import stores
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.commands import command
from pipelines.recipes.runs import REHEARSAL_FOLDER, experiment_folder, record_stage
from pipelines.recipes.settings import Recipe
from pipelines.training import distillation, ray_train
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training.callbacks.console import with_progress_file
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints.fork import Fork, find_weights
from pipelines.training.optimization import learning_rates
from pipelines.training.run import TrainedModel, TrainingRun, finished_model, run_identity
from pipelines.whisper import model as whisper_model
from pipelines.whisper import model_files
from pipelines.whisper.model import ModelRef, vocabulary_sha256

logger = logging.getLogger(__name__)

CLIPS = 4
"""Validation and test clips of a fast_dev_run."""
TEACHER_CLIPS = 64
"""Training clips that a teacher transcribes in a fast_dev_run."""
NOTE = f"fast_dev_run: 2 steps, {CLIPS} validation clips, separate folders. Its figures mean nothing"
_FOR = "-for-"
"""Between the names of a teacher's and a student's recipe, if the teacher is trained on the student's data."""


@dataclass(frozen=True)
class Launch:
    """How a run starts, and on which machines."""

    fork: str = ""
    """URI of a run's folder, a checkpoint or a model to start from; empty for the base model."""
    cluster: str = ""
    """Address of a Ray cluster; empty for this machine."""
    devices: int = 1
    """Workers of the Ray cluster that train together."""

    def __post_init__(self):
        if self.devices > 1 and not self.cluster:
            raise LabError(
                f"devices={self.devices} needs a cluster; on one machine, give the command train the option "
                f"--devices {self.devices}"
            )
        if self.cluster and distributed.world_size() > 1:
            raise LabError("torchrun and --cluster both start processes: leave one of them out")


def run(
    recipe: Recipe,
    cache: FeatureCache,
    *,
    runs: str | Path = "",
    resume: str = "",
    publish: str = "",
    launch: Launch | None = None,
    progress: Progress | None = None,
) -> TrainedModel:
    """Tune the recipe's base model on the cache (stage 02); resume an interrupted run in its folder.

    Checkpoints are copied to the URI `resume` in the background, and an empty machine resumes from there. The finished
    model is copied to the URI `publish`. With the setting `training.fast_dev_run`, two steps are done in a separate
    folder that later stages do not use, and nothing is copied. A recipe that names a teacher trains its student. Raises
    LabError if that teacher is not trained yet, or if training clips share something with a guard.
    """
    launch = launch or Launch()
    if recipe.distillation.teacher and launch.fork:
        raise LabError("a student starts from its teacher's layers: leave out --fork, or distillation.teacher")
    progress = with_progress_file(progress or Progress()) if distributed.is_main_process() else Progress()
    if recipe.training.fast_dev_run:
        recipe, cache = apply_fast_dev_run(recipe, cache)
        resume = publish = ""
        rehearsal = experiment_folder(recipe, runs) / REHEARSAL_FOLDER
        distributed.broadcast_from_main(lambda: shutil.rmtree(rehearsal, ignore_errors=True))
    with record_stage(recipe, runs, "training") as note:
        derivation = derived.derive(recipe, cache)
        recipe = derivation.recipe
        if derivation.values:
            logger.info(str(derivation))
        with distributed.local_main_process_first():
            base = starting_model(recipe, cache, runs)
            model_files.require_full_window(base.folder)
            _refuse_long_labels(recipe, cache, base)
            fork = find_weights(launch.fork, base) if launch.fork else None
            for name in recipe.guards:
                feature_pipeline.guard_cache(recipe, name, cache, runs=runs)  # refused before hours of training
        folder = run_folder(recipe, cache, base, runs, fork)
        job = TrainingRun(recipe, cache, base, folder, progress, resume, fork, derived=derivation.values)
        training_run.log_unfinished_runs(folder, job.identity)
        if line := learning_rates.hint(recipe, base.folder):
            logger.info(line)
        model = ray_train.train(launch.cluster, launch.devices, job) if launch.cluster else training_loop.train(job)
        note |= {
            "model_uri": model.uri,
            "digest": model.digest,
            "best_step": model.best_step,
            "validation_wer": model.validation["eval_wer"],
            "training_seconds": model.seconds,
            **({"derived": derivation.values} if derivation.values else {}),
        }
    if publish and distributed.is_main_process():
        _publish(recipe, model, runs, publish)
    return model


def _publish(recipe: Recipe, model: TrainedModel, runs: str | Path, uri: str) -> None:
    with record_stage(recipe, runs, "model publication") as note:
        logger.info(f"the model is finished: {model.uri}")
        note["model_uri"] = stores.open_store(uri).publish(Path(model.uri), uri)
        logger.info(f"published as {note['model_uri']}")


def distill(
    recipe: Recipe,
    cache: FeatureCache,
    *,
    runs: str | Path = "",
    resume: str = "",
    publish: str = "",
    launch: Launch | None = None,
    progress: Progress | None = None,
) -> TrainedModel:
    """Train the student of a recipe that names a teacher, as `run` does; train a missing `run:<recipe>` teacher first.

    With the URI `resume` the teacher's checkpoints and model are copied to `<resume>-teacher`, so that an empty machine
    continues with the same teacher weights.
    """
    launch = launch or Launch()
    if not recipe.distillation.teacher:
        raise LabError(
            f"recipe {recipe.name} names no teacher: take --recipe tour-distil, or give one with --teacher (a model's "
            "URI, or run:<recipe>) and --set distillation.decoder_layers=2"
        )
    teacher = _teacher_recipe(recipe)
    finished = teacher and _finished_teacher(teacher, cache, runs)
    teacher_uri = f"{resume.rstrip('/')}-teacher" if resume and not recipe.training.fast_dev_run else ""
    if teacher is None or finished:
        logger.info("teacher model found; skipping teacher training")
    else:
        fetched = f", unless {teacher_uri} has it" if teacher_uri else ""
        logger.info(f"no finished run of {teacher.name} on this cache: training the teacher first{fetched}")
    if teacher and (teacher_uri or not finished):  # a finished one is only copied to the URI
        teacher = finished[0] if finished else teacher
        run(teacher, cache, runs=runs, resume=teacher_uri, launch=replace(launch, fork=""), progress=progress)
    return run(recipe, cache, runs=runs, resume=resume, publish=publish, launch=launch, progress=progress)


def starting_model(recipe: Recipe, cache: FeatureCache, runs: str | Path = "") -> ModelRef:
    """Return the recipe's base model, or its teacher; raise LabError if there is no teacher or it does not match."""
    if not recipe.distillation.teacher:
        return whisper_model.resolve(recipe.model.base)
    teacher_recipe = _teacher_recipe(recipe)
    finished = teacher_recipe and _finished_teacher(teacher_recipe, cache, runs)
    if teacher_recipe and not finished:
        raise LabError(
            f"distillation.teacher is {recipe.distillation.teacher!r}, and no finished run of it on this cache is on "
            f"this machine: {command('distill', recipe=recipe, runs=runs)} trains it first"
        )
    teacher = whisper_model.resolve(finished[1] if finished else recipe.distillation.teacher)
    distillation.refuse_shorter_teacher(recipe, cache, teacher)
    processor = whisper_model.load_processor(teacher, recipe.language)
    expected = {
        "features.n_mels": processor.feature_extractor.feature_size,
        "features.vocabulary": vocabulary_sha256(processor),
    }
    if changed := recipes.differences({name: cache.identity.get(name) for name in expected}, expected):
        raise LabError(
            f"the teacher {teacher.title} cannot read this cache: {'; '.join(changed)}. Take another teacher"
        )
    return teacher


def _refuse_long_labels(recipe: Recipe, cache: FeatureCache, base: ModelRef) -> None:
    """Raise LabError if a label of the cache, or of a window, is longer than the text that the decoder takes."""
    positions = model_files.text_positions(base.folder)
    longest = int(cache.rows["label_count"].max())
    longer = next((name for name in ("window_share", "bpe_dropout") if getattr(recipe.training, name)), "")
    if positions < (MAX_LABEL_TOKENS if longer else longest):
        window = f" and training.{longer} needs {MAX_LABEL_TOKENS}: set it to 0," if longer else ","
        raise LabError(
            f"{base.title} takes texts of {positions} tokens (max_target_positions), the longest of the cache has "
            f"{longest}{window} or take another base model or shorter clips (features.max_duration_s)"
        )


def _teacher_recipe(recipe: Recipe) -> Recipe | None:
    """Return the recipe that trains the teacher on the student's data; None if the teacher is a model's URI."""
    name, prefix = recipe.distillation.teacher, "run:"
    if not name.startswith(prefix):
        return None
    teacher = recipes.load(name.removeprefix(prefix))
    if teacher.distillation.teacher or teacher.name == recipe.name:
        raise LabError(
            f"distillation.teacher must name a recipe that tunes a whole model under another name, got {name!r}: "
            f"call the student something else (--set name={recipe.name}-distil), or name another teacher"
        )
    data = {name: getattr(recipe, name) for name in ("language", "source", "features", "curation")}
    differs = teacher.model.base != recipe.model.base or any(
        getattr(teacher, name) != value for name, value in data.items()
    )
    return teacher.model_copy(
        update={
            **data,
            # trained on other data, it must not be in the folder of that recipe's own model
            "name": f"{teacher.name}{_FOR}{recipe.name}"[:64] if differs else teacher.name,
            "model": teacher.model.model_copy(update={"base": recipe.model.base}),
            "training": teacher.training.model_copy(update={"fast_dev_run": recipe.training.fast_dev_run}),
        }
    )


def _finished_teacher(teacher: Recipe, cache: FeatureCache, runs: str | Path) -> tuple[Recipe, str] | None:
    """Return the recipe and the URI of a finished teacher on this cache.

    Its recipe may have the original name, if it was trained on this data directly, and for a fast_dev_run a teacher of
    a fast_dev_run is enough.
    """
    full = teacher.model_copy(update={"training": teacher.training.model_copy(update={"fast_dev_run": False})})
    base = whisper_model.resolve(teacher.model.base)
    original = teacher.model_copy(update={"name": teacher.name.partition(_FOR)[0]})
    for candidate in (full, teacher, original):
        if model := finished_model(run_folder(candidate, cache, base, runs)):
            return candidate, model.uri
    return None


def run_folder(
    recipe: Recipe, cache: FeatureCache, base: ModelRef, runs: str | Path = "", fork: Fork | None = None
) -> Path:
    """Return the folder of a training run, named by the digest of its identity."""
    if recipe.training.fast_dev_run:
        return experiment_folder(recipe, runs) / REHEARSAL_FOLDER / "run"
    return training_run.folder_of(experiment_folder(recipe, runs), run_identity(recipe, cache, base, fork))


def apply_fast_dev_run(recipe: Recipe, cache: FeatureCache) -> tuple[Recipe, FeatureCache]:
    """Return the recipe and the cache of a fast_dev_run: two steps, few clips."""
    logger.info(NOTE)
    return shorten_recipe(derived.resolve(recipe, cache)), reduce_cache(cache, bool(recipe.distillation.teacher))


def shorten_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with two steps and short transcripts."""
    training = {"steps": 2, "eval_every": 2, "warmup_steps": 0}
    evaluation = {"max_new_tokens": min(16, recipe.evaluation.max_new_tokens)}
    # a teacher of two steps transcribes nothing right
    student = {"max_label_wer": 0.0} if recipe.distillation.teacher else {}
    return recipe.model_copy(
        update={
            "distillation": recipe.distillation.model_copy(update=student),
            "training": recipe.training.model_copy(update=training),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
        }
    )


def reduce_cache(cache: FeatureCache, has_teacher: bool = False) -> FeatureCache:
    """Return the cache with the first CLIPS clips of validation and test, and with a teacher few of training too."""
    rows = cache.rows
    parts = [
        rows[rows["split"] == "train"].head(TEACHER_CLIPS if has_teacher else len(rows)),
        *(rows[rows["split"] == name].head(CLIPS) for name in ("validation", "test")),
    ]
    return replace(cache, rows=pd.concat(parts).reset_index(drop=True))
