"""Where a batch does not fit into memory, it goes through the model in pieces.

The batches stay those that the sampler drew, each at the length of its longest clip, and the loss of a step stays the
sum over its label tokens divided by their number: the pieces give the same gradient up to the order of its sums (and
other draws of dropout). So their size is no part of a run's identity. It is noted in the run's folder, so that a
resumed run goes on as it was.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import manifest
from pipelines.errors import LabError
from pipelines.recipe import TrainingSettings

if TYPE_CHECKING:
    import torch

_NOTE = "memory.json"


class OutOfMemory(Exception):
    """A piece of so many clips did not fit, at which step."""

    def __init__(self, clips: int, step: int):
        super().__init__(f"{clips} clips did not fit into memory at step {step}")
        self.clips, self.step = clips, step


def micro_batch(run: Path, settings: TrainingSettings) -> int:
    """How many clips go through the model at once: what the recipe asks for, or less where more did not fit."""
    wanted = settings.micro_batch or settings.batch_size
    try:
        return min(wanted, json.loads((run / _NOTE).read_text("utf-8"))["micro_batch"])
    except (OSError, ValueError):
        return wanted


def pieces(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batch in pieces of `size` clips, padded as it is."""
    for start in range(0, len(batch["labels"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


@contextlib.contextmanager
def watched(clips: int, step: int, processes: int) -> Iterator[None]:
    """Within, memory that runs out is OutOfMemory; LabError where other processes wait for this one."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        if processes > 1:
            raise LabError(
                f"{clips} clips did not fit into memory at step {step}, on one of {processes} devices. "
                f"Set training.micro_batch={max(1, clips // 2)} and run the same command again"
            ) from None
        raise OutOfMemory(clips, step) from None


def halved(run: Path, error: OutOfMemory) -> str:
    """Note that the run goes on with half the clips at once; the line that says so. LabError where it was one clip."""
    if error.clips == 1:
        raise LabError(
            f"memory does not hold one clip at step {error.step}: take a smaller model.base or a larger device"
        )
    half = error.clips // 2
    manifest.write_json(run / _NOTE, {"micro_batch": half})
    return (
        f"memory ran out: {error}. From now on {half} go through the model at once, and the gradient is summed over "
        "each batch as before: same batches, same loss"
    )


def free() -> None:
    """Give back what a trainer that is gone held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
