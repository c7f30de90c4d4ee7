"""The process that does tasks: it reads them from standard input, tells JSON lines, and ends when its server does."""

from __future__ import annotations

import io
import json
import math
import numbers
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from pipelines.infra import console
from pipelines.infra.errors import LabError, Unfinished
from pipelines.worker.interface import FineTuningInterface

_ROOT = str(Path(__file__).parents[2])
START = f"import sys; sys.path.insert(0, {_ROOT!r}); from pipelines.worker import process; process.main()"
_PATIENCE_S = 60.0
"""How long a process waits for the one before it, which ends as soon as its server is gone."""

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """What a process is to do."""

    implementation: FineTuningInterface
    task: str
    params: dict[str, Any]
    logs: dict[str, Any]
    lock: Path
    """Held while the work is done: no two processes ever work in one folder."""


class Logs(MutableMapping):
    """The `logs_dict` of a task: every assignment is told to the server."""

    def __init__(self, values: dict[str, Any], tell: Tell):
        self._values, self._tell = values, tell

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value
        self.tell()

    def __delitem__(self, name: str) -> None:
        del self._values[name]
        self.tell()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def update(self, *values: Any, **more: Any) -> None:
        """As of a dictionary; told once."""
        self._values.update(*values, **more)
        self.tell()

    def tell(self) -> None:
        self._tell({"logs": plain(self._values)})


class Lines(io.TextIOBase):
    """Standard output while a task runs: each whole line is told."""

    def __init__(self, tell: Tell):
        self._tell, self._begun = tell, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, whole):
            self._tell({"line": line})
        return len(text)

    def end(self) -> None:
        """Tell what was begun and not ended."""
        if self._begun:
            self.write("\n")


def packed(work: Work) -> bytes:
    """Work as a process that was started with START reads it. Raises LabError where it cannot be sent to one."""
    try:
        return pickle.dumps(sys.path) + pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        raise LabError(f"{type(work.implementation).__name__} cannot be pickled ({error})") from None


def main() -> None:
    """Do the work that comes on standard input, one piece after another; its end ends the process at once, whatever it
    does, and all that it started."""
    told, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)  # what a library prints must not come between the lines

    def tell(message: dict[str, Any]) -> None:
        with lock:
            told.write(json.dumps(message, allow_nan=False) + "\n")
            told.flush()

    come: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(come,), daemon=True).start()
    sys.stdout = lines = Lines(tell)
    console.configure()
    while work := come.get():
        outcome = _outcome(work, Logs(work.logs, tell))
        lines.end()
        tell(outcome)
    os._exit(1)


def _read(come: queue.SimpleQueue[Work | None]) -> None:
    """Read work for as long as there is a server: the pipe is its alone, and ends with it, however it was killed."""
    try:
        while True:
            sys.path[:] = pickle.load(sys.stdin.buffer)
            come.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    except Exception:  # what cannot be imported here
        traceback.print_exc()
        come.put(None)


def _outcome(work: Work, logs: Logs) -> dict[str, Any]:
    alone = filelock.FileLock(work.lock)
    try:
        alone.acquire(timeout=_PATIENCE_S)
    except filelock.Timeout:
        return {"error": "another process still works in this folder: stop it, then send this again"}
    try:
        result = getattr(work.implementation, work.task)(work.params, logs)
        logs.tell()
        return {"result": plain(result)}
    except Unfinished as error:
        return {"unfinished": str(error)}
    except LabError as error:
        return {"error": str(error)}
    except Exception:
        traceback.print_exc()
        return {"defect": True}
    finally:
        alone.release()


def plain(value: Any) -> Any:
    """JSON values of `value`: what is no finite number is null. Raises TypeError for what is no JSON value."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # names of files may hold what is no character
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"logs and results are JSON values, got {type(value).__name__}")
