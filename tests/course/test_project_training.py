"""`project train` on the toy model: four trainings, their scores, the kept plan, and what `check` then misses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.course.project import page, rubric, template, training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, toy_recipe: Path, toy_model: Path) -> Path:
    """A project of the toy, trained by the command before its plan was written."""
    folder = tmp_path_factory.mktemp("projects") / "my-idea"
    template.create(folder, "tour", {"augment.noise_share": 0.5})
    toy = toy_recipe.read_text("utf-8").replace('name = "toy"', 'name = "my-idea-baseline"')
    (folder / "baseline.toml").write_text(f'{toy}\n[model]\nbase = "{toy_model}"\n')
    done = CliRunner().invoke(app, ["project", "train", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    (folder / "output.txt").write_text(done.output)
    return folder


def test_both_recipes_are_trained_with_two_seeds(trained: Path):
    comparison = rubric.Project(trained).comparison
    assert [finding.experiment.seeds for finding in comparison.findings] == [[42, 43], [42, 43]]
    assert rubric.Project(trained).scores.keys() == {"before", "after"}


def test_output_has_the_verdict_and_the_next_command(trained: Path):
    output = (trained / "output.txt").read_text()
    verdict = rubric.Project(trained).comparison.findings[1].verdict
    assert "Changed: `augment.noise_share` from `0.0` to `0.5`. WER " in output
    assert f"Verdict: {verdict}." in output
    assert (Path(re.search("MODEL_URI=(.*) make app", output)[1]) / "model.safetensors").is_file()
    assert f"Next: write {trained / 'README.md'}, then python -m pipelines project check {trained}\n" in output


def test_only_texts_are_missing_after_the_training(trained: Path):
    _, lines = rubric.check(trained)
    met = {line.key for line in lines if line.is_met}
    assert met >= {"change", "reproducible", "before_after", "model_card"}
    texts = {"plan", "data", "comparison", "discussion", "errors", "demo", "cost"}
    assert texts & met == set()
    assert rubric.next_step(lines).startswith("plan.md, section Hypothesis")
    html = page.write(*rubric.check(trained)).read_text("utf-8")
    assert "Each speaker of the test set" in html


def test_plan_that_changes_after_the_training_is_noted(trained: Path):
    assert "README.md, section Hypothesis" not in (trained / "output.txt").read_text()
    assert "note: plan.md, section Hypothesis: replace TODO" in (trained / "output.txt").read_text()
    project = rubric.Project(trained)
    assert project.plan_note == ""
    (trained / "plan.md").write_text("## Hypothesis\n\nWhat we have seen is what we expected.\n")
    assert "plan.md was changed after the first training" in rubric.Project(trained).plan_note
    assert "changed after the first training" in page.write(*rubric.check(trained)).read_text("utf-8")


def test_second_call_trains_nothing(trained: Path):
    before = {path: path.stat().st_mtime_ns for path in trained.glob("runs/*/train-*/model/model.safetensors")}
    assert len(before) == 4
    kept = (trained / "runs" / "plan.md").read_text()
    training.plan(rubric.open_folder(trained), [42, 43]).run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (trained / "runs" / "plan.md").read_text() == kept
    assert json.loads((trained / "runs" / "my-idea" / "stages.json").read_text())["training"]["seconds"] > 0
