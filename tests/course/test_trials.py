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


def losses_of(ends: dict[float, float | None]):
    """Return a training that ends with these losses by learning rate; None: it stops with an error after a step."""

    def train(recipe, cache, folder, *, history):
        end = ends[round(recipe.training.learning_rate / 1e-3)]
        history[:] = [{"step": 1, "loss": 4.0}]
        if end is None:
            raise LabError("diverged")
        history += [{"step": step, "loss": end} for step in range(2, recipe.training.steps + 1)]

    return train


@pytest.mark.parametrize(
    ("ends", "line"),
    [
        ({1: 1.0, 4: 0.9, 16: 3.0, 64: 7.0}, "measured: 16 times. That is right within a factor of 4."),
        ({1: 1.0, 4: 0.9, 16: 1.2, 64: None}, "measured: 64 times. That is right within a factor of 4."),
        ({1: 1.0, 4: float("nan"), 16: 2.0, 64: None}, "measured: 4 times. That is right within a factor of 4."),
        ({1: None, 4: None, 16: None, 64: None}, "measured: 1 times. That is too high."),
        ({1: 1.0, 4: 1.1, 16: 0.8, 64: 1.1}, "No training broke up to 64 times the recipe's learning rate."),
    ],
)
def test_rate_that_breaks_training_is_found(toy_settings, toy_cache, tmp_path, monkeypatch, capsys, ends, line):
    monkeypatch.setattr(trials, "_train", losses_of(ends))
    (axes,) = trials.run("learning_rate", toy_settings(), toy_cache, 16, runs=tmp_path).axes
    assert line in capsys.readouterr().out
    assert len(axes.lines) == 4


def test_lowest_validation_loss_is_found(toy_settings, toy_cache, tmp_path, monkeypatch, capsys):
    def train(recipe, cache, folder, *, history):
        assert (cache.rows["split"] == "train").sum() == 48 and recipe.training.window_share == 0
        losses = zip(range(10, 101, 10), [3, 2, 1, 2, 3, 4, 5, 6, 7, 8], strict=True)
        history[:] = [{"step": step, "loss": 1.0, "eval_loss": loss, "eval_wer": 0.5} for step, loss in losses]

    monkeypatch.setattr(trials, "_train", train)
    settings = toy_settings({"training.window_share": 0.5, "training.window_fill": "random"})
    assert len(trials.run("overfitting", settings, toy_cache, 60, runs=tmp_path).axes) == 3
    assert "measured: 30 steps. That is too high." in capsys.readouterr().out


@pytest.mark.slow
def test_resumed_training_equals_one_in_one_piece(toy_settings, toy_cache, tmp_path, capsys, one_thread):
    settings = toy_settings({"training.window_share": 0.5, "training.patience": 1})
    assert trials.run("resume", settings, toy_cache, 0, runs=tmp_path) is None
    printed = capsys.readouterr().out
    assert "measured: 0 different arrays. That is right" in printed
    first, second = re.findall(r"sha256 (\w+)", printed)
    assert first == second
    assert not any(tmp_path.iterdir()), "the folder of the trial is removed"
