"""Train one trial of a sweep to a step.

An error of one trial is its result, and the sweep continues. An error that would also affect the next trial (a full
disk, a lost cluster) ends the sweep.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError, Unfinished, is_disk_full
from pipelines.recipes.settings import Recipe
from pipelines.training import loop as training_loop
from pipelines.training.callbacks import divergence, interruptions
from pipelines.training.callbacks.progress import Progress, seconds_of
from pipelines.training.run import TrainingRun, lock_run
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

_PATIENCE_S = 120.0
"""Time to wait for a worker of an interrupted sweep that still locks the folder: a Ray node without its head ends after
a minute, and its workers with it."""
_MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class Job:
    """A trial to train up to step `until`."""

    number: int
    recipe: Recipe
    cache: FeatureCache
    base: ModelRef
    run: Path
    until: int


@dataclass(frozen=True)
class Result:
    """The result of a job."""

    number: int
    state: str
    """paused, finished, diverged or failed: see trials.Trial. `died`: its process ended without a result."""
    wers: dict[int, float] = field(default_factory=dict)
    """Step to WER on the validation split, from the first step on."""
    seconds: float = 0.0
    reason: str = ""


def fit(job: Job) -> Result:
    """Train a trial from its newest checkpoint to its step, and return the result, also of an error.

    Raise errors.Unfinished if a signal ended it, and LabError if the disk is full.
    """
    histories: list[list[dict[str, float]]] = [[]]
    until = job.until if job.until < job.recipe.training.steps else 0
    run = TrainingRun(job.recipe, job.cache, job.base, job.run, Progress(on_log=histories.append), until=until)
    state, reason = "finished", ""
    try:
        _wait_for_lock(job.run)
        histories.append(training_loop.train(run).history)
    except interruptions.Paused as paused:
        state = "paused"
        histories.append(paused.history)
    except Unfinished:
        raise
    except LabError as error:
        state, reason = "diverged" if isinstance(error, divergence.RunDiverged) else "failed", str(error)
    except Exception as error:  # e.g. of peft, torch or the disk: it must not end the other trials
        state, reason = "failed", describe_unexpected(error, job.run)
    history = histories[-1]
    wers = {int(row["step"]): row["eval_wer"] for row in history if "eval_wer" in row}
    return Result(job.number, state, wers, seconds_of(history), reason)


def _wait_for_lock(run: Path) -> None:
    """Wait for a worker of an earlier call to end.

    Raise LabError if it still trains in the folder after _PATIENCE_S.
    """
    run.mkdir(parents=True, exist_ok=True)
    with lock_run(run, _PATIENCE_S):
        pass


def describe_unexpected(error: Exception, folder: Path) -> str:
    """Return an unexpected error as one line and write its traceback to `folder`.

    Raise LabError if the disk is full.
    """
    refuse_full_disk(error, folder)
    note = folder / "traceback.txt"
    with contextlib.suppress(OSError):
        note.write_text("".join(traceback.format_exception(error)), "utf-8")
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line[:_MAX_REASON_CHARS]} (see {note})"


def refuse_full_disk(error: Exception, folder: Path) -> None:
    """Raise LabError if a full disk caused the error."""
    if is_disk_full(error, folder):
        raise LabError(
            f"the disk is full at {folder}: free space there, then run the same command again to resume"
        ) from error
