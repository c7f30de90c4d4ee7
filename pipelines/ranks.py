"""Processes that train one model together, started by torchrun or Ray Train; each is known by its rank, from 0.

In a process that was started alone nothing here does anything: its rank is 0 of 1, and no process group exists.
What is agreed on travels between CPUs by gloo, gradients between GPUs by NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipelines.errors import LabError, Unfinished

T = TypeVar("T")

PATIENCE = datetime.timedelta(hours=2)
"""How long processes wait for the first one, which fetches, verifies and saves; whoever dies is noticed sooner."""
_FAILED = "lab/failed"


class PeerLost(Unfinished):
    """Another process of the group is gone."""


def backend(on_gpu: bool) -> str:
    """What the processes talk through, as torch.distributed names it."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def size() -> int:
    """How many processes train together."""
    return _group().get_world_size() if _group() else 1


def rank() -> int:
    """Which of them this one is; the first writes and tells."""
    return _group().get_rank() if _group() else 0


def is_first() -> bool:
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within, this process belongs to those that torchrun or Ray Train started with it, if any did.

    A peer that dies is PeerLost in the others. LabError where a machine has fewer GPUs than processes.
    """
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    started_here = wanted > 1 and _group() is None
    if started_here:
        _start()
    try:
        yield
    except RuntimeError as error:
        if wanted > 1 and _is_of_the_connection(error):
            raise PeerLost(
                "another process of this run ended. Run the same command again to go on from the newest checkpoint"
            ) from None
        raise
    if started_here:
        _group().destroy_process_group()


def by_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in every process (it is pickled); a LabError of it likewise.

    No process goes on before the first one has done it.
    """
    if size() == 1:
        return make()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = make()
        except LabError as error:
            told[1] = error
    _group().broadcast_object_list(told, src=0, device="cpu")
    if told[1]:
        raise told[1]
    return told[0]


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """Within, the first process of each machine goes before its others: what it fetches, they find."""
    leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not leads:
        wait()
    yield
    if leads:
        wait()


def wait() -> None:
    """Until every process has come here."""
    summed(0.0)


def summed(*values: float) -> list[float]:
    """Each of the numbers, summed over all processes (in float64): the same in every process."""
    if size() == 1:
        return list(values)
    import torch

    sums = torch.tensor(values, dtype=torch.float64)
    _group().all_reduce(sums)
    return sums.tolist()


def merged(own: dict[Any, Any]) -> dict[Any, Any]:
    """The dictionaries of all processes in one."""
    if size() == 1:
        return own
    told: list[Any] = [None] * size()
    _group().all_gather_object(told, own)
    return {name: value for part in told for name, value in part.items()}


def agreed(word: str) -> str:
    """The first word that a process has to say, in rank order; empty where none has. Every process must ask."""
    if not summed(float(bool(word)))[0]:
        return ""
    if size() == 1:
        return word
    words: list[Any] = [None] * size()
    _group().all_gather_object(words, word)
    return next(filter(None, words))


def is_first_to_fail() -> bool:
    """Whether no other process has failed before this one: one tells the user, the others are silent."""
    return _failures(1) == 1


def has_failed() -> bool:
    """Whether a process has failed by itself (`is_first_to_fail`)."""
    return _failures(0) > 0


def _failures(more: int) -> int:
    if size() == 1:
        return more
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return _get_default_store().add(_FAILED, more)
    except RuntimeError:  # the store went with the process that kept it
        return more


def _group() -> Any:
    """torch.distributed with its process group, or None."""
    if "WORLD_SIZE" not in os.environ:
        return None  # torch need not be imported
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


def _start() -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise LabError("this PyTorch cannot train in several processes: install a build with torch.distributed")
    here, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < n_gpus < here:
        raise LabError(
            f"{here} processes were started beside {n_gpus} GPU(s): give torchrun --nproc-per-node {n_gpus}, "
            "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if n_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend(n_gpus > 0), timeout=PATIENCE)


def _is_of_the_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)
