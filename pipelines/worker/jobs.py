"""One job at a time, in a process apart; what it is and what it told outlives the server.

<folder>/
    state.json    the job that is running, if one is; whether there is a data set; logs_dict. Whole at every moment
    log.jsonl     what jobs told (events.py)
    .lock         held by the server, job.lock by the process that works

A job that was running when the server was killed is begun again with the same parameters when the server starts, and
goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.redact import redact_text
from pipelines.worker import process as child
from pipelines.worker.event_log import EventLog
from pipelines.worker.interface import ASYNCHRONOUS, TASKS, FineTuningInterface, Ignored

logger = logging.getLogger(__name__)

STATE, LOG = "state.json", "log.jsonl"
_NEEDS_DATA = ("train", "eval")
_BETWEEN_WRITES_S = 2.0
"""What a running job logs is written to the disk at most this often."""
_GRACE_S = 10.0
"""A job has so long to keep what it has when the server is asked to end."""
_PAUSE_S = 5.0
"""Before a job that asked for another sitting gets one."""
_IDLE_S = 300.0
"""A process whose task has ended waits so long for the next one: its imports alone take seconds."""
_LAST = ("train",)
"""Tasks after which a process ends, so that what they held of memory is free."""
_KEPT_FROM_JOBS = ("LAB_API_TOKEN",)
"""Variables that a job has no use for."""


class Failed(LabError):
    """A job ended without a result: one line, without places of this machine."""


class Cancelled(Failed):
    """A job was cancelled."""


@dataclass(eq=False)
class Job:
    """A task that is running."""

    task: str
    params: dict[str, Any]
    done: Future = field(default_factory=Future, repr=False)
    """Its result, or Failed."""
    process: Process | None = field(default=None, repr=False)


class Process:
    """A process that does tasks (child.py), and the job that it has. Raises OSError where none can be started."""

    def __init__(self):
        variables = {name: value for name, value in os.environ.items() if name not in _KEPT_FROM_JOBS}
        self.job: Job | None = None
        self.popen = subprocess.Popen(
            [sys.executable, "-c", child.START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables | {"TQDM_DISABLE": "1"},
            start_new_session=True,  # Ctrl-C reaches the server alone, and a kill all that the job started
        )

    def send(self, packed: bytes) -> None:
        """Hand it work; a large recording takes longer than anybody may wait here."""
        threading.Thread(target=self._send, args=(packed,), daemon=True).start()

    def _send(self, packed: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it ended
            self.popen.stdin.write(packed)
            self.popen.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it tells, until it ends."""
        for row in self.popen.stdout:
            with contextlib.suppress(ValueError):  # cut off in the middle
                yield json.loads(row)

    def let_go(self) -> None:
        """Let it end: it has nothing to do."""
        with contextlib.suppress(OSError):
            self.popen.stdin.close()

    def ask_to_end(self, patience_s: float) -> None:
        """Ask it to keep what it has and to end; kill it when it takes too long."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(patience_s)
        self.kill()

    def kill(self) -> None:
        """Kill it with all that it started, and wait for its end."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


class Jobs:
    """The tasks of `implementation`, one at a time, with their state in `folder`. Any thread may call it.

    Raises LabError where another server works in `folder`, its state cannot be read, or the implementation's class is
    one of the main script, which no other process can import. `log` is told every line.
    """

    def __init__(self, implementation: FineTuningInterface, folder: Path):
        if type(implementation).__module__ == "__main__":
            name = type(implementation).__name__
            raise LabError(f"jobs run in a process apart: put {name} into a module that it can import")
        self.implementation, self.folder = implementation, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._alone = _alone_in(folder)
        kept = _read(folder / STATE)
        self.logs: dict[str, Any] = kept.get("logs", {})
        self.ready: bool = kept.get("ready", False)
        self.error: str = kept.get("error", "")
        self.job: Job | None = None
        self.events = EventLog(folder / LOG)
        self._lock, self._closing, self._written_s = threading.RLock(), threading.Event(), 0.0
        self._idle: Process | None = None
        self._attending: threading.Thread | None = None
        if cut_off := kept.get("job"):
            self._go_on(cut_off)

    @property
    def state(self) -> str:
        """The internal state: Ready, Busy with something, or Error with its reason."""
        with self._lock:
            if self.job:
                return f"Busy {TASKS[self.job.task]}"
            return f"Error: {self.error}" if self.error else "Ready"

    def status(self, params: dict[str, Any]) -> dict[str, Any]:
        """What the implementation tells of itself."""
        with self._lock:
            logs = dict(self.logs)
        return child.plain(self.implementation.status(params, logs))

    def begin(self, task: str, params: dict[str, Any]) -> Job:
        """Begin a task. Raises Ignored where that cannot be now, LabError where the parameters are wrong."""
        with self._lock:
            if self.job:
                raise Ignored(f"{task} was ignored: the worker is busy {TASKS[self.job.task]}; send status, or cancel")
            if self._closing.is_set():
                raise Ignored(f"{task} was ignored: the worker is ending")
            if task in _NEEDS_DATA and not self.ready:
                raise Ignored(f"{task} was ignored: there is no data set yet; send the task dataset first")
            logs = dict(self.logs)
            try:
                params = self.implementation.check(task, params, logs)
            except LabError as error:
                kind = Ignored if isinstance(error, Ignored) else LabError
                raise kind(f"{task} was ignored: {self._public(error)}") from None
            self.logs, self.ready = logs, self.ready and task != "dataset"
            self.error, self.job = "", (job := Job(task, params))
            self._keep()
            self._tell(f"{task} began")
            try:
                self._start(job)
            except Exception:
                self.job = None
                raise
            return job

    def cancel(self, job: Job | None = None) -> str:
        """End the job that is running (or `job`, if that is it) at once; what it was. Ignored where none is."""
        with self._lock:
            running = self.job
            if running is None or job not in (None, running):
                raise Ignored("cancel was ignored: nothing is running")
            self.job = None
            self.implementation.forget(running.task, self.logs)
            self._keep()
            running.process.job = None
            self._idle = None if self._idle is running.process else self._idle
        running.process.kill()
        self._tell(f"{running.task} was cancelled")
        running.done.set_exception(Cancelled(f"{running.task} was cancelled"))
        return running.task

    def close(self) -> None:
        """End; the job that is running is asked to keep what it has, and is gone on with by the next server."""
        with self._lock:
            self._closing.set()
            job = self.job
            self._let_idle_go()
        if job and job.process:
            job.process.ask_to_end(_GRACE_S)
        if self._attending:
            self._attending.join(_GRACE_S)
        with self._lock:
            self._keep()
        self._alone.release()

    def _go_on(self, cut_off: dict[str, Any]) -> None:
        task = cut_off["task"]
        if task not in ASYNCHRONOUS:  # whoever waited for the answer is gone
            self._keep()
            return self._tell(f"{task} was cut off with the server: send it again")
        self.job = Job(task, cut_off["params"])
        self._tell(f"{task} goes on: the server was ended while it ran")
        self._start(self.job)

    def _start(self, job: Job) -> None:
        """Hand the job to the process that waits for one, or to a new one, which a thread listens to."""
        work = child.Work(self.implementation, job.task, job.params, self.logs, self.folder / "job.lock")
        try:
            packed = child.packed(work)
            job.process, self._idle = self._idle or self._started(), None
        except (OSError, LabError) as error:
            return self._end(job, {"error": f"no process can be started: {error}"}, 1)
        job.process.job = job
        job.process.send(packed)

    def _started(self) -> Process:
        process = Process()
        self._attending = threading.Thread(target=self._attend, args=(process,), daemon=True)
        self._attending.start()
        return process

    def _attend(self, process: Process) -> None:
        for message in process.messages():
            if "line" in message:
                self._tell(message["line"])
            elif "logs" in message:
                self._note(process.job, message["logs"])
            else:
                self._answered(process, message)
        code = process.popen.wait()
        process.popen.stdout.close()
        process.let_go()
        with self._lock:
            job, process.job = process.job, None
            if self._idle is process:
                self._idle = None
        if job:
            self._end(job, {}, code)

    def _answered(self, process: Process, told: dict[str, Any]) -> None:
        """A task has ended; its process waits for the next one where it is none the worse for it."""
        with self._lock:
            job, process.job = process.job, None
            sound = "result" in told or "error" in told
            if job and sound and job.task not in _LAST and not self._closing.is_set():
                self._idle = process
                self._tire(process)
            else:
                process.let_go()
        if job:
            self._end(job, told, 0)

    def _tire(self, process: Process) -> None:
        """Let a process go that gets nothing to do for too long."""

        def let_go() -> None:
            with self._lock:
                if self._idle is process:
                    self._let_idle_go()

        timer = threading.Timer(_IDLE_S, let_go)
        timer.daemon = True
        timer.start()

    def _let_idle_go(self) -> None:
        if self._idle:
            self._idle.let_go()
            self._idle = None

    def _note(self, job: Job | None, logs: dict[str, Any]) -> None:
        with self._lock:
            if job and self.job is job:
                self.logs = logs
                if time.monotonic() - self._written_s > _BETWEEN_WRITES_S:
                    self._keep()

    def _end(self, job: Job, told: dict[str, Any], code: int) -> None:
        if "unfinished" in told and not self._closing.wait(_PAUSE_S):
            with self._lock:
                if self.job is job:
                    self._start(job)
            return
        with self._lock:
            if self.job is not job:
                return  # cancelled
            if self._closing.is_set() and "result" not in told:
                return job.done.set_exception(Failed("the worker is ending"))  # the next server goes on with it
            self.job = None
            failure = "" if "result" in told else self._public(told.get("error") or _fate(job.task, code))
            # what a client sent to test or save may be at fault: that is no state of the server
            self.error = failure if job.task in ASYNCHRONOUS or "error" not in told else ""
            self.ready = self.ready or (job.task == "dataset" and not failure)
            self._keep()
        if failure:
            self._tell(failure if failure.startswith(job.task) else f"{job.task} failed: {failure}")
            job.done.set_exception(Failed(failure))
        else:
            self._tell(f"{job.task} is done")
            job.done.set_result(told["result"])

    def _keep(self) -> None:
        """Write the state; the caller holds the lock."""
        job = None
        if self.job:
            job = {"task": self.job.task, "params": self.job.params if self.job.task in ASYNCHRONOUS else {}}
        state = {"ready": self.ready, "error": self.error, "job": job, "logs": self.logs}
        self._written_s = time.monotonic()
        try:
            manifest.write_json(self.folder / STATE, state)
        except OSError as error:
            logger.info(f"warning: {self.folder / STATE} cannot be written ({error.strerror}): free space")

    def _tell(self, line: str) -> None:
        logger.info(line)
        self.events.add(self._public(line))

    def _public(self, text: object) -> str:
        return redact_text(" ".join(child.plain(str(text)).split()), self.folder, *self.implementation.places())


def _alone_in(folder: Path) -> filelock.FileLock:
    try:
        lock = filelock.FileLock(folder / ".lock", timeout=0, thread_local=False)  # close may come from any thread
        lock.acquire()
    except filelock.Timeout:
        raise LabError(f"another worker runs in {folder}: stop it first, or give this one another --runs") from None
    return lock


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text("utf-8"))
        job = state["job"]
        if not (job is None or (job["task"] in TASKS and isinstance(job["params"], dict))):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        raise LabError(f"{path} cannot be read as the state of a worker: remove it to begin anew") from None
    return state


def _fate(task: str, code: int) -> str:
    if code == -signal.SIGKILL:
        return f"{task} was killed; most often memory is short"
    if code < 0:
        return f"{task} ended with {signal.Signals(-code).name}"
    return f"{task} failed unexpectedly; the worker's own output tells how"
