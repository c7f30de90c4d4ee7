"""Recipe and cache to tuned weights: transformers' Seq2SeqTrainer at clip length, resumable at any step.

What differs from the stock recipe, and why:
- each batch runs at the length of its longest clip, from length buckets in an order that a seed fixes (batches.py);
- the loss is the mean over all label tokens of a step, whatever the accumulation: transformers multiplies it by the
  number of accumulated batches otherwise;
- the encoder's sinusoids stay constants (models.py);
- validation decodes in length-sorted batches at clip length (decoding.py) and selects by WER;
- a checkpoint counts only when sealed, and resume goes on from the newest sealed one of the same run (checkpoints.py).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from pipelines import augmentation, checkpoints, decoding, environment, manifest, models, scoring
from pipelines.batches import IGNORED, BucketSampler, ClipDataset, Collator
from pipelines.cache import FeatureCache
from pipelines.errors import LabError
from pipelines.features import FULL_FRAMES
from pipelines.models import ModelRef
from pipelines.recipe import Recipe, differences, digest

if TYPE_CHECKING:
    import torch
    from transformers import Seq2SeqTrainer, TrainerState, TrainingArguments

CODE = "2"
"""Version of the code that trains: raised whenever the same recipe and cache would give other weights."""
_NOT_OF_THE_WEIGHTS = (
    "model.base",  # its weights' sha256 stands in its place
    "training.workers",
    "training.keep_checkpoints",
    "evaluation.bootstrap_samples",
    "evaluation.seed",
)


@dataclass(frozen=True)
class Progress:
    """What a training run tells while it goes on; hand in your own to draw it."""

    on_start: Callable[[int, int], None] = lambda step, steps: None
    """(steps already done, steps in all)."""
    on_step: Callable[[int], None] = lambda step: None
    on_log: Callable[[list[dict[str, float]]], None] = lambda history: None
    """The whole history so far, one dictionary per log line."""
    on_line: Callable[[str], None] = print
    """A line worth reading."""
    on_end: Callable[[list[dict[str, float]]], None] = lambda history: None
    """The whole history, once the run is finished, also where it was finished before."""


@dataclass(frozen=True)
class TrainedModel:
    """A finished run."""

    uri: str
    """The model's folder: what 03 takes."""
    digest: str
    best_step: int
    validation: dict[str, Any]
    """The validation score at the best step (scoring.Score as a dictionary)."""
    history: list[dict[str, float]] = field(repr=False)
    """One dictionary per log line: step, and loss, learning_rate, grad_norm or eval_loss, eval_wer."""
    seconds: float
    """Wall-clock seconds of training, over all sittings."""


def run_identity(recipe: Recipe, cache: FeatureCache, base: ModelRef) -> dict[str, Any]:
    """Flat: everything that decides the weights. Names the run; resume compares it field by field."""
    settings = recipe.settings("model", "training", "evaluation") | {"language": recipe.language}
    for name in _NOT_OF_THE_WEIGHTS:
        settings.pop(name)
    told = {f"base.{name}": value for name, value in models.identity(base).items()}
    varied = recipe.changed("augment")
    varied |= {"code.augmentation": augmentation.CODE} if varied else {}
    return {**settings, **varied, **told, "cache": cache.digest, "code.training": CODE}


def train(
    recipe: Recipe, cache: FeatureCache, base: ModelRef, run: Path, progress: Progress | None = None
) -> TrainedModel:
    """Tune `base` on the cache's training split inside the folder `run`; go on where an earlier call was cut off.

    The result lies in `run/model`, sealed. A run that is already finished is returned at once. A run folder of another
    recipe, cache or base model is refused, naming the fields that differ.
    """
    progress = progress or Progress()
    identity = run_identity(recipe, cache, base)
    run.mkdir(parents=True, exist_ok=True)
    with _only_trainer(run):
        _refuse_other_run(run, identity)
        finished = _finished(run)
        if finished:
            progress.on_line(f"this run is finished: {finished.uri}")
        finished = finished or _train(recipe, cache, base, run, identity, progress)
    progress.on_end(finished.history)
    return finished


def _train(
    recipe: Recipe, cache: FeatureCache, base: ModelRef, run: Path, identity: dict[str, Any], progress: Progress
) -> TrainedModel:
    name = digest(identity)
    folder = run / "checkpoints"
    last = checkpoints.newest_complete(folder, run_digest=name, log=progress.on_line)
    checkpoints.remove_unusable(folder, last)
    progress.on_line(f"going on from {last.name}" if last else f"starting from {base.title}")
    trainer = _build_trainer(recipe, cache, base, folder, name, progress)
    done = _state_of(last) if last else None
    if done and _is_over(done, recipe):
        trainer.state = done  # cut off between the last checkpoint and the model: the Trainer would do one step more
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return _finish(trainer, recipe, cache, run, name, base)


def _build_trainer(
    recipe: Recipe, cache: FeatureCache, base: ModelRef, folder: Path, run_digest: str, progress: Progress
) -> Seq2SeqTrainer:
    import transformers

    settings = recipe.training
    transformers.set_seed(settings.seed)
    _fix_the_order_of_sums()
    model = models.load(base, dropout=recipe.model.dropout, spec_augment=recipe.model.spec_augment)
    models.set_language(model, recipe.language)
    processor = models.load_processor(base, recipe.language)
    rows = _rows(cache, "train")
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
        args=_arguments(recipe, folder),
        train_dataset=make_clips(cache, rows),
        eval_dataset=ClipDataset(cache, _rows(cache, "validation")),
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=token_mean_loss,
        callbacks=[_reporter(recipe, sampler, progress)],
        sampler=sampler,
        validate=_validator(recipe, cache, processor, full_context),
        run_digest=run_digest,
        keep=settings.keep_checkpoints,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _fix_the_order_of_sums() -> None:
    """On several CPU threads some gradients are summed in varying order: two runs then differ in their last digits."""
    import torch

    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time and changes no result here


def token_mean_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy summed over label tokens and divided by their number in the whole optimizer step.

    With accumulation every micro-batch is divided by the same total, so that k small batches give the gradient of one
    large batch. `labels` int64 [B, L] with IGNORED where nothing counts.
    """
    import torch.nn.functional as F

    total = F.cross_entropy(
        outputs.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())


def trainer_class() -> type[Seq2SeqTrainer]:
    """Seq2SeqTrainer with our sampler, our validation and sealed checkpoints (built late)."""
    from torch.utils.data import DataLoader
    from transformers import Seq2SeqTrainer
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    class LabTrainer(Seq2SeqTrainer):
        def __init__(
            self, *args: Any, sampler: BucketSampler, validate: Callable, run_digest: str, keep: int, **kwargs: Any
        ):
            super().__init__(*args, **kwargs)
            self.sampler, self.validate, self.run_digest, self.keep = sampler, validate, run_digest, keep
            self.clock = time.monotonic()

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            # seconds of training over all sittings: each line adds the time since the line before it
            now, history = time.monotonic(), self.state.log_history
            earlier = history[-1].get("seconds", 0.0) if history else 0.0
            super().log({**logs, "seconds": round(earlier + now - self.clock, 3)}, *args, **kwargs)
            self.clock = now

        def get_train_dataloader(self) -> DataLoader:
            loader = DataLoader(
                self.train_dataset,
                batch_sampler=self.sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
            return self.accelerator.prepare(loader)

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
            # the decoder's input is made here: the labels themselves go to token_mean_loss and not to the model
            start = self.model.config.decoder_start_token_id
            inputs = {
                **inputs,
                "decoder_input_ids": shift_right(inputs["labels"], start, self.model.config.pad_token_id),
            }
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

        def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate(self.model).items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            folder = Path(self.args.output_dir)
            saved = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            shutil.rmtree(saved, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            checkpoints.seal(saved, run_digest=self.run_digest, best_step=self.state.best_global_step)
            checkpoints.prune(folder, keep=self.keep)

    return LabTrainer


def shift_right(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """The decoder's input for `labels` int64 [B, L]: the start token first, IGNORED as padding."""
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, pad)


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    from transformers import Seq2SeqTrainingArguments

    settings, machine = recipe.training, environment.detect()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        seed=settings.seed,
        bf16=machine.dtype == "bfloat16",
        fp16=machine.dtype == "float16",
        tf32=True if machine.device == "cuda" else None,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.eval_every,
        metric_for_best_model="wer",
        greater_is_better=False,
        logging_steps=max(1, min(10, settings.steps // 12)),
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=machine.device == "cuda",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=machine.device == "cpu",
    )
    # Trainer would wrap the model in DataParallel on Kaggle's two GPUs: threads that share one context length
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _reporter(recipe: Recipe, sampler: BucketSampler, progress: Progress) -> Any:
    """The callback that sets the epoch, ends with a look at validation, ends early, and tells `progress`."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            progress.on_start(state.global_step, state.max_steps)

        def on_epoch_begin(self, args, state, control, **kwargs):
            # not every version of transformers and accelerate passes the epoch on to a batch sampler
            sampler.set_epoch(int(state.epoch or 0))

        def on_step_end(self, args, state, control, **kwargs):
            progress.on_step(state.global_step)
            if state.global_step >= state.max_steps:
                control.should_log = control.should_evaluate = control.should_save = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            progress.on_log(_history(state))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            progress.on_line(
                f"step {state.global_step}: validation WER {metrics['eval_wer']:.3f}, loss {metrics['eval_loss']:.3f}"
            )
            if _is_over(state, recipe):
                control.should_training_stop = True

    return Reporter()


def _state_of(checkpoint: Path) -> TrainerState:
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _is_over(state: TrainerState, recipe: Recipe) -> bool:
    """Whether the last step is done, or as many validations as the recipe has patience for brought no better WER."""
    wers = [row["eval_wer"] for row in state.log_history if "eval_wer" in row]
    waited = len(wers) - 1 - wers.index(min(wers)) if wers else 0
    return state.global_step >= recipe.training.steps or 0 < recipe.training.patience <= waited


def _validator(
    recipe: Recipe, cache: FeatureCache, processor: Any, full_context: bool
) -> Callable[[Any], dict[str, float]]:
    """A function from a model to its validation loss and normalised WER."""
    rows = _rows(cache, "validation")
    references = cache.rows["text"].iloc[rows].tolist()
    settings = recipe.evaluation

    def validate(model: Any) -> dict[str, float]:
        hypotheses = decoding.decode_rows(
            model,
            processor,
            cache,
            rows,
            language=recipe.language,
            batch_frames=settings.batch_frames,
            max_new_tokens=settings.max_new_tokens,
            full_context=full_context,
        )
        edits = scoring.count_edits(references, hypotheses)
        return {
            "wer": float(edits.word_edits.sum() / edits.words.sum()),
            "loss": validation_loss(model, cache, rows, settings.batch_frames, full_context),
        }

    return validate


def validation_loss(model: Any, cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool) -> float:
    """Mean cross entropy per label token over `rows`, teacher-forced."""
    import torch

    from pipelines.batches import sorted_batches

    collate, total, tokens = Collator(cache, full_context=full_context), 0.0, 0
    config, was_training = model.config, model.training
    model.eval()
    lengths = cache.rows["frames"].to_numpy()[rows]
    for batch in sorted_batches(np.full_like(lengths, FULL_FRAMES) if full_context else lengths, batch_frames):
        inputs = {name: value.to(model.device) for name, value in collate(rows[batch].tolist()).items()}
        labels = inputs.pop("labels")
        with torch.inference_mode():
            outputs = model(
                **inputs, decoder_input_ids=shift_right(labels, config.decoder_start_token_id, config.pad_token_id)
            )
            total += float(token_mean_loss(outputs, labels, 1))
        tokens += int((labels != IGNORED).sum())
    model.train(was_training)
    return total / tokens


def _finish(
    trainer: Any, recipe: Recipe, cache: FeatureCache, run: Path, run_digest: str, base: ModelRef
) -> TrainedModel:
    """Write the best weights as the run's model, seal it, and let the checkpoints go."""
    state, folder = trainer.state, run / "model"
    best = state.best_global_step
    weights = Path(trainer.args.output_dir) / f"checkpoint-{best}"
    manifest.require_whole(weights, "the best checkpoint", f"Remove {run} and train again")
    best_model = models.load(ModelRef("best", weights, "folder", str(best)))
    models.set_language(best_model, recipe.language)
    shutil.rmtree(folder, ignore_errors=True)
    models.save(best_model, trainer.processing_class, folder)
    history = _history(state)
    facts = {
        "best_step": best,
        "validation": next(row for row in history if row["step"] == best and "eval_wer" in row),
        "history": history,
        "seconds": _seconds(history),
    }
    manifest.write_json(folder / "training.json", facts)
    manifest.write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    manifest.seal(
        folder,
        kind="model",
        digest=run_digest,
        name=f"{recipe.name}-{run_digest}",
        base=base.title,
        cache=cache.digest,
        context=recipe.training.context,
        quantisation=base.quantisation,
        language=recipe.language,
    )
    shutil.rmtree(trainer.args.output_dir)
    return _finished(run)


def _finished(run: Path) -> TrainedModel | None:
    folder = run / "model"
    if manifest.problem(folder, thorough=False) is not None:
        return None
    facts = json.loads((folder / "training.json").read_text("utf-8"))
    return TrainedModel(str(folder), manifest.read(folder)["digest"], **facts)


def _history(state: Any) -> list[dict[str, float]]:
    return [
        {
            name: row[name]
            for name in ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_wer", "eval_loss", "seconds")
            if name in row
        }
        for row in state.log_history
        if "loss" in row or "eval_wer" in row
    ]


def _seconds(history: list[dict[str, float]]) -> float:
    return max((row["seconds"] for row in history), default=0.0)


def _rows(cache: FeatureCache, split: str) -> np.ndarray:
    rows = cache.split(split)
    if not len(rows):
        raise LabError(
            f"the cache {cache.folder} has no {split} clips: training needs a training and a validation split"
        )
    return rows


def _refuse_other_run(run: Path, identity: dict[str, Any]) -> None:
    """The run folder's own note of what it trains; written at the first start."""
    note = run / "run.json"
    if not note.exists():
        manifest.write_json(note, identity)
        return
    unlike = differences(identity, json.loads(note.read_text("utf-8")))
    if unlike:
        raise LabError(
            f"{run} belongs to another run: {'; '.join(unlike)}. Name another folder, or go back to that recipe"
        )


def _only_trainer(run: Path) -> filelock.FileLock:
    try:
        return filelock.FileLock(run / ".lock", timeout=0).acquire()
    except filelock.Timeout:
        raise LabError(f"another process trains in {run} right now: wait for it, or stop it first") from None
