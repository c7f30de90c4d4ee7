"""A loss or a gradient that is no number: the run stops before the step, keeps what is good, and says what to try."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pipelines.infra import manifest
from pipelines.infra.errors import Unfinished
from pipelines.training import loop as training_loop
from pipelines.training import trainer
from pipelines.training.callbacks.divergence import Diverged, Guard
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"training.steps": 6, "training.eval_every": 2}


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(7, "loss")`: the batch of the 7th forward pass in training has a NaN in its loss, or in its gradient."""

    def plan(nth: int, what: str) -> None:
        passes = 0
        loss = trainer.token_mean_loss

        def spoilt(outputs, labels, num_items_in_batch=None, **options):
            nonlocal passes
            passes += 1
            total = loss(outputs, labels, num_items_in_batch, **options)
            if passes == nth and what == "loss":
                return total * math.nan
            if passes == nth:
                total.register_hook(lambda grad: grad * math.inf)
            return total

        monkeypatch.setattr(training_loop, "token_mean_loss", spoilt)

    return plan


def all_finite(folder: Path) -> bool:
    model = whisper_model.load(whisper_model.ModelRef("checkpoint", folder, "folder", "x"))
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize(("what", "told"), [("loss", "the loss of step 5 is nan"), ("gradient", "the gradient's norm")])
def test_nan_stops_before_the_step_and_keeps_weights(train_toy, spoil, tmp_path, what, told):
    run = tmp_path / "run"
    spoil(5, what)
    ended, _ = train_toy(run, SETTINGS)
    assert not isinstance(ended, Unfinished)
    kept = run / "checkpoints" / "checkpoint-4"
    assert f"training diverged: {told}" in str(ended)
    assert f"The weights of {kept} are kept" in str(ended)
    assert "training.learning_rate=0.0005" in str(ended)
    assert "\n" not in str(ended)
    assert sealed_checkpoints.listed(run / "checkpoints")[-1] == kept
    assert manifest.problem(kept) is None
    assert all_finite(kept)
    assert not (run / "model").exists()


def test_next_start_logs_earlier_divergence(train_toy, spoil, tmp_path, monkeypatch):
    spoil(3, "loss")
    train_toy(tmp_path / "run", SETTINGS)
    monkeypatch.undo()
    made, lines = train_toy(tmp_path / "run", SETTINGS)
    assert lines[:2] == [
        "note: this run diverged before (the loss of step 3 is nan); on a CPU the same steps end the same way",
        "resuming from checkpoint-2",
    ]
    assert made.history[-1]["step"] == 6


def test_nan_in_first_accumulated_batch_is_detected(train_toy, spoil, tmp_path):
    spoil(3, "loss")
    ended, _ = train_toy(tmp_path / "run", SETTINGS | {"training.accumulation": 2})
    assert "the loss of step 2 is nan. The weights of the base model are kept" in str(ended)
    assert sealed_checkpoints.listed(tmp_path / "run" / "checkpoints") == []


def test_weights_with_nan_validation_loss_are_not_saved(train_toy, tmp_path, monkeypatch):
    wers = iter([0.5, 0.4])
    losses = iter([1.0, math.nan])
    monkeypatch.setattr(
        training_loop, "validator", lambda *args: lambda model: {"wer": next(wers), "loss": next(losses)}
    )
    ended, _ = train_toy(tmp_path / "run", SETTINGS)
    assert "the validation loss of step 4 is nan" in str(ended)
    assert [path.name for path in sealed_checkpoints.listed(tmp_path / "run" / "checkpoints")] == ["checkpoint-2"]


def test_float16_scaler_may_skip_a_limited_number_of_steps():
    guard = Guard(scaled=True)
    for step in range(1, 16):
        guard.check(step, math.inf)
    guard.check(16, 1.0)
    for step in range(17, 37):
        guard.check(step, torch.tensor(math.inf))
    with pytest.raises(Diverged, match="gradient's norm of step 37 is inf"):
        guard.check(37, torch.tensor(math.inf))
    guard.add(torch.tensor(math.nan))
    with pytest.raises(Diverged, match="the loss of step 1 is nan"):
        guard.check(1, 1.0)
