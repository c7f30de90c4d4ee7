"""Train on the workers of a Ray cluster; Ray Train starts them, and restarts them if one dies.

Each worker runs the same function as a single process (loop.train), so the run's folder, checkpoints and weights are
those of torchrun on one machine. The run's folder, the cache and the base model must be on a disk that all machines
share. This package is sent to them (ray_cluster.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.features.cache import FeatureCache
from pipelines.infra import console
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.parallel import distributed, ray_cluster
from pipelines.training import loop as training_loop
from pipelines.training.callbacks.progress import Progress
from pipelines.training.run import TrainedModel, TrainingRun, finished_model

logger = logging.getLogger(__name__)

RESTARTS = 20
"""Largest number of restarts in one sitting after a worker died."""
_POLL_S = 0.2
_LOG = "log"
"""Name of the calls that carry a log line instead of progress."""


class Messages:
    """Ray actor that passes the workers' messages to the process that started them."""

    def __init__(self):
        self.calls: list[tuple[str, tuple]] = []
        self.error: LabError | None = None

    def report(self, name: str, *args: Any) -> None:
        """Record a call of the Progress, or a log line."""
        self.calls.append((name, args))

    def fail(self, error: LabError) -> None:
        """Record an error that a restart would repeat; the first one counts."""
        self.error = self.error or error

    def take(self) -> list[tuple[str, tuple]]:
        """Return the calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def failed(self) -> LabError | None:
        """Return the recorded error."""
        return self.error


def train(address: str, devices: int, run: TrainingRun) -> TrainedModel:
    """Train `run` with `devices` workers of the Ray cluster at `address`; return the finished model.

    Each worker has a GPU, or one core if the cluster has no GPU. A worker that dies costs the steps since the newest
    checkpoint. Raises LabError for a cluster that cannot be used or is too small, and the errors of loop.train.
    """
    with ray_cluster.connect(address) as ray:
        on_gpu = refuse_too_small(ray, address, devices)
        logger.info(f"Ray cluster {address}: {devices} worker(s), each with {'a GPU' if on_gpu else 'one core'}")
        messages = ray.remote(num_cpus=0)(Messages).remote()
        storage = run.folder / "ray"
        shutil.rmtree(storage, ignore_errors=True)
        sent = replace(run, cache=without_open_files(run.cache), progress=_remote_progress(messages))
        try:
            fit = _ray_trainer(functools.partial(_work, sent, messages), devices, on_gpu, storage).fit
            _forward_progress(ray, fit, messages, run.progress)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    model = finished_model(run.folder)
    if model is None:
        raise LabError(f"the workers ended without a model in {run.folder}: is it on a disk that all machines share?")
    return model


def _ray_trainer(work: Callable[[], None], devices: int, on_gpu: bool, storage: Path) -> Any:
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise missing_package("ray[train]", "ray[data,train]>=2.60,<2.64", "training on a Ray cluster") from None
    return TorchTrainer(
        work,
        torch_config=TorchConfig(
            distributed.backend(on_gpu), timeout_s=int(distributed.COLLECTIVE_TIMEOUT.total_seconds())
        ),
        scaling_config=ScalingConfig(num_workers=devices, use_gpu=on_gpu),
        run_config=RunConfig(
            name="train", storage_path=str(storage), failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )


def _forward_progress(ray: ModuleType, fit: Callable[[], Any], messages: Any, progress: Progress) -> None:
    """Call `fit` in a thread and pass the workers' calls to `progress`; raise the error that ended them, if any."""
    failures: list[Exception] = []

    def call_fit() -> None:
        try:
            fit()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=call_fit, daemon=True)  # the main thread has to receive Ctrl-C
    thread.start()
    while thread.is_alive():
        time.sleep(_POLL_S)
        for name, args in ray.get(messages.take.remote()):
            call = logger.info if name == _LOG else getattr(progress, name)
            call(*args)
    if error := ray.get(messages.failed.remote()):
        raise error
    for failure in failures:
        lines = [line for line in str(failure).splitlines() if line.strip()]
        raise LabError(
            f"training on the Ray cluster ended: {lines[-1] if lines else type(failure).__name__}. "
            "Run the same command again to continue from the newest checkpoint"
        ) from failure


def refuse_too_small(ray: ModuleType, address: str, devices: int) -> bool:
    """Return True if the workers get GPUs; raise LabError if there are too few devices, for which Ray would wait."""
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    if resources.get(kind, 0) < devices:
        raise LabError(
            f"the Ray cluster {address} has {resources.get(kind, 0):.0f} {kind}(s), and --devices asks for {devices}: "
            "ask for fewer, or start more nodes"
        )
    return kind == "GPU"


def without_open_files(cache: FeatureCache) -> FeatureCache:
    """Return a copy of the cache without the data that it has read so far."""
    return FeatureCache(**{field.name: getattr(cache, field.name) for field in fields(cache)})


def _work(run: TrainingRun, messages: Any) -> None:
    """Train in a worker."""
    import ray

    if ray.get(messages.failed.remote()):
        return
    try:
        ray_cluster.require_visible((run.folder.parent, run.cache.folder, run.base.folder))
        with distributed.process_group(), _forwarded_log(messages):
            training_loop.train(run)
    except distributed.PeerLost:
        raise
    except LabError as error:
        ray.get(messages.fail.remote(error))
        raise


def _forwarded_log(messages: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the main worker's log lines are sent to the actor; the other workers log nothing."""
    if not distributed.is_main_process():
        return contextlib.nullcontext()
    return console.forwarded(lambda line: messages.report.remote(_LOG, line))


def _remote_progress(messages: Any) -> Progress:
    """Return a Progress that sends its calls to the actor."""

    def reporter(name: str) -> Callable[..., None]:
        return lambda *args: messages.report.remote(name, *args)

    return Progress(**{field.name: reporter(field.name) for field in fields(Progress)})
