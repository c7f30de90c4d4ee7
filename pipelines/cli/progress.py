"""Progress of a notebook that runs in another process.

The kernel appends lines to a file (infra/progress_file.py); they are printed here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pipelines.infra.progress_file import VARIABLE

INTERVAL_S = 5.0
"""Shortest time between two lines where output is redirected."""
_REFRESH_S = 0.5
ERASE_LINE = "\r\x1b[2K"
"""Moves the cursor to the start of an empty line on a terminal."""


@contextlib.contextmanager
def follow(label: str, stream: TextIO) -> Iterator[None]:
    """Print the progress of child processes while the body runs.

    On a terminal one line is overwritten, with the elapsed time; elsewhere a line is printed every few seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, stop = Path(folder) / "progress.txt", threading.Event()
        show = _overwrite if stream.isatty() else _append
        thread = threading.Thread(target=show, args=(path, label, stream, stop), daemon=True)
        previous = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(path)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            os.environ.pop(VARIABLE)
            if previous is not None:
                os.environ[VARIABLE] = previous


def _overwrite(path: Path, label: str, stream: TextIO, stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(_REFRESH_S):
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        text = f"{label} {minutes}:{seconds:02}  {_last_line(path)}"
        stream.write(ERASE_LINE + text[: shutil.get_terminal_size().columns - 1])
        stream.flush()
    stream.write(ERASE_LINE)
    stream.flush()


def _append(path: Path, label: str, stream: TextIO, stop: threading.Event) -> None:
    printed, stopped = "", False
    while not stopped:
        stopped = stop.wait(INTERVAL_S)
        line = _last_line(path)
        if line != printed:
            print(f"{label}  {line}", file=stream, flush=True)
            printed = line


def _last_line(path: Path) -> str:
    """Return the last complete line, or an empty string."""
    try:
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1].decode("utf-8", "replace") if lines else ""
