"""The child process that runs tasks: it reads them from standard input and writes JSON lines to standard output.

It ends when its server ends.
"""

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
_LOCK_TIMEOUT_S = 60.0
"""Longest wait in seconds for the process of an earlier server, which ends soon after its server."""

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """A task for the process."""

    implementation: FineTuningInterface
    task: str
    params: dict[str, Any]
    logs: dict[str, Any]
    lock: Path
    """Path of the lock that is held while the task runs: one process per folder."""


class Logs(MutableMapping):
    """The `logs_dict` of a task; every assignment is sent to the server."""

    def __init__(self, values: dict[str, Any], send: Send):
        self._values, self._send = values, send

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value
        self.send()

    def __delitem__(self, name: str) -> None:
        del self._values[name]
        self.send()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def update(self, *values: Any, **more: Any) -> None:
        """Update several values and send them once."""
        self._values.update(*values, **more)
        self.send()

    def send(self) -> None:
        """Send all values to the server."""
        self._send({"logs": plain(self._values)})


class Lines(io.TextIOBase):
    """Standard output of a task; each complete line is sent to the server."""

    def __init__(self, send: Send):
        self._send, self._rest = send, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            self._send({"line": line})
        return len(text)

    def end(self) -> None:
        """Send an incomplete last line."""
        if self._rest:
            self.write("\n")


def packed(work: Work) -> bytes:
    """Return work in the format that `main` reads. Raises LabError if it cannot be pickled."""
    try:
        return pickle.dumps(sys.path) + pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        raise LabError(f"{type(work.implementation).__name__} cannot be pickled ({error})") from None


def main() -> None:
    """Run the tasks from standard input in turn. At its end, kill this process and all that it started."""
    output, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)  # output of libraries must not get between the messages

    def send(message: dict[str, Any]) -> None:
        with lock:
            output.write(json.dumps(message, allow_nan=False) + "\n")
            output.flush()

    received: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(received,), daemon=True).start()
    sys.stdout = lines = Lines(send)
    console.configure()
    while work := received.get():
        outcome = _run(work, Logs(work.logs, send))
        lines.end()
        send(outcome)
    os._exit(1)


def _receive(received: queue.SimpleQueue[Work | None]) -> None:
    """Read work until the pipe is closed, which happens when the server ends or is killed."""
    try:
        while True:
            sys.path[:] = pickle.load(sys.stdin.buffer)
            received.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    except Exception:  # e.g. a class that cannot be imported here
        traceback.print_exc()
        received.put(None)


def _run(work: Work, logs: Logs) -> dict[str, Any]:
    """Run a task and return its last message: result, unfinished, error or defect."""
    lock = filelock.FileLock(work.lock)
    try:
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except filelock.Timeout:
        return {"error": "another process still works in this folder: stop it, then send this again"}
    try:
        result = getattr(work.implementation, work.task)(work.params, logs)
        logs.send()
        return {"result": plain(result)}
    except Unfinished as error:
        return {"unfinished": str(error)}
    except LabError as error:
        return {"error": str(error)}
    except Exception:
        traceback.print_exc()
        return {"defect": True}
    finally:
        lock.release()


def plain(value: Any) -> Any:
    """Return `value` as JSON values, with None for NaN and infinity. Raises TypeError for other types."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # file names may contain bytes that are not valid text
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"logs and results are JSON values, got {type(value).__name__}")
