"""What a run tells while it goes on: steps, a history of losses and scores, lines worth reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.batches import BucketSampler
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from transformers import TrainerState

_TOLD = (
    *("step", "epoch", "loss", "grad_norm", "learning_rate"),
    *("eval_wer", "eval_wer_low", "eval_wer_high", "eval_loss", "seconds"),
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


def reporter(recipe: Recipe, sampler: BucketSampler, progress: Progress) -> Any:
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
            progress.on_log(history_of(state))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            progress.on_line(
                f"step {state.global_step}: validation WER {metrics['eval_wer']:.3f}, loss {metrics['eval_loss']:.3f}"
            )
            if is_over(state, recipe):
                control.should_training_stop = True

    return Reporter()


def is_over(state: TrainerState, recipe: Recipe) -> bool:
    """Whether the last step is done, or as many validations as the recipe has patience for brought no better WER."""
    wers = [row["eval_wer"] for row in state.log_history if "eval_wer" in row]
    waited = len(wers) - 1 - wers.index(min(wers)) if wers else 0
    return state.global_step >= recipe.training.steps or 0 < recipe.training.patience <= waited


def history_of(state: TrainerState) -> list[dict[str, float]]:
    """One dictionary per log line of a TrainerState: step, and what was measured there."""
    return [
        {name: row[name] for name in _TOLD if name in row}
        for row in state.log_history
        if "loss" in row or "eval_wer" in row
    ]


def seconds_of(history: list[dict[str, float]]) -> float:
    """Wall-clock seconds of training, over all sittings."""
    return max((row["seconds"] for row in history), default=0.0)
