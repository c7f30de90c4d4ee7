"""The workers of a Ray cluster train together: Ray Train starts them, and starts them anew where one dies.

Each runs the very function that a single process runs (training.train), so the run's folder, its checkpoints and the
weights are those of torchrun on one machine. The run's folder, the cache and the base model must lie on a disk that all
machines see; this package itself travels along (cluster.py).
"""

from __future__ import annotations

import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.parallel import distributed, ray_cluster
from pipelines.recipes.settings import Recipe
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints.fork import Fork
from pipelines.training.run import TrainedModel
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

RESTARTS = 20
"""So many times in one sitting the workers are started anew, after one of them died."""
_LISTEN_S = 0.2


@dataclass(frozen=True)
class Job:
    """What every worker is told: the arguments of training.train."""

    recipe: Recipe
    cache: FeatureCache
    base: ModelRef
    run: Path
    resume: str
    fork: Fork | None


class Ear:
    """An actor of the cluster: takes what the workers tell to the process that started them."""

    def __init__(self):
        self.told: list[tuple[str, tuple]] = []
        self.error: LabError | None = None

    def tell(self, name: str, *args: Any) -> None:
        """One call of the Progress."""
        self.told.append((name, args))

    def fail(self, error: LabError) -> None:
        """The first error that would come again with the next start."""
        self.error = self.error or error

    def take(self) -> list[tuple[str, tuple]]:
        told, self.told = self.told, []
        return told

    def failed(self) -> LabError | None:
        return self.error


def train(address: str, devices: int, job: Job, progress: Progress | None = None) -> TrainedModel:
    """`training.train` by `devices` workers of the Ray cluster at `address` (see cluster.make_shards).

    Each has a GPU, or one core where the cluster has no GPU. A worker that dies costs the steps since the newest
    checkpoint. Raises LabError for a cluster that cannot be used or is too small, and what training.train raises.
    """
    progress = progress or Progress()
    with ray_cluster.joined(address) as ray:
        on_gpu = refuse_too_small(ray, address, devices)
        logger.info(f"Ray cluster {address}: {devices} worker(s), each with {'a GPU' if on_gpu else 'one core'}")
        ear = ray.remote(num_cpus=0)(Ear).remote()
        notes = job.run / "ray"
        shutil.rmtree(notes, ignore_errors=True)
        fit = _trainer(functools.partial(_work, replace(job, cache=light(job.cache)), ear), devices, on_gpu, notes).fit
        try:
            _listen(ray, fit, ear, progress)
        finally:
            shutil.rmtree(notes, ignore_errors=True)
    model = training_run.finished(job.run)
    if model is None:
        raise LabError(f"the workers ended without a model in {job.run}: is it on a disk that all machines share?")
    return model


def _trainer(work: Callable[[], None], devices: int, on_gpu: bool, notes: Path) -> Any:
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise missing_package("ray[train]", "ray[data,train]>=2.60,<2.64", "training on a Ray cluster") from None
    return TorchTrainer(
        work,
        torch_config=TorchConfig(distributed.backend(on_gpu), timeout_s=int(distributed.PATIENCE.total_seconds())),
        scaling_config=ScalingConfig(num_workers=devices, use_gpu=on_gpu),
        run_config=RunConfig(
            name="train", storage_path=str(notes), failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )


def _listen(ray: ModuleType, fit: Callable[[], Any], ear: Any, progress: Progress) -> None:
    """Until `fit` has ended, tell `progress` what the workers tell; then raise what ended them, if anything did."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            fit()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)  # the main thread stays free for Ctrl-C
    thread.start()
    while thread.is_alive():
        time.sleep(_LISTEN_S)
        for name, args in ray.get(ear.take.remote()):
            getattr(progress, name)(*args)
    if error := ray.get(ear.failed.remote()):
        raise error
    for failure in failures:
        lines = [line for line in str(failure).splitlines() if line.strip()]
        raise LabError(
            f"training on the Ray cluster ended: {lines[-1] if lines else type(failure).__name__}. "
            "Run the same command again to go on from the newest checkpoint"
        ) from failure


def refuse_too_small(ray: ModuleType, address: str, devices: int) -> bool:
    """Whether the workers get GPUs. LabError where there are fewer devices: Ray would wait for more."""
    there = ray.cluster_resources()
    kind = "GPU" if there.get("GPU") else "CPU"
    if there.get(kind, 0) < devices:
        raise LabError(
            f"the Ray cluster {address} has {there.get(kind, 0):.0f} {kind}(s), and --devices asks for {devices}: "
            "ask for fewer, or start more nodes"
        )
    return kind == "GPU"


def light(cache: FeatureCache) -> FeatureCache:
    """The cache without what it has read so far."""
    return FeatureCache(**{field.name: getattr(cache, field.name) for field in fields(cache)})


# ---- in the workers


def _work(job: Job, ear: Any) -> None:
    import ray

    if ray.get(ear.failed.remote()):
        return
    try:
        ray_cluster.refuse_unseen((job.run.parent, job.cache.folder, job.base.folder))
        with distributed.process_group():
            training_loop.train(job.recipe, job.cache, job.base, job.run, _telling(ear), job.resume, fork=job.fork)
    except distributed.PeerLost:
        raise
    except LabError as error:
        ray.get(ear.fail.remote(error))
        raise


def _telling(ear: Any) -> Progress:
    """A Progress that tells `ear`."""

    def teller(name: str) -> Callable[..., None]:
        return lambda *args: ear.tell.remote(name, *args)

    return Progress(**{field.name: teller(field.name) for field in fields(Progress)})
