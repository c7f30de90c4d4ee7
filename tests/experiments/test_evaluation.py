from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.experiments import evaluation, figures
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.report import slices as report_slices
from pipelines.features import pipeline as feature_pipeline
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import runs as recipe_runs
from pipelines.speech import scoring
from pipelines.speech import text as speech_text
from pipelines.training import pipeline as training_pipeline
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(toy_model):
    return whisper_model.resolve(str(toy_model))


@pytest.fixture
def heard(monkeypatch):
    """Return `heard(function)`, which makes the model write `function(row of the cache)` and returns its options."""

    def plan(write) -> list[dict]:
        calls = []

        def decode_rows(model, processor, cache, rows, options, on_clips=lambda n: None):
            calls.append(dataclasses.asdict(options))
            on_clips(len(rows))
            return [decoding.Hypothesis(write(cache.rows.iloc[row]), -0.1, 5) for row in rows]

        monkeypatch.setattr(decoding, "decode_rows", decode_rows)
        monkeypatch.setattr(whisper_model, "load", lambda ref, **kwargs: torch.nn.Module())
        monkeypatch.setattr(decoding, "engine_name", lambda model: "transformers cpu float32")
        return calls

    return plan


@pytest.fixture
def score(toy_settings, toy_cache, base, tmp_path):
    """Return `score()`, which evaluates the toy model on the test split; arguments replace defaults."""

    def make(ref=base, split="test", cache=toy_cache, overrides=None, **told) -> EvalReport:
        return evaluation.evaluate(toy_settings(overrides), cache, ref, split, tmp_path / "reports", **told)

    return make


def same(one: EvalReport, other: EvalReport) -> bool:
    pd.testing.assert_frame_equal(one.predictions, other.predictions)
    return dataclasses.replace(one, predictions=None) == dataclasses.replace(other, predictions=None)


def test_report_is_written_once_and_read_back_equal(score, toy_cache, monkeypatch):
    told = []
    report = score(on_clips=told.append)
    assert sum(told) == 12
    assert manifest.problem(report.folder) is None
    assert same(evaluation.read_report(report.folder), report)
    rows = toy_cache.rows.iloc[toy_cache.split("test")]
    assert report.predictions["id"].tolist() == rows["id"].tolist()
    assert report.predictions["reference"].tolist() == rows["text"].tolist()
    assert (report.score.n, report.score.speakers, report.split) == (12, rows["speaker"].nunique(), "test")
    assert report.score.wer > 0.5
    assert report.seconds > 0

    for module, name in ((decoding, "decode_rows"), (whisper_model, "load")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("decoded again"))
    assert same(score(on_clips=told.append), report)
    assert sum(told) == 12


def test_same_clips_are_decoded_once_for_all_recipes(heard, toy_settings, toy_cache, toy_model, tmp_path):
    calls = heard(lambda row: row["text"] + " ja")

    def score(cache, **overrides) -> EvalReport:
        recipe = toy_settings({name.replace("__", "."): value for name, value in overrides.items()})
        return experiment_pipeline.evaluate(recipe, cache, str(toy_model), runs=tmp_path)

    first = score(toy_cache)
    other = score(toy_cache, name="other", evaluation__bootstrap_samples=250)
    assert len(calls) == 1
    assert other.folder.parents[1].name == "other"
    assert other.predictions.equals(first.predictions)
    assert (other.raw.wer, other.seconds) == (first.raw.wer, first.seconds)

    train = {"source.train": 8, "name": "fewer"}
    fewer = score(feature_pipeline.run(toy_settings(train), runs=tmp_path), name="fewer", source__train=8)
    assert len(calls) == 1, "another cache with the same test clips"
    assert fewer.predictions["unseen_words"].sum() > first.predictions["unseen_words"].sum()

    score(toy_cache, name="longer", evaluation__max_new_tokens=17)
    test = {"source.test": 8, "name": "short"}
    score(feature_pipeline.run(toy_settings(test), runs=tmp_path), name="short", source__test=8)
    assert len(calls) == 3, "other decoding settings, and other clips"


def test_scores_match_predictions(score, heard):
    heard(lambda row: row["text"].lower().strip(".") if row["gender"] == "female" else row["text"] + " ja")
    report = score(overrides={"evaluation.bootstrap_samples": 250, "evaluation.seed": 3})
    texts = [report.predictions[name].tolist() for name in ("reference", "hypothesis", "speaker")]
    assert report.score == scoring.score(*texts, samples=250, seed=3)
    assert report.raw == scoring.score(*texts, normalised=False, samples=250, seed=3)
    males = (report.predictions["gender"] == "male").sum()
    assert 0 < males < 12
    assert (report.score.insertions, report.score.substitutions, report.score.deletions) == (males, 0, 0)
    assert report.raw.substitutions > 0
    assert report.predictions["wer"].gt(0).tolist() == report.predictions["gender"].eq("male").tolist()


@pytest.mark.parametrize(
    "other",
    [{"split": "validation"}, {"overrides": {"evaluation.max_new_tokens": 17}}, {"overrides": {"language": "da"}}],
)
def test_changed_identity_creates_another_report(score, heard, other):
    calls = heard(lambda row: "ja")
    folders = {score().folder, score(**other).folder, score().folder, score(**other).folder}
    assert (len(folders), len(calls)) == (2, 2)


def test_another_model_creates_another_report(score, heard, base, toy_model, tmp_path):
    calls = heard(lambda row: "ja")
    shutil.copytree(toy_model, tmp_path / "copy")
    assert score().folder == score(ref=whisper_model.resolve(str(tmp_path / "copy"))).folder
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["model.decoder.layer_norm.weight"][0] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert score().folder != score(ref=whisper_model.resolve(str(tmp_path / "copy"))).folder
    assert score().folder != score(ref=dataclasses.replace(base, context="clip")).folder
    assert len(calls) == 3


def test_damaged_report_is_refused_and_rebuilt(score, heard):
    calls = heard(lambda row: row["text"])
    report = score()
    table = report.folder / "predictions.csv"
    table.write_text(table.read_text("utf-8").replace("tour-test-00001", "tour-test-00009"), "utf-8")
    with pytest.raises(LabError, match=r"report .* predictions.csv is damaged .* Remove it and evaluate again"):
        evaluation.read_report(report.folder)
    again = score()
    assert again.predictions["id"].iloc[0] == "tour-test-00001"
    assert len(calls) == 2
    assert manifest.problem(again.folder) is None


def test_slices_use_metadata_of_the_source(score, heard):
    heard(lambda row: row["text"] if row["gender"] == "female" else "")
    slices = score().slices()
    assert set(slices["slice"]) == {"gender", "variant", "origin", "duration", "snr", "words"}
    assert slices.groupby("slice")["n"].sum().tolist() == [12] * 6
    gender = slices[slices["slice"] == "gender"].set_index("value")
    assert (gender.loc["female", "wer"], gender.loc["male", "wer"]) == (0, 1)
    with_interval = slices[slices["low"].notna()]
    assert len(with_interval) and (with_interval["low"] <= with_interval["wer"]).all()
    assert (with_interval["wer"] <= with_interval["high"]).all()
    assert set(slices[slices["slice"] == "variant"]["value"]) == {"sv+f2", "sv+f3", "sv+m3", "sv+m6"}


def test_missing_metadata_is_a_separate_slice(score, heard, toy_cache):
    heard(lambda row: row["text"])
    accents = [None, "Gotland", float("nan")] * len(toy_cache.rows)
    cache = dataclasses.replace(toy_cache, rows=toy_cache.rows.assign(accent=accents[: len(toy_cache.rows)]))
    report = score(cache=cache)
    accent = report.slices().query("slice == 'accent'").set_index("value")
    assert accent["n"].to_dict() == {"": 8, "Gotland": 4}
    assert "unknown" in report.page.read_text("utf-8")


def test_worst_utterances_come_first(score, heard):
    heard(lambda row: " ".join([row["text"], *["ja"] * (int(row["id"][-2:]) % 7)]))
    report = score()
    worst = report.worst(5)
    assert worst["wer"].tolist() == sorted(report.predictions["wer"], reverse=True)[:5]
    assert worst["wer"].iloc[0] > 0
    assert list(worst.columns) == ["reference", "hypothesis", "wer", "speaker"]
    assert all(row.hypothesis.startswith(row.reference) for row in worst.itertuples())
    assert len(report.worst(100)) == 12


def test_report_names_quantised_weights(score, heard, base):
    heard(lambda row: "ja")
    assert "q8" not in score().model
    report = score(ref=dataclasses.replace(base, name="openai/whisper-small", quantisation="q8"))
    assert report.model == f"openai/whisper-small (q8) @ {base.revision}"
    assert manifest.read(report.folder)["quantisation"] == "q8"
    assert evaluation.read_report(report.folder).model == report.model


def test_report_names_engine_and_search(score, toy_cache):
    report, line = score(), "transformers cpu float32, greedy, without timestamps"
    expected = {"engine": "transformers cpu float32", "precision": "float32", "beam_size": 1, "timestamps": False}
    assert report.decoding == expected == report.details()["decoding"] == report.as_dict()["decoding"]
    assert f"Decoded by {line}." in report.page.read_text("utf-8")
    assert f"decoded by {line}" in str(report)
    other = score(overrides={"evaluation.seed": 5}, earlier=[report.folder])
    assert (other.folder != report.folder, other.decoding) == (True, expected), "its transcripts are taken over"


def test_beams_of_the_recipe_give_a_report_of_their_own(score, monkeypatch):
    frames, decode = [], decoding.decode_in_batches
    monkeypatch.setattr(decoding, "decode_in_batches", lambda *a: frames.append(a[3].batch_frames) or decode(*a))
    greedy = score(overrides={"evaluation.max_new_tokens": 6})
    beams = score(overrides={"evaluation.max_new_tokens": 6, "evaluation.beam_size": 4})
    assert beams.folder != greedy.folder
    assert "beam search with 4 beams" in (beams.folder / "report.html").read_text("utf-8")
    assert beams.predictions["hypothesis"].tolist() != greedy.predictions["hypothesis"].tolist()
    assert frames == [24_000, 6_000], "a batch holds as many texts with beams as without"


def test_model_is_decoded_at_its_training_length(score, heard, base):
    calls = heard(lambda row: "ja")
    score(overrides={"evaluation.max_new_tokens": 9})
    score(ref=dataclasses.replace(base, context="clip"))
    assert [call["full_context"] for call in calls] == [True, False]
    assert (calls[0]["max_new_tokens"], calls[0]["language"], calls[0]["batch_frames"]) == (9, "sv", 24_000)


@pytest.mark.parametrize("text", ["", "007", "NA", 'han sa "ja"', "rad\nrad", "rad\rrad", "a,b;c", "å ä ö é", "1.50"])
def test_transcripts_survive_the_csv_round_trip(score, heard, text):
    heard(lambda row: text)
    report = score()
    assert report.predictions["hypothesis"].tolist() == [text] * 12
    assert len(report.slices()) > 5


def test_empty_split_raises_one_line_error(score, toy_cache):
    lacking = dataclasses.replace(toy_cache, rows=toy_cache.rows[toy_cache.rows["split"] != "test"])
    with pytest.raises(LabError, match="has no test clips to score"):
        score(cache=lacking)


# ---- as a stage


def test_test_score_is_added_to_the_model_manifest(toy_settings, toy_cache, toy_model, heard, tmp_path):
    calls = heard(lambda row: row["text"])
    tuned = tmp_path / "tuned"
    shutil.copytree(toy_model, tuned)
    manifest.seal(tuned, kind="model", digest="d1", name="toy-d1", context="clip")
    reports = experiment_pipeline.evaluate_base_and_tuned(toy_settings(), toy_cache, str(tuned), runs=tmp_path / "runs")
    assert [reports[name].model.partition(" @ ")[0] for name in ("before", "after")] == ["(a local path)", "toy-d1"]
    assert [call["full_context"] for call in calls] == [True, False]
    assert whisper_model.resolve(str(tuned)).facts["test"]["wer"] == reports["after"].score.wer == 0
    assert not (toy_model / manifest.MANIFEST).exists()
    noted = recipe_runs.read_stages(toy_settings(), tmp_path / "runs")["scores"]
    assert noted["after"] == str(reports["after"].folder)
    experiment_pipeline.evaluate_base_and_tuned(toy_settings(), toy_cache, str(tuned), runs=tmp_path / "runs")
    assert len(calls) == 2


def test_validation_score_is_not_added_to_the_model(toy_settings, toy_cache, toy_model, heard, tmp_path):
    heard(lambda row: row["text"])
    tuned = tmp_path / "tuned"
    shutil.copytree(toy_model, tuned)
    manifest.seal(tuned, kind="model", digest="d1", name="toy-d1", context="clip")
    experiment_pipeline.evaluate(toy_settings(), toy_cache, str(tuned), "validation", runs=tmp_path / "runs")
    assert "test" not in whisper_model.resolve(str(tuned)).facts


@pytest.fixture(scope="module")
def tuned(toy_settings, toy_cache, tmp_path_factory):
    """Return the toy model after two training steps."""
    runs = tmp_path_factory.mktemp("tuned")
    return training_pipeline.run(toy_settings({"training.steps": 2, "training.eval_every": 2}), toy_cache, runs=runs)


def test_report_records_test_set_and_lineage(score, base, tuned):
    of_base, of_tuned = score(), score(whisper_model.resolve(tuned.uri))
    assert of_tuned.test_set == of_base.test_set == evaluation.test_set(of_base.predictions.iloc[::-1])
    other = of_base.predictions.assign(reference=["ett annat ord", *of_base.predictions["reference"][1:]])
    assert evaluation.test_set(other) != of_base.test_set != score(split="validation").test_set
    told = of_tuned.lineage
    plain = f"(a local path) @ {base.revision}"
    assert (of_base.model, of_base.lineage) == (plain, {"base": plain}), "whose machine it was is nobody's business"
    assert (told["digest"], told["training_seconds"], told["base"]) == (tuned.digest, tuned.seconds, plain)
    assert told["recipe"] == told["settings"]["name"] == "toy"


# ---- the page and what programs read


def test_report_contains_page_and_json(score, heard, toy_cache, toy_model):
    heard(lambda row: f"<b>{row['text']}</b>" if row["gender"] == "female" else "hej")
    report = score()
    assert set(manifest.read(report.folder)["files"]) == {"predictions.csv", "report.json", "report.html"}
    facts, page = report.details(), report.page.read_text("utf-8")
    assert facts["score"]["wer"] == report.score.wer
    assert facts["slices"] == report_slices.rows(report.predictions)
    assert facts["speed"]["decoding_seconds"] == report.seconds
    assert facts["utterances"] == 12
    assert [row["id"] for row in facts["worst"]] == report.predictions.nlargest(10, "wer")["id"].tolist()
    for row in facts["worst"]:
        assert page.count(row["id"]) >= 2, "told, and heard: the toy's source is at hand"
    assert page.count("data:audio/flac") == 10
    assert len(page) < 2_000_000
    for path in (toy_model, toy_cache.folder, report.folder):
        assert str(path.parent) not in page + json.dumps(facts), "nothing tells whose machine it was"


def test_lineage_of_a_tuned_model_contains_no_path(score, tuned, toy_model):
    report = score(whisper_model.resolve(tuned.uri))
    facts, page = json.dumps(report.details()), report.page.read_text("utf-8")
    assert "(a local path) @ " in facts, "the base is told without its place"
    assert str(toy_model.parent) not in facts + page
    assert str(tuned.uri) not in facts + page
    assert "training.learning_rate" in page


def test_predictions_contain_confidence_and_unseen_words(score, toy_cache):
    predictions = score().predictions
    assert predictions["logprob"].between(-12, -1e-4).all()
    assert predictions["logprob"].nunique() > 3
    assert predictions["tokens"].between(1, 16).all()
    said = [len(speech_text.normalise(line).split()) for line in predictions["reference"]]
    assert predictions["unseen_words"].between(0, said).all()
    assert predictions["unseen_errors"].between(0, predictions["unseen_words"]).all()
    assert predictions["unseen_errors"].sum() > 0
    assert predictions["snr_db"].between(5, 80).all()


def test_report_of_an_older_version_is_readable(score, heard, tmp_path):
    heard(lambda row: "ja")
    new = score()
    old = tmp_path / "old"
    old.mkdir()
    kept = ["id", "speaker", "duration_s", "gender", "variant", "origin", "reference", "hypothesis", "wer"]
    new.predictions[kept].to_csv(old / "predictions.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    told = manifest.read(new.folder)
    facts = ("model", "quantisation", "split", "identity", "score", "raw", "seconds")
    manifest.seal(old, kind="report", **{name: told[name] for name in facts})
    report = evaluation.read_report(old)
    assert (report.page, report.details(), report.lineage, report.test_set) == (None, {}, {}, "")
    assert report.decoding == {}
    assert "decoded by" in str(new)
    assert "decoded by" not in str(report)
    assert report.score == new.score
    assert set(report.slices()["slice"]) == {"gender", "variant", "origin"}
    assert len(report.worst(3)) == 3


def test_decoding_time_excludes_model_loading(score, heard, monkeypatch):
    heard(lambda row: "ja")
    monkeypatch.setattr(whisper_model, "load", lambda ref, **kwargs: time.sleep(0.4))
    assert 0 < score().seconds < 0.3


def test_slices_figure_links_the_report_page(score, heard):
    heard(lambda row: row["text"])
    report = score()
    shown = figures.slices(report).to_html()
    assert str(report.page) in shown
    assert f'href="{os.path.relpath(report.page, environment.ROOT / "notebooks")}"' in shown
    assert "sv+f2" in shown
    assert "0.000 to 0.000" in shown
    hostile = dataclasses.replace(report, predictions=report.predictions.assign(gender="<i>x</i>"))
    assert "&lt;i&gt;x" in figures.slices(hostile).to_html()
    assert "<i>" not in figures.slices(hostile).to_html()
