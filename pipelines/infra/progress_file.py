"""Progress of a process as lines in a file that another process reads.

`python -m pipelines run` names the file in the environment variable LAB_PROGRESS_FILE, and prints what notebook kernels
append to it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

VARIABLE = "LAB_PROGRESS_FILE"
INTERVAL_S = 3.0
"""Shortest time between two ordinary lines of a task, in seconds."""


def is_requested() -> bool:
    """Return True if another process reads the progress of this one."""
    return bool(os.environ.get(VARIABLE))


def append(line: str) -> None:
    """Append a line, if requested. A file that cannot be written is ignored: the work itself goes on."""
    if is_requested():
        with contextlib.suppress(OSError), Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
