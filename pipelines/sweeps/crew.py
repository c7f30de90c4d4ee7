"""Who trains a sweep's trials: this process, one at a time, or the machines of a Ray cluster, several side by side.

On a cluster each trial has a GPU, or one core where there is none. Where its worker dies it is begun again, from its
newest checkpoint. Runs, caches and weights must lie on a disk that all machines see; the package itself travels along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pipelines import cluster, training
from pipelines.cache import FeatureCache
from pipelines.errors import LabError, Unfinished
from pipelines.models import ModelRef
from pipelines.recipe import Recipe
from pipelines.training import Progress, fleet, memory
from pipelines.training.progress import seconds_of


@dataclass(frozen=True)
class Job:
    """A trial that is to be trained to the step `until`."""

    number: int
    recipe: Recipe
    cache: FeatureCache
    base: ModelRef
    run: Path
    until: int


@dataclass(frozen=True)
class Result:
    """What came of a job."""

    number: int
    state: str
    """paused, finished, diverged or failed: see record.Trial."""
    looks: dict[int, float] = field(default_factory=dict)
    """Step to WER on the validation split, from the first step on."""
    seconds: float = 0.0
    reason: str = ""


class Crew(Protocol):
    """Takes jobs, as many at a time as it has hands."""

    hands: int

    def start(self, job: Job) -> None: ...

    def wait(self) -> Result:
        """The next result. LabError where there will be none; errors.Unfinished where a signal ended it."""


@contextlib.contextmanager
def hired(address: str, devices: int, log: Callable[[str], None]) -> Iterator[Crew]:
    """This process where `address` is empty, else the Ray cluster there (cluster.py)."""
    if not address:
        yield Alone(log)
        return
    with cluster.joined(address) as ray:
        machines = len([node for node in ray.nodes() if node["Alive"]])
        hands = devices or int(ray.cluster_resources().get("GPU", 0)) or machines
        on_gpu = fleet.refuse_too_small(ray, address, hands)
        log(f"Ray cluster {address}: {hands} trial(s) at a time, each with {'a GPU' if on_gpu else 'one core'}")
        yield OnRay(ray, hands, on_gpu)


def fit(job: Job, log: Callable[[str], None]) -> Result:
    """Train a trial from its newest checkpoint to its step. Raises errors.Unfinished where a signal ended it."""
    told: list[list[dict[str, float]]] = [[]]
    progress = Progress(on_line=log, on_log=told.append)
    until = job.until if job.until < job.recipe.training.steps else 0
    state, reason = "finished", ""
    try:
        told.append(training.train(job.recipe, job.cache, job.base, job.run, progress, until=until).history)
    except training.Paused as paused:
        state = "paused"
        told.append(paused.history)
    except Unfinished:
        raise
    except LabError as error:
        state, reason = "diverged" if isinstance(error, training.RunDiverged) else "failed", str(error)
    history = told[-1]
    looks = {int(row["step"]): row["eval_wer"] for row in history if "eval_wer" in row}
    return Result(job.number, state, looks, seconds_of(history), reason)


class Alone:
    """This process."""

    hands = 1

    def __init__(self, log: Callable[[str], None]):
        self.log = log
        self.jobs: list[Job] = []

    def start(self, job: Job) -> None:
        self.jobs.append(job)

    def wait(self) -> Result:
        job = self.jobs.pop()
        try:
            return fit(job, lambda line: self.log(f"  trial {job.number}: {line}"))
        finally:
            memory.free()


class OnRay:
    """The workers of a Ray cluster."""

    def __init__(self, ray: Any, hands: int, on_gpu: bool):
        self.ray, self.hands, self.under_way = ray, hands, []
        self.task = ray.remote(
            num_cpus=1, num_gpus=int(on_gpu), max_retries=fleet.RESTARTS, scheduling_strategy="SPREAD"
        )(_on_a_worker)

    def start(self, job: Job) -> None:
        self.under_way.append(self.task.remote(replace(job, cache=fleet.light(job.cache))))

    def wait(self) -> Result:
        done: list[Any] = []
        while not done:  # waiting in short pieces hears Ctrl-C
            done, _ = self.ray.wait(self.under_way, num_returns=1, timeout=1.0)
        self.under_way.remove(done[0])
        try:
            result = self.ray.get(done[0])
        except self.ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise LabError(
                f"a trial ended on the Ray cluster: {lines[-1] if lines else type(error).__name__}. "
                "Run the same command again to go on"
            ) from error
        if isinstance(result, LabError):
            raise result
        return result


def _on_a_worker(job: Job) -> Result | LabError:
    """What ends the sweep travels as a value: as an exception it would arrive in Ray's words."""
    try:
        cluster.refuse_unseen((job.run.parent, job.cache.folder, job.base.folder))
        return fit(job, training.SILENT.on_line)
    except Unfinished as error:
        return Unfinished(str(error))
    except LabError as error:
        return error
