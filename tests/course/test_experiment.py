"""Tests of pipelines/course/experiment.py; notebook 05 is run in tests/cli/test_notebooks.py."""

import pytest
import sample_reports

from pipelines.course import experiment
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
        (CHANGE, [7, 7], r"at least two different numbers, got \[7, 7\]"),
    ],
)
def test_plan_that_shows_nothing_is_refused(change, seeds, message):
    with pytest.raises(LabError, match=message):
        experiment.plan("tour", change, seeds)


@pytest.mark.parametrize(
    ("change", "heading"), [(CHANGE, "## Model-centric"), ({"augment.noise_share": 0.5}, "## Data-centric")]
)
def test_readme_has_the_result_under_the_heading_of_the_change(tmp_path, change, heading):
    reports = [sample_reports.report(tmp_path, name, sample_reports.wrong(n)) for name, n in (("a", 3), ("b", 2))]
    comparison = compare([str(one.folder) for one in reports], runs=tmp_path)
    text = experiment.plan("tour", change, [1, 2]).readme("", comparison)
    sections = dict(zip(text.split("\n\n")[1::2], text.split("\n\n")[2::2]))
    assert f"`{next(iter(change))}` was changed" in sections[heading]
    assert "TODO: what else" in sections[({"## Model-centric", "## Data-centric"} - {heading}).pop()]
    assert "TODO: what you expected" in sections["## Hypothesis"]
