from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.training import components
from pipelines.training.callbacks.ema import FILE, WeightAverage

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"training.ema_decay": 0.9, "training.steps": 6, "training.eval_every": 2, "training.batch_size": 8}


class CutOff(BaseException):
    """Like a kill."""


def test_average_follows_the_formula_with_warm_up():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.5)
    for step, value in ((1, 3.0), (20, 5.0)):
        model.weight.data.fill_(value)
        average.update(step)
    first = 2 / 11 * 1.0 + 9 / 11 * 3.0
    with average.applied():
        assert model.weight.item() == pytest.approx(0.5 * first + 0.5 * 5.0)
    assert model.weight.item() == 5.0


def test_weights_are_restored_after_an_error():
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.5)
    model.weight.data.add_(1)
    before = model.weight.detach().clone()
    with pytest.raises(CutOff), average.applied():
        raise CutOff
    assert torch.equal(model.weight, before)


def test_frozen_weights_take_no_memory():
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [tensor.shape for tensor in WeightAverage(model, decay=0.5).average] == [model.bias.shape]


@pytest.mark.slow
@pytest.mark.parametrize("other", [{}, {"model.adapter": "lora", "model.freeze_encoder": True}], ids=["all", "lora"])
def test_cut_run_ends_with_the_same_average(train_toy, tmp_path, other):
    def cut(step: int) -> None:
        if step == 3:
            raise CutOff

    settings = {**SETTINGS, **other}
    train_toy(tmp_path / "whole", settings)
    with pytest.raises(CutOff):
        train_toy(tmp_path / "cut", settings, on_step=cut)
    files = manifest.read(tmp_path / "cut" / "checkpoints" / "checkpoint-2")["files"]
    assert files[FILE]["sha256"], "the weights that training continues with are hashed and mirrored"
    train_toy(tmp_path / "cut", settings)
    whole, again = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut"))
    assert manifest.sha256(whole) == manifest.sha256(again)


@pytest.mark.slow
def test_model_is_the_average_that_was_validated(train_toy, toy_model, tmp_path):
    train_toy(tmp_path / "plain", {**SETTINGS, "training.ema_decay": 0.0})
    train_toy(tmp_path / "average", SETTINGS)
    base = load_file(toy_model / "model.safetensors")
    plain, averaged = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "average"))
    assert 0 < distance(base, averaged) < distance(base, plain)
    losses = [validation_losses(tmp_path / name) for name in ("plain", "average")]
    assert all(a != b for a, b in zip(*losses, strict=True))


def distance(one: dict, other: dict) -> float:
    return sum(float((one[name] - other[name]).abs().sum()) for name in one)


def validation_losses(run: Path) -> list[float]:
    history = json.loads((run / "model" / "training.json").read_text())["history"]
    return [row["eval_loss"] for row in history if "eval_loss" in row]


def test_custom_loop_refuses_ema(toy_settings, toy_cache):
    with pytest.raises(LabError, match="leave training.ema_decay out"):
        components.build(toy_settings({"training.ema_decay": 0.9}), toy_cache)
