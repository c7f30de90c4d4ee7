"""What a run tells while it goes on: steps, a history of losses and scores, lines worth reading."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.recipes.settings import Recipe
from pipelines.whisper.batching import BucketSampler

if TYPE_CHECKING:
    from transformers import TrainerState

logger = logging.getLogger(__name__)


_TOLD = (
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "clips_per_s"),
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
    on_end: Callable[[list[dict[str, float]]], None] = lambda history: None
    """The whole history, once the run is finished, also where it was finished before."""
    on_stop: Callable[[], None] = lambda: None
    """The sitting ends without a model; the error follows."""


class Pace:
    """Training clips per second, without the looks at validation and the checkpoints."""

    def __init__(self):
        self.clips, self.since = 0, time.monotonic()

    def add(self, clips: int) -> None:
        self.clips += clips

    def take(self) -> float:
        """The pace since it was taken last."""
        clips, since = self.clips, self.since
        self.clips, self.since = 0, time.monotonic()
        return clips / max(self.since - since, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.since += time.monotonic() - started


class TimeLeft:
    """How long a run has been going on and will still take, of which this sitting made a part."""

    def __init__(self, step: int, seconds: float):
        self.first, self.seconds_before, self.began = step, seconds, time.monotonic()

    def told(self, step: int, steps: int) -> str:
        """`12:03 done, 4:10 left`: over all sittings, and by this sitting's own pace with all that it stops for."""
        here = time.monotonic() - self.began
        left = here / max(1, step - self.first) * (steps - step)
        return f"{_clock(self.seconds_before + here)} done, {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def reporter(recipe: Recipe, sampler: BucketSampler, progress: Progress) -> Any:
    """The callback that sets the epoch, ends with a look at validation, ends early, and tells `progress`."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            progress.on_start(state.global_step, state.max_steps)
            self.time = TimeLeft(state.global_step, seconds_of(history_of(state)))

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
            logger.info(
                f"step {state.global_step}: validation WER {metrics['eval_wer']:.3f}, loss {metrics['eval_loss']:.3f}; "
                f"{self.time.told(state.global_step, state.max_steps)}"
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
