"""Train a recipe on a cache: transformers' Seq2SeqTrainer at clip length, resumable at any step.

Differences from the usual Whisper recipe, and the reasons:
- each batch has the length of its longest clip. Batches come from length buckets in a seeded order (batching.py);
- the loss is the mean over all label tokens of a step, with or without accumulation: transformers would multiply it by
  the number of accumulated batches;
- the encoder's sinusoidal positions stay constants (whisper/model.py);
- validation decodes length-sorted batches at clip length (decoding.py), and the best checkpoint is that of lowest WER;
- only sealed checkpoints count, and training resumes from the newest sealed one of the same run (checkpoints/).
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
from pipelines.features.derived import PROMPT_TOKENS
from pipelines.infra import console, environment, manifest
from pipelines.infra.parallel import distributed
from pipelines.recipes import as_toml
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import Recipe
from pipelines.training import adapters, components, distillation
from pipelines.training.callbacks import divergence, oom, samples, trackers
from pipelines.training.callbacks.divergence import Diverged
from pipelines.training.callbacks.interruptions import Interruption, Paused
from pipelines.training.callbacks.oom import OutOfMemory
from pipelines.training.callbacks.progress import Progress, history_of, is_over, reporter
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.checkpoints.mirror import CheckpointMirror
from pipelines.training.data import data_parallel
from pipelines.training.finish import finish
from pipelines.training.memory import advice, report
from pipelines.training.optimization import precision
from pipelines.training.run import TrainedModel, TrainingRun, finished_model, lock_run, refuse_other_run
from pipelines.training.trainer import TrainerParts, arguments_of, token_mean_loss, trainer_class
from pipelines.training.validation import rows_of, transcripts_before_training, validator
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import BucketSampler, ClipDataset, padded_frames
from pipelines.whisper.log_mel import FULL_FRAMES

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer, TrainerCallback, TrainerState

logger = logging.getLogger(__name__)


def train(run: TrainingRun) -> TrainedModel:
    """Train `run` inside its folder, or continue where an earlier call ended; return the model in `<folder>/model`.

    A finished run is returned as it is. If the recipe names a teacher, its student is trained (distillation.py). With
    `run.resume` checkpoints and the model are also copied to that URI, and a newer checkpoint there is fetched first.

    Several processes may train together (infra/parallel/distributed.py). All must see the run's folder. The main
    process writes and reports, and every process returns the model.

    Raises LabError if the folder belongs to another run, Unfinished if a signal or the time budget ended the sitting,
    and Paused at the first checkpoint from `run.until` on that is not the last.
    """
    environment.keep_freed_memory()
    if not distributed.is_main_process():
        run = dataclasses.replace(run, progress=Progress())
    with contextlib.ExitStack() as stack:
        mirror = None
        if run.resume and distributed.is_main_process():
            mirror = CheckpointMirror(run.resume, run.folder, run.identity, run.recipe.training.keep_checkpoints)
        model = distributed.broadcast_from_main(lambda: _open_folder(run, mirror, stack))
        data_parallel.refuse_unshared(run.folder)
        if model:
            logger.info(f"this run is finished: {model.uri}")
        try:
            with mirror or contextlib.nullcontext():
                model = model or _train(run, mirror)
                if mirror:
                    mirror.offer(Path(model.uri))
            if run.recipe.training.remove_checkpoints:
                distributed.broadcast_from_main(lambda: shutil.rmtree(run.checkpoints, ignore_errors=True))
        except BaseException:
            run.progress.on_stop()
            raise
    run.progress.on_end(model.history)
    return dataclasses.replace(model, copies=mirror.state()) if mirror else model


def _open_folder(run: TrainingRun, mirror: CheckpointMirror | None, stack: contextlib.ExitStack) -> TrainedModel | None:
    """Create and lock the run's folder, fetch newer checkpoints into it, and return the model if it is finished."""
    run.folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock_run(run.folder))
    refuse_other_run(run.folder, run.identity)
    _move_damaged_model(run.folder / "model")
    if mirror:
        with console.silenced():  # skipped checkpoints are logged when training starts
            newest = run.newest_checkpoint()
        mirror.resume_from(run.folder / "model" if finished_model(run.folder) else newest)
    model = finished_model(run.folder)
    if model is None:
        manifest.write_bytes(run.folder / "recipe.toml", as_toml(run.recipe).encode())
    return model


def _move_damaged_model(model: Path) -> None:
    """Move a finished model aside if a file of it is damaged: it cannot be used, and is trained or fetched again."""
    fault = manifest.problem(model)
    if fault and (model / manifest.MANIFEST).exists():
        manifest.move_aside(model, fault)


def _train(run: TrainingRun, mirror: CheckpointMirror | None) -> TrainedModel:
    """Train with smaller micro-batches until they fit into memory; return the finished model."""
    interruption = Interruption(run.recipe.training.max_hours, run.until)
    if run.recipe.distillation.teacher:
        cache = distillation.student_cache(run.recipe, run.cache, run.base, run.folder, run.newest_checkpoint)
        run = dataclasses.replace(run, cache=cache)
    divergence.log_earlier(run.folder)
    while True:
        try:
            trainer = _fit(run, interruption, mirror)
            break
        except OutOfMemory as error:
            line = oom.halve_micro_batch(run.folder, error)
        logger.info(line)
        oom.free()  # after the except block: the error's traceback holds the trainer
    return distributed.broadcast_from_main(lambda: finish(run, trainer))


def _fit(run: TrainingRun, interruption: Interruption, mirror: CheckpointMirror | None) -> Seq2SeqTrainer:
    """Return the trainer after it has done all remaining steps."""
    import torch

    checkpoint = distributed.broadcast_from_main(lambda: _checkpoint_to_resume(run))
    logger.info(f"resuming from {checkpoint.name}" if checkpoint else f"starting from {run.origin}")
    if checkpoint:
        data_parallel.log_other_world_size(checkpoint)
    settings, state = run.recipe.training, _state_of(checkpoint) if checkpoint else None
    if distributed.is_main_process():
        samples.restore(run.folder, checkpoint, state.global_step if state else 0)
    trainer = _build_trainer(run, [mirror.callback()] if mirror else [])
    if state and is_over(state, settings.steps, settings.patience):
        trainer.state = state  # only the model was missing: the Trainer would do one step more
        return trainer
    if state and 0 < interruption.until <= state.global_step:
        raise Paused(state.global_step, settings.steps, history_of(state))
    if not state and distributed.is_main_process():
        texts = transcripts_before_training(
            run.recipe, run.cache, adapters.unwrap(trainer.model), trainer.processing_class
        )
        samples.add(run.folder, 0, *texts)
    tracker = settings.tracker if distributed.is_main_process() else ""
    try:
        with (
            trackers.attached(trainer, tracker, f"{run.recipe.name}-{run.digest}", run.folder),
            interruption.handled(trainer),
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:  # outside of the model: the optimizer allocates its state in its first step
        raise oom.error_of(trainer.micro_batch, trainer.state.global_step + 1, distributed.world_size()) from None
    except Diverged as error:
        newest = next(reversed(sealed_checkpoints.listed(run.checkpoints)), "the base model")
        raise divergence.run_diverged(error, run.folder, str(newest), settings.learning_rate) from None
    return trainer


def _checkpoint_to_resume(run: TrainingRun) -> Path | None:
    """Return the newest whole checkpoint and remove those after it."""
    newest = run.newest_checkpoint()
    sealed_checkpoints.remove_unusable(run.checkpoints, newest)
    return newest


def _build_trainer(run: TrainingRun, callbacks: Sequence[TrainerCallback] = ()) -> Seq2SeqTrainer:
    import transformers

    recipe, cache, settings = run.recipe, run.cache, run.recipe.training
    components.seed_everything(recipe)
    model = components.build_model(recipe, run.start)
    drops_layers = adapters.drops_layers(adapters.unwrap(model))
    processor = whisper_model.load_processor(run.start, recipe.language)
    sampler, clips, collate = components.training_clips(recipe, cache, processor)
    micro_batch = _micro_batch(run)

    def keep_samples(ids: list[str], hypotheses: list[str]) -> None:
        if distributed.is_main_process():
            samples.add(run.folder, trainer.state.global_step, ids, hypotheses)

    batch = oom.ValidationBatch(run.folder, recipe.evaluation.batch_frames)
    trainer = trainer_class()(
        model=model,
        args=arguments_of(
            recipe, run.checkpoints, precision.of_training(settings.precision), drops_layers=drops_layers
        ),
        train_dataset=clips,
        eval_dataset=ClipDataset(cache, rows_of(cache, "validation")),
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=functools.partial(token_mean_loss, smoothing=settings.label_smoothing),
        callbacks=[reporter(settings.steps, settings.patience, sampler, run.progress), *callbacks],
        parts=TrainerParts(
            sampler=sampler,
            validate=validator(recipe, cache, processor, settings.context == "full", batch, keep_samples),
            run_digest=run.digest,
            model_facts={"context": settings.context, "language": recipe.language},
            keep_checkpoints=settings.keep_checkpoints,
            micro_batch=micro_batch,
            build_loader=functools.partial(components.loader_of, recipe),
            build_optimizer=functools.partial(components.build_optimizer, recipe),
            build_scheduler=functools.partial(components.build_scheduler, recipe),
            label_smoothing=settings.label_smoothing,
            teacher=distillation.load_teacher(recipe, run.start),
            extra_files=(run.folder / distillation.TRANSCRIPTS, run.folder / samples.FILE),
            trial_batches=_longest_batches(recipe, cache, sampler, micro_batch) if oom.tries_longest_batch() else (),
            ema_decay=settings.ema_decay,
        ),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if rank := distributed.rank():  # the weights are initialised: from here on each process draws its own dropout
        transformers.set_seed((settings.seed + rank) % 2**32)
    return trainer


def _micro_batch(run: TrainingRun) -> int:
    """Return the clips of one forward pass. An automatic choice is recorded, so that a resumed run has the same."""
    if run.recipe.training.micro_batch != AUTO:
        return oom.micro_batch(run.folder, advice.largest_micro_batch(run.recipe))

    def choose() -> int:
        return report.fitting_micro_batch(run.recipe, run.cache)

    return distributed.broadcast_from_main(lambda: oom.chosen_micro_batch(run.folder, choose))


def steps_per_epoch(recipe: Recipe, cache: FeatureCache) -> int:
    """Return the optimizer steps of one epoch; the last step may have fewer batches."""
    return -(-len(components.sampler_of(recipe, cache)) // recipe.training.accumulation)


def _longest_batches(
    recipe: Recipe, cache: FeatureCache, sampler: BucketSampler, micro_batch: int
) -> list[dict[str, Any]]:
    """Return silent batches of the largest sizes that training may draw: of clips, and of 30 s windows if it has any.

    `input_features` float32 [B, n_mels, T], `attention_mask` int64 [B, T], `labels` int64 [B, L].
    """
    import torch

    settings, rows = recipe.training, rows_of(cache, "train")
    clips = min(micro_batch, -(-settings.batch_size // distributed.world_size()))
    longest = padded_frames(int(cache.rows["frames"].to_numpy()[rows].max() / (1 - recipe.augment.speed)) + 1)
    sizes = [(clips, FULL_FRAMES if settings.context == "full" else longest)]
    if settings.window_share:
        sizes.append((min(clips, -(-sampler.windows_per_batch // distributed.world_size())), FULL_FRAMES))
    tokens = MAX_LABEL_TOKENS if settings.window_share else max(len(cache.labels(row)) for row in rows)
    if settings.bpe_dropout:  # at most one token for each byte
        bytes_of_text = max(len(text.encode()) for text in cache.rows["text"].iloc[rows])
        tokens = max(tokens, min(MAX_LABEL_TOKENS, bytes_of_text + PROMPT_TOKENS + 1))
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
