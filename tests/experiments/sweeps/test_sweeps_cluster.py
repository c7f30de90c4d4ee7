"""Sweeps on a Ray cluster: the same trials as in one process, also after killed workers and heads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import _add_node
from log_recorder import record_log

from pipelines import recipes
from pipelines.experiments.sweeps import executors, sweep, trial_run
from pipelines.experiments.sweeps.trials import Trial
from pipelines.infra import console
from pipelines.infra.errors import LabError
from pipelines.recipes import settings
from pipelines.training import loop as training_loop
from pipelines.training import pipeline as training_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("one_thread")]
SEARCH = {
    "search.space.training.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    "search.trials": 2,
    "search.reduction": 1,
    "training.steps": 8,
    "evaluation.max_new_tokens": 3,
}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def address(ray_address):
    """Return the address of a cluster; functions of this file are sent there by value."""
    sys.modules["ray"].cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray_address
    sys.modules["ray"].cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def told(made: sweep.Sweep) -> list[dict]:
    """Return the trials without their times."""
    return [{**dataclasses.asdict(trial), "seconds": 0} for trial in made.trials]


@pytest.fixture(scope="module")
def here(toy_settings, one_thread, tmp_path_factory):
    """Run a local sweep without interruption; return its recipe and result."""
    recipe = toy_settings(SEARCH)
    return recipe, sweep.run(recipe, runs=tmp_path_factory.mktemp("here"))


@pytest.fixture
def there(here, tmp_path) -> Path:
    """Return another runs folder with the same features."""
    (tmp_path / "there").mkdir()
    os.symlink(here[1].folder.parent / "features", tmp_path / "there" / "features")
    return tmp_path / "there"


def killing(noted: Path):
    """Return a worker function that kills itself the first time that trial 2 reaches step 6."""

    def on_a_worker(job: trial_run.Job) -> trial_run.Result | LabError:
        def kill_once(step: int) -> None:
            if job.number == 2 and step == 6 and not noted.exists():
                noted.write_text(" ".join(path.name for path in (job.run / "checkpoints").glob("checkpoint-*")))
                os.kill(os.getpid(), signal.SIGKILL)

        def train(run):
            lines = (run.folder / "lines.txt").open("a", buffering=1)
            watched = dataclasses.replace(run, progress=dataclasses.replace(run.progress, on_step=kill_once))
            with console.forwarded(lambda line: lines.write(f"{line}\n")):
                return whole(watched)

        whole, training_loop.train = training_loop.train, train
        try:
            return trial_run.fit(job)
        finally:
            training_loop.train = whole

    return on_a_worker


def test_cluster_sweep_equals_local_after_killed_worker(address, toy_settings, here, there, tmp_path, monkeypatch):
    (recipe, alone), noted, lines = here, tmp_path / "killed", record_log()
    with monkeypatch.context() as patch:
        patch.setattr(executors, "_run_on_worker", killing(noted))
        run = sweep.folder_of(recipe, there)
        patch.setattr(training_pipeline, "run_folder", made_first(training_pipeline.run_folder))
        made = sweep.run(recipe, runs=there, cluster=address, devices=2)
    assert noted.read_text() == "checkpoint-4"
    second: Trial = made.trials[1]
    assert "resuming from checkpoint-4" in (run / second.run / "lines.txt").read_text()
    assert lines[0].startswith(f"Ray cluster {address}: 2 trial(s) at a time")
    assert "trial 2 is started again: its worker died (WorkerCrashedError)" in lines
    assert told(made) == told(alone)
    more = sweep.run(toy_settings(SEARCH | {"search.trials": 3}), runs=there)
    assert told(more)[:2] == told(made) and more.trials[2].state == "finished", "what a cluster began goes on without"


def made_first(run_folder):
    """Wrap `run_folder` so that the folder exists: the worker writes lines to it."""

    def make(*args):
        folder = run_folder(*args)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


def befalling(job: trial_run.Job) -> trial_run.Result | LabError:
    """Run a job on a worker: trial 2 always kills it, trial 3 cannot start."""
    if job.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.number == 3:
        raise ModuleNotFoundError("No module named 'peft'")
    return trial_run.fit(job)


def test_trial_that_kills_workers_fails_others_continue(address, toy_settings, there, monkeypatch):
    monkeypatch.setattr(executors, "_run_on_worker", befalling)
    recipe = toy_settings(SEARCH | {"search.trials": 3, "training.steps": 2, "training.eval_every": 2})
    made = sweep.run(recipe, runs=there, cluster=address, devices=2)
    assert [trial.state for trial in made.trials] == ["finished", "failed", "failed"]
    assert made.trials[1].reason.startswith("2 processes in a row died in this trial without a new checkpoint")
    assert made.trials[2].reason == "ModuleNotFoundError: No module named 'peft'"


HELD = """
import dataclasses, os, sys, time
from pathlib import Path

import ray

from pipelines import __main__ as cli
from pipelines.experiments.sweeps import executors
from pipelines.training import loop

def held(job):
    \"\"\"Both trials come to step 6, tell so, and no further.\"\"\"
    def hold(step):
        if step == 6:
            (job.run / "held").touch()
            time.sleep(600)

    def train(run):
        return whole(dataclasses.replace(run, progress=dataclasses.replace(run.progress, on_step=hold)))

    whole, loop.train = loop.train, train
    return executors._run_on_worker(job)  # the worker's own

executors._run_on_worker, executors._CHECK_INTERVAL_S, executors._SILENCE_S = held, 0.5, 5.0
cli.main()
"""


@contextlib.contextmanager
def held_command(recipe: settings.Recipe, runs: Path, address: str):
    """Run the sweep command; yield its process when both trials wait at step 6, after a checkpoint at step 4."""
    file = runs.parent / "recipe.toml"
    file.write_text(recipes.as_toml(recipe), "utf-8")
    command = [sys.executable, "-c", HELD, "sweep", "--recipe", str(file), "--runs", str(runs)]
    process = subprocess.Popen(
        [*command, "--cluster", address, "--devices", "2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder, end = sweep.folder_of(recipe, runs), time.monotonic() + 240
    try:
        while len(list(folder.glob("train-*/held"))) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end, "the trials did not come to step 6"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def states(folder: Path) -> list[str]:
    return [trial["state"] for trial in json.loads((folder / "trials.json").read_text("utf-8"))]


def test_killed_cluster_sweep_is_resumed(address, here, there):
    (recipe, alone), lines = here, record_log()
    with held_command(recipe, there, address) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert states(sweep.folder_of(recipe, there)) == ["begun", "begun"]
    again = sweep.run(recipe, runs=there, cluster="auto", devices=2)
    assert lines[0] == f"resuming 2 trial(s) of {again.folder}"
    assert "Ray cluster auto: 2 trial(s) at a time, each with one core" in lines
    assert told(again) == told(alone)


@pytest.fixture
def doomed(ray_address):
    """Start the head of another cluster with two cores; return its address and a function that kills it."""
    temp = tempfile.mkdtemp(prefix="ray-")
    nodes = sys.modules["ray.cluster_utils"].Cluster()
    node = {"num_cpus": 2, "object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1"}
    node |= {"temp_dir": temp, "include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    node["_system_config"] = {"prestart_worker_first_driver": False}

    def kill() -> None:
        for processes in nodes.head_node.all_processes.values():
            for one in processes:
                os.kill(one.process.pid, signal.SIGKILL)

    try:
        _add_node(nodes, **node)
        yield nodes.address, kill
    finally:
        nodes.shutdown()
        shutil.rmtree(temp, ignore_errors=True)


def test_lost_head_is_reported_and_sweep_resumed_elsewhere(doomed, address, here, there):
    (recipe, alone), (first, kill) = here, doomed
    with held_command(recipe, there, first) as process:
        kill()
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 1
    mine = [line for line in error.splitlines() if line.startswith("error: ")]
    assert mine == [
        f"error: the head of the Ray cluster is gone ({first}): restart it, or another cluster, then run the same "
        "command again to resume"
    ]
    assert "Traceback" not in error
    assert states(sweep.folder_of(recipe, there)) == ["begun", "begun"]
    again = sweep.run(recipe, runs=there, cluster=address, devices=2)
    assert told(again) == told(alone)


@pytest.mark.parametrize("name", ["its address", "auto"])
def test_worker_error_that_ends_sweep_is_one_line(address, toy_settings, tmp_path, monkeypatch, name):
    def unseen(job: trial_run.Job) -> LabError:
        return LabError(f"the Ray machine does not see {job.run.parent}")

    monkeypatch.setattr(executors, "_run_on_worker", unseen)
    with pytest.raises(LabError, match=r"^the Ray machine does not see \S+$"):
        sweep.run(toy_settings(SEARCH), runs=tmp_path, cluster="auto" if name == "auto" else address)
