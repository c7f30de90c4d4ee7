"""The second figure of a report: the same model in transformers' own pipeline."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sample_reports import report, wrong

from pipelines.experiments import evaluation, leaderboard
from pipelines.experiments.comparison import compare, lookup
from pipelines.experiments.report import stock
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.recipes.settings import EvaluationSettings
from pipelines.training import model_card
from pipelines.whisper import model as whisper_model

HOW = {"engine": "transformers' pipeline cpu float32", "precision": "float32", "beam_size": 5, "timestamps": False}


def with_stock(made: evaluation.EvalReport, n: int, errors: int) -> evaluation.EvalReport:
    """Add a score in the stock pipeline on `n` clips with `errors` wrong words in each."""
    table = made.predictions
    rows = stock.sample(table["id"].tolist(), table["speaker"].tolist(), n)
    texts = {row: wrong(errors)(table.iloc[row]) for row in rows}
    evaluation._add_stock(made, stock.figure(table, texts, HOW, EvaluationSettings()), None)
    return evaluation.read_report(made.folder)


@pytest.mark.parametrize(
    ("delta", "interval", "says"),
    [
        (0.3, (0.2, 0.4), "this model needs the lab's decoder"),
        (0.03, (-0.1, 0.2), "it may need the lab's decoder: evaluation.stock_pipeline=true scores all clips"),
        (0.03, None, "it may need"),
        (0.02, (0.01, 0.03), "not worse than in this lab by more than 0.02"),
        (-0.4, (-0.5, -0.3), "not worse than in this lab by more than 0.02"),
    ],
)
def test_verdict_names_what_the_difference_means(delta, interval, says):
    assert says in stock.verdict({"delta": delta, "ci95": interval})


def test_sample_has_all_speakers_and_grows_by_nesting():
    ids, speakers = [f"clip{n}" for n in range(60)], [f"s{n % 6}" for n in range(60)]
    six, all_rows = stock.sample(ids, speakers, 6), stock.sample(ids, speakers, 60)
    assert {speakers[row] for row in six} == set(speakers)
    assert set(six) < set(stock.sample(ids, speakers, 20)) < set(all_rows)
    assert all_rows == list(range(60))
    other_order = stock.sample(ids[::-1], speakers[::-1], 6)
    assert {ids[::-1][row] for row in other_order} == {ids[row] for row in six}


def test_setting_decides_number_of_clips(toy_model):
    base = whisper_model.resolve(str(toy_model))
    tuned = replace(base, facts={"kind": "model"})
    assert [stock.n_clips(value, tuned, 60) for value in ("auto", True, False, 7, 90)] == [24, 60, 0, 7, 60]
    assert [stock.n_clips(value, base, 60) for value in ("auto", True, 7)] == [0, 60, 7]
    exported = replace(base, facts={"kind": "onnx"})
    assert stock.n_clips("auto", exported, 60) == 0
    with pytest.raises(LabError, match="does not read .* set evaluation.stock_pipeline to auto or false"):
        stock.n_clips(True, exported, 60)


def test_figure_is_added_to_a_finished_report_and_read_back(toy_settings, toy_cache, toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pipelines.whisper.engines.stock_pipeline.decode",
        lambda model, processor, features, _: ["ja"] * len(features),
    )
    ref = whisper_model.resolve(str(toy_model))

    def score(value):
        recipe = toy_settings({"evaluation.stock_pipeline": value})
        return evaluation.evaluate(recipe, toy_cache, ref, "test", tmp_path)

    plain, five = score(False), score(5)
    assert plain.folder == five.folder
    assert (plain.stock, five.stock.score.n) == (None, 5)
    assert manifest.problem(five.folder) is None
    assert five.score == plain.score
    assert score(False).stock == five.stock, "an existing figure stays"
    details = five.details()
    assert details["stock"] == json.loads(json.dumps(stock.facts(five.stock)))
    assert f"{five.stock.score.wer:.3f}" in five.page.read_text("utf-8")
    asked = []
    monkeypatch.setattr(
        stock, "_transcribe", lambda *args: asked.append(len(args[4])) or (dict.fromkeys(args[4], "nej"), HOW)
    )
    everything = score(True)
    assert asked == [7], "the others are taken from the report"
    assert sorted(everything.stock.hypotheses) == list(range(12))
    assert everything.as_dict()["stock"]["score"]["n"] == 12


def test_refused_model_is_left_out_with_auto_only(toy_settings, toy_cache, toy_model, tmp_path, monkeypatch):
    def refuse(*args):
        raise LabError("transformers' pipeline cannot decode this model")

    monkeypatch.setattr(stock, "_transcribe", refuse)
    ref = replace(whisper_model.resolve(str(toy_model)), facts={"kind": "model"})
    recipe = toy_settings({"evaluation.stock_pipeline": 2})
    with pytest.raises(LabError, match="cannot decode"):
        evaluation.evaluate(recipe, toy_cache, ref, "test", tmp_path)
    assert (
        evaluation.evaluate(toy_settings({"evaluation.stock_pipeline": "auto"}), toy_cache, ref, "test", tmp_path).stock
        is None
    )


def test_compare_and_leaderboard_rank_by_either(tmp_path):
    with_stock(report(tmp_path, "raw", wrong(1)), 60, errors=6)
    with_stock(report(tmp_path, "best", wrong(3)), 36, errors=2)
    by_lab, by_stock = (compare.compare(["raw", "best"], by=by, runs=tmp_path) for by in ("lab", "stock"))
    assert [one.findings[1].verdict for one in (by_lab, by_stock)] == ["worse", "better"]
    assert by_stock.findings[1].difference.n == 36, "the clips of both"
    assert by_lab.digest != by_stock.digest
    assert "transformers' own pipeline" in str(by_stock)
    assert by_stock.as_dict()["by"] == "stock"

    board = leaderboard.rank(["raw", "best"], runs=tmp_path)
    assert [entry.by for entry in board.ranked] == ["this lab, recipe raw", "this lab, recipe best"]
    assert board.ranked[1].delta == pytest.approx(2 / 12)
    assert board.ranked[1].delta_ci95
    stocks = leaderboard.rank(["raw", "best"], by="stock", runs=tmp_path)
    assert [entry.n for entry in stocks.ranked + stocks.not_comparable] == [60, 36], "another set of clips"


def test_comparison_by_stock_needs_its_score(tmp_path):
    for name in ("raw", "best"):
        report(tmp_path, name)
    with pytest.raises(LabError, match=r"no score in the stock pipeline: .*evaluation.stock_pipeline=true"):
        compare.compare(["raw", "best"], by="stock", runs=tmp_path)
    with pytest.raises(LabError, match="--by must be lab .* or stock .* got 'wer'"):
        leaderboard.rank(["raw"], by="wer", runs=tmp_path)


def test_card_has_both_figures(tmp_path):
    made = with_stock(report(tmp_path, "raw", wrong(1)), 36, errors=6)
    facts = {
        "test_stock": {
            **stock.facts(made.stock),
            "test_set": lookup.in_stock_pipeline(made).test_set,
            "normaliser": "1",
        }
    }
    text = model_card._decoded(facts)
    assert "On 36 test clips it makes 0.500 errors per word, this lab 0.083" in text
    assert "this model needs the lab's decoder" in text
