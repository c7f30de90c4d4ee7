"""Report a run to an experiment tracker through transformers' callbacks.

A resumed run continues the same tracker run if the tracker supports that. trackio and tensorboard store everything on
this machine. A tracker receives the settings of the Trainer and of the model, which contain no token. After its first
failure (a missing server, a full disk) it is not called again, and training continues.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.infra.errors import missing_package

logger = logging.getLogger(__name__)

PROJECT = "swedish-whisper-lab"
_PACKAGES = {"trackio": "trackio>=0.21.1", "tensorboard": "tensorboard>=2.15", "wandb": "wandb", "mlflow": "mlflow"}


@contextlib.contextmanager
def attached(trainer: Any, tracker: str, name: str, folder: Path) -> Iterator[None]:
    """Report what `trainer` logs to `tracker` as run `name`; an empty `tracker` is none.

    The tracker's own output is dropped. Raises LabError if its package is not installed.
    """
    if not tracker:
        yield
        return
    if importlib.util.find_spec(tracker) is None:
        raise missing_package(tracker, _PACKAGES[tracker], f"training.tracker = {tracker!r}")
    trainer.args.run_name, trainer.args.project, trainer.args.trackio_static_space_id = name, PROJECT, False
    with _environment(_settings(tracker, name, folder)):
        try:
            callback = _callback(tracker)
        except Exception as error:
            logger.info(_failure(tracker, error))
            yield
            return
        trainer.add_callback(callback)
        logger.info(f"{tracker} records this run as {name}{_how_to_view(tracker, folder)}")
        try:
            yield
        except BaseException:
            # the Trainer does not call it on an error: the tracker would lose its buffer
            callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
            raise


def _callback(tracker: str) -> Any:
    """Return the tracker's callback; after its first failed call, which is logged, it does nothing."""
    from transformers import TrainerCallback
    from transformers.integrations import get_reporting_integration_callbacks

    failed = False
    with contextlib.redirect_stdout(io.StringIO()):
        callback = get_reporting_integration_callbacks([tracker])[0]()

    def guarded(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> None:
            nonlocal failed
            if failed:
                return
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    method(*args, **kwargs)
            except Exception as error:  # trackers and their clients raise all kinds
                failed = True
                logger.info(_failure(tracker, error))

        return call

    for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
        if getattr(type(callback), event) is not getattr(TrainerCallback, event):
            setattr(callback, event, guarded(getattr(callback, event)))
    return callback


def _failure(tracker: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"note: {tracker} failed and records no more of this sitting; training continues ({reason})"


def _settings(tracker: str, name: str, folder: Path) -> dict[str, str]:
    """Return the environment variables that set a tracker's folder and the run that it continues."""
    return {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")},
        "wandb": {"WANDB_PROJECT": PROJECT, "WANDB_RUN_ID": name, "WANDB_RESUME": "allow", "WANDB_DIR": str(folder)},
        "mlflow": {"MLFLOW_EXPERIMENT_NAME": PROJECT},
    }.get(tracker, {})


def _how_to_view(tracker: str, folder: Path) -> str:
    commands = {"trackio": f"trackio show --project {PROJECT}", "tensorboard": f"tensorboard --logdir {folder.parent}"}
    return f"; to view it: {commands[tracker]}" if tracker in commands else ""


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the context, except those that are set already."""
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
