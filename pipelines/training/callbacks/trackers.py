"""Experiment trackers by name, through transformers' own callbacks: what a run logs, on a page that stays.

Where the tool can, a resumed run goes on in the same place; trackio and tensorboard keep all on this machine. A tracker
is told the Trainer's settings and the model's, in which there is no token. One that fails is told no more, and training
goes on: its server may be gone, its disk full, its package broken.
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
    """Within, `tracker` (a key of the packages above, or empty for none) is told what `trainer` logs, as run `name`.

    LabError where its package is not installed. What trackers print is left out: commands print what they promise.
    """
    if not tracker:
        yield
        return
    if importlib.util.find_spec(tracker) is None:
        raise missing_package(tracker, _PACKAGES[tracker], f"training.tracker = {tracker!r}")
    trainer.args.run_name, trainer.args.project, trainer.args.trackio_static_space_id = name, PROJECT, False
    with _variables(_settings(tracker, name, folder)):
        try:
            callback = _callback(tracker)
        except Exception as error:
            logger.info(_lost(tracker, error))
            yield
            return
        trainer.add_callback(callback)
        logger.info(f"{tracker} is told of this run as {name}{_where(tracker, folder)}")
        try:
            yield
        except BaseException:
            # the Trainer ends without telling: what the tracker still holds would be lost
            callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
            raise


def _callback(tracker: str) -> Any:
    """The tracker's callback; at the first of its calls that fails, `log` is told, and the tracker nothing any more."""
    from transformers import TrainerCallback
    from transformers.integrations import get_reporting_integration_callbacks

    lost = False
    with contextlib.redirect_stdout(io.StringIO()):
        callback = get_reporting_integration_callbacks([tracker])[0]()

    def guarded(tell: Callable) -> Callable:
        @functools.wraps(tell)
        def told(*args: Any, **kwargs: Any) -> None:
            nonlocal lost
            if lost:
                return
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    tell(*args, **kwargs)
            except Exception as error:  # whatever a tracker or its client may raise
                lost = True
                logger.info(_lost(tracker, error))

        return told

    for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
        if getattr(type(callback), event) is not getattr(TrainerCallback, event):
            setattr(callback, event, guarded(getattr(callback, event)))
    return callback


def _lost(tracker: str, error: Exception) -> str:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return f"note: {tracker} failed and is told no more in this sitting; training goes on ({words})"


def _settings(tracker: str, name: str, folder: Path) -> dict[str, str]:
    """Variables by which a tracker takes its place and the run that it is to go on with."""
    return {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")},
        "wandb": {"WANDB_PROJECT": PROJECT, "WANDB_RUN_ID": name, "WANDB_RESUME": "allow", "WANDB_DIR": str(folder)},
        "mlflow": {"MLFLOW_EXPERIMENT_NAME": PROJECT},
    }.get(tracker, {})


def _where(tracker: str, folder: Path) -> str:
    look = {"trackio": f"trackio show --project {PROJECT}", "tensorboard": f"tensorboard --logdir {folder.parent}"}
    return f"; to look: {look[tracker]}" if tracker in look else ""


@contextlib.contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; those that somebody has set stay as they are."""
    unset = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
