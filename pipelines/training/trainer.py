"""transformers' Seq2SeqTrainer with our batches, our loss, our validation and sealed checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import environment
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe
from pipelines.training import adapters
from pipelines.training.callbacks import oom
from pipelines.training.callbacks.divergence import Guard
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
"""The recipe's names of them, and transformers'."""
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "sgd": "sgd"}


def trainer_class() -> type[Seq2SeqTrainer]:
    """Seq2SeqTrainer with our sampler, our validation and sealed checkpoints (built late)."""
    from accelerate.data_loader import prepare_data_loader

    with contextlib.redirect_stdout(sys.stderr):  # transformers greets whoever has set WANDB_MODE=offline
        from transformers import Seq2SeqTrainer
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    class LabTrainer(Seq2SeqTrainer):
        def __init__(
            self,
            *args: Any,
            sampler: BucketSampler,
            teacher: Teacher | None,
            validate: Callable,
            run_digest: str,
            keep: int,
            carried: Sequence[Path],
            micro_batch: int,
            make_loader: Callable[[Any, Any, Callable], DataLoader],
            make_optimizer: Callable[[Any], Any],
            make_scheduler: Callable[[Any], Any],
            tried_first: Sequence[dict[str, torch.Tensor]] = (),
            **kwargs: Any,
        ):
            super().__init__(*args, **kwargs)
            self.sampler, self.validate, self.run_digest, self.keep = sampler, validate, run_digest, keep
            self.micro_batch, self.tried_first, self.teacher = micro_batch, tried_first, teacher
            self.carried = carried
            self.make_loader, self.make_optimizer, self.make_scheduler = make_loader, make_optimizer, make_scheduler
            self.clock = time.monotonic()
            self.guard = Guard(scaled=self.args.fp16)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            # seconds of training over all sittings: each line adds the time since the line before it
            now, history = time.monotonic(), self.state.log_history
            earlier = history[-1].get("seconds", 0.0) if history else 0.0
            pace = {"clips_per_s": round(distributed.all_reduce_sum(self.pace.take())[0], 2)} if "loss" in logs else {}
            super().log({**logs, **pace, "seconds": round(earlier + now - self.clock, 3)}, *args, **kwargs)
            self.clock = now

        def get_train_dataloader(self) -> DataLoader:
            self.pace = Pace()  # the training loop begins with this call
            collate = self.data_collator
            if distributed.world_size() > 1:
                collate = data_parallel.ShareOf(collate, distributed.rank(), distributed.world_size())
            loader = self.make_loader(self.sampler, self.train_dataset, collate)
            if distributed.world_size() == 1:
                return self.accelerator.prepare(loader)
            # the same without sharding: that would deal whole batches to the processes
            return prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True)

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                self.optimizer = self.make_optimizer(self.model if model is None else model)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                self.lr_scheduler = self.make_scheduler(self.optimizer if optimizer is None else optimizer)
                self._created_lr_scheduler = True
            return self.lr_scheduler

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
            # the decoder's input is made here: the labels themselves go to token_mean_loss and not to the model
            start = self.model.config.decoder_start_token_id
            inputs = {
                **inputs,
                "decoder_input_ids": shift_right(inputs["labels"], start, self.model.config.pad_token_id),
            }
            if self.teacher:
                self.compute_loss_func = functools.partial(taught_loss, self.teacher, inputs)
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            self._try_first(model, *args, **kwargs)
            forward_backward, losses = super().training_step, []
            pieces = list(oom.pieces(inputs, self.micro_batch))
            for piece in pieces:
                # processes sum their gradients once, after the last piece: others may have another number of them
                alone = contextlib.nullcontext() if piece is pieces[-1] else self.accelerator.no_sync(model)
                with alone, oom.watched(len(piece["labels"]), self.state.global_step + 1, self.args.world_size):
                    losses.append(forward_backward(model, piece, *args, **kwargs))
            loss = sum(losses)
            self.guard.add(loss)
            self.pace.add(len(inputs["labels"]))
            return loss

        def _try_first(self, model: Any, *args: Any, **kwargs: Any) -> None:
            """At the first step of a sitting, the longest batches that can come; memory runs out now or never."""
            batches, self.tried_first = self.tried_first, ()
            for batch in batches:
                with (
                    oom.watched(len(batch["labels"]), self.state.global_step + 1, self.args.world_size),
                    oom.tried(model, self.optimizer),
                    self.accelerator.no_sync(model),
                ):
                    super().training_step(model, batch, *args, **kwargs)

        def _clip_grad_norm(self, model: Any) -> torch.Tensor:
            norm = super()._clip_grad_norm(model)
            self.guard.check(self.state.global_step + 1, norm)
            return norm

        def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
            with self.pace.paused():
                found = self.validate(adapters.bare(self.model))
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            self.guard.check_validation(self.state.global_step, metrics[f"{metric_key_prefix}_loss"])
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            folder = Path(self.args.output_dir)
            saved = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

            def seal() -> None:
                for path in filter(Path.is_file, self.carried):
                    _put_into(saved, path)
                sealed_checkpoints.seal(saved, run_digest=self.run_digest, best_step=self.state.best_global_step)
                sealed_checkpoints.prune(folder, keep=self.keep)

            distributed.broadcast_from_main(lambda: shutil.rmtree(saved, ignore_errors=True))
            with self.pace.paused():
                super()._save_checkpoint(model, trial)
                distributed.barrier()  # each process has written the state of its random numbers
                distributed.broadcast_from_main(seal)

    return LabTrainer


def _put_into(folder: Path, path: Path) -> None:
    """A file in a checkpoint, too: as a link, for it is the same in each of them, where the disk has links."""
    (folder / path.name).unlink(missing_ok=True)
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.copyfile(path, folder / path.name)


def arguments_of(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The Trainer's own settings: the recipe's, and what this machine bears."""
    from transformers import Seq2SeqTrainingArguments

    settings, machine = recipe.training, environment.detect()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        # these seven are for the trackers, which tell them: building.py makes optimizer and schedule
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        optim=OPTIMIZERS[settings.optimizer],
        lr_scheduler_type=SCHEDULES[settings.scheduler],
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
        logging_nan_inf_filter=False,  # it would hide them: see divergence.py
        logging_steps=max(1, min(10, settings.steps // 12)),
        accelerator_config={"non_blocking": machine.device == "cuda"},  # pinned batches travel while the GPU computes
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=machine.device == "cpu",
        ddp_find_unused_parameters=False,
    )
    # Trainer would wrap the model in DataParallel on Kaggle's two GPUs: threads that share one context length
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


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


def taught_loss(
    teacher: Teacher,
    inputs: dict[str, torch.Tensor],
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`token_mean_loss`, and what a student's distributions are away from its teacher's."""
    own = token_mean_loss(outputs, labels, num_items_in_batch)
    return own + teacher.divergence(inputs, outputs, labels, num_items_in_batch)


def shift_right(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """The decoder's input for `labels` int64 [B, L]: the start token first, IGNORED as padding."""
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, pad)


def fix_the_order_of_sums() -> None:
    """On several CPU threads some gradients are summed in varying order: two runs then differ in their last digits."""
    import torch

    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time and changes no result here
