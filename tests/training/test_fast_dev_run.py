"""fast_dev_run: everything is gone through in two steps, and nothing of it can be taken for the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest
from log_recorder import record_log

from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.features import pipeline as feature_pipeline
from pipelines.recipes import runs as recipe_runs
from pipelines.training import pipeline as training_pipeline
from pipelines.training.callbacks import progress
from pipelines.training.pipeline import CLIPS, NOTE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rehearsed(toy_settings, toy_cache, tmp_path_factory):
    """The runs folder after a rehearsal of training and scoring, the model, the reports and the lines told."""
    runs, lines = tmp_path_factory.mktemp("rehearsed"), []
    record_log(lines)
    recipe = toy_settings({"training.fast_dev_run": True, "training.steps": 5_000})
    model = training_pipeline.run(recipe, toy_cache, runs=runs, progress=progress.Progress())
    reports = experiment_pipeline.evaluate_base_and_tuned(recipe, toy_cache, model.uri, runs=runs)
    return recipe, runs, model, reports, lines


def test_fast_dev_run_does_two_steps_on_few_clips(rehearsed):
    _, _, model, reports, lines = rehearsed
    assert [row["step"] for row in model.history if "loss" in row] == [1, 2]
    assert [row["step"] for row in model.history if "eval_wer" in row] == [2]
    assert [report.score.n for report in reports.values()] == [CLIPS, CLIPS]
    assert lines.count(NOTE) == 3
    assert "mean nothing" in NOTE


def test_fast_dev_run_is_not_used_by_later_stages(rehearsed, toy_settings):
    recipe, runs, model, _, _ = rehearsed
    folder = runs / "toy-fast-dev-run" / "thrown_away"
    assert Path(model.uri) == folder / "run" / "model"
    assert [path.name for path in runs.iterdir()] == ["toy-fast-dev-run"]
    assert recipe_runs.newest_finished_model(runs) is None
    assert recipe_runs.read_stages(toy_settings(), runs) == {}
    assert recipe_runs.read_stages(recipe, runs)["training"]["model_uri"] == model.uri


def test_fast_dev_run_starts_from_scratch(rehearsed, toy_cache):
    recipe, runs, model, _, _ = rehearsed
    lines, left = [], Path(model.uri).parent / "left.over"
    record_log(lines)
    left.write_text("")
    again = training_pipeline.run(recipe, toy_cache, runs=runs, progress=progress.Progress())
    assert not left.exists()
    assert lines[1].startswith("starting from")
    assert again.digest == model.digest


def test_fast_dev_run_uses_existing_features(toy_settings, toy_cache, tmp_path):
    plain, recipe = toy_settings(), toy_settings({"training.fast_dev_run": True})
    with recipe_runs.record_stage(plain, tmp_path, "features") as note:
        note["cache_uri"] = toy_cache.uri
    assert feature_pipeline.open_cache(recipe, runs=tmp_path).digest == toy_cache.digest
