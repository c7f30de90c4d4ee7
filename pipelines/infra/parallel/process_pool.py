"""A pool of worker processes that repeats the task of a worker that died.

Each worker is a new Python process: nothing is forked from a process that may have threads or a CUDA context, and the
caller's main module is not imported, so that scripts need no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipelines.infra.errors import LabError, Unfinished

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Number of workers that may die over one task before it fails."""
_CHECK_INTERVAL_S = 1.0
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a worker: with one worker per core, more threads would only slow each other down."""
_ROOT = str(Path(__file__).parents[3])
_START = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); from pipelines.infra.parallel.process_pool import _serve; _serve()"
)

Task = TypeVar("Task")
Result = TypeVar("Result")


class _WorkerDied(Exception):
    """The process ended without a result."""


class Pool(Generic[Task, Result]):
    """`n` processes that run `work(task)`. Use it as a context manager: leaving it kills them, also busy ones.

    `work` and tasks are pickled. Processes start when they are first needed.
    """

    def __init__(self, n: int, work: Callable[[Task], Result]):
        self._work, self._closed = _pickled(work), False
        self._lock, self._running = threading.Lock(), set[subprocess.Popen]()
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(n):
            self._idle.put(None)

    def __enter__(self) -> Pool[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.kill()
        for process in running:
            _close(process)

    def run(self, task: Task, name: str) -> Result:
        """Return `work(task)`, computed by an idle process; wait for one if necessary. Thread-safe.

        A LabError of `work` is raised here as LabError or Unfinished, any other exception as RuntimeError with its
        traceback. Raises LabError if ATTEMPTS processes died over this task. `name` is the task's name in messages.
        """
        worker = self._idle.get()
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    worker = worker or self._start()
                    return _exchange(worker, task)
                except _WorkerDied as death:
                    self._discard(worker)
                    worker = None
                    if self._closed:
                        raise LabError(f"{name} was not finished: the work was ended") from None
                    if attempt < ATTEMPTS:
                        logger.info(f"a worker process died ({death}) over {name}: another repeats the task")
            raise LabError(
                f"{ATTEMPTS} worker processes in a row died over {name}; most often memory is short: "
                "run again with fewer (features.workers=1 uses none); what is done is kept"
            )
        finally:
            self._idle.put(worker)

    def _start(self) -> subprocess.Popen:
        with self._lock:
            if self._closed:
                raise _WorkerDied("not started")
            # a new session: Ctrl-C reaches only the parent, which then kills its workers
            worker = subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | ONE_THREAD,
                start_new_session=True,
            )
            self._running.add(worker)
        try:
            pickle.dump(sys.path, worker.stdin)
            worker.stdin.write(self._work)
        except OSError:
            raise _WorkerDied(_cause_of_death(worker)) from None
        return worker

    def _discard(self, worker: subprocess.Popen | None) -> None:
        if worker is not None:
            worker.kill()
            _close(worker)
            with self._lock:
                self._running.discard(worker)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pickled(work: Any) -> bytes:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LabError(
            f"worker processes need work that can be pickled (no function within a function), got: {error}. "
            "Move it to a module, or use features.workers=1"
        ) from None


def _exchange(worker: subprocess.Popen, task: Any) -> Any:
    try:
        pickle.dump(task, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
        kind, result = pickle.load(worker.stdout)
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        raise _WorkerDied(_cause_of_death(worker)) from None
    if kind == "result":
        return result
    if kind == "unfinished":
        raise Unfinished(result)
    raise LabError(result) if kind == "lab error" else RuntimeError(f"in a worker process:\n{result}")


def _close(worker: subprocess.Popen) -> None:
    """Wait for a killed process and close its pipes; unsent data is discarded."""
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


def _cause_of_death(worker: subprocess.Popen) -> str:
    try:
        code = worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it does not respond"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve() -> None:
    """Run in a worker: read sys.path and the work, then tasks until the parent closes the pipe or ends."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of the work must not mix with the results
    sys.path[:] = pickle.load(sys.stdin.buffer)
    work = pickle.load(sys.stdin.buffer)
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        result = pickle.dumps(_result_of(work, task), protocol=pickle.HIGHEST_PROTOCOL)
        try:
            results.write(result)
            results.flush()
        except OSError:  # the parent was killed
            os._exit(1)


def _end_with_parent(parent: int) -> None:
    """End this worker when the parent was killed: a task may take an hour, and a new run would wait for its lock."""
    while os.getppid() == parent:
        time.sleep(_CHECK_INTERVAL_S)
    os._exit(1)


def _result_of(work: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    try:
        return "result", work(task)
    except Unfinished as error:
        return "unfinished", str(error)
    except LabError as error:
        return "lab error", str(error)
    except Exception:
        return "error", traceback.format_exc()
