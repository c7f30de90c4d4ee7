"""The inference pipeline chooses a model."""

import os

import pytest

from pipelines.inference import pipeline as inference_pipeline
from pipelines.infra import manifest
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef


def create_model(runs, name, finished_s, kind="model", **facts):
    folder = runs / "tour" / f"train-{name}" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    manifest.seal(folder, kind=kind, **facts)
    os.utime(folder / manifest.MANIFEST, (finished_s, finished_s))
    return folder


def test_named_model_is_chosen_first(tmp_path):
    create_model(tmp_path, "a", 100)
    assert inference_pipeline.choose_model("hub://a/b", tmp_path) == ("hub://a/b", "named")


def test_rewritten_manifest_makes_no_model_newer(tmp_path):
    """As after a kill while a test score was added."""
    old = create_model(tmp_path, "z", 100, made="2026-11-01T10:00:00+00:00")
    newest = create_model(tmp_path, "a", 50, made="2026-11-01T10:00:00.500+00:00")
    older_version = create_model(tmp_path, "b", 100)
    (older_version / "model.safetensors").touch()
    os.utime(older_version / "model.safetensors", (200, 200))
    manifest.amend(older_version, test={"wer": 0.5})
    manifest.amend(old, test={"wer": 0.5})
    assert inference_pipeline.choose_model("", tmp_path) == (str(newest), "newest")


def test_newest_finished_run_is_chosen_next(tmp_path):
    create_model(tmp_path, "z", 100)
    newest = create_model(tmp_path, "a", 200)
    create_model(tmp_path, "c", 300, kind="report")
    (create_model(tmp_path, "damaged", 400) / "config.json").unlink()
    (create_model(tmp_path, "unfinished", 500) / manifest.MANIFEST).unlink()
    assert inference_pipeline.choose_model("", tmp_path) == (str(newest), "newest")


@pytest.mark.parametrize(
    ("facts", "settings", "language"),
    [
        ({"language": "da"}, '{"language": "swedish"}', "da"),
        ({}, '{"language": "<|fi|>"}', "fi"),
        ({}, '{"language": "Danish"}', "da"),
        ({}, '{"language": ["da"]}', "sv"),
        ({}, "{}", "sv"),
        ({}, "[", "sv"),
        ({}, None, "sv"),
    ],
)
def test_language_is_that_of_manifest_then_settings(tmp_path, facts, settings, language):
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(settings)
    ref = ModelRef("x", tmp_path, "folder", "1", facts=facts)
    assert whisper_model.language_of(ref) == language
    assert whisper_model.language_of(ref, "nn") == (language if facts or language != "sv" else "nn")


@pytest.mark.parametrize("runs", ["", "absent"])
def test_base_model_is_chosen_last(tmp_path, runs):
    assert inference_pipeline.choose_model(None, tmp_path / runs) == ("openai/whisper-tiny", "base")
