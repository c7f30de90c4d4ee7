"""A trial that is sent to a step, and what comes of it, wherever that is done.

Whatever befalls a trial is its result, and the sweep goes on without it; what would befall the next one just so (the
disk is full, the cluster is gone) ends the sweep.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError, Unfinished
from pipelines.recipes.settings import Recipe
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training.callbacks import divergence, interruptions
from pipelines.training.callbacks.progress import Progress, seconds_of
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

_PATIENCE_S = 120.0
"""How long a trial waits for a worker of an earlier sitting that still holds its folder: a Ray node whose head is gone
ends after a minute, and its workers with it."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM_BYTES = 1_000_000
"""A disk with less room is full."""
_TOLD_CHARS = 300


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
    """paused, finished, diverged or failed: see record.Trial. `died`: its process did, with no answer."""
    looks: dict[int, float] = field(default_factory=dict)
    """Step to WER on the validation split, from the first step on."""
    seconds: float = 0.0
    reason: str = ""


def fit(job: Job) -> Result:
    """Train a trial from its newest checkpoint to its step; what befalls it is its result.

    Raises errors.Unfinished where a signal ended it, and LabError where the disk is full.
    """
    told: list[list[dict[str, float]]] = [[]]
    progress = Progress(on_log=told.append)
    until = job.until if job.until < job.recipe.training.steps else 0
    state, reason = "finished", ""
    try:
        _let_the_one_before_end(job.run)
        told.append(training_loop.train(job.recipe, job.cache, job.base, job.run, progress, until=until).history)
    except interruptions.Paused as paused:
        state = "paused"
        told.append(paused.history)
    except Unfinished:
        raise
    except LabError as error:
        state, reason = "diverged" if isinstance(error, divergence.RunDiverged) else "failed", str(error)
    except Exception as error:  # of peft, of torch, of the disk: one trial's must not end the others
        state, reason = "failed", unforeseen(error, job.run)
    history = told[-1]
    looks = {int(row["step"]): row["eval_wer"] for row in history if "eval_wer" in row}
    return Result(job.number, state, looks, seconds_of(history), reason)


def _let_the_one_before_end(run: Path) -> None:
    """A worker outlives the process that sent it by moments: LabError where one trains in the folder for longer."""
    run.mkdir(parents=True, exist_ok=True)
    with training_run.only_trainer(run, _PATIENCE_S):
        pass


def unforeseen(error: Exception, folder: Path) -> str:
    """One line for an error that nobody foresaw; its traceback is kept in `folder`. LabError where the disk is full."""
    refuse_full(error, folder)
    note = folder / "traceback.txt"
    with contextlib.suppress(OSError):
        note.write_text("".join(traceback.format_exception(error)), "utf-8")
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {told[:_TOLD_CHARS]} (see {note})"


def refuse_full(error: Exception, folder: Path) -> None:
    """LabError where an error came of a full disk. safetensors tells that in words alone, torch not at all."""
    told = getattr(error, "errno", 0) in _FULL or f"os error {errno.ENOSPC}" in str(error)
    if told or shutil.disk_usage(folder).free < _ROOM_BYTES:
        raise LabError(
            f"the disk is full at {folder}: make room there, then run the same command again to go on"
        ) from error
