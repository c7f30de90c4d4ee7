"""Complete-or-absent checkpoints: sealed when whole, verified before use, pruned only after a newer one is sealed."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from pipelines.infra import manifest

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path, *, run_digest: str, best_step: int | None) -> None:
    """Mark the checkpoint `folder` as whole: its files, the run that it belongs to, and the best step so far."""
    manifest.seal(folder, kind="checkpoint", step=step_of(folder), run_digest=run_digest, best_step=best_step)


def newest_complete(folder: Path, *, run_digest: str) -> Path | None:
    """The newest whole checkpoint of this run below `folder`; each newer one that is not whole is named and skipped."""
    for checkpoint in reversed(listed(folder)):
        fault = manifest.problem(checkpoint) or _foreign(checkpoint, run_digest)
        if fault is None:
            return checkpoint
        logger.info(f"skipping {checkpoint.name}: {fault}")
    return None


def remove_unusable(folder: Path, newest: Path | None) -> None:
    """Remove what lies after the checkpoint that training goes on from: it will be written anew."""
    for checkpoint in listed(folder):
        if newest is None or step_of(checkpoint) > step_of(newest):
            shutil.rmtree(checkpoint)


def prune(folder: Path, *, keep: int) -> None:
    """Keep the `keep` newest whole checkpoints and the best one that each of them knows; call it after sealing one.

    Should the newest turn out damaged, the one before it still finds its best.
    """
    whole = [path for path in listed(folder) if manifest.problem(path, thorough=False) is None]
    newest = whole[-keep:]
    best_steps = {manifest.read(path).get("best_step") for path in newest}
    for checkpoint in whole[:-keep]:
        if step_of(checkpoint) not in best_steps:
            # the manifest goes first: a kill in the middle leaves an unfinished folder, never a damaged whole one
            (checkpoint / manifest.MANIFEST).unlink()
            shutil.rmtree(checkpoint)


def listed(folder: Path) -> list[Path]:
    """The checkpoint folders below `folder`, whole or not, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and is_named(path)]
    return sorted(found, key=step_of)


def is_named(path: Path) -> bool:
    """Whether a path has a checkpoint's name."""
    return _NAME.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def _foreign(checkpoint: Path, run_digest: str) -> str | None:
    found = manifest.read(checkpoint).get("run_digest")
    return None if found == run_digest else f"it belongs to another run ({found})"
