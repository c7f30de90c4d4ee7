"""Exponential moving average (EMA) of the trained weights: what is validated, saved and becomes the model.

A checkpoint holds the average as its weights, so that everything that loads one gets what was validated. The weights
that training continues with are in one more file, FILE.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "training_weights.safetensors"
"""File of a checkpoint with the weights that are trained, as they are; `model.safetensors` holds their average."""


class WeightAverage:
    """The average of a model's trainable weights, on its device: 4 bytes per trainable weight."""

    def __init__(self, model: Any, decay: float):
        self.decay = decay
        self.trained = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
        self.average = [weights.detach().clone() for weights in self.trained.values()]

    def update(self, step: int) -> None:
        """Add the weights after an optimizer step: average = d * average + (1 - d) * weights.

        d is min(decay, (1 + step) / (10 + step)), so that a short run forgets its initial weights (as in TensorFlow's
        ExponentialMovingAverage).
        """
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        average(self.average, [weights.data for weights in self.trained.values()], None)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model its averaged weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, weights in enumerate(self.trained.values()):
            weights.data, self.average[i] = self.average[i], weights.data

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights, which are not averaged, to a checkpoint."""
        from safetensors.torch import save_file

        save_file({name: weights.detach().contiguous() for name, weights in self.trained.items()}, checkpoint / FILE)

    def resume(self, checkpoint: Path) -> None:
        """Take the average from the model, which has the weights of the checkpoint, and load the trained weights."""
        from safetensors.torch import load_file

        stored = load_file(checkpoint / FILE)
        for i, (name, weights) in enumerate(self.trained.items()):
            self.average[i].copy_(weights.data)
            weights.data.copy_(stored[name])

    def callback(self) -> Any:
        """Return the TrainerCallback that updates the average after each step, before validation."""
        from transformers import TrainerCallback

        class Average(TrainerCallback):
            def on_step_end(callback, args, state, control, **kwargs):
                self.update(state.global_step)

        return Average()
