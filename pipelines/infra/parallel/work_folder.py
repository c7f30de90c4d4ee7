"""Hidden folders in which large results are made, beside the place where they are put.

A killed process leaves its folder behind. The next one that works there removes it: each folder has a lock, which the
system releases when its process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

logger = logging.getLogger(__name__)

_MAX_AGE_S = 86_400.0
"""A folder without a lock is one of an older version of this lab: it is removed after a day."""


@contextlib.contextmanager
def create(parent: Path, purpose: str) -> Iterator[Path]:
    """Yield an empty folder `.<purpose>-...` in `parent`, which is removed at the end.

    Folders of the same purpose that killed processes left there are removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, purpose)
    folder = parent / f".{purpose}-{os.getpid()}-{secrets.token_hex(4)}"
    lock = filelock.FileLock(_lock_of(folder))
    with lock:
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_abandoned(parent: Path, purpose: str) -> None:
    for folder in parent.glob(f".{purpose}-*"):
        if not folder.is_dir():
            continue
        lock = _lock_of(folder)
        if not lock.exists() and time.time() - folder.stat().st_mtime < _MAX_AGE_S:
            continue
        with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(lock, timeout=0):
            logger.info(f"removing {folder}, which a process that was killed left")
            shutil.rmtree(folder)
            lock.unlink()
