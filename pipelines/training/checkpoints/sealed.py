"""Seal, verify, list and prune checkpoints: only complete ones are used."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from pipelines.infra import manifest

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path, *, run_digest: str, best_step: int | None, **facts: str) -> None:
    """Write the manifest of a checkpoint: its files, its run, the best step so far, and `facts` of its model."""
    fields = {"step": step_of(folder), "run_digest": run_digest, "best_step": best_step, **facts}
    manifest.seal(folder, kind="checkpoint", **fields)


def newest_complete(folder: Path, *, run_digest: str) -> Path | None:
    """Return the newest checkpoint of this run below `folder` that is whole, and so is the best one that it names.

    Newer ones, which are skipped, are logged.
    """
    for checkpoint in reversed(listed(folder)):
        fault = manifest.problem(checkpoint) or _foreign(checkpoint, run_digest) or _lacks_best(checkpoint)
        if fault is None:
            return checkpoint
        logger.info(f"skipping {checkpoint.name}: {fault}")
    return None


def remove_unusable(folder: Path, newest: Path | None) -> None:
    """Remove all checkpoints later than `newest` (None: all). Training resumes from `newest` and writes them again."""
    for checkpoint in listed(folder):
        if newest is None or step_of(checkpoint) > step_of(newest):
            shutil.rmtree(checkpoint)


def prune(folder: Path, *, keep: int) -> None:
    """Remove all whole checkpoints but the `keep` newest and the best one that each of them names.

    Call it after sealing one. If the newest is damaged later, the one before it still has its best checkpoint.
    """
    sealed = [path for path in listed(folder) if manifest.problem(path, thorough=False) is None]
    newest = sealed[-keep:]
    best_steps = {manifest.read(path).get("best_step") for path in newest}
    for checkpoint in sealed[:-keep]:
        if step_of(checkpoint) not in best_steps:
            # manifest first: a kill in between leaves an unfinished folder, not a damaged one
            (checkpoint / manifest.MANIFEST).unlink()
            shutil.rmtree(checkpoint)


def listed(folder: Path) -> list[Path]:
    """Return the checkpoint folders below `folder`, whole or not, oldest step first."""
    return sorted((path for path in folder.glob("checkpoint-*") if path.is_dir() and is_named(path)), key=step_of)


def is_named(path: Path) -> bool:
    """Return True if a path has the name of a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in a checkpoint's name."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def _lacks_best(checkpoint: Path) -> str | None:
    """Return a fault if the best checkpoint so far, which the model may be written from, is not whole."""
    best = manifest.read(checkpoint).get("best_step") or step_of(checkpoint)
    if best == step_of(checkpoint):
        return None
    folder = checkpoint.with_name(f"checkpoint-{best}")
    fault = manifest.problem(folder)
    return fault and f"the best one before it, {folder.name}, cannot be used ({fault})"


def _foreign(checkpoint: Path, run_digest: str) -> str | None:
    recorded = manifest.read(checkpoint).get("run_digest")
    return None if recorded == run_digest else f"it belongs to another run ({recorded})"
