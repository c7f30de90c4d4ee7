"""A loss or gradient that is no number ends a run before the step that would spoil the weights.

transformers would log the mean of earlier losses in its place and go on; from then on every logit is NaN, and decoding
takes the first token of the vocabulary for the likeliest: a WER that looks bad, not broken.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


_SKIPPED_STEPS = 20
"""Steps in a row that the scaler of float16 may skip while it looks for its scale: it halves it each time."""
_NOTE = "diverged.json"


class Diverged(Exception):
    """What was no finite number, at which step."""

    def __init__(self, step: int, what: str, value: float):
        super().__init__(f"the {what} of step {step} is {value}")
        self.step = step


class RunDiverged(LabError):
    """A run that ended so, as its user is told."""


class Guard:
    """Watches one run; `scaled` where a scaler of float16 makes gradients overflow now and then, and skips the step."""

    def __init__(self, scaled: bool):
        self.skipped_in_a_row = 0
        self.scaled = scaled
        self.loss: torch.Tensor | float = 0.0

    def add(self, loss: torch.Tensor) -> None:
        """The loss of one forward pass: a scalar, on any device; it is read once in an optimizer step."""
        self.loss = self.loss + loss

    def check(self, step: int, norm: torch.Tensor | float) -> None:
        """Before optimizer step `step`: raises Diverged where the step's loss or its gradient's norm is no number.

        In all processes that train together, where the loss of one is none.
        """
        (loss,), norm, self.loss = distributed.all_reduce_sum(float(self.loss)), float(norm), 0.0
        if not math.isfinite(loss):
            raise Diverged(step, "loss", loss)
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > (_SKIPPED_STEPS if self.scaled else 0):
            raise Diverged(step, "gradient's norm", norm)

    def check_validation(self, step: int, loss: float) -> None:
        """Before the weights of `step` are kept: raises Diverged where their loss on validation is no number."""
        if not math.isfinite(loss):
            raise Diverged(step, "validation loss", loss)


def refused(error: Diverged, run: Path, kept: str, learning_rate: float) -> RunDiverged:
    """The error for the user; the run's folder remembers it for the next start."""
    if distributed.is_main_process():
        manifest.write_json(run / _NOTE, {"step": error.step, "what": str(error)})
    return RunDiverged(
        f"training diverged: {error}. The weights of {kept} are kept, nothing after them. Try half the learning rate "
        f"(training.learning_rate={learning_rate / 2:g}) or more warm-up steps; the same settings again will most "
        "likely end the same way, and on a CPU they will for certain"
    )


def tell_earlier(run: Path) -> None:
    """Say at the start of a run that it diverged before, and where."""
    try:
        told = json.loads((run / _NOTE).read_text("utf-8"))
    except (OSError, ValueError):
        return
    logger.info(f"note: this run diverged before ({told['what']}); on a CPU the same steps end the same way")
