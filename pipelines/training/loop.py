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
    shares         batches in shares, where several processes train
    forks          a new run from the weights of another
    trackers       trackio, tensorboard and others are told
    rehearsal      two steps, to see that all works
    adapters       what is tuned: all weights, the decoder's alone, or LoRA's
    windows        clips joined to 30 s
    building       model, optimizer, schedule, batches and measure of a recipe: for the trainer, and for your own loop
    trainer        Seq2SeqTrainer with our batches, loss and checkpoints
    validation     the looks at the validation split
    card           the finished model's README.md
    runs           the folder of a run: its identity, its lock, its model
    copies         checkpoints kept at a URI, and fetched from it on another machine
    fleet          the workers of a Ray cluster train together
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.features.cache import FeatureCache
from pipelines.features.clips import MAX_LABEL_TOKENS
from pipelines.infra import manifest
from pipelines.infra.parallel import distributed
from pipelines.recipes import as_toml, digest
from pipelines.recipes.settings import Recipe
from pipelines.training import components, distillation
from pipelines.training.callbacks import divergence, oom, trackers
from pipelines.training.callbacks.divergence import Diverged
from pipelines.training.callbacks.interruptions import Interruption, Paused
from pipelines.training.callbacks.oom import OutOfMemory
from pipelines.training.callbacks.progress import Progress, history_of, is_over, reporter
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.checkpoints.fork import Fork
from pipelines.training.checkpoints.mirror import CheckpointMirror
from pipelines.training.data import data_parallel
from pipelines.training.run import TrainedModel, finish, finished, only_trainer, refuse_other_run, run_identity
from pipelines.training.trainer import arguments_of, token_mean_loss, trainer_class
from pipelines.training.validation import rows_of, validator
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import BucketSampler, ClipDataset, padded_frames
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer, TrainerCallback, TrainerState

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    run: Path,
    progress: Progress | None = None,
    resume: str = "",
    *,
    fork: Fork | None = None,
    until: int = 0,
) -> TrainedModel:
    """Tune `base` on the cache's training split inside the folder `run`; go on where an earlier call was cut off.

    Where the recipe names a teacher, `base` is that teacher, and its student is what is tuned (distillation.py).

    The result lies in `run/model`, sealed. A run that is already finished is not trained again. A run folder of another
    recipe, cache or base model is refused, naming the fields that differ. With `fork` a new run starts from the weights
    that another one made of `base`. Raises errors.Unfinished where a signal or the time budget ended the sitting, and
    Paused at the first checkpoint from step `until` on that is not the last; `until` is no part of what the run is.

    With the URI `resume` the checkpoints are copied there, too, and at last the model; the newest one there is gone on
    from where it is newer than what is on this machine (copies.py).

    Several processes may train together (ranks.py): all must see the run's folder, the first writes and tells, and each
    gets the model.
    """
    progress = progress if progress and distributed.is_main_process() else Progress()
    identity = run_identity(recipe, cache, base, fork)
    name, folder, copies = digest(identity), run / "checkpoints", None

    def begin() -> TrainedModel | None:
        nonlocal copies
        run.mkdir(parents=True, exist_ok=True)
        held.enter_context(only_trainer(run))
        refuse_other_run(run, identity)
        if resume:
            copies = CheckpointMirror(resume, run, identity, recipe.training.keep_checkpoints)
            newest = _newest(run, name)
            copies.go_on_from(run / "model" if finished(run) else newest)
        model = finished(run)
        if model is None:
            manifest.write_bytes(run / "recipe.toml", as_toml(recipe).encode())
        return model

    with contextlib.ExitStack() as held:
        model = distributed.broadcast_from_main(begin)
        data_parallel.refuse_unseen(run)
        if model:
            logger.info(f"this run is finished: {model.uri}")
        try:
            with copies or contextlib.nullcontext():
                model = model or _train(recipe, cache, base, run, name, progress, copies, fork, until)
                if copies:
                    copies.offer(Path(model.uri))
            distributed.broadcast_from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        except BaseException:
            progress.on_stop()
            raise
    progress.on_end(model.history)
    return dataclasses.replace(model, copies=copies.kept()) if copies else model


def _train(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    run: Path,
    run_digest: str,
    progress: Progress,
    copies: CheckpointMirror | None,
    fork: Fork | None,
    until: int,
) -> TrainedModel:
    start, interruption = fork.start(base) if fork else base, Interruption(recipe.training.max_hours, until)
    if recipe.distillation.teacher:
        newest = functools.partial(_newest, run, run_digest)
        cache = distillation.taught(recipe, cache, base, run, newest)
    divergence.tell_earlier(run)
    while True:
        try:
            trainer = _fit(recipe, cache, start, run, run_digest, progress, interruption, copies)
            break
        except OutOfMemory as error:
            line = oom.halved(run, error)
        logger.info(line)
        oom.free()
    return distributed.broadcast_from_main(
        functools.partial(finish, trainer, recipe, cache, run, run_digest, start, fork)
    )


def _newest(run: Path, run_digest: str) -> Path | None:
    """The checkpoint that the run goes on from."""
    return sealed_checkpoints.newest_complete(run / "checkpoints", run_digest=run_digest)


def _fit(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    run: Path,
    run_digest: str,
    progress: Progress,
    interruption: Interruption,
    copies: CheckpointMirror | None,
) -> Seq2SeqTrainer:
    """The trainer that has done every step that was left."""
    import torch

    folder = run / "checkpoints"

    def newest() -> Path | None:
        found = _newest(run, run_digest)
        sealed_checkpoints.remove_unusable(folder, found)
        return found

    last = distributed.broadcast_from_main(newest)
    logger.info(f"going on from {last.name}" if last else f"starting from {base.title}")
    if last:
        data_parallel.tell_other_size(last)
    trainer = _build_trainer(recipe, cache, base, folder, run_digest, progress, [copies.callback()] if copies else [])
    done = _state_of(last) if last else None
    if done and is_over(done, recipe.training.steps, recipe.training.patience):
        trainer.state = done  # cut off between the last checkpoint and the model: the Trainer would do one step more
        return trainer
    if done and 0 < interruption.until <= done.global_step:
        raise Paused(done.global_step, recipe.training.steps, history_of(done))
    name, tracker = f"{recipe.name}-{run_digest}", recipe.training.tracker if distributed.is_main_process() else ""
    try:
        with (
            trackers.attached(trainer, tracker, name, run),
            interruption.heeded(trainer),
        ):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except torch.OutOfMemoryError:  # outside of the model: the optimizer's own numbers come with its first step
        raise oom.ran_out(trainer.micro_batch, trainer.state.global_step + 1, distributed.world_size()) from None
    except Diverged as error:
        kept = next(reversed(sealed_checkpoints.listed(folder)), "the base model")
        raise divergence.refused(error, run, str(kept), recipe.training.learning_rate) from None
    return trainer


def _build_trainer(
    recipe: Recipe,
    cache: FeatureCache,
    base: ModelRef,
    folder: Path,
    run_digest: str,
    progress: Progress,
    callbacks: Sequence[TrainerCallback] = (),
) -> Seq2SeqTrainer:
    import transformers

    settings = recipe.training
    components.begin(recipe)
    model = components.build_model(recipe, base)
    processor = whisper_model.load_processor(base, recipe.language)
    sampler, clips, collate = components.training_clips(recipe, cache, processor)
    run, at_once = folder.parent, oom.micro_batch(folder.parent, settings)
    room = oom.Room(run, recipe.evaluation.batch_frames)
    trainer = trainer_class()(
        model=model,
        args=arguments_of(recipe, folder),
        train_dataset=clips,
        eval_dataset=ClipDataset(cache, rows_of(cache, "validation")),
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=token_mean_loss,
        callbacks=[reporter(settings.steps, settings.patience, sampler, progress), *callbacks],
        sampler=sampler,
        teacher=distillation.teacher_of(recipe, base),
        validate=validator(recipe, cache, processor, settings.context == "full", room),
        run_digest=run_digest,
        keep=settings.keep_checkpoints,
        carried=[run / distillation.HEARD],
        micro_batch=at_once,
        make_loader=functools.partial(components.loader_of, recipe),
        make_optimizer=functools.partial(components.build_optimizer, recipe),
        make_scheduler=functools.partial(components.build_scheduler, recipe),
        tried_first=_longest_batches(recipe, cache, sampler, at_once) if oom.is_tried_first() else (),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if distributed.rank():
        transformers.set_seed(
            settings.seed + distributed.rank()
        )  # the weights are drawn; each rank masks clips of its own
    return trainer


def steps_per_epoch(recipe: Recipe, cache: FeatureCache) -> int:
    """The optimizer steps in which every training clip comes once; as in every epoch, the last one may be smaller."""
    return -(-len(components.sampler_of(recipe, cache)) // recipe.training.accumulation)


def _longest_batches(recipe: Recipe, cache: FeatureCache, sampler: BucketSampler, at_once: int) -> list[dict[str, Any]]:
    """Of each kind of batch that training may draw the largest: silence of that length, and as many tokens."""
    import torch

    settings, rows = recipe.training, rows_of(cache, "train")
    clips = min(at_once, -(-settings.batch_size // distributed.world_size()))
    longest = padded_frames(int(cache.rows["frames"].to_numpy()[rows].max() / (1 - recipe.augment.speed)) + 1)
    sizes = [(clips, FULL_FRAMES if settings.context == "full" else longest)]
    if settings.window_share:
        sizes.append((min(clips, -(-sampler.windows_per_batch // distributed.world_size())), FULL_FRAMES))
    tokens = MAX_LABEL_TOKENS if settings.window_share else max(len(cache.labels(row)) for row in rows)
    n_mels = cache.log_mel(int(rows[0])).frames.shape[1]
    return [
        {
            "input_features": torch.zeros(n, n_mels, frames),
            "attention_mask": torch.ones(n, frames, dtype=torch.int64),
            "labels": torch.zeros(n, tokens, dtype=torch.int64),
        }
        for n, frames in sizes
    ]


def _state_of(checkpoint: Path) -> TrainerState:
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
