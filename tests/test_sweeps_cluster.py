"""A sweep whose trials train side by side on a Ray cluster: the same trials as in one process, whoever dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest

from pipelines import lab, sweeps, training
from pipelines.errors import LabError
from pipelines.sweeps import crew
from pipelines.sweeps.record import Trial

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("one_thread")]
SEARCH = {
    "search.space.training.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    "search.trials": 2,
    "search.reduction": 1,
    "training.steps": 8,
    "evaluation.max_new_tokens": 3,
}


@pytest.fixture
def address(ray_address):
    """The cluster; what this file defines travels there by value."""
    sys.modules["ray"].cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray_address
    sys.modules["ray"].cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def quiet(line: str) -> None:
    pass


def told(made: sweeps.Sweep) -> list[dict]:
    """The trials without their times."""
    return [{**dataclasses.asdict(trial), "seconds": 0} for trial in made.trials]


def killing(noted: Path):
    """What a worker does with a job; the first time that trial 2 comes to step 6 it kills itself."""

    def on_a_worker(job: crew.Job) -> crew.Result | LabError:
        def kill_once(step: int) -> None:
            if job.number == 2 and step == 6 and not noted.exists():
                noted.write_text(" ".join(path.name for path in (job.run / "checkpoints").glob("checkpoint-*")))
                os.kill(os.getpid(), signal.SIGKILL)

        def train(recipe, cache, base, run, progress, **how):
            lines = (run / "lines.txt").open("a", buffering=1)
            watched = dataclasses.replace(progress, on_step=kill_once, on_line=lambda line: lines.write(f"{line}\n"))
            return whole(recipe, cache, base, run, watched, **how)

        whole, training.train = training.train, train
        try:
            return crew.fit(job, quiet)
        finally:
            training.train = whole

    return on_a_worker


def test_a_cluster_tries_the_same_and_a_killed_worker_costs_the_steps_since_its_checkpoint(
    address, toy_settings, tmp_path, monkeypatch
):
    recipe = toy_settings(SEARCH)
    runs, noted, lines = tmp_path / "there", tmp_path / "killed", []
    cache = lab.features(recipe, runs=tmp_path / "here", log=quiet)
    (runs / "features").mkdir(parents=True)
    os.symlink(cache.folder, runs / "features" / cache.folder.name)
    with monkeypatch.context() as patch:
        patch.setattr(crew, "_on_a_worker", killing(noted))
        run = sweeps.folder_of(recipe, runs)
        patch.setattr(sweeps.lab, "run_folder", made_first(lab.run_folder))
        there = sweeps.run(recipe, runs=runs, cluster=address, devices=2, log=lines.append)
    assert noted.read_text() == "checkpoint-4"
    second: Trial = there.trials[1]
    assert "going on from checkpoint-4" in (run / second.run / "lines.txt").read_text()
    assert lines[0].startswith(f"Ray cluster {address}: 2 trial(s) at a time")
    here = sweeps.run(recipe, runs=tmp_path / "here", log=quiet)
    assert told(there) == told(here)
    more = sweeps.run(toy_settings(SEARCH | {"search.trials": 3}), runs=runs, log=quiet)
    assert told(more)[:2] == told(there) and more.trials[2].state == "finished", "what a cluster began goes on without"


def made_first(run_folder):
    """The run's folder, made: its worker writes lines into it."""

    def make(*args):
        folder = run_folder(*args)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


def test_what_ends_a_sweep_on_a_worker_is_one_line_here(address, toy_settings, tmp_path, monkeypatch):
    def unseen(job: crew.Job) -> LabError:
        return LabError(f"the Ray machine does not see {job.run.parent}")

    monkeypatch.setattr(crew, "_on_a_worker", unseen)
    with pytest.raises(LabError, match=r"^the Ray machine does not see \S+$"):
        sweeps.run(toy_settings(SEARCH), runs=tmp_path, cluster=address, log=quiet)
