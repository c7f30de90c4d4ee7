"""Who trains a sweep's trials: this process, one at a time, or the machines of a Ray cluster, several side by side.

On a cluster each trial has a GPU, or one core where there is none. Where its worker dies it is begun again, from its
newest checkpoint. Runs, caches and weights must lie on a disk that all machines see; the package itself travels along.
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

_LOOK_S = 5.0
_SILENCE_S = 20.0
"""What has not answered for so long is gone. Ray itself gives up after a minute, and takes this process with it."""
_LOOKS_BETWEEN_LINES = 120


class Crew(Protocol):
    """Takes jobs, as many at a time as it has hands."""

    hands: int

    def start(self, job: Job) -> None: ...

    def wait(self) -> Result:
        """The next result. LabError where there will be none; errors.Unfinished where a signal ended it."""


@contextlib.contextmanager
def hired(address: str, devices: int) -> Iterator[Crew]:
    """This process where `address` is empty, else the Ray cluster there (cluster.py)."""
    if not address:
        yield Alone()
        return
    with ray_cluster.joined(address) as ray:
        machines = len([node for node in ray.nodes() if node["Alive"]])
        hands = devices or int(ray.cluster_resources().get("GPU", 0)) or machines
        on_gpu = ray_train.refuse_too_small(ray, address, hands)
        logger.info(f"Ray cluster {address}: {hands} trial(s) at a time, each with {'a GPU' if on_gpu else 'one core'}")
        yield OnRay(ray, hands, on_gpu)


class Alone:
    """This process."""

    hands = 1

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


class OnRay:
    """The workers of a Ray cluster."""

    def __init__(self, ray: Any, hands: int, on_gpu: bool):
        self.ray, self.hands, self.under_way = ray, hands, {}
        self.lookout = Lookout(ray, "GPU" if on_gpu else "CPU")
        # no retries: Ray would send off what kills its worker again and again, and nobody would know
        self.task = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=0, scheduling_strategy="SPREAD")(
            _on_a_worker
        )

    def start(self, job: Job) -> None:
        with self._in_one_line():
            self.under_way[self.task.remote(replace(job, cache=ray_train.light(job.cache)))] = job.number

    def wait(self) -> Result:
        with self._in_one_line():
            done = self._next_done()
            number = self.under_way.pop(done)
            result = self._result_of(done, number)
        if isinstance(result, LabError):
            raise result
        return result

    def _next_done(self) -> Any:
        while True:  # waiting in short pieces hears Ctrl-C
            done, _ = self.ray.wait(list(self.under_way), num_returns=1, timeout=1.0)
            if done:
                return done[0]
            self.lookout.look(len(self.under_way))

    def _result_of(self, done: Any, number: int) -> Result | LabError:
        errors = self.ray.exceptions
        try:
            return self.ray.get(done)
        except errors.RayTaskError as error:  # before its training began: a package is missing there, for example
            return Result(number, "failed", reason=_last_line(error))
        except (
            errors.WorkerCrashedError,
            errors.LocalRayletDiedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
        ) as error:
            self.lookout.refuse_gone()  # a cluster that goes takes its workers along
            return Result(number, "died", reason=f"its worker died ({type(error).__name__})")

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except self.ray.exceptions.RayError as error:
            raise LabError(
                f"the sweep ended on the Ray cluster: {_last_line(error)}. Run the same command again to go on"
            ) from error


class Lookout:
    """Sees what Ray tells nobody, while nothing comes from the cluster.

    Ray ends the whole process where the head is silent for a minute, with words of its own; it waits for ever where
    this machine's node is gone, and for ever where no machine is left that could train.
    """

    def __init__(self, ray: Any, kind: str):
        self.ray, self.kind = ray, kind
        about = ray.get_runtime_context()
        (here,) = [node for node in ray.nodes() if node["NodeID"] == about.get_node_id()]
        self.places = {
            "the head of the Ray cluster": about.gcs_address,
            "this machine's node of the Ray cluster": f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}",
        }
        self.next, self.without = 0.0, 0

    def look(self, waiting: int) -> None:
        """`refuse_gone`, now and then; and a line where no machine is left that could train one of `waiting` trials."""
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + _LOOK_S
        self.refuse_gone()
        able = any(node["Alive"] and node.get("Resources", {}).get(self.kind) for node in self.ray.nodes())
        self.without = 0 if able else self.without + 1
        if self.without % _LOOKS_BETWEEN_LINES == 1:
            logger.info(f"no machine of the Ray cluster has a {self.kind} now: {waiting} trial(s) wait until one joins")

    def refuse_gone(self) -> None:
        """LabError where head or node do not answer for as long as a restart may take."""
        end = time.monotonic() + _SILENCE_S
        while gone := [name for name, address in self.places.items() if not _answers(address)]:
            if time.monotonic() > end:
                raise LabError(
                    f"{gone[0]} is gone ({self.places[gone[0]]}): start it anew, or another cluster, then run the same "
                    "command again to go on"
                )
            time.sleep(_LOOK_S / 5)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host.strip("[]"), int(port)), ray_cluster.CONNECT_S).close()
        return True
    return False


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ---- in the workers


def _on_a_worker(job: Job) -> Result | LabError:
    """What ends the sweep travels as a value: as an exception it would arrive in Ray's words."""
    try:
        ray_cluster.refuse_unseen((job.run.parent, job.cache.folder, job.base.folder))
        with _ending_with_its_node():
            return fit(job)
    except Unfinished as error:
        return Unfinished(str(error))
    except LabError as error:
        return error


@contextlib.contextmanager
def _ending_with_its_node() -> Iterator[None]:
    """Within, this process ends when the Ray node that started it does.

    Ray lets it work on, seen by nobody, in a folder that the next sitting is to train in.
    """
    over, node = threading.Event(), os.getppid()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if os.getppid() != node:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
