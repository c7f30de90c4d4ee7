"""A new run from the weights of another, on purpose: where it starts, what it is called, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from log_recorder import record_log
from safetensors.torch import load_file

from pipelines.features.data_card.markdown import inline
from pipelines.inference import pipeline as inference_pipeline
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.training import pipeline as training_pipeline
from pipelines.training.callbacks import progress
from pipelines.training.checkpoints import fork as checkpoints_fork
from pipelines.whisper import lineage as lineage_of_model
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"training.steps": 4, "training.eval_every": 2, "evaluation.max_new_tokens": 3}
OTHER = SETTINGS | {"training.steps": 1, "training.learning_rate": 1e-12, "training.warmup_steps": 0}
"""A recipe that differs, and moves the weights by nothing that counts."""


@pytest.fixture(scope="module")
def base(toy_model):
    return whisper_model.resolve(str(toy_model))


@pytest.fixture(scope="module")
def quiet():
    return progress.Progress()


@pytest.fixture(scope="module")
def parent(train_toy, tmp_path_factory):
    """A run that was stopped after step 3, and the run's folder."""
    run = tmp_path_factory.mktemp("parent") / "run"
    train_toy(run, SETTINGS, on_step=lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None)
    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def alike(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_fork_starts_from_weights_and_records_them(toy_settings, toy_cache, toy_model, parent, tmp_path):
    recipe, lines = toy_settings(OTHER), []
    record_log(lines)
    made = training_pipeline.run(
        recipe, toy_cache, runs=tmp_path, launch=training_pipeline.Launch(str(parent)), progress=progress.Progress()
    )
    checkpoint = parent / "checkpoints" / "checkpoint-3"
    run_digest = manifest.read(checkpoint)["run_digest"]
    lineage = {"run": run_digest, "step": 3, "weights_sha256": manifest.sha256(checkpoint / "model.safetensors")}
    base = whisper_model.resolve(str(toy_model))
    assert f"starting from run {run_digest} step 3, tuned from {base.title}" in lines
    assert alike(Path(made.uri), checkpoint)
    assert not alike(Path(made.uri), toy_model)
    assert manifest.read(Path(made.uri))["fork"] == lineage
    facts = manifest.read(Path(made.uri))
    assert facts["base"] == f"(a local path) @ {base.revision}", "a revision that exists"
    origin = f"run {run_digest} step 3, tuned from {facts['base']}"
    assert inference_pipeline.model_info(whisper_model.resolve(made.uri))["base"] == origin
    assert f"from {inline(origin)}; learning rate" in Path(made.uri, "README.md").read_text("utf-8")
    assert lineage_of_model.origin_of({**facts, "base": f"a/b @ {run_digest} step 3"}).endswith("tuned from a/b")
    identity = json.loads((Path(made.uri).parent / "run.json").read_text())
    assert {name.removeprefix("fork."): value for name, value in identity.items() if "fork." in name} == lineage
    assert made.history[-1]["step"] == 1, "its steps, optimizer and learning rate begin anew"

    plain = training_pipeline.run(recipe, toy_cache, runs=tmp_path, progress=progress.Progress())
    assert Path(plain.uri).parent != Path(made.uri).parent
    assert alike(Path(plain.uri), toy_model)
    assert "fork" not in manifest.read(Path(plain.uri))

    again = checkpoints_fork.find_weights(made.uri, whisper_model.resolve(str(toy_model)))
    assert (again.run, again.step) == (made.digest, 1)


def test_other_recipe_without_fork_is_refused(train_toy, parent):
    ended, _ = train_toy(parent, OTHER)
    assert str(ended).startswith(f"{parent} belongs to another run: ")
    assert str(ended).endswith(f"or start a new run from its weights with --fork {parent}")


def test_checkpoints_record_context_and_language(parent):
    facts = manifest.read(parent / "checkpoints" / "checkpoint-3")
    assert (facts["context"], facts["language"]) == ("clip", "sv")


@pytest.mark.parametrize("step", [2, 3])
def test_checkpoint_can_be_forked(parent, base, step):
    fork = checkpoints_fork.find_weights(str(parent / "checkpoints" / f"checkpoint-{step}"), base)
    assert fork.step == step


def test_invalid_fork_raises_one_line(parent, base, toy_cache, tmp_path):
    find = checkpoints_fork.find_weights
    with pytest.raises(LabError, match="absent. Name a run's folder, a checkpoint or a model"):
        find(str(tmp_path / "none"), base)
    with pytest.raises(LabError, match="holds no weights of a run: name a run's folder"):
        find(str(toy_cache.folder), base)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(LabError, match="has no whole checkpoint yet"):
        find(str(tmp_path / "run"), base)
    adapter = tmp_path / "checkpoint-4"
    adapter.mkdir()
    manifest.seal(adapter, kind="checkpoint", step=4, run_digest="x")
    with pytest.raises(LabError, match="holds an adapter without its base model"):
        find(str(adapter), base)


def test_fork_of_other_base_model_is_refused(parent, toy_of_width):
    other = whisper_model.resolve(str(toy_of_width(16)))
    with pytest.raises(LabError, match=r"checkpoint-3 was not tuned from .*: set model.base to the model"):
        checkpoints_fork.find_weights(str(parent), other)


def test_damaged_checkpoint_cannot_be_forked(parent, base, tmp_path):
    copy = tmp_path / "checkpoint-3"
    shutil.copytree(parent / "checkpoints" / "checkpoint-3", copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(5_000)
        file.write(b"spoilt")
    with pytest.raises(LabError, match=r"the weights to fork from .* cannot be used: model.safetensors is damaged"):
        checkpoints_fork.find_weights(str(copy), base)
