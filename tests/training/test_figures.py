"""Plots of notebook 02: batches, curves, the loss of single tokens."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.training import figures
from pipelines.training.validation import token_losses
from pipelines.whisper import model as whisper_model


def test_batch_from_buckets_has_less_padding(toy_cache, toy_settings):
    left, right = figures.batches(toy_settings(), toy_cache).axes
    epochs = [float(axes.get_title().partition("epoch: ")[2].rstrip("%)")) for axes in (left, right)]
    assert epochs[1] < epochs[0]
    assert len(left.images) == len(right.images) == 4
    for axes in (left, right):  # as in notebook 01: low frequencies at the bottom
        assert all(image.origin == "lower" for image in axes.images)


def test_last_batch_of_a_small_corpus_is_drawn(toy_cache, toy_settings):
    left, _ = figures.batches(toy_settings({"training.batch_size": 64}), toy_cache).axes
    assert len(left.images) == 16


def history(n: int) -> list[dict[str, float]]:
    interval = {"eval_wer": 0.5, "eval_wer_low": 0.4, "eval_wer_high": 0.6, "eval_loss": 1.0}
    return [{"step": step, "loss": 1.0} for step in range(1, 9)] + [{"step": k, **interval} for k in range(1, n + 1)]


@pytest.mark.parametrize(("n", "line"), [(1, ":"), (2, ":"), (3, "-")])
def test_two_validations_are_no_curve(n: int, line: str):
    middle = figures.curves(history(n)).axes[1]
    assert middle.lines[0].get_linestyle() == line
    intervals = middle.lines[1:]
    assert [list(drawn.get_ydata()) for drawn in intervals] == [[0.4, 0.6]] * n


def test_token_losses_sum_to_the_loss_of_the_labels(toy_cache, toy_model):
    losses = token_losses(whisper_model.resolve(str(toy_model)), toy_cache, 0)
    assert losses.shape == (len(toy_cache.labels(0)),)
    assert (losses > 0).all() and np.isfinite(losses).all()


def test_token_losses_are_plotted_with_their_means():
    (axes,) = figures.token_losses(["Hej", "."], np.array([2.0, 1.0]), np.array([0.5, 0.25])).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before, mean 1.50", "after, mean 0.38"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Hej", "."]
