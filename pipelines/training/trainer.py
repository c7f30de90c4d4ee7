"""transformers' Seq2SeqTrainer with this lab's batches, loss, validation and sealed checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import environment
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe
from pipelines.training import adapters
from pipelines.training.callbacks import oom
from pipelines.training.callbacks.divergence import Guard
from pipelines.training.callbacks.ema import WeightAverage
from pipelines.training.callbacks.progress import Pace
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.data import data_parallel
from pipelines.training.distillation import Teacher
from pipelines.whisper.batching import IGNORED, BucketSampler

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader
    from transformers import Seq2SeqTrainer, TrainingArguments


SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Schedule in a recipe to its name in transformers."""
OPTIMIZERS = {"adamw8bit": "adamw_bnb_8bit", "adafactor": "adafactor", "sgd": "sgd"}
"""Optimizer in a recipe to its name in transformers, for trackers; the others are reported as AdamW."""


@dataclass(frozen=True)
class TrainerParts:
    """What LabTrainer needs beside the arguments of Seq2SeqTrainer."""

    sampler: BucketSampler
    validate: Callable[[Any], dict[str, float]]
    """Function from a model to its `wer`, `wer_low`, `wer_high` and `loss` on the validation split."""
    run_digest: str
    model_facts: Mapping[str, str]
    """Context and language of the model, for programs that load a checkpoint."""
    keep_checkpoints: int
    micro_batch: int
    """Clips in one forward pass; larger batches are split."""
    build_loader: Callable[[Any, Any, Callable], DataLoader]
    """Function of sampler, data set and collator."""
    build_optimizer: Callable[[Any], Any]
    build_scheduler: Callable[[Any], Any]
    label_smoothing: float = 0.0
    teacher: Teacher | None = None
    """Teacher of a distillation with a KL loss."""
    extra_files: Sequence[Path] = ()
    """Files that are added to each checkpoint if they exist."""
    trial_batches: Sequence[dict[str, torch.Tensor]] = ()
    """Batches that must fit into memory before the first step."""
    ema_decay: float = 0.0
    """Decay of the average of the weights; 0: none."""


@functools.cache
def trainer_class() -> type[Seq2SeqTrainer]:
    """Return LabTrainer: Seq2SeqTrainer with the methods of `LabTrainerMixin`. It imports transformers."""
    with contextlib.redirect_stdout(sys.stderr):  # transformers prints a greeting if WANDB_MODE=offline is set
        from transformers import Seq2SeqTrainer
    return type("LabTrainer", (LabTrainerMixin, Seq2SeqTrainer), {})


class LabTrainerMixin:
    """Methods that replace those of Seq2SeqTrainer; a mixin, so that importing it does not import transformers."""

    def __init__(self, *args: Any, parts: TrainerParts, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parts, self.sampler, self.validate = parts, parts.sampler, parts.validate
        self.micro_batch, self.trial_batches = parts.micro_batch, parts.trial_batches
        self.logged_at, self.pace = time.monotonic(), Pace()
        self.guard = Guard(scaled=self.args.fp16)
        self.average = WeightAverage(self.model, parts.ema_decay) if parts.ema_decay else None
        if self.average:
            self.add_callback(self.average.callback())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add `seconds`, the training time of all sittings, and `clips_per_s` to each log line."""
        now, history = time.monotonic(), self.state.log_history
        earlier_s = history[-1].get("seconds", 0.0) if history else 0.0
        pace = {"clips_per_s": round(distributed.all_reduce_sum(self.pace.take())[0], 2)} if "loss" in logs else {}
        super().log({**logs, **pace, "seconds": round(earlier_s + now - self.logged_at, 3)}, *args, **kwargs)
        self.logged_at = now

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the lab's batches; with several processes each gets its part of every batch."""
        from accelerate.data_loader import prepare_data_loader

        self.pace = Pace()  # the Trainer calls this when its loop starts
        if distributed.world_size() == 1:
            return self.accelerator.prepare(
                self.parts.build_loader(self.sampler, self.train_dataset, self.data_collator)
            )
        collate = data_parallel.RankCollator(self.data_collator, distributed.rank(), distributed.world_size())
        loader = self.parts.build_loader(self.sampler, self.train_dataset, collate)
        # without accelerate's sharding, which would give whole batches to the processes
        return prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the recipe's optimizer."""
        if self.optimizer is None:
            self.optimizer = self.parts.build_optimizer(self.model if model is None else model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the recipe's learning-rate schedule."""
        if self.lr_scheduler is None:
            self.lr_scheduler = self.parts.build_scheduler(self.optimizer if optimizer is None else optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Pass the shifted labels to the decoder; the labels themselves go to the loss function alone."""
        config = self.model.config
        inputs = {**inputs, "use_cache": False}  # a cache would copy all keys and values, which no step reads
        if "decoder_input_ids" not in inputs:  # windows with a prompt have them
            decoder_input_ids = shift_right(inputs["labels"], config.decoder_start_token_id, config.pad_token_id)
            inputs["decoder_input_ids"] = decoder_input_ids
        if self.parts.teacher:
            smoothing = self.parts.label_smoothing
            self.compute_loss_func = functools.partial(
                distillation_loss, self.parts.teacher, inputs, smoothing=smoothing
            )
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do the forward and backward pass in micro-batches; return the sum of their losses."""
        self._run_trial_batches(model, *args, **kwargs)
        losses, pieces = [], list(oom.split(inputs, self.micro_batch))
        for piece in pieces:
            # gradients are reduced once, after the last piece: processes may have different numbers of pieces
            synced = contextlib.nullcontext() if piece is pieces[-1] else self.accelerator.no_sync(model)
            with synced, oom.converted(len(piece["labels"]), self.state.global_step + 1, self.args.world_size):
                losses.append(super().training_step(model, piece, *args, **kwargs))
        loss = sum(losses)
        self.guard.add(loss)
        self.pace.add(len(inputs["labels"]))
        return loss

    def _run_trial_batches(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Run the longest batches once before the first step, so that memory runs out then or not at all."""
        batches, self.trial_batches = self.trial_batches, ()
        for batch in batches:
            with (
                oom.converted(len(batch["labels"]), self.state.global_step + 1, self.args.world_size),
                oom.without_effect(model, self.optimizer),
                self.accelerator.no_sync(model),
            ):
                super().training_step(model, batch, *args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm = super()._clip_grad_norm(model)
        self.guard.check(self.state.global_step + 1, norm)
        return norm

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Return and log the metrics of the validation split; raise Diverged if its loss is not finite."""
        with self.pace.paused(), self._averaged():
            scores = self.validate(adapters.unwrap(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.guard.check_validation(self.state.global_step, metrics[f"{metric_key_prefix}_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has its averaged weights, if they are averaged."""
        return self.average.applied() if self.average else contextlib.nullcontext()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average:
            self.average.resume(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        distributed.broadcast_from_main(lambda: shutil.rmtree(checkpoint, ignore_errors=True))
        with self.pace.paused():
            with self._averaged():
                super()._save_checkpoint(model, trial)
            distributed.barrier()  # each process has written the state of its random numbers
            distributed.broadcast_from_main(lambda: self._seal(checkpoint))

    def _seal(self, checkpoint: Path) -> None:
        if self.average:
            self.average.save(checkpoint)
        for path in filter(Path.is_file, self.parts.extra_files):
            _link_or_copy(path, checkpoint)
        best_step = self.state.best_global_step
        parts = self.parts
        sealed_checkpoints.seal(checkpoint, run_digest=parts.run_digest, best_step=best_step, **parts.model_facts)
        sealed_checkpoints.prune(checkpoint.parent, keep=self.parts.keep_checkpoints)


def _link_or_copy(path: Path, folder: Path) -> None:
    """Add a file to a folder as a hard link, or as a copy if the disk has no links."""
    (folder / path.name).unlink(missing_ok=True)
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.copyfile(path, folder / path.name)


def arguments_of(recipe: Recipe, folder: Path, precision: str, *, drops_layers: bool) -> TrainingArguments:
    """Build the TrainingArguments from the recipe, adapted to this device; `precision` as of optimization/precision."""
    from transformers import Seq2SeqTrainingArguments

    settings, machine = recipe.training, environment.detect()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        # the next seven are only reported to trackers: components.py builds optimizer and schedule
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        optim=OPTIMIZERS.get(settings.optimizer, "adamw_torch_fused"),
        lr_scheduler_type=SCHEDULES[settings.scheduler],
        seed=settings.seed,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        tf32=True if machine.device == "cuda" else None,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.eval_every,
        metric_for_best_model="wer",
        greater_is_better=False,
        logging_nan_inf_filter=False,  # it would hide NaN losses from divergence.py
        logging_steps=max(1, min(10, settings.steps // 12)),
        accelerator_config={"non_blocking": machine.device == "cuda"},  # copy pinned batches while the GPU computes
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=machine.device == "cpu",
        ddp_find_unused_parameters=drops_layers,
    )
    # on two GPUs the Trainer would wrap the model in DataParallel, whose threads share one context length
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def token_mean_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the cross entropy summed over label tokens, divided by their number in the whole optimizer step.

    With accumulation every micro-batch is divided by the same total, so that k small batches give the gradient of one
    large batch. `labels` int64 [B, L], IGNORED where a position has no label. With `smoothing` the gradient is that of
    smoothed labels. The value stays the plain cross entropy, so that runs and validations can be compared.
    """
    import torch
    import torch.nn.functional as F

    tokens, targets = outputs.logits.flatten(0, 1).float(), labels.flatten()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not smoothing):
        total = F.cross_entropy(tokens, targets, ignore_index=IGNORED, reduction="sum")
    if smoothing:
        smoothed = F.cross_entropy(tokens, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        total = total + (smoothed - smoothed.detach())
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())


def distillation_loss(
    teacher: Teacher,
    inputs: dict[str, torch.Tensor],
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return `token_mean_loss` plus the weighted KL divergence from the teacher's distributions."""
    loss = token_mean_loss(outputs, labels, num_items_in_batch, smoothing=smoothing)
    return loss + teacher.divergence(inputs, outputs, labels, num_items_in_batch)


def shift_right(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """Return the decoder's input for `labels` int64 [B, L]: the start token first, `pad` instead of IGNORED."""
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, pad)


def use_deterministic_sums() -> None:
    """Make gradients on several CPU threads reproducible: torch otherwise sums some of them in varying order."""
    import torch

    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it takes time and changes no result here
