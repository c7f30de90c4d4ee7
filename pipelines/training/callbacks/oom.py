"""Where a batch does not fit into memory, it goes through the model in pieces; a look at validation in smaller batches.

The batches stay those that the sampler drew, each at the length of its longest clip, and the loss of a step stays the
sum over its label tokens divided by their number: the pieces give the same gradient up to the order of its sums (and
other draws of dropout). So their size is no part of a run's identity. It is noted in the run's folder, so that a
resumed run goes on as it was. On a GPU the longest batch that can come is tried before the first step: what does not
fit shows at once, not when that batch is drawn.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.training_settings import TrainingSettings
from pipelines.whisper.log_mel import FULL_FRAMES

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NOTE = "memory.json"
_KEPT = {"AdamW": 2, "SGD": 1, "Adafactor": 0}
"""Numbers that an optimizer keeps for each weight; Adafactor's are few."""


class OutOfMemory(Exception):
    """A piece of so many clips did not fit, at which step."""

    def __init__(self, clips: int, step: int):
        super().__init__(f"{clips} clips did not fit into memory at step {step}")
        self.clips, self.step = clips, step


def micro_batch(run: Path, settings: TrainingSettings) -> int:
    """How many clips go through the model at once: what the recipe asks for, or less where more did not fit."""
    wanted = settings.micro_batch or settings.batch_size
    return min(wanted, _noted(run).get("micro_batch", wanted))


def pieces(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batch in pieces of `size` clips, padded as it is."""
    for start in range(0, len(batch["labels"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


@contextlib.contextmanager
def watched(clips: int, step: int, processes: int) -> Iterator[None]:
    """Within, memory that runs out is the error that `ran_out` makes of it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ran_out(clips, step, processes) from None


def ran_out(clips: int, step: int, processes: int) -> Exception:
    """OutOfMemory; LabError where other processes wait for this one."""
    if processes == 1:
        return OutOfMemory(clips, step)
    return LabError(
        f"{clips} clips did not fit into memory at step {step}, on one of {processes} devices. "
        f"Set training.micro_batch={max(1, clips // 2)} and run the same command again"
    )


def is_tried_first() -> bool:
    """Whether the longest batch is tried before the first step: a CPU swaps where a GPU ends."""
    return environment.detect().device == "cuda"


@contextlib.contextmanager
def tried(model: Any, optimizer: Any) -> Iterator[None]:
    """Within, a forward and backward pass leaves no trace: no gradient, no draw from the random numbers.

    The room that the optimizer's numbers for each weight will take from its first step on is taken meanwhile.
    """
    import numpy as np
    import torch

    tuned = [weight for weight in model.parameters() if weight.requires_grad]
    kept = _KEPT[type(getattr(optimizer, "optimizer", optimizer)).__name__]  # accelerate wraps it
    taken = [] if optimizer.state else [torch.empty_like(weight) for weight in tuned for _ in range(kept)]
    draws, devices = np.random.get_state(), {weight.device.index for weight in tuned if weight.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(draws)  # SpecAugment's
        model.zero_grad(set_to_none=True)
        taken.clear()


def halved(run: Path, error: OutOfMemory) -> str:
    """Note that the run goes on with half the clips at once; the line that says so. LabError where it was one clip."""
    if error.clips == 1:
        raise LabError(
            f"memory does not hold one clip at step {error.step}: take a smaller model.base or a larger device"
        )
    half = error.clips // 2
    _note(run, micro_batch=half)
    return (
        f"memory ran out: {error}. From now on {half} go through the model at once, and the gradient is summed over "
        "each batch as before: same batches, same loss"
    )


class Room:
    """How many frames one batch of validation may hold: `frames`, or less where memory ran out in this run."""

    def __init__(self, run: Path, frames: int):
        self.run = run
        self.frames = min(frames, _noted(run).get("batch_frames", frames))

    def fit(self, work: Callable[[int], T]) -> T:
        """What `work` makes in batches of so many frames; where memory runs out, it is done again with half as many.

        Every process that trains halves when one must; `work` itself speaks with no other. LabError where 30 s are
        too much.
        """
        import torch

        while True:
            made, full = None, ""
            try:
                made = work(self.frames)
            except torch.OutOfMemoryError:
                full = "full"
            if not distributed.first_message(full):
                return made
            self._halve()
            free()

    def _halve(self) -> None:
        if self.frames <= FULL_FRAMES:
            raise LabError(
                "memory does not hold 30 s of speech in a look at validation: take a smaller model.base or a larger "
                "device"
            )
        self.frames = max(FULL_FRAMES, self.frames // 2)
        if distributed.is_main_process():
            _note(self.run, batch_frames=self.frames)
        logger.info(
            f"memory ran out in a look at validation: from now on its batches hold at most {self.frames} frames "
            f"(evaluation.batch_frames={self.frames})"
        )


def _noted(run: Path) -> dict[str, int]:
    try:
        return json.loads((run / _NOTE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _note(run: Path, **told: int) -> None:
    manifest.write_json(run / _NOTE, {**_noted(run), **told})


def free() -> None:
    """Give back what a trainer that is gone held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
