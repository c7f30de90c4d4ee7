"""Trackers store all that a run logs, a missing package is a one-line error, and no token is stored."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.training.callbacks import trackers

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[3]
SETTINGS = {"training.steps": 3, "training.eval_every": 2, "training.tracker": "trackio"}
TOKEN = "hf_" + "secret" * 6


def test_missing_tracker_package_stops_before_training(train_toy, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    ended, _ = train_toy(tmp_path / "run", SETTINGS)
    assert str(ended).startswith("training.tracker = 'trackio' needs the package trackio, which is not installed.")
    assert str(ended).endswith("Run: pip install 'trackio>=0.21.1'")


def test_tracker_is_not_in_the_run_identity(toy_settings, toy_cache, toy_model):
    from pipelines.training import run as training_run
    from pipelines.whisper import model as whisper_model

    base = whisper_model.resolve(str(toy_model))
    plain, tracked = (training_run.run_identity(toy_settings(chosen), toy_cache, base) for chosen in ({}, SETTINGS))
    assert {**tracked, "training.steps": 0, "training.eval_every": 0} == {
        **plain,
        "training.steps": 0,
        "training.eval_every": 0,
    }


def test_environment_is_restored_and_user_values_stay(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    with trackers._environment({"WANDB_PROJECT": "ours", "WANDB_RUN_ID": "x"}):
        assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_RUN_ID"]) == ("mine", "x")
    assert os.environ["WANDB_PROJECT"] == "mine"
    assert "WANDB_RUN_ID" not in os.environ


@pytest.mark.parametrize("fails", ["__init__", "on_train_begin", "on_log", "on_save", "on_train_end"])
def test_failing_tracker_is_dropped_and_training_continues(train_toy, tmp_path, monkeypatch, capsys, fails):
    import transformers

    calls = []

    def event(name):
        def record(self, *args, **kwargs):
            print("a tracker's chatter")
            calls.append(name)
            if name == fails:
                raise OSError(28, "No space left\non device")

        return record

    broken = type("Broken", (transformers.TrainerCallback,), {
        name: event(name) for name in ("__init__", "on_train_begin", "on_log", "on_save", "on_train_end")
    })  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "trackio" else find(name))
    monkeypatch.setattr(transformers.integrations, "get_reporting_integration_callbacks", lambda names: [broken])
    model, lines = train_toy(tmp_path / "run", {**SETTINGS, "training.steps": 2, "training.eval_every": 1})
    assert Path(model.uri).is_dir()
    assert [line for line in lines if "trackio failed" in line] == [
        "note: trackio failed and records no more of this sitting; training continues "
        "(OSError: [Errno 28] No space left on device)"
    ]
    assert calls.count(fails) == 1 and calls[-1] == fails
    assert "chatter" not in capsys.readouterr().out


TRAIN = """
import json, os, sys
from pathlib import Path
from pipelines import recipes
from pipelines.features import cache
from pipelines.infra import console
from pipelines.infra.errors import Unfinished
from pipelines.training import loop
from pipelines.training.callbacks.progress import Progress
from pipelines.training.run import TrainingRun
from pipelines.whisper import model

console.configure(sys.stderr)
settings = recipes.load(sys.argv[1], json.loads(sys.argv[2]))
def stop(step):
    if step == int(sys.argv[5]):
        os.kill(os.getpid(), 15)
try:
    progress = Progress(on_step=stop)
    base, clips = model.resolve(settings.model.base), cache.open_cache(Path(sys.argv[3]))
    loop.train(TrainingRun(settings, clips, base, Path(sys.argv[4]), progress))
except Unfinished:
    pass
"""


@pytest.mark.slow
def test_trackio_stores_interrupted_run_as_one(toy_recipe, toy_model, toy_cache, tmp_path):
    pytest.importorskip("trackio", reason="pip install -r tests/requirements.txt")
    settings = {**SETTINGS, "model.base": str(toy_model), "evaluation.max_new_tokens": 3}
    store, run = tmp_path / "trackio", tmp_path / "run"
    variables = {"TRACKIO_DIR": str(store), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for stop in (1, 0):
        command = [sys.executable, "-c", TRAIN, toy_recipe, json.dumps(settings), toy_cache.uri, run, stop]
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    history = json.loads((run / "model" / "training.json").read_text())["history"]
    (name,) = {name for name, _ in rows(store)}
    logged = [metrics for _, metrics in rows(store)]
    assert name.startswith("toy-")
    for theirs, ours in (("train/loss", "loss"), ("eval/wer", "eval_wer"), ("train/clips_per_s", "clips_per_s")):
        values = [metrics[theirs] for metrics in logged if theirs in metrics]
        assert values == pytest.approx([row[ours] for row in history if ours in row])
    assert not [path for path in store.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def rows(store: Path) -> list[tuple[str, dict]]:
    """Return run name and metrics of every row in trackio's databases."""
    records = []
    for path in store.glob("*.db"):
        with sqlite3.connect(path) as database:
            records += database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    return [(name, json.loads(metrics)) for name, metrics in records]
