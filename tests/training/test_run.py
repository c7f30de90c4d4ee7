"""What identifies a run: its folder's name, and the other runs beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from log_recorder import record_log

from pipelines.infra import manifest
from pipelines.recipes import digest
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_run
from pipelines.training.run import TrainingRun
from pipelines.whisper import model as whisper_model

BATCH_FRAMES = "evaluation.batch_frames"


@pytest.fixture
def folder_of(toy_settings, toy_cache, toy_model, tmp_path):
    """`folder_of({"training.steps": 4}, model)`: the folder of the run that this recipe trains."""

    def find(overrides: dict | None = None, model: Path = toy_model) -> Path:
        base = whisper_model.resolve(str(model))
        return training_pipeline.run_folder(toy_settings(overrides), toy_cache, base, tmp_path)

    return find


@pytest.fixture
def identity(toy_settings, toy_cache, toy_model):
    return training_run.run_identity(toy_settings(), toy_cache, whisper_model.resolve(str(toy_model)))


def begin(folder: Path, identity: dict, step: int = 3) -> Path:
    """Create an unfinished run."""
    (folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    manifest.write_json(folder / "run.json", identity)
    return folder


def with_config(toy_model: Path, folder: Path, **fields) -> Path:
    """Copy a model; change fields of its config.json."""
    shutil.copytree(toy_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_decoding_batch_size_does_not_start_a_new_run(folder_of, identity):
    assert identity[BATCH_FRAMES] == 24_000, "as in all runs of older versions with the default"
    assert folder_of({BATCH_FRAMES: 12_000}) == folder_of()
    assert folder_of({"evaluation.max_new_tokens": 9}) != folder_of()


def test_run_named_by_its_batch_size_is_found(folder_of, identity, tmp_path, toy_settings, toy_cache, toy_model):
    recorded = identity | {BATCH_FRAMES: 12_000}
    old = begin(tmp_path / "toy" / f"train-{digest(recorded)}", recorded)
    assert folder_of() == folder_of({BATCH_FRAMES: 12_000}) == old
    run = TrainingRun(toy_settings(), toy_cache, whisper_model.resolve(str(toy_model)), old)
    assert run.digest == digest(recorded), "its checkpoints name it"
    training_run.refuse_other_run(old, run.identity)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_dropout": 0.1},
        {"activation_dropout": 0.1},
        {"encoder_layerdrop": 0.2},
        {"decoder_layerdrop": 0.2},
        {"activation_function": "relu"},
        {"scale_embedding": True},
    ],
)
def test_other_config_with_the_same_weights_is_another_run(folder_of, toy_model, tmp_path, change):
    other = with_config(toy_model, tmp_path / "other", **change)
    assert folder_of(model=other) != folder_of()


def test_config_that_changes_no_weight_is_the_same_run(folder_of, toy_model, tmp_path):
    other = with_config(toy_model, tmp_path / "other", dropout=0.3, mask_time_prob=0.1, use_cache=False)
    masked = {"model.spec_augment": True}
    assert folder_of(model=other) == folder_of()
    assert folder_of(masked, other) != folder_of(masked), "time masks change training with SpecAugment"


def test_new_run_names_how_an_unfinished_one_differs(identity, tmp_path):
    other = begin(tmp_path / "train-other", identity | {"training.learning_rate": 5e-5})
    lines = record_log()
    training_run.log_unfinished_runs(tmp_path / "train-new", identity)
    expected = f"wanted {identity['training.learning_rate']}, found 5e-05"
    assert lines == [
        f"note: this is a new run. {other} is unfinished and is not continued, because of training.learning_rate: "
        + expected
    ]
    begin(tmp_path / "train-new", identity)
    training_run.log_unfinished_runs(tmp_path / "train-new", identity)
    shutil.rmtree(other / "checkpoints")
    training_run.log_unfinished_runs(tmp_path / "train-next", identity | {"training.steps": 9})
    assert len(lines) == 2, "a run that is resumed says nothing; one without a checkpoint has nothing to lose"
    assert "train-new is unfinished" in lines[1]


@pytest.mark.parametrize("context", ["clip", "full"])
def test_checkpoint_is_read_at_the_context_of_its_run(toy_model, identity, tmp_path, context):
    run = begin(tmp_path / "run", identity | {"training.context": context}, step=4)
    checkpoint = run / "checkpoints" / "checkpoint-4"
    shutil.copytree(toy_model, checkpoint, dirs_exist_ok=True)
    manifest.seal(checkpoint, kind="checkpoint", step=4)  # as in older versions
    ref = whisper_model.resolve(str(checkpoint))
    assert (ref.context, ref.facts["language"]) == (context, "sv")
    shutil.move(checkpoint, tmp_path / "elsewhere")
    assert whisper_model.resolve(str(tmp_path / "elsewhere")).context == "clip"
    manifest.seal(tmp_path / "elsewhere", kind="checkpoint", step=4, context=context, language="da")
    ref = whisper_model.resolve(str(tmp_path / "elsewhere"))
    assert (ref.context, ref.facts["language"]) == (context, "da")
