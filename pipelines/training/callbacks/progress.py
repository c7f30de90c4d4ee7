"""Report a run's progress: its steps, its history of losses and scores, and the time left."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pipelines.whisper.batching import BucketSampler

if TYPE_CHECKING:
    from transformers import TrainerState

logger = logging.getLogger(__name__)


_HISTORY_FIELDS = (
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "clips_per_s"),
    *("eval_wer", "eval_wer_low", "eval_wer_high", "eval_cut", "eval_loss", "seconds"),
)


@dataclass(frozen=True)
class Progress:
    """Functions that a training run calls to report its progress."""

    on_start: Callable[[int, int], None] = lambda step, steps: None
    """Receives (steps already done, total steps)."""
    on_step: Callable[[int], None] = lambda step: None
    """Receives the number of the optimizer step that was done."""
    on_log: Callable[[list[dict[str, float]]], None] = lambda history: None
    """Receives the whole history so far, one dictionary per log line."""
    on_end: Callable[[list[dict[str, float]]], None] = lambda history: None
    """Receives the whole history of a finished run, also if it was finished before."""
    on_stop: Callable[[], None] = lambda: None
    """Called when the sitting ends without a model; the error follows."""


def combine(first: Progress, second: Progress) -> Progress:
    """Return a Progress that passes each call to `first`, then to `second`."""

    def call_both(name: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            getattr(first, name)(*args)
            getattr(second, name)(*args)

        return call

    return Progress(**{field.name: call_both(field.name) for field in fields(Progress)})


class Pace:
    """Training clips per second, without the time of validations and checkpoints."""

    def __init__(self):
        self.clips, self.since = 0, time.monotonic()

    def add(self, clips: int) -> None:
        """Count `clips` as trained on."""
        self.clips += clips

    def take(self) -> float:
        """Return the clips per second since the last call."""
        clips, since = self.clips, self.since
        self.clips, self.since = 0, time.monotonic()
        return clips / max(self.since - since, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context."""
        started = time.monotonic()
        yield
        self.since += time.monotonic() - started


class TimeLeft:
    """Estimate of a run's remaining time, from the steps of this sitting."""

    def __init__(self, step: int, seconds: float = 0.0):
        self.first, self.seconds_before, self.started = step, seconds, time.monotonic()

    def remaining_s(self, step: int, steps: int) -> float:
        """Return the seconds left, at this sitting's pace including its validations and checkpoints."""
        return (time.monotonic() - self.started) / max(1, step - self.first) * (steps - step)

    def describe(self, step: int, steps: int) -> str:
        """Return `12:03 done, 4:10 left`; the time done is that of all sittings."""
        done = self.seconds_before + time.monotonic() - self.started
        return f"{clock_time(done)} done, {clock_time(self.remaining_s(step, steps))} left"


def clock_time(seconds: float) -> str:
    """Return `m:ss`, or `h:mm:ss` from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def reporter(steps: int, patience: int, sampler: BucketSampler, progress: Progress) -> Any:
    """Return the TrainerCallback that sets the sampler's epoch, stops early and reports to `progress`.

    It also has the last step validated and saved. `steps` and `patience` are those of `is_over`.
    """
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
                f"{self.time.describe(state.global_step, state.max_steps)}"
            )
            if is_over(state, steps, patience):
                control.should_training_stop = True

    return Reporter()


def is_over(state: TrainerState, steps: int, patience: int) -> bool:
    """Return True after the last of `steps`, or after `patience` (0: no limit) validations without a lower WER."""
    wers = [row["eval_wer"] for row in state.log_history if "eval_wer" in row]
    since_best = len(wers) - 1 - wers.index(min(wers)) if wers else 0
    return state.global_step >= steps or 0 < patience <= since_best


def history_of(state: TrainerState) -> list[dict[str, float]]:
    """Return one dictionary per log line of a TrainerState: the step and what was measured there."""
    return [
        {name: row[name] for name in _HISTORY_FIELDS if name in row}
        for row in state.log_history
        if "loss" in row or "eval_wer" in row
    ]


def seconds_of(history: list[dict[str, float]]) -> float:
    """Return the wall-clock seconds of training, over all sittings."""
    return max((row["seconds"] for row in history), default=0.0)
