"""End a run early with a checkpoint: on a signal, when its time budget is used up, or at a requested step.

Batch systems send SIGTERM before they kill a job; Ctrl-C and a notebook's stop button send SIGINT. The first signal
takes effect after the current optimizer step or validation, a second one at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.infra.errors import Unfinished
from pipelines.infra.parallel import distributed
from pipelines.training.callbacks.progress import history_of

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Paused(Unfinished):
    """The run reached the step at which it was to pause; `history` has what was measured up to there."""

    def __init__(self, step: int, steps: int, history: list[dict[str, float]]):
        super().__init__(f"paused at step {step} of {steps} as requested: the same call with a later step continues")
        self.history = history


class Interruption:
    """State of the request to end this sitting. `until` is the step to pause at, 0 for none."""

    def __init__(self, max_hours: float, until: int = 0):
        self.max_hours, self.until, self.paused = max_hours, until, False
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.signal: signal.Signals | None = None
        self.previous_handlers: dict[signal.Signals, Any] = {}
        self.message = ""

    @property
    def reason(self) -> str:
        """Why the sitting is to end; empty if it is not."""
        if self.signal:
            return self.signal.name
        return f"the time budget of {self.max_hours:g} h" if time.monotonic() >= self.deadline else ""

    def handle(self, number: int, frame: Any) -> None:
        """Record a signal; pass a second one to the handler that was set before."""
        repeated, self.signal = self.signal is not None, signal.Signals(number)
        if repeated:
            self.restore()
            signal.raise_signal(number)

    def install(self) -> None:
        """Set the signal handlers, which Python allows in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {number: signal.signal(number, self.handle) for number in _SIGNALS}

    def restore(self) -> None:
        """Set the previous signal handlers again; None is a handler that Python did not set and cannot restore."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.previous_handlers = {}

    @contextlib.contextmanager
    def handled(self, trainer: Any) -> Iterator[None]:
        """End `trainer.train` with a checkpoint on a signal or after the time budget, then raise Unfinished.

        A signal that came too late to shorten the run is raised again at the end.
        """
        trainer.add_callback(_stopper(self))
        self.install()
        try:
            yield
        finally:
            self.restore()
        if self.message:
            raise Unfinished(self.message)
        if self.signal:
            signal.raise_signal(self.signal)
        if self.paused:
            raise Paused(trainer.state.global_step, trainer.state.max_steps, history_of(trainer.state))


def _stopper(interruption: Interruption) -> Any:
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < state.max_steps and distributed.first_message(interruption.reason):
                control.should_save = True

        def on_save(self, args, state, control, **kwargs):
            # also after a regular checkpoint: another step would be lost
            if control.should_training_stop:
                return
            if reason := distributed.first_message(interruption.reason):
                control.should_training_stop = True
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                interruption.message = (
                    f"{reason} ended training after step {state.global_step} of {state.max_steps}; {checkpoint} is "
                    "kept. Run the same command or cell again to continue from there"
                )
            elif 0 < interruption.until <= state.global_step:
                control.should_training_stop = interruption.paused = True

    return Stopper()


def leave_to_trainer(worker: int) -> None:
    """Ignore signals in a data loader's worker process: the trainer's process handles them for the group."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
