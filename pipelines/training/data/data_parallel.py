"""Split each batch among the processes that train together.

The recipe's batch size is that of all processes together. Each draws the same batches in the same order, padded to the
longest clip of the whole batch. The loss of a step stays the sum over all label tokens divided by their number, and
gradients are summed over processes. So the number of processes changes only the order of sums and the dropout masks,
and is not part of a run's identity.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.whisper.batching import IGNORED

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankCollator:
    """Collator that returns the part of each batch that process `rank` of `size` trains on."""

    collate: Callable[[Any], dict[str, torch.Tensor]]
    rank: int
    size: int

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        return rank_part(self.collate(rows), self.rank, self.size)


def rank_part(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """Return every `size`-th clip of the batch from `rank` on, with unchanged padding.

    If none is left, return one clip without labels: every process must take part in the sum of gradients.
    """
    if rank < len(batch["labels"]):
        return {name: tensor[rank::size] for name, tensor in batch.items()}
    clip = {name: tensor[:1] for name, tensor in batch.items()}
    return {**clip, "labels": clip["labels"].new_full(clip["labels"].shape, IGNORED)}


def refuse_unshared(run: Path) -> None:
    """Raise LabError if this process cannot read what the main process has written in the run's folder."""
    if not (run / "run.json").exists():
        raise LabError(
            f"process {distributed.rank()} does not see {run}: name a folder (--runs) that all machines share"
        )


def log_other_world_size(checkpoint: Path) -> None:
    """Log a note if the checkpoint was written by another number of processes."""
    before, now = len(list(checkpoint.glob("rng_state*.pth"))), distributed.world_size()
    if before != now:
        logger.info(
            f"note: {before} process(es) wrote {checkpoint.name}, and {now} continue: same batches and loss, other "
            "rounding and dropout masks; the weights will be as good, but not the same to the last digit"
        )
