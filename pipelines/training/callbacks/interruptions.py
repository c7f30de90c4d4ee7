"""A run that is asked to end, by a signal or by its time budget: one more step, a checkpoint, and what to do next.
Or by who called it, at a step: then it pauses at the checkpoint that is due there.

SIGTERM is what batch systems send before they kill, SIGINT what Ctrl-C and a notebook's stop button send. The first one
is heeded at the end of the optimizer step, or of the look at validation, that is being made; a second one at once.
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
    """The run came to the step that it was to go to for now; `history` is what was measured up to there."""

    def __init__(self, step: int, steps: int, history: list[dict[str, float]]):
        super().__init__(f"paused at step {step} of {steps}, as asked: the same call with a later step goes on")
        self.history = history


class Interruption:
    """What asked a sitting to end, and the checkpoint that it ended with; `until` is the step to pause at, 0 none."""

    def __init__(self, max_hours: float, until: int = 0):
        self.max_hours, self.until, self.paused = max_hours, until, False
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.signal: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}
        self.ended = ""

    @property
    def asked(self) -> str:
        """Who asked, in words; empty as long as nobody did."""
        if self.signal:
            return self.signal.name
        return f"the time budget of {self.max_hours:g} h" if time.monotonic() >= self.deadline else ""

    def hear(self, number: int, frame: Any) -> None:
        """The signals' handler; the second signal gets the handler that was there before."""
        repeated, self.signal = self.signal is not None, signal.Signals(number)
        if repeated:
            self.hush()
            signal.raise_signal(number)

    def listen(self) -> None:
        """Take over the signals; Python lets the main thread alone do that."""
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.hear) for number in _SIGNALS}

    def hush(self) -> None:
        """Give the signals back; None stands for a handler that Python did not set and cannot put back."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.before = {}

    @contextlib.contextmanager
    def heeded(self, trainer: Any) -> Iterator[None]:
        """Within, a signal or the end of the time budget ends `trainer.train` with a checkpoint; then Unfinished.

        A signal that came too late to shorten the run is passed on at the end.
        """
        trainer.add_callback(_heeder(self))
        self.listen()
        try:
            yield
        finally:
            self.hush()
        if self.ended:
            raise Unfinished(self.ended)
        if self.signal:
            signal.raise_signal(self.signal)
        if self.paused:
            raise Paused(trainer.state.global_step, trainer.state.max_steps, history_of(trainer.state))


def _heeder(interruption: Interruption) -> Any:
    from transformers import TrainerCallback

    class Heeder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < state.max_steps and distributed.first_message(interruption.asked):
                control.should_save = True

        def on_save(self, args, state, control, **kwargs):
            # also after a checkpoint that was due: no step is begun that nothing would keep
            if control.should_training_stop:
                return
            if who := distributed.first_message(interruption.asked):
                control.should_training_stop = True
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                interruption.ended = (
                    f"{who} ended training after step {state.global_step} of {state.max_steps}; {checkpoint} is kept. "
                    "Run the same command or cell again to go on from there"
                )
            elif 0 < interruption.until <= state.global_step:
                control.should_training_stop = interruption.paused = True

    return Heeder()


def leave_to_trainer(worker: int) -> None:
    """In a worker process that loads batches: signals that reach the whole group are the trainer's to heed."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
