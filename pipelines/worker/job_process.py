"""The server's side of a job: a child process that runs tasks (process.py), and the job it has."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pipelines.worker import process

_REMOVED_VARIABLES = ("LAB_API_TOKEN",)
"""Environment variables that a job does not need."""


@dataclass(eq=False)
class Job:
    """A running task."""

    task: str
    params: dict[str, Any]
    done: Future = field(default_factory=Future, repr=False)
    """Its result, or Failed."""
    process: JobProcess | None = field(default=None, repr=False)


class JobProcess:
    """A child process that runs tasks. Raises OSError if it cannot be started."""

    def __init__(self):
        variables = {name: value for name, value in os.environ.items() if name not in _REMOVED_VARIABLES}
        self.job: Job | None = None
        self.popen = subprocess.Popen(
            [sys.executable, "-c", process.START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables | {"TQDM_DISABLE": "1"},
            start_new_session=True,  # Ctrl-C reaches only the server, and a kill all processes that the job started
        )

    def send(self, packed: bytes) -> None:
        """Send work in a thread: a large recording takes a while."""
        threading.Thread(target=self._send, args=(packed,), daemon=True).start()

    def _send(self, packed: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # the process has ended
            self.popen.stdin.write(packed)
            self.popen.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the messages of the process until it ends."""
        for row in self.popen.stdout:
            with contextlib.suppress(ValueError):  # an incomplete line
                yield json.loads(row)

    def release(self) -> None:
        """Close the pipe, upon which an idle process ends."""
        with contextlib.suppress(OSError):
            self.popen.stdin.close()

    def stop(self, timeout_s: float) -> None:
        """Ask the process to write a checkpoint and end; kill it after the timeout."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """Kill the process and all that it started, and wait for its end."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
