"""Where a sweep's trials train: in this process, one at a time, or on the machines of a Ray cluster, in parallel.

On a cluster each trial has a GPU, or one core if there are no GPUs. If its worker dies, it is started again from its
newest checkpoint. Runs, caches and weights must be on a disk that all machines share; the package itself is sent along.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from pipelines.experiments.sweeps.trial_run import Job, Result, fit
from pipelines.infra import console
from pipelines.infra.errors import LabError, Unfinished
from pipelines.infra.parallel import ray_cluster
from pipelines.training import ray_train
from pipelines.training.callbacks import oom

logger = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 5.0
_SILENCE_S = 20.0
"""Time without an answer after which a node is gone. Ray itself gives up after a minute, and ends this process."""
_CHECKS_BETWEEN_WARNINGS = 120


class Executor(Protocol):
    """Runs jobs, as many in parallel as it has slots."""

    slots: int

    def start(self, job: Job) -> None: ...

    def wait(self) -> Result:
        """Return the next result. Raise LabError if there will be none, errors.Unfinished if a signal ended it."""


@contextlib.contextmanager
def open_executor(address: str, devices: int) -> Iterator[Executor]:
    """Yield an executor for the Ray cluster at `address`, or for this process if `address` is empty."""
    if not address:
        yield LocalExecutor()
        return
    with ray_cluster.connect(address) as ray:
        machines = len([node for node in ray.nodes() if node["Alive"]])
        slots = devices or int(ray.cluster_resources().get("GPU", 0)) or machines
        on_gpu = ray_train.refuse_too_small(ray, address, slots)
        logger.info(f"Ray cluster {address}: {slots} trial(s) at a time, each with {'a GPU' if on_gpu else 'one core'}")
        yield RayExecutor(ray, slots, on_gpu)


class LocalExecutor:
    """Runs one job at a time in this process."""

    slots = 1

    def __init__(self):
        self.jobs: list[Job] = []

    def start(self, job: Job) -> None:
        self.jobs.append(job)

    def wait(self) -> Result:
        job = self.jobs.pop()
        try:
            with console.rewritten(lambda line: f"  trial {job.number}: {line}"):
                return fit(job)
        finally:
            oom.free()


class RayExecutor:
    """Runs jobs on the workers of a Ray cluster."""

    def __init__(self, ray: Any, slots: int, on_gpu: bool):
        self.ray, self.slots, self.running = ray, slots, {}
        self.monitor = ClusterMonitor(ray, "GPU" if on_gpu else "CPU")
        # no retries by Ray: a job that kills its worker would be repeated without any message
        self.task = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=0, scheduling_strategy="SPREAD")(
            _run_on_worker
        )

    def start(self, job: Job) -> None:
        with self._one_line_errors():
            self.running[self.task.remote(replace(job, cache=ray_train.without_open_files(job.cache)))] = job.number

    def wait(self) -> Result:
        with self._one_line_errors():
            done = self._next_done()
            number = self.running.pop(done)
            result = self._result_of(done, number)
        if isinstance(result, LabError):
            raise result
        return result

    def _next_done(self) -> Any:
        while True:  # short waits, so that Ctrl-C is handled
            done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=1.0)
            if done:
                return done[0]
            self.monitor.check(len(self.running))

    def _result_of(self, done: Any, number: int) -> Result | LabError:
        errors = self.ray.exceptions
        try:
            return self.ray.get(done)
        except errors.RayTaskError as error:  # before training started, e.g. because a package is missing there
            return Result(number, "failed", reason=_last_line(error))
        except (
            errors.WorkerCrashedError,
            errors.LocalRayletDiedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
        ) as error:
            self.monitor.require_cluster()  # workers also die when their cluster ends
            return Result(number, "died", reason=f"its worker died ({type(error).__name__})")

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except self.ray.exceptions.RayError as error:
            raise LabError(
                f"the sweep ended on the Ray cluster: {_last_line(error)}. Run the same command again to resume"
            ) from error


class ClusterMonitor:
    """Detects failures that Ray does not report while this process waits for results.

    Ray ends the process if the head does not answer for a minute. It waits forever if this machine's node is gone, or
    if no machine is left that could train.
    """

    def __init__(self, ray: Any, kind: str):
        self.ray, self.kind = ray, kind
        context = ray.get_runtime_context()
        (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
        self.addresses = {
            "the head of the Ray cluster": context.gcs_address,
            "this machine's node of the Ray cluster": f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
        }
        self.next_check, self.checks_without_machine = 0.0, 0

    def check(self, waiting: int) -> None:
        """Call `require_cluster` every few seconds; log if no machine can train one of `waiting` trials."""
        if time.monotonic() < self.next_check:
            return
        self.next_check = time.monotonic() + _CHECK_INTERVAL_S
        self.require_cluster()
        available = any(node["Alive"] and node.get("Resources", {}).get(self.kind) for node in self.ray.nodes())
        self.checks_without_machine = 0 if available else self.checks_without_machine + 1
        if self.checks_without_machine % _CHECKS_BETWEEN_WARNINGS == 1:
            logger.info(f"no machine of the Ray cluster has a {self.kind} now: {waiting} trial(s) wait until one joins")

    def require_cluster(self) -> None:
        """Raise LabError if the head or this machine's node does not answer for _SILENCE_S."""
        end = time.monotonic() + _SILENCE_S
        while gone := [name for name, address in self.addresses.items() if not _is_reachable(address)]:
            if time.monotonic() > end:
                raise LabError(
                    f"{gone[0]} is gone ({self.addresses[gone[0]]}): restart it, or another cluster, then run the same "
                    "command again to resume"
                )
            time.sleep(_CHECK_INTERVAL_S / 5)


def _is_reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host.strip("[]"), int(port)), ray_cluster.CONNECT_TIMEOUT_S).close()
        return True
    return False


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ---- in the workers


def _run_on_worker(job: Job) -> Result | LabError:
    """Run a job. Return errors that end the sweep as values: as exceptions they would be wrapped in Ray's messages."""
    try:
        ray_cluster.require_visible((job.run.parent, job.cache.folder, job.base.folder))
        with _exit_with_node():
            return fit(job)
    except Unfinished as error:
        return Unfinished(str(error))
    except LabError as error:
        return error


@contextlib.contextmanager
def _exit_with_node() -> Iterator[None]:
    """End this process if the Ray node that started it ends while the body runs.

    Ray would let it train on, in a folder that the resumed sweep needs.
    """
    stop, node = threading.Event(), os.getppid()

    def watch() -> None:
        while not stop.wait(_CHECK_INTERVAL_S):
            if os.getppid() != node:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        stop.set()
