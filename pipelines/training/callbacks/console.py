"""Show a run's progress in a terminal as a bar, elsewhere as plain lines.

If the environment variable LAB_PROGRESS_FILE is set, the same lines are also appended to that file: a program that
starts the training in another process, as papermill does, can show them.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from pipelines.infra import console as infra_console
from pipelines.infra import progress_file
from pipelines.training.callbacks.progress import Progress, TimeLeft, clock_time, combine

History = list[dict[str, float]]

logger = logging.getLogger(__name__)


class ProgressLines:
    """A run's progress as lines: `step 40/200, loss 1.23, validation WER 0.610 (step 20), 2:10 left`."""

    def __init__(
        self, write: Callable[[str], None], *, interval_s: float = progress_file.INTERVAL_S, validations: bool = True
    ):
        self._write, self._interval_s, self._validations = write, interval_s, validations
        self._step = self._steps = self._n_validations = 0
        self._written_at = float("-inf")
        self._time, self._history = TimeLeft(0), []

    def progress(self) -> Progress:
        """Return the functions that a training run calls."""
        return Progress(self._start, self._on_step, self._on_log)

    def _start(self, step: int, steps: int) -> None:
        self._step, self._steps, self._time = step, steps, TimeLeft(step)

    def _on_step(self, step: int) -> None:
        self._step = step
        if time.monotonic() - self._written_at >= self._interval_s:
            self._write_line()

    def _on_log(self, history: History) -> None:
        self._history = history
        n_validations = sum("eval_wer" in row for row in history)
        if self._validations and n_validations > self._n_validations:
            self._write_line()
        self._n_validations = n_validations

    def _write_line(self) -> None:
        self._written_at = time.monotonic()
        left = clock_time(self._time.remaining_s(self._step, self._steps))
        parts = [f"step {self._step}/{self._steps}", *_measured(self._history), f"{left} left"]
        self._write(", ".join(parts))


def console_progress() -> Progress:
    """Return a progress bar if standard error is a terminal, else lines in the log."""
    if sys.stderr.isatty():
        return progress_bar()
    return ProgressLines(logger.info, validations=False).progress()  # the run itself logs its validations


def progress_bar(
    on_log: Callable[[History], None] = lambda history: None, on_end: Callable[[History], None] = lambda history: None
) -> Progress:
    """Return a progress bar with steps, loss, validation WER, clips per second and the time left.

    `on_log` and `on_end` are called with the history after the bar was drawn.
    """
    bar = infra_console.progress_bar(unit="step", desc="training")

    def start(step: int, steps: int) -> None:
        bar.reset(total=steps)
        bar.initial = bar.n = bar.last_print_n = step  # the rate is that of this sitting's steps
        bar.refresh()

    def log(history: History) -> None:
        rates = [row["clips_per_s"] for row in history if "clips_per_s" in row]
        parts = [*_measured(history), *(f"{rate:.3g} clips/s" for rate in rates[-1:])]
        bar.set_postfix_str(", ".join(parts), refresh=False)
        on_log(history)

    def end(history: History) -> None:
        bar.close()
        on_end(history)

    return Progress(start, lambda step: bar.update(step - bar.n), log, end, bar.close)


def with_progress_file(progress: Progress) -> Progress:
    """Return a Progress that also appends lines to the file named by LAB_PROGRESS_FILE, if that is set."""
    if not progress_file.is_requested():
        return progress
    return combine(progress, ProgressLines(progress_file.append).progress())


def _measured(history: History) -> list[str]:
    """Return the newest training loss and the newest validation WER of a history, in words."""
    losses = [f"loss {row['loss']:.3g}" for row in history if "loss" in row]
    wers = [f"validation WER {row['eval_wer']:.3f} (step {row['step']})" for row in history if "eval_wer" in row]
    return [*losses[-1:], *wers[-1:]]
