"""Pseudo-labels in a recipe: settings that are refused, the cache, leaks, and a model trained on them."""

import numpy as np
import pytest
from log_recorder import record_log

from pipelines import recipes
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.data_card import card
from pipelines.infra.errors import LabError
from pipelines.training import pipeline as training_pipeline
from tests.features.sources.unlabelled.conftest import TEXT, write

UNLABELLED = {"name": "more", "kind": "unlabelled", "path": "radio", "label_model": "run:tour"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source.kind": "unlabelled", "source.path": "radio"}, "source.label_model must name the model"),
        ({"source.kind": "unlabelled", "source.label_model": "run:tour"}, "source.path must name"),
        ({"source.kind": "mix", "source.parts": [{**UNLABELLED, "gives": ["train", "test"]}]}, "can give train only"),
        ({"source.kind": "mix", "source.parts": [{**UNLABELLED, "min_confidence": 2}]}, "less than or equal to 1"),
        (
            {"guards.other.source.kind": "unlabelled"}
            | {f"guards.other.source.{name}": UNLABELLED[name] for name in ("path", "label_model")},
            "must have transcripts by people",
        ),
    ],
)
def test_wrong_setting_gives_one_line(settings, message):
    with pytest.raises(LabError, match=message) as error:
        recipes.load("tour", settings)
    assert "\n" not in str(error.value)


@pytest.fixture
def mixed(engine, folder, tmp_path, speech, toy_model):
    """`mixed(label_model=...)`: settings of a mix of three labelled recordings, one for each split, and the others."""
    own = tmp_path / "own"
    own.mkdir()
    texts = {"train": "Rasten slutar snart.", "validation": "Kalven diar sin mor.", "test": "Låten är svår."}
    rows = ["path,text,split,speaker"]
    for seed, (split, text) in enumerate(texts.items(), start=10):
        write(own / f"{split}.wav", speech(32_000, seed))
        rows.append(f"{split}.wav,{text},{split},{split}-speaker")
    (own / "transcripts.csv").write_text("\n".join(rows), "utf-8")
    every = ["train", "validation", "test"]
    labelled = {"name": "own", "kind": "folder", "path": str(own), "gives": every, "own_names": True}
    part = {**UNLABELLED, "path": str(folder), "label_model": str(toy_model)}
    return lambda **options: {"source.kind": "mix", "source.parts": [labelled, {**part, **options}]}


def test_unlabelled_folder_becomes_training_labels(mixed, engine, toy_settings, toy_model, tmp_path):
    lines = record_log()
    cache = feature_pipeline.run(toy_settings(mixed()), runs=tmp_path / "runs")
    pseudo = cache.rows[cache.rows["label"] == "pseudo"]
    assert pseudo["split"].tolist() == ["train"] * 2
    assert pseudo["text"].tolist() == [TEXT] * 2
    (own,) = cache.rows.index[cache.rows["id"] == "train"]
    assert all(len(cache.labels(row)) > len(TEXT.split()) for row in pseudo.index)
    assert list(cache.labels(pseudo.index[0])) != list(cache.labels(own))
    assert {*pseudo["confidence"]} == {"0.950"} and pseudo["label_model"].nunique() == 1
    assert cache.counts == {"train": 3, "validation": 1, "test": 1, "rejected": 2}
    assert any("no calibrated confidence" in line for line in lines)

    page = (cache.folder / card.FILE).read_text("utf-8")
    assert "| label | pseudo | 2 |" in page and "2 transcripts (0.00 hours) were written by" in page
    assert "| low&#95;confidence | 1 |" in page and "filtered, as the recipe asks" in page

    n_decoded = engine.n_decoded
    stricter = feature_pipeline.run(toy_settings(mixed(min_confidence=0.99)), runs=tmp_path / "runs")
    assert stricter.digest != cache.digest and stricter.counts["train"] == 1
    assert engine.n_decoded == n_decoded


@pytest.mark.parametrize("cut", [False, True])
def test_test_recording_among_the_unlabelled_is_a_leak(mixed, toy_settings, folder, tmp_path, cut, speech):
    held_out = tmp_path / "own" / "test.wav"
    if cut:  # silence around it: the clip is a part of the recording, with other audio than the test clip
        write(
            held_out, np.concatenate([np.zeros(48_000, np.float32), speech(32_000, 12), np.zeros(48_000, np.float32)])
        )
    (folder / "copy.wav").write_bytes(held_out.read_bytes())
    with pytest.raises(LabError, match="leak_audio"):
        feature_pipeline.run(toy_settings(mixed()), runs=tmp_path / "runs")
    dropped = feature_pipeline.run(toy_settings({**mixed(), "curation.leaks": "drop"}), runs=tmp_path / "runs")
    (row,) = dropped.rejected[dropped.rejected["reason"] == "leak_audio"].to_dict("records")
    assert row["id"].startswith("more/copy.wav")


def test_recording_that_a_test_clip_is_cut_from_is_a_leak(mixed, toy_settings, folder, tmp_path, speech):
    table, held_out = tmp_path / "own" / "transcripts.csv", tmp_path / "own" / "test.wav"
    settings = mixed()
    write(held_out, np.concatenate([speech(32_000, 12), np.zeros(48_000, np.float32), speech(48_000, 13)]))
    header, *rows = table.read_text("utf-8").splitlines()
    rows = [f"{row},{'0,2' if row.startswith('test') else ','}" for row in rows]
    table.write_text("\n".join([f"{header},start,end", *rows]), "utf-8")
    (folder / "copy.wav").write_bytes(held_out.read_bytes())
    with pytest.raises(LabError, match=r"leak_audio \(more/copy.wav@.*: it was cut from the recording of test row"):
        feature_pipeline.run(toy_settings(settings), runs=tmp_path / "runs")


def test_pseudo_label_that_is_a_test_sentence_is_a_leak(mixed, toy_settings, tmp_path):
    table = tmp_path / "own" / "transcripts.csv"
    table.write_text(table.read_text("utf-8").replace("Låten är svår.", TEXT), "utf-8")
    with pytest.raises(LabError, match="leak_sentence"):
        feature_pipeline.run(toy_settings(mixed()), runs=tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "message"),
    [("run:toy", "must name the model of another recipe"), ("run:tour", "no finished run of tour")],
)
def test_model_of_a_recipe_must_be_another_and_finished(mixed, toy_settings, tmp_path, name, message):
    recipe = toy_settings({**mixed(label_model=name), "name": "toy"})
    with pytest.raises(LabError, match=message):
        feature_pipeline.run(recipe, runs=tmp_path / "runs")


@pytest.mark.slow
def test_teacher_labels_what_a_student_is_trained_on(mixed, toy_settings, tmp_path):
    runs = tmp_path / "runs"
    short = {"training.steps": 2, "training.eval_every": 2, "training.learning_rate": 1e-5}
    own = {"source.kind": "folder", "source.path": str(tmp_path / "own"), "name": "teacher", **short}
    teacher = toy_settings(own)
    training_pipeline.run(teacher, feature_pipeline.run(teacher, runs=runs), runs=runs)
    student = toy_settings({**mixed(label_model="run:teacher"), "name": "round1", **short})
    cache = feature_pipeline.run(student, runs=runs)
    model = training_pipeline.run(student, feature_pipeline.open_cache(student, runs=runs), runs=runs)
    report = experiment_pipeline.evaluate(student, cache, model.uri, runs=runs)
    (labelled,) = report.lineage["pseudo_labels"]
    assert labelled["model"].startswith("teacher-") and labelled["clips"] == (cache.rows["label"] == "pseudo").sum() > 0
    assert f"have pseudo-labels: {labelled['model']}" in report.page.read_text("utf-8")
    model_card = (report.folder / model.uri / "README.md").read_text("utf-8")
    assert f"have pseudo-labels: {labelled['model']} wrote their transcripts" in model_card
