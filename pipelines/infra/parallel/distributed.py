"""Data-parallel training: processes with ranks from 0, started by `launch`, torchrun or Ray Train.

A process that was started alone has rank 0 of 1 and no process group; these functions then do nothing. Gloo transfers
objects and numbers between CPUs, NCCL transfers gradients between GPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipelines.infra import console
from pipelines.infra.errors import UNFINISHED, LabError, Unfinished
from pipelines.infra.parallel import process_pool

T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
"""Longest wait for the main process, which fetches, verifies and saves. A process that dies is noticed sooner."""
GRACE_S = 1200.0
"""Grace period of the other processes after one has failed: they notice it, and the main one may still upload files.

Seconds."""
_FAILURE_COUNT = "lab/failed"
_has_started = False


class PeerLost(Unfinished):
    """Another process of the group has ended."""


def launch(n: int, command: Sequence[str]) -> int:
    """Run `command` in `n` processes of this machine that train together. Returns one exit code for all.

    torchrun changes every exit code to 1, so that a batch system cannot distinguish an unfinished run from an error. It
    also kills the other processes when one has ended, even while one uploads the last checkpoint.
    SIGTERM and SIGINT are forwarded to every process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    variables.setdefault("OMP_NUM_THREADS", str(max(1, process_pool.cores() // n)))
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame: Any) -> None:
        for process in processes:
            process.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in map(str, range(n)):  # in new sessions: a terminal's Ctrl-C reaches each process once, from here
            environment = variables | {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _combined_code(_wait(processes))
    finally:
        for process in processes:
            process.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen]) -> list[int]:
    """Wait for all processes and return their exit codes; kill the others GRACE_S after one has failed."""
    deadline = float("inf")
    while None in (codes := [process.poll() for process in processes]):
        if deadline == float("inf") and any(code not in (None, 0, UNFINISHED) for code in codes):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return codes


def _combined_code(codes: list[int]) -> int:
    """Return one exit code: the first error, else UNFINISHED, else 128 + the signal that ended a process, else 0."""
    errors = [code for code in codes if code > 0 and code != UNFINISHED]
    signals = [128 - code for code in codes if code < 0]  # as in a shell
    return next(iter([*errors, *(code for code in codes if code == UNFINISHED), *signals]), 0)


def backend(on_gpu: bool) -> str:
    """Return the backend of torch.distributed."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def world_size() -> int:
    """Return the number of processes that train together."""
    return _group().get_world_size() if _group() else 1


def rank() -> int:
    """Return the index of this process, from 0."""
    return _group().get_rank() if _group() else 0


def is_main_process() -> bool:
    """Return True in the process of rank 0, which writes files and prints messages."""
    return rank() == 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of `launch`, torchrun or Ray Train, if there is one; only the main process prints.

    Raises PeerLost if another process dies, and LabError if a machine has fewer GPUs than processes.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    started_here = n_processes > 1 and _group() is None
    if started_here:
        _start()
    if not is_main_process():
        console.mute()
    try:
        yield
    except RuntimeError as error:
        if n_processes > 1 and _is_connection_error(error):
            raise PeerLost(
                "another process of this run ended. Run the same command again to go on from the newest checkpoint"
            ) from None
        raise
    if started_here:
        _group().destroy_process_group()


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """Call `compute` in the main process; return its result, or raise its LabError, in every process.

    The result is pickled. The other processes wait for it.
    """
    if world_size() == 1:
        return compute()
    result_and_error: list[Any] = [None, None]
    if is_main_process():
        try:
            result_and_error[0] = compute()
        except LabError as error:
            result_and_error[1] = error
    _group().broadcast_object_list(result_and_error, src=0, device="cpu")
    result, error = result_and_error
    if error:
        raise error
    return result


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others, which reuse its downloads."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    yield
    if is_first:
        barrier()


def barrier() -> None:
    """Wait until every process has called this."""
    all_reduce_sum(0.0)


def all_reduce_sum(*values: float) -> list[float]:
    """Return each value summed over all processes, in float64."""
    if world_size() == 1:
        return list(values)
    import torch

    sums = torch.tensor(values, dtype=torch.float64)
    _group().all_reduce(sums)
    return sums.tolist()


def gather_dicts(part: dict[Any, Any]) -> dict[Any, Any]:
    """Return the dictionaries of all processes merged into one."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    _group().all_gather_object(parts, part)
    return {name: value for part in parts for name, value in part.items()}


def first_message(message: str) -> str:
    """Return the first non-empty message in rank order, or "". Every process must call this."""
    if not all_reduce_sum(float(bool(message)))[0]:
        return ""
    if world_size() == 1:
        return message
    messages: list[Any] = [None] * world_size()
    _group().all_gather_object(messages, message)
    return next(filter(None, messages))


def exit_process(code: int | str | None) -> None:
    """End a process that has joined a group, after its exit handlers; do nothing in any other process.

    The threads of gloo outlive the group, because DistributedDataParallel keeps it. One that still releases a tensor
    while the interpreter shuts down aborts the process ("terminate called without an active exception"), and a
    complete run would count as failed.
    """
    if not _has_started or not isinstance(code, int | None):
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def claim_error_report() -> bool:
    """Count a failure of this process; return True if it is the first one, which reports the error to the user."""
    return _count_failures(1) == 1


def has_failed() -> bool:
    """Return True if a process has called `claim_error_report`."""
    return _count_failures(0) > 0


def _count_failures(more: int) -> int:
    """Add `more` to the number of failures and return it."""
    if world_size() == 1:
        return more
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return _get_default_store().add(_FAILURE_COUNT, more)
    except RuntimeError:  # the store ended with its process
        return more


def _group() -> Any:
    """Return torch.distributed if this process is in a process group, else None."""
    if "WORLD_SIZE" not in os.environ:
        return None  # without importing torch
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


def _start() -> None:
    global _has_started

    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise LabError("this PyTorch cannot train in several processes: install a build with torch.distributed")
    n_local, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < n_gpus < n_local:
        raise LabError(
            f"{n_local} processes were started beside {n_gpus} GPU(s): start {n_gpus} (--devices, --nproc-per-node), "
            "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if n_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend(n_gpus > 0), timeout=COLLECTIVE_TIMEOUT)
    _has_started = True


def _is_connection_error(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)
