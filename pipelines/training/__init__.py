"""Recipe and cache to tuned weights: transformers' Seq2SeqTrainer at clip length, resumable at any step.

What differs from the stock recipe, and why:
- each batch runs at the length of its longest clip, from length buckets in an order that a seed fixes (batches.py);
- the loss is the mean over all label tokens of a step, whatever the accumulation: transformers multiplies it by the
  number of accumulated batches otherwise;
- the encoder's sinusoids stay constants (models.py);
- validation decodes in length-sorted batches at clip length (decoding.py) and selects by WER;
- a checkpoint counts only when sealed, and resume goes on from the newest sealed one of the same run (checkpoints.py).

    progress       what is told while a run goes on
    interruptions  a signal or the time budget ends a sitting with a checkpoint
    divergence     a loss or gradient that is no number ends a run before it spoils the weights
    memory         batches in pieces, where they do not fit
    forks          a new run from the weights of another
    trackers       trackio, tensorboard and others are told
    rehearsal      two steps, to see that all works
    trainer        Seq2SeqTrainer with our batches, loss and checkpoints
    validation     the looks at the validation split
    runs           the folder of a run: its identity, its lock, its model
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import augmentation, checkpoints, models
from pipelines.batches import BucketSampler, ClipDataset, Collator
from pipelines.cache import FeatureCache
from pipelines.models import ModelRef
from pipelines.recipe import Recipe, digest
from pipelines.training import divergence, forks, memory, rehearsal, trackers
from pipelines.training.divergence import Diverged
from pipelines.training.forks import Fork
from pipelines.training.interruptions import Interruption
from pipelines.training.memory import OutOfMemory
from pipelines.training.progress import Progress, is_over, reporter
from pipelines.training.runs import TrainedModel, finish, finished, only_trainer, refuse_other_run, run_identity
from pipelines.training.trainer import arguments_of, fix_the_order_of_sums, token_mean_loss, trainer_class
from pipelines.training.validation import rows_of, validation_loss, validator

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer, TrainerState

__all__ = [
    "Fork",
    "Progress",
    "TrainedModel",
    "forks",
    "rehearsal",
    "run_identity",
    "token_mean_loss",
    "train",
    "validation_loss",
]


def train(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    run: Path,
    progress: Progress | None = None,
    *,
    fork: Fork | None = None,
) -> TrainedModel:
    """Tune `base` on the cache's training split inside the folder `run`; go on where an earlier call was cut off.

    The result lies in `run/model`, sealed. A run that is already finished is returned at once. A run folder of another
    recipe, cache or base model is refused, naming the fields that differ. With `fork` a new run starts from the weights
    that another one made of `base`. Raises errors.Unfinished where a signal or the time budget ended the sitting.
    """
    progress = progress or Progress()
    identity = run_identity(recipe, cache, base, fork)
    run.mkdir(parents=True, exist_ok=True)
    with only_trainer(run):
        refuse_other_run(run, identity)
        model = finished(run)
        if model:
            progress.on_line(f"this run is finished: {model.uri}")
        try:
            model = model or _train(recipe, cache, base, run, identity, progress, fork)
        except BaseException:
            progress.on_stop()
            raise
    progress.on_end(model.history)
    return model


def _train(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    run: Path,
    identity: dict[str, Any],
    progress: Progress,
    fork: Fork | None,
) -> TrainedModel:
    name, start = digest(identity), fork.start(base) if fork else base
    interruption = Interruption(recipe.training.max_hours)
    divergence.tell_earlier(run, progress.on_line)
    while True:
        try:
            trainer = _fit(recipe, cache, start, run, name, progress, interruption)
            return finish(trainer, recipe, cache, run, name, start, fork)
        except OutOfMemory as error:
            line = memory.halved(run, error)
        progress.on_line(line)
        memory.free()


def _fit(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    run: Path,
    run_digest: str,
    progress: Progress,
    interruption: Interruption,
) -> Seq2SeqTrainer:
    """The trainer that has done every step that was left."""
    folder = run / "checkpoints"
    last = checkpoints.newest_complete(folder, run_digest=run_digest, log=progress.on_line)
    checkpoints.remove_unusable(folder, last)
    progress.on_line(f"going on from {last.name}" if last else f"starting from {base.title}")
    trainer = _build_trainer(recipe, cache, base, folder, run_digest, progress)
    done = _state_of(last) if last else None
    if done and is_over(done, recipe):
        trainer.state = done  # cut off between the last checkpoint and the model: the Trainer would do one step more
        return trainer
    name = f"{recipe.name}-{run_digest}"
    try:
        with (
            trackers.attached(trainer, recipe.training.tracker, name, run, progress.on_line),
            interruption.heeded(trainer),
        ):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except Diverged as error:
        kept = next(reversed(checkpoints.listed(folder)), "the base model")
        raise divergence.refused(error, run, str(kept), recipe.training.learning_rate) from None
    return trainer


def _build_trainer(
    recipe: Recipe, cache: FeatureCache, base: ModelRef, folder: Path, run_digest: str, progress: Progress
) -> Seq2SeqTrainer:
    import transformers

    settings = recipe.training
    transformers.set_seed(settings.seed)
    fix_the_order_of_sums()
    model = models.load(base, dropout=recipe.model.dropout, spec_augment=recipe.model.spec_augment)
    models.set_language(model, recipe.language)
    processor = models.load_processor(base, recipe.language)
    rows = rows_of(cache, "train")
    lengths = cache.rows["frames"].to_numpy()[rows]
    full_context = settings.context == "full"
    variation = augmentation.Variation(**recipe.augment.model_dump())
    make_sampler, make_clips, collate = BucketSampler, ClipDataset, Collator(cache, full_context=full_context)
    if variation:
        make_sampler, make_clips = augmentation.DrawnSampler, augmentation.DrawnClips
        collate = augmentation.VaryingCollator(cache, variation, full_context=full_context)
    sampler = make_sampler(lengths, settings.batch_size, settings.bucket_batches, settings.seed)
    trainer = trainer_class()(
        model=model,
        args=arguments_of(recipe, folder),
        train_dataset=make_clips(cache, rows),
        eval_dataset=ClipDataset(cache, rows_of(cache, "validation")),
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=token_mean_loss,
        callbacks=[reporter(recipe, sampler, progress)],
        sampler=sampler,
        validate=validator(recipe, cache, processor, full_context),
        run_digest=run_digest,
        keep=settings.keep_checkpoints,
        micro_batch=memory.micro_batch(folder.parent, settings),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _state_of(checkpoint: Path) -> TrainerState:
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
