"""Run one job at a time in a child process; its state outlives the server.

<folder>/
    state.json    the running job, if any; whether a data set is prepared; logs_dict. It is written atomically
    log.jsonl     the lines that jobs report (event_log.py)
    .lock         held by the server; job.lock is held by the child process

A job that was running when the server was killed is started again with the same parameters by the next server, and
resumes.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import filelock

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.redact import redact_text
from pipelines.worker import process as child
from pipelines.worker.event_log import EventLog
from pipelines.worker.interface import ASYNCHRONOUS, TASKS, FineTuningInterface, Ignored
from pipelines.worker.job_process import Job, JobProcess

logger = logging.getLogger(__name__)

STATE, LOG = "state.json", "log.jsonl"
_REQUIRES_DATA = ("train", "eval")
_WRITE_INTERVAL_S = 2.0
"""Shortest time in seconds between two writes of a running job's logs."""
_GRACE_S = 10.0
"""Grace period in seconds in which a job writes a checkpoint on shutdown."""
_RESTART_PAUSE_S = 5.0
"""Pause in seconds before a job that ended unfinished is started again."""
_IDLE_S = 300.0
"""Time in seconds that a process waits for its next task: starting a new one takes seconds for imports."""
_ENDS_PROCESS = ("train",)
"""Tasks after which the process ends, so that its memory is free."""


class Failed(LabError):
    """A job ended without a result: one line without local paths."""


class Cancelled(Failed):
    """A job was cancelled."""


class Jobs:
    """The tasks of `implementation`, one at a time, with their state in `folder`. Any thread may call it.

    Raises LabError if another server uses `folder`, if its state cannot be read, or if the implementation's class is
    defined in the main script, which a child process cannot import.
    """

    def __init__(self, implementation: FineTuningInterface, folder: Path):
        if type(implementation).__module__ == "__main__":
            name = type(implementation).__name__
            raise LabError(f"jobs run in a child process: put {name} into a module that it can import")
        self.implementation, self.folder = implementation, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(folder)
        saved = _read(folder / STATE)
        self.logs: dict[str, Any] = saved.get("logs", {})
        self.ready: bool = saved.get("ready", False)
        self.error: str = saved.get("error", "")
        self.job: Job | None = None
        self.events = EventLog(folder / LOG)
        self._lock, self._closing, self._written_at = threading.RLock(), threading.Event(), 0.0
        self._idle: JobProcess | None = None
        self._listener: threading.Thread | None = None
        if interrupted := saved.get("job"):
            self._resume(interrupted)

    @property
    def state(self) -> str:
        """Internal state: `Ready`, `Busy` with a task, or `Error` with its reason."""
        with self._lock:
            if self.job:
                return f"Busy {TASKS[self.job.task]}"
            return f"Error: {self.error}" if self.error else "Ready"

    def status(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the implementation's status for a request with `params`."""
        with self._lock:
            logs = dict(self.logs)
        return child.plain(self.implementation.status(params, logs))

    def start(self, task: str, params: dict[str, Any]) -> Job:
        """Start a task. Raises Ignored if it cannot run now, LabError if the parameters are wrong."""
        with self._lock:
            if self.job:
                raise Ignored(f"{task} was ignored: the worker is busy {TASKS[self.job.task]}; send status, or cancel")
            if self._closing.is_set():
                raise Ignored(f"{task} was ignored: the worker is ending")
            if task in _REQUIRES_DATA and not self.ready:
                raise Ignored(f"{task} was ignored: there is no data set yet; send the task dataset first")
            logs = dict(self.logs)
            try:
                params = self.implementation.check(task, params, logs)
            except LabError as error:
                kind = Ignored if isinstance(error, Ignored) else LabError
                raise kind(f"{task} was ignored: {self._public(error)}") from None
            self.logs, self.ready = logs, self.ready and task != "dataset"
            self.error, self.job = "", (job := Job(task, params))
            self._save()
            self._report(f"{task} began")
            try:
                self._start(job)
            except Exception:
                self.job = None
                raise
            return job

    def cancel(self, job: Job | None = None) -> str:
        """Kill the running job, or `job` only if that is running; return its task. Raises Ignored if none is."""
        with self._lock:
            running = self.job
            if running is None or job not in (None, running):
                raise Ignored("cancel was ignored: nothing is running")
            self.job = None
            self.implementation.forget(running.task, self.logs)
            self._save()
            running.process.job = None
            self._idle = None if self._idle is running.process else self._idle
        running.process.kill()
        self._report(f"{running.task} was cancelled")
        running.done.set_exception(Cancelled(f"{running.task} was cancelled"))
        return running.task

    def close(self) -> None:
        """Stop; a running job writes a checkpoint, and the next server resumes it."""
        with self._lock:
            self._closing.set()
            job = self.job
            self._release_idle()
        if job and job.process:
            job.process.stop(_GRACE_S)
        if self._listener:
            self._listener.join(_GRACE_S)
        with self._lock:
            self._save()
        self._lock_file.release()

    def _resume(self, interrupted: dict[str, Any]) -> None:
        """Start the job again that was running when the server ended."""
        task = interrupted["task"]
        if task not in ASYNCHRONOUS:  # its client is gone
            self._save()
            return self._report(f"{task} was cut off with the server: send it again")
        self.job = Job(task, interrupted["params"])
        self._report(f"{task} goes on: the server was ended while it ran")
        self._start(self.job)

    def _start(self, job: Job) -> None:
        """Send the job to the idle process or to a new one."""
        work = child.Work(self.implementation, job.task, job.params, self.logs, self.folder / "job.lock")
        try:
            packed = child.packed(work)
            job.process, self._idle = self._idle or self._start_process(), None
        except (OSError, LabError) as error:
            return self._end(job, {"error": f"no process can be started: {error}"}, 1)
        job.process.job = job
        job.process.send(packed)

    def _start_process(self) -> JobProcess:
        process = JobProcess()
        self._listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        self._listener.start()
        return process

    def _listen(self, process: JobProcess) -> None:
        """Receive the messages of a process until it ends."""
        for message in process.messages():
            if "line" in message:
                self._report(message["line"])
            elif "logs" in message:
                self._update_logs(process.job, message["logs"])
            else:
                self._task_ended(process, message)
        code = process.popen.wait()
        process.popen.stdout.close()
        process.release()
        with self._lock:
            job, process.job = process.job, None
            if self._idle is process:
                self._idle = None
        if job:
            self._end(job, {}, code)

    def _task_ended(self, process: JobProcess, outcome: dict[str, Any]) -> None:
        """End the job; its process waits for the next task unless it failed unexpectedly or holds much memory."""
        with self._lock:
            job, process.job = process.job, None
            reusable = "result" in outcome or "error" in outcome
            if job and reusable and job.task not in _ENDS_PROCESS and not self._closing.is_set():
                self._idle = process
                self._release_later(process)
            else:
                process.release()
        if job:
            self._end(job, outcome, 0)

    def _release_later(self, process: JobProcess) -> None:
        """Release a process that gets no task for _IDLE_S."""

        def release() -> None:
            with self._lock:
                if self._idle is process:
                    self._release_idle()

        timer = threading.Timer(_IDLE_S, release)
        timer.daemon = True
        timer.start()

    def _release_idle(self) -> None:
        if self._idle:
            self._idle.release()
            self._idle = None

    def _update_logs(self, job: Job | None, logs: dict[str, Any]) -> None:
        with self._lock:
            if job and self.job is job:
                self.logs = logs
                if time.monotonic() - self._written_at > _WRITE_INTERVAL_S:
                    self._save()

    def _end(self, job: Job, outcome: dict[str, Any], code: int) -> None:
        if "unfinished" in outcome and not self._closing.wait(_RESTART_PAUSE_S):
            with self._lock:
                if self.job is job:
                    self._start(job)
            return
        with self._lock:
            if self.job is not job:
                return  # cancelled
            if self._closing.is_set() and "result" not in outcome:
                return job.done.set_exception(Failed("the worker is ending"))  # the next server resumes it
            self.job = None
            failure = "" if "result" in outcome else self._public(outcome.get("error") or _exit_reason(job.task, code))
            # an error of test or save may be due to what the client sent: it does not change the server's state
            self.error = failure if job.task in ASYNCHRONOUS or "error" not in outcome else ""
            self.ready = self.ready or (job.task == "dataset" and not failure)
            self._save()
        if failure:
            self._report(failure if failure.startswith(job.task) else f"{job.task} failed: {failure}")
            job.done.set_exception(Failed(failure))
        else:
            self._report(f"{job.task} is done")
            job.done.set_result(outcome["result"])

    def _save(self) -> None:
        """Write the state; the caller holds the lock."""
        job = None
        if self.job:
            job = {"task": self.job.task, "params": self.job.params if self.job.task in ASYNCHRONOUS else {}}
        state = {"ready": self.ready, "error": self.error, "job": job, "logs": self.logs}
        self._written_at = time.monotonic()
        try:
            manifest.write_json(self.folder / STATE, state)
        except OSError as error:
            logger.warning(f"warning: {self.folder / STATE} cannot be written ({error.strerror}): free space")

    def _report(self, line: str) -> None:
        logger.info(line)
        self.events.add(self._public(line))

    def _public(self, text: object) -> str:
        return redact_text(" ".join(child.plain(str(text)).split()), self.folder, *self.implementation.private_paths())


def _lock(folder: Path) -> filelock.FileLock:
    """Return the acquired lock of a worker's folder; raise LabError if another worker holds it."""
    try:
        lock = filelock.FileLock(folder / ".lock", timeout=0, thread_local=False)  # any thread may call close
        lock.acquire()
    except filelock.Timeout:
        raise LabError(f"another worker runs in {folder}: stop it first, or give this one another --runs") from None
    return lock


def _read(path: Path) -> dict[str, Any]:
    """Return the saved state, empty for a new folder; raise LabError if it cannot be read."""
    try:
        state = json.loads(path.read_text("utf-8"))
        job = state["job"]
        if not (job is None or (job["task"] in TASKS and isinstance(job["params"], dict))):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        raise LabError(f"{path} cannot be read as the state of a worker: remove it to start again") from None
    return state


def _exit_reason(task: str, code: int) -> str:
    if code == -signal.SIGKILL:
        return f"{task} was killed; most often memory is short"
    if code < 0:
        return f"{task} ended with {signal.Signals(-code).name}"
    return f"{task} failed unexpectedly; see the worker's output"
