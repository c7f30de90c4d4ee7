"""Stop on a NaN or infinite loss or gradient before the weights are corrupted.

transformers would log the mean of earlier losses instead and continue. All logits would then be NaN, and decoding would
return the first token of the vocabulary: a WER that looks bad, not broken.
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


_MAX_SKIPPED_STEPS = 20
"""Steps in a row that float16's loss scaler may skip while it searches for its scale, which it halves each time."""
_FILE = "diverged.json"


class Diverged(Exception):
    """A value of a step is NaN or infinite."""

    def __init__(self, step: int, what: str, value: float):
        super().__init__(f"the {what} of step {step} is {value}")
        self.step = step


class RunDiverged(LabError):
    """The error that a user sees after `Diverged`."""


class Guard:
    """Checks of one run's losses and gradients. With `scaled` (float16) some steps may overflow and are skipped."""

    def __init__(self, scaled: bool):
        self.skipped_in_a_row = 0
        self.scaled = scaled
        self.loss: torch.Tensor | float = 0.0

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of one forward pass, a scalar; it is copied from its device once per optimizer step."""
        self.loss = self.loss + loss

    def check(self, step: int, norm: torch.Tensor | float) -> None:
        """Raise Diverged if the loss or the gradient norm of a step is not finite, in all processes alike."""
        (loss,), norm, self.loss = distributed.all_reduce_sum(float(self.loss)), float(norm), 0.0
        if not math.isfinite(loss):
            raise Diverged(step, "loss", loss)
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > (_MAX_SKIPPED_STEPS if self.scaled else 0):
            raise Diverged(step, "gradient's norm", norm)

    def check_validation(self, step: int, loss: float) -> None:
        """Raise Diverged if the validation loss is not finite, before the weights of `step` are saved."""
        if not math.isfinite(loss):
            raise Diverged(step, "validation loss", loss)


def run_diverged(error: Diverged, run: Path, checkpoint: str, learning_rate: float) -> RunDiverged:
    """Return the error for the user, and record the step in the run's folder for the next start."""
    if distributed.is_main_process():
        manifest.write_json(run / _FILE, {"step": error.step, "what": str(error)})
    return RunDiverged(
        f"training diverged: {error}. The weights of {checkpoint} are kept, nothing after them. Try half the learning "
        f"rate (training.learning_rate={learning_rate / 2:g}) or more warm-up steps; the same settings again will most "
        "likely end the same way, and on a CPU they will for certain"
    )


def log_earlier(run: Path) -> None:
    """Log that the run diverged in an earlier sitting, if it did."""
    try:
        recorded = json.loads((run / _FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return
    logger.info(f"note: this run diverged before ({recorded['what']}); on a CPU the same steps end the same way")
