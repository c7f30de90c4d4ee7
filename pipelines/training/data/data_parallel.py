"""Several processes train on one batch: each takes its share of the clips.

The recipe's batch is the batch of all processes together. Each of them draws the same batches in the same order, at the
length of the longest clip of the whole batch; the loss of a step stays the sum over all label tokens divided by their
number, and gradients are summed over processes. So their number changes nothing but the order of sums (and draws of
dropout): it is no part of a run's identity.
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
class ShareOf:
    """A collator that leaves process `rank` of `size` its share of each batch."""

    collate: Callable[[Any], dict[str, torch.Tensor]]
    rank: int
    size: int

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        return share(self.collate(rows), self.rank, self.size)


def share(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """Every `size`-th clip of the batch, padded as it is.

    Where there is none left, a clip whose labels count in nothing: all processes must meet to sum gradients.
    """
    if rank < len(batch["labels"]):
        return {name: tensor[rank::size] for name, tensor in batch.items()}
    spare = {name: tensor[:1] for name, tensor in batch.items()}
    return {**spare, "labels": spare["labels"].new_full(spare["labels"].shape, IGNORED)}


def refuse_unseen(run: Path) -> None:
    """LabError in a process that does not see what the first one has written in the run's folder."""
    if not (run / "run.json").exists():
        raise LabError(
            f"process {distributed.rank()} does not see {run}: name a folder (--runs) that all machines share"
        )


def tell_other_size(checkpoint: Path) -> None:
    """Say where another number of processes made the checkpoint that a run goes on from."""
    made, now = len(list(checkpoint.glob("rng_state*.pth"))), distributed.world_size()
    if made != now:
        logger.info(
            f"note: {made} process(es) made {checkpoint.name}, and {now} go on: same batches, same loss, other "
            "roundings and draws of dropout; the weights will be as good, not the same to the last digit"
        )
