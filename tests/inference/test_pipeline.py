"""The inference pipeline chooses a model."""

import os

import pytest

from pipelines.inference import pipeline as inference_pipeline
from pipelines.infra import manifest


def create_model(runs, name, finished_s, kind="model"):
    folder = runs / "tour" / f"train-{name}" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    manifest.seal(folder, kind=kind)
    os.utime(folder / manifest.MANIFEST, (finished_s, finished_s))
    return folder


def test_named_model_is_chosen_first(tmp_path):
    create_model(tmp_path, "a", 100)
    assert inference_pipeline.choose_model("hub://a/b", tmp_path) == ("hub://a/b", "named")


def test_newest_finished_run_is_chosen_next(tmp_path):
    create_model(tmp_path, "z", 100)
    newest = create_model(tmp_path, "a", 200)
    create_model(tmp_path, "c", 300, kind="report")
    (create_model(tmp_path, "damaged", 400) / "config.json").unlink()
    (create_model(tmp_path, "unfinished", 500) / manifest.MANIFEST).unlink()
    assert inference_pipeline.choose_model("", tmp_path) == (str(newest), "newest")


@pytest.mark.parametrize("runs", ["", "absent"])
def test_base_model_is_chosen_last(tmp_path, runs):
    assert inference_pipeline.choose_model(None, tmp_path / runs) == ("openai/whisper-tiny", "base")
