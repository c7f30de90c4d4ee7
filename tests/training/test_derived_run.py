"""A run whose settings are derived from its cache: log, identity, manifest and card say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from log_recorder import record_log

from pipelines.features import derived
from pipelines.infra import manifest
from pipelines.training import pipeline as training_pipeline
from pipelines.training.callbacks.progress import Progress
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = dict.fromkeys(("training.eval_every", "training.patience", "evaluation.max_new_tokens"), "auto")


def test_derived_settings_are_logged_and_recorded(toy_settings, toy_cache, toy_model, tmp_path):
    recipe, lines = toy_settings({"training.steps": 2, **AUTO}), record_log()
    base = whisper_model.resolve(str(toy_model))
    model = training_pipeline.run(recipe, toy_cache, runs=tmp_path, progress=Progress())
    values = derived.derive(recipe, toy_cache).values
    assert values.keys() == AUTO.keys()
    assert lines[0].startswith("derived from ") and all(f"{name} {value}" in lines[0] for name, value in values.items())
    explicit = toy_settings({"training.steps": 2, **values})
    assert training_pipeline.run_folder(explicit, toy_cache, base, tmp_path) == Path(model.uri).parent
    assert manifest.read(Path(model.uri))["derived"] == values
    assert "Derived from the number and length of the clips: `training.eval_every` " in (
        Path(model.uri) / "README.md"
    ).read_text("utf-8")


def test_cut_validation_hypotheses_are_counted_in_one_line(train_toy, tmp_path):
    model, _ = train_toy(tmp_path / "run", {"training.steps": 1, "training.eval_every": 1})
    assert model.validation["eval_cut"] > 0
    (note,) = [line for line in str(model).splitlines() if line.startswith("note: ")]
    assert " validation hypotheses were cut at evaluation.max_new_tokens" in note
