"""Worker processes that answer one task after another; one that dies costs its task, which another does again.

Each is a Python of its own, started afresh: nothing is forked from a process that may hold threads or a CUDA context,
and the caller's main module is not imported again, so that scripts need no `if __name__ == "__main__"`.
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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Workers that one task may cost before it is given up."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a worker: there is one for each core, so threads of their own would only be in each other's way."""
_ROOT = str(Path(__file__).parents[3])
_START = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); from pipelines.infra.parallel.process_pool import _serve; _serve()"
)

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class _WorkerDied(Exception):
    """The process ended without an answer."""


class Pool(Generic[Task, Answer]):
    """`n` processes that run `work(task)`. Use it as a context: leaving it ends them, whatever they are doing.

    `work` and tasks are pickled; `log` is told of workers that died. Processes start when they are first needed.
    """

    def __init__(self, n: int, work: Callable[[Task], Answer]):
        self._work, self._closed = _pickled(work), False
        self._lock, self._running = threading.Lock(), set[subprocess.Popen]()
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(n):
            self._idle.put(None)

    def __enter__(self) -> Pool[Task, Answer]:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.kill()
        for process in running:
            _close(process)

    def ask(self, task: Task, name: str) -> Answer:
        """`work(task)` as some idle process answers it; waits for one. Several threads may ask at once.

        An exception of `work` is raised here: LabError as itself, any other as RuntimeError with the traceback.
        Raises LabError if ATTEMPTS processes died over this task; `name` is what messages call it.
        """
        worker = self._idle.get()
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    worker = worker or self._start()
                    return _exchange(worker, task)
                except _WorkerDied as death:
                    self._bury(worker)
                    worker = None
                    if self._closed:
                        raise LabError(f"{name} was not finished: the work was ended") from None
                    if attempt < ATTEMPTS:
                        logger.info(f"a worker process died ({death}) over {name}: another does it again")
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
            # a session of its own: Ctrl-C reaches the parent alone, which then ends its workers
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
            raise _WorkerDied(_fate(worker)) from None
        return worker

    def _bury(self, worker: subprocess.Popen | None) -> None:
        if worker is not None:
            worker.kill()
            _close(worker)
            with self._lock:
                self._running.discard(worker)


def cores() -> int:
    """The cores that this process may use."""
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
        kind, answer = pickle.load(worker.stdout)
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        raise _WorkerDied(_fate(worker)) from None
    if kind == "answer":
        return answer
    raise LabError(answer) if kind == "refusal" else RuntimeError(f"in a worker process:\n{answer}")


def _close(worker: subprocess.Popen) -> None:
    """Wait for a process that was killed, and give its pipes back; what was not yet sent is lost with it."""
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


def _fate(worker: subprocess.Popen) -> str:
    try:
        code = worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it does not answer"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve() -> None:
    """What a worker runs: a path and the work, then tasks until the parent closes the pipe or is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the work prints must not come between the answers
    sys.path[:] = pickle.load(sys.stdin.buffer)
    work = pickle.load(sys.stdin.buffer)
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = pickle.dumps(_outcome(work, task), protocol=pickle.HIGHEST_PROTOCOL)
        try:
            answers.write(answer)
            answers.flush()
        except OSError:  # the parent was killed: nobody is left to tell
            os._exit(1)


def _outcome(work: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    try:
        return "answer", work(task)
    except LabError as error:
        return "refusal", str(error)
    except Exception:
        return "error", traceback.format_exc()
