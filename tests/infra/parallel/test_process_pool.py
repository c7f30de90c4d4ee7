from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.infra.parallel.process_pool import Pool


def work(task):
    """What the tests ask of a worker: `(verb, argument)`."""
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


def test_every_task_is_answered():
    with Pool(2, work) as pool, ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda n: pool.ask(("double", n), "n"), range(20))
        assert list(answers) == [2 * n for n in range(20)]


def test_other_processes_work_and_no_more_than_told():
    with Pool(2, work) as pool, ThreadPoolExecutor(4) as threads:
        pids = {*threads.map(lambda n: pool.ask(("pid", n), "n"), range(30))}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


def test_a_worker_has_one_thread():
    with Pool(1, work) as pool:
        assert pool.ask(("environment", "OMP_NUM_THREADS"), "n") == "1"


def test_errors_of_the_work_come_back_and_the_worker_stays():
    with Pool(1, work) as pool:
        before = pool.ask(("pid", 0), "n")
        with pytest.raises(LabError, match="^no such clip$"):
            pool.ask(("refuse", "no such clip"), "n")
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            pool.ask(("fail", 0), "n")
        assert pool.ask(("pid", 0), "n") == before


def test_a_task_whose_worker_died_is_done_by_another(tmp_path):
    lines = []
    with Pool(1, work, lines.append) as pool:
        before = pool.ask(("pid", 0), "n")
        assert pool.ask(("die once", str(tmp_path / "died")), "shard 7") != before
    assert lines == ["a worker process died (exit code 3) over shard 7: another does it again"]


def test_a_task_that_kills_every_worker_is_given_up():
    lines = []
    with Pool(1, work, lines.append) as pool:
        with pytest.raises(LabError, match=r"3 worker processes in a row died over shard 7.*features.workers=1"):
            pool.ask(("die", 0), "shard 7")
        assert pool.ask(("double", 4), "n") == 8
    assert len(lines) == 2 and all("SIGKILL" in line for line in lines)


def test_leaving_ends_workers_in_the_middle_of_their_work(tmp_path):
    refused = []

    def ask(pool):
        try:
            pool.ask(("sleep", str(tmp_path / "pid")), "shard 7")
        except LabError as error:
            refused.append(str(error))

    with Pool(1, work) as pool:
        thread = threading.Thread(target=ask, args=(pool,))
        thread.start()
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            time.sleep(0.01)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert "ended" in refused[0]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_work_that_cannot_be_sent_is_one_line():
    with pytest.raises(LabError, match=r"can be pickled.*features.workers=1"):
        Pool(1, lambda task: task)


def test_cores_are_at_least_one():
    assert process_pool.cores() >= 1
