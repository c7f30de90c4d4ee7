from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from log_recorder import record_log

from pipelines.infra.errors import LabError, Unfinished
from pipelines.infra.parallel import process_pool
from pipelines.infra.parallel.process_pool import Pool


def work(task):
    """Do one task `(verb, argument)` in a worker process."""
    verb, argument = task
    if verb == "double":
        print("not an answer")  # goes to stderr
        return 2 * argument
    if verb == "refuse":
        raise LabError(argument)
    if verb == "fail":
        return 1 / argument
    if verb == "environment":
        return os.environ.get(argument)
    if verb == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "die once" and not Path(argument).exists():
        Path(argument).touch()
        os._exit(3)
    if verb == "sleep":
        Path(argument).write_text(str(os.getpid()))
        time.sleep(60)
    return os.getpid()


def test_every_task_returns_its_result():
    with Pool(2, work) as pool, ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda n: pool.run(("double", n), "n"), range(20))
        assert list(results) == [2 * n for n in range(20)]


def test_tasks_run_in_at_most_n_other_processes():
    with Pool(2, work) as pool, ThreadPoolExecutor(4) as threads:
        pids = {*threads.map(lambda n: pool.run(("pid", n), "n"), range(30))}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


def test_worker_has_one_thread():
    with Pool(1, work) as pool:
        assert pool.run(("environment", "OMP_NUM_THREADS"), "n") == "1"


def test_error_of_a_task_is_raised_and_the_worker_stays():
    with Pool(1, work) as pool:
        pid = pool.run(("pid", 0), "n")
        with pytest.raises(LabError, match="^no such clip$"):
            pool.run(("refuse", "no such clip"), "n")
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            pool.run(("fail", 0), "n")
        assert pool.run(("pid", 0), "n") == pid


def test_task_of_a_dead_worker_is_repeated_by_another(tmp_path):
    lines = record_log()
    with Pool(1, work) as pool:
        pid = pool.run(("pid", 0), "n")
        assert pool.run(("die once", str(tmp_path / "died")), "shard 7") != pid
    assert lines == ["a worker process died (exit code 3) over shard 7: another repeats the task"]


def test_task_that_kills_every_worker_is_an_error():
    lines = record_log()
    with Pool(1, work) as pool:
        with pytest.raises(LabError, match=r"3 worker processes in a row died over shard 7.*features.workers=1"):
            pool.run(("die", 0), "shard 7")
        assert pool.run(("double", 4), "n") == 8
    assert len(lines) == 2 and all("SIGKILL" in line for line in lines)


def test_leaving_the_pool_kills_busy_workers(tmp_path):
    errors = []

    def run_task(pool):
        try:
            pool.run(("sleep", str(tmp_path / "pid")), "shard 7")
        except LabError as error:
            errors.append(str(error))

    with Pool(1, work) as pool:
        thread = threading.Thread(target=run_task, args=(pool,))
        thread.start()
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            time.sleep(0.01)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert "ended" in errors[0]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_busy_worker_ends_when_its_parent_is_killed(tmp_path):
    code = "import sys; sys.path[:] = %r; import test_process_pool as t; t.Pool(1, t.work).run(('sleep', %r), 'n')"
    command = [sys.executable, "-c", code % ([str(Path(__file__).parent), *sys.path], str(tmp_path / "pid"))]
    with subprocess.Popen(command) as parent:
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            time.sleep(0.01)
        parent.kill()
    worker = int((tmp_path / "pid").read_text())
    for _ in range(300):
        if not _is_running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on after its parent was killed")


def _is_running(pid):
    """Return whether a process runs; one that has ended may wait for its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_work_that_cannot_be_pickled_is_an_error():
    with pytest.raises(LabError, match=r"can be pickled.*features.workers=1"):
        Pool(1, lambda task: task)


def test_cores_are_at_least_one():
    assert process_pool.cores() >= 1


@pytest.mark.parametrize("kind", [Unfinished, LabError])
def test_errors_that_a_user_can_fix_keep_their_kind(kind):
    def fail(task):
        raise kind("one line")

    answer = pickle.dumps(process_pool._result_of(fail, "task"))
    worker = SimpleNamespace(stdin=io.BytesIO(), stdout=io.BytesIO(answer))
    with pytest.raises(LabError) as error:
        process_pool._exchange(worker, "task")
    assert (type(error.value), str(error.value)) == (kind, "one line")
