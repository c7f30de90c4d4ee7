"""Continue with smaller pieces when memory runs out, in training and in validation.

Training batches stay those that the sampler drew, each at the length of its longest clip. The loss of a step stays the
sum over its label tokens divided by their number, so micro-batches give the same gradient up to the order of its sums
(and other dropout masks). Their size is not part of a run's identity. It is written to memory.json in the run's folder,
and a resumed run uses it again. On a GPU the longest possible batch is tried before the first step.
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
from pipelines.whisper.log_mel import FULL_FRAMES

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


T = TypeVar("T")

_FILE = "memory.json"
_STATES_PER_WEIGHT = {"AdamW": 2, "AdamW8bit": 1, "MuonWithAdamW": 2, "SGD": 1, "Adafactor": 0}
"""Numbers that an optimizer stores for each weight, rounded up; Adafactor stores few."""


class OutOfMemory(Exception):
    """A micro-batch of `clips` clips did not fit into memory at a step."""

    def __init__(self, clips: int, step: int):
        super().__init__(f"{clips} clips did not fit into memory at step {step}")
        self.clips, self.step = clips, step


def micro_batch(run: Path, requested: int) -> int:
    """Return the clips of one forward pass: `requested`, or fewer if memory ran out earlier in this run."""
    return min(requested, _read(run).get("micro_batch", requested))


def chosen_micro_batch(run: Path, choose: Callable[[], int]) -> int:
    """Return the clips of one forward pass that `choose` returned for this run, or fewer if memory ran out since.

    The choice is recorded apart from what memory held: it does not limit a number that is set later.
    """
    if "chosen" not in _read(run):
        _write(run, chosen=choose())
    return micro_batch(run, _read(run)["chosen"])


def split(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batch in micro-batches of `size` clips, with unchanged padding."""
    for start in range(0, len(batch["labels"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


@contextlib.contextmanager
def converted(clips: int, step: int, processes: int) -> Iterator[None]:
    """Convert torch's out-of-memory errors to those of `error_of`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise error_of(clips, step, processes) from None


def error_of(clips: int, step: int, processes: int) -> Exception:
    """Return OutOfMemory, or a LabError if other processes would have to change their batches too."""
    if processes == 1:
        return OutOfMemory(clips, step)
    return LabError(
        f"{clips} clips did not fit into memory at step {step}, on one of {processes} devices. "
        f"Set training.micro_batch={max(1, clips // 2)} and run the same command again"
    )


def tries_longest_batch() -> bool:
    """Return True if the longest batch is tried before the first step: on a GPU; a CPU swaps instead of failing."""
    return environment.detect().device == "cuda"


@contextlib.contextmanager
def without_effect(model: Any, optimizer: Any) -> Iterator[None]:
    """Undo the effects of a forward and backward pass on gradients and random numbers.

    Meanwhile it allocates as much memory as the optimizer's state will take from the first step on.
    """
    import numpy as np
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    states = _STATES_PER_WEIGHT[type(getattr(optimizer, "optimizer", optimizer)).__name__]  # accelerate wraps it
    reserved = [] if optimizer.state else [torch.empty_like(weight) for weight in weights for _ in range(states)]
    numpy_state, devices = np.random.get_state(), {weight.device.index for weight in weights if weight.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)  # SpecAugment draws from it
        model.zero_grad(set_to_none=True)
        reserved.clear()


def halve_micro_batch(run: Path, error: OutOfMemory) -> str:
    """Halve the run's micro-batch and return a log line; raise LabError if it was one clip."""
    if error.clips == 1:
        raise LabError(
            f"memory does not hold one clip at step {error.step}: take a smaller model.base or a larger device"
        )
    half = error.clips // 2
    _write(run, micro_batch=half)
    return (
        f"memory ran out: {error}. From now on {half} go through the model at once, and the gradient is summed over "
        "each batch as before: same batches, same loss"
    )


class ValidationBatch:
    """Largest size of a validation batch in frames; it is halved when memory runs out."""

    def __init__(self, run: Path, frames: int):
        self.run = run
        self.frames = min(frames, _read(run).get("batch_frames", frames))

    def run_with_retries(self, work: Callable[[int], T]) -> T:
        """Return `work(frames)`, repeated with half the frames whenever memory runs out.

        All processes halve together, so `work` must not communicate. Raises LabError if 30 s do not fit.
        """
        import torch

        while True:
            result, failed = None, ""
            try:
                result = work(self.frames)
            except torch.OutOfMemoryError:
                failed = "memory"
            if not distributed.first_message(failed):
                return result
            self._halve()
            free()

    def _halve(self) -> None:
        if self.frames <= FULL_FRAMES:
            raise LabError(
                "memory does not hold 30 s of speech in validation: take a smaller model.base or a larger device"
            )
        self.frames = max(FULL_FRAMES, self.frames // 2)
        if distributed.is_main_process():
            _write(self.run, batch_frames=self.frames)
        logger.info(
            f"memory ran out in validation: from now on its batches hold at most {self.frames} frames "
            f"(evaluation.batch_frames={self.frames})"
        )


def _read(run: Path) -> dict[str, int]:
    """Return the recorded sizes, each at least 1; nothing of a file that is missing or damaged."""
    try:
        sizes = dict(json.loads((run / _FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return {name: size for name, size in sizes.items() if isinstance(size, int) and size > 0}


def _write(run: Path, **sizes: int) -> None:
    manifest.write_json(run / _FILE, {**_read(run), **sizes})


def free() -> None:
    """Release the memory of objects that are no longer referenced."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
