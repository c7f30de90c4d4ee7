"""Tests of pipelines/course/experiment.py; notebook 05 is run in tests/cli/test_notebooks.py."""

import shlex
from dataclasses import replace

import pytest
import sample_reports
from typer.testing import CliRunner

from pipelines import recipes
from pipelines.__main__ import app
from pipelines.course import experiment
from pipelines.course.project import rubric, template, training
from pipelines.experiments.comparison.compare import compare
from pipelines.infra.errors import LabError

CHANGE = {"training.label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("change", "seeds", "message"),
    [
        ({}, [1, 2], "change must be one setting"),
        (CHANGE | {"training.steps": 3}, [1, 2], "got 2: if two things change"),
        ({"training.label_smoothing": 0}, [1, 2], "is 0.0 there already"),
        ({"training.smoothing": 0.1}, [1, 2], "unknown setting"),
        ({"training": {"label_smoothing": 0.1, "steps": 3}}, [1, 2], "got 2: if two things change"),
        ("training.steps=3", [1, 2], "got 'training.steps=3'"),
        (None, [1, 2], "got None"),
        ({"training.seed": 9}, [1, 2], "a parameter of their own"),
        ({"name": "other"}, [1, 2], "changes neither weights nor transcripts"),
        ({"guards.english.source.kind": "tour-english"}, [1, 2], "changes neither weights nor transcripts"),
        (CHANGE, [7, 7], r"at least two different numbers, such as \[42, 43\], got \[7, 7\]"),
        (CHANGE, "42", "got '42'"),
        (CHANGE, 42, "got 42"),
        (CHANGE, [1, [2]], "at least two different numbers"),
        (CHANGE, [1, 1.5], "training.seed: Input should be a valid integer"),
    ],
)
def test_plan_that_shows_nothing_is_refused(change, seeds, message):
    with pytest.raises(LabError, match=message):
        experiment.plan("tour", change, seeds)


def test_nested_change_of_one_setting_is_accepted():
    planned = experiment.plan("tour", {"source": {"train": 480}}, [1, 2])
    assert planned.changes == {"source.train": (960, 480)}
    assert planned.table()["source.train"].tolist() == ["960", "960", "480", "480"]


def test_change_of_the_test_set_is_refused_before_training(toy_cache, monkeypatch):
    def features(recipe, runs):
        kept = toy_cache.rows["id"] != toy_cache.rows["id"][toy_cache.rows["split"] == "test"].iloc[0]
        return replace(toy_cache, rows=toy_cache.rows[kept]) if recipe.name.endswith("idea") else toy_cache

    monkeypatch.setattr(experiment.feature_pipeline, "run", features)
    monkeypatch.setattr(experiment.series, "run", lambda *arguments, **options: pytest.fail("a training was started"))
    with pytest.raises(LabError, match=r"the same test set, but source\.test changes it: \d+ clips before"):
        experiment.plan("tour", {"source.test": 10}, [1, 2]).run()


def test_change_without_features_fails_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.series, "run", lambda *arguments, **options: pytest.fail("a training was started"))
    missing = {"source.path": str(tmp_path / "none")}
    with pytest.raises(LabError, match="none"):
        experiment.plan("own", missing, [1, 2], {"source.path": str(tmp_path / "none either")}).run(tmp_path)


def test_space_that_is_no_owner_and_name_is_refused():
    with pytest.raises(LabError, match=r"space must be owner/name, .* got 'https://"):
        experiment.plan("tour", CHANGE, [1, 2]).share_commands("https://huggingface.co/spaces/a/b", None)


@pytest.mark.parametrize(
    ("change", "heading"), [(CHANGE, "## Model-centric"), ({"augment.noise_share": 0.5}, "## Data-centric")]
)
def test_readme_has_the_result_under_the_heading_of_the_change(tmp_path, change, heading):
    reports = [sample_reports.report(tmp_path, name, sample_reports.wrong(n)) for name, n in (("a", 3), ("b", 2))]
    comparison = compare([str(one.folder) for one in reports], runs=tmp_path)
    text = experiment.plan("tour", change, [1, 2]).readme("", comparison)
    sections = dict(zip(text.split("\n\n")[1::2], text.split("\n\n")[2::2]))
    assert f"Changed: `{next(iter(change))}` from" in sections[heading]
    assert "TODO: what else" in sections[({"## Model-centric", "## Data-centric"} - {heading}).pop()]
    assert "TODO: what you expected" in sections["## Hypothesis"]
    assert sections["## Result"] == experiment.summary(comparison)
    assert f"Verdict: {comparison.findings[1].verdict}." in sections["## Result"]


def test_headings_of_the_readme_are_those_of_a_project(tmp_path):
    reports = [sample_reports.report(tmp_path, name, sample_reports.wrong(n)) for name, n in (("a", 3), ("b", 2))]
    comparison = compare([str(one.folder) for one in reports], runs=tmp_path)
    ours = rubric.sections(experiment.plan("tour", CHANGE, [1, 2]).readme("", comparison))
    template.create(tmp_path / "my-idea", "tour")
    project = rubric.Project(tmp_path / "my-idea")
    assert ours.keys() <= project.plan.keys() | project.readme.keys()


def test_project_command_takes_the_change_along(tmp_path):
    words = shlex.split(experiment.plan("tour-lora", {"augment.noise_share": 0.5}, [1, 2]).project_command())
    assert words[:5] == ["python", "-m", "pipelines", "project", "new"]
    folder = tmp_path / "my-idea"
    done = CliRunner().invoke(app, ["project", "new", str(folder), *words[6:]], catch_exceptions=False)
    assert done.exit_code == 0
    planned = experiment.of_files(folder / "baseline.toml", folder / "idea.toml", [1, 2])
    assert planned.changes == {"augment.noise_share": (0.0, 0.5)}
    expected = recipes.load("tour-lora", {"training.seed": 1, "name": "my-idea-baseline"})
    assert planned.baseline[0].settings() == expected.settings()


@pytest.mark.parametrize(
    ("change", "seeds", "message"),
    [("", [1, 2], "idea.toml equals baseline.toml"), ("augment.noise_share = 0.5", [1], "at least two different")],
)
def test_project_that_shows_nothing_is_not_trained(tmp_path, change, seeds, message):
    template.create(tmp_path / "my-idea", "tour")
    with (tmp_path / "my-idea" / "idea.toml").open("a") as file:
        file.write(f"{change}\n")
    with pytest.raises(LabError, match=message):
        training.plan(rubric.open_folder(tmp_path / "my-idea"), seeds)
