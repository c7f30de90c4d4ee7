"""Jobs in child processes that a process with everything imported forks: they start at once and can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
LOOP = """
import json, os, sys, traceback

for line in sys.stdin:
    job = json.loads(line)
    prepare(job)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            run(job)
        except SystemExit as ended:
            os._exit(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print("started", child, flush=True)
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


class JobStarter:
    """A process that runs `program` (imports, `prepare(job)`, `run(job)`), then forks a child for each job."""

    def __init__(self, program: str, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-c", program + LOOP],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        job: dict[str, Any],
        kill_when: Callable[[], object] | None = None,
        sends: signal.Signals = signal.SIGKILL,
        timeout_s: float = 120,
    ) -> int:
        """Return the exit code of a job, which writes its output to the file `job["log"]`.

        Once `kill_when()` is true, `sends` is sent to the child's process group. Raises AssertionError if the job
        ends before that, or after `timeout_s`.
        """
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        child, ended = self._read("started"), time.monotonic() + timeout_s
        problem = ""
        while kill_when and not problem and not kill_when():
            if not running(child):
                problem = "the job ended before it was killed"
            elif time.monotonic() > ended:
                problem = "the condition for the kill never came"
                sends = signal.SIGKILL
            time.sleep(0.0005)
        if kill_when:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, sends)
        code = os.waitstatus_to_exitcode(self._read("ended"))
        log = Path(job["log"])
        assert not problem, f"{problem}:\n{log.read_text() if log.exists() else 'it never started'}"
        return code

    def _read(self, word: str) -> int:
        """Return the number after `word`. A line of another job must never be taken for a process to kill."""
        name, number = self._process.stdout.readline().split()
        assert name == word, f"expected {word}, received {name} {number}"
        return int(number)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def running(child: int) -> bool:
    """Return whether the process has not ended. Its parent may be about to collect its exit code."""
    try:
        return psutil.Process(child).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
