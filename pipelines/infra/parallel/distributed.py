"""Processes that train one model together, each known by its rank, from 0: `launch`, torchrun or Ray Train start them.

In a process that was started alone nothing here does anything: its rank is 0 of 1, and no process group exists.
What is agreed on travels between CPUs by gloo, gradients between GPUs by NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipelines.infra.errors import UNFINISHED, LabError, Unfinished
from pipelines.infra.parallel import process_pool

T = TypeVar("T")

PATIENCE = datetime.timedelta(hours=2)
"""How long processes wait for the first one, which fetches, verifies and saves; whoever dies is noticed sooner."""
GRACE_S = 1200.0
"""How long the others may go on once a process has failed: its peers notice, and the first may have copies to send."""
_FAILED = "lab/failed"


class PeerLost(Unfinished):
    """Another process of the group is gone."""


def launch(n: int, command: Sequence[str]) -> int:
    """Run `command` in `n` processes of this machine that train together; returns the exit code that one would have.

    That is why it is here: torchrun turns every code into 1, so that a batch system cannot tell an unfinished run from
    a fault; and it ends the other processes when one has ended, also the one that is copying the last checkpoint.
    SIGTERM and SIGINT are handed on.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    told.setdefault("OMP_NUM_THREADS", str(max(1, process_pool.cores() // n)))
    processes: list[subprocess.Popen] = []

    def hand_on(number: int, frame: Any) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in map(str, range(n)):  # in sessions of their own: a terminal's Ctrl-C reaches them once, from here
            own = told | {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env=own, start_new_session=True))
        return _code_of(_ended(processes))
    finally:
        for process in processes:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(processes: list[subprocess.Popen]) -> list[int]:
    """Their exit codes, once all have ended; those that stay too long after one has failed are killed."""
    until = float("inf")
    while None in (codes := [process.poll() for process in processes]):
        if until == float("inf") and any(code not in (None, 0, UNFINISHED) for code in codes):
            until = time.monotonic() + GRACE_S
        if time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return codes


def _code_of(codes: list[int]) -> int:
    """One code for all: a fault before UNFINISHED, and that, where the others noticed it, before a signal's."""
    faults = [code for code in codes if code > 0 and code != UNFINISHED]
    signals = [128 - code for code in codes if code < 0]  # as a shell has it
    return next(iter([*faults, *(code for code in codes if code == UNFINISHED), *signals]), 0)


def backend(on_gpu: bool) -> str:
    """What the processes talk through, as torch.distributed names it."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def world_size() -> int:
    """How many processes train together."""
    return _group().get_world_size() if _group() else 1


def rank() -> int:
    """Which of them this one is; the first writes and tells."""
    return _group().get_rank() if _group() else 0


def is_main_process() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
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


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in every process (it is pickled); a LabError of it likewise.

    No process goes on before the first one has done it.
    """
    if world_size() == 1:
        return make()
    told: list[Any] = [None, None]
    if is_main_process():
        try:
            told[0] = make()
        except LabError as error:
            told[1] = error
    _group().broadcast_object_list(told, src=0, device="cpu")
    if told[1]:
        raise told[1]
    return told[0]


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """Within, the first process of each machine goes before its others: what it fetches, they find."""
    leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not leads:
        barrier()
    yield
    if leads:
        barrier()


def barrier() -> None:
    """Until every process has come here."""
    all_reduce_sum(0.0)


def all_reduce_sum(*values: float) -> list[float]:
    """Each of the numbers, summed over all processes (in float64): the same in every process."""
    if world_size() == 1:
        return list(values)
    import torch

    sums = torch.tensor(values, dtype=torch.float64)
    _group().all_reduce(sums)
    return sums.tolist()


def gather_dicts(own: dict[Any, Any]) -> dict[Any, Any]:
    """The dictionaries of all processes in one."""
    if world_size() == 1:
        return own
    told: list[Any] = [None] * world_size()
    _group().all_gather_object(told, own)
    return {name: value for part in told for name, value in part.items()}


def first_message(word: str) -> str:
    """The first word that a process has to say, in rank order; empty where none has. Every process must ask."""
    if not all_reduce_sum(float(bool(word)))[0]:
        return ""
    if world_size() == 1:
        return word
    words: list[Any] = [None] * world_size()
    _group().all_gather_object(words, word)
    return next(filter(None, words))


def claim_error_report() -> bool:
    """Whether no other process has failed before this one: one tells the user, the others are silent."""
    return _failures(1) == 1


def has_failed() -> bool:
    """Whether a process has failed by itself (`claim_error_report`)."""
    return _failures(0) > 0


def _failures(more: int) -> int:
    if world_size() == 1:
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
            f"{here} processes were started beside {n_gpus} GPU(s): start {n_gpus} (--devices, --nproc-per-node), "
            "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if n_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend(n_gpus > 0), timeout=PATIENCE)


def _is_of_the_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)
