"""Short trainings for a try in notebook 02."""

from __future__ import annotations

import re

import pytest

from pipelines.course import trials
from pipelines.infra.errors import LabError


def test_without_a_name_the_trials_are_listed(toy_settings, toy_cache, tmp_path, capsys):
    assert trials.run("", toy_settings(), toy_cache, runs=tmp_path) is None
    assert re.findall(r"^(\w+): .*\(about \d+ s", capsys.readouterr().out, re.MULTILINE) == list(trials.TRIALS)
    assert not any(tmp_path.iterdir())


def test_unknown_trial_is_one_line(toy_settings, toy_cache, tmp_path):
    with pytest.raises(LabError, match=r"^TRIAL must be one of resume, learning_rate, overfitting, or empty, got 'x'$"):
        trials.run("x", toy_settings(), toy_cache, runs=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prediction", "result", "plots"),
    [
        ("resume", 0, "measured: 0 different arrays. That is right", 0),
        ("learning_rate", None, "", 1),
        ("overfitting", None, " steps. To compare", 3),
    ],
)
def test_trial_measures_and_leaves_nothing(
    toy_settings, toy_cache, tmp_path, capsys, one_thread, name, prediction, result, plots
):
    windows = {"training.window_share": 0.5, "training.window_fill": "random", "training.patience": 1}
    figure = trials.run(name, toy_settings(windows), toy_cache, prediction, runs=tmp_path)
    assert result in capsys.readouterr().out
    assert len(figure.axes if figure else []) == plots
    assert not any(tmp_path.iterdir())
