"""LoRA on a base model in 8 bits: what is trained, and that the finished model has full weights.

bitsandbytes needs an NVIDIA GPU; a layer with the same interface stands for its own.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.training_settings import ModelSettings
from pipelines.training import adapters
from pipelines.training.run import run_identity
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")
EIGHT_BIT = {"model.adapter": "lora", "model.load_in_8bit": True, "training.learning_rate": 1e-2}


class Int8Params(torch.nn.Parameter):
    """Weights that are rounded to 127 steps up and down, row by row."""

    def __new__(cls, data, requires_grad, has_fp16_weights):
        assert not requires_grad and not has_fp16_weights
        scale = data.abs().amax(dim=1, keepdim=True) / 127
        return super().__new__(cls, (data / scale).round() * scale, requires_grad)


class Linear8bitLt(torch.nn.Linear):
    def __init__(self, n_in, n_out, bias, has_fp16_weights, threshold):
        super().__init__(n_in, n_out, bias)

    def forward(self, inputs):
        return F.linear(inputs, self.weight, self.bias)


@pytest.fixture
def bitsandbytes(monkeypatch):
    """A stand-in for the package; the training itself stays on the CPU."""
    layers = types.SimpleNamespace(Linear8bitLt=Linear8bitLt, Int8Params=Int8Params)
    monkeypatch.setattr(adapters, "_bitsandbytes", lambda: types.SimpleNamespace(nn=layers))


def test_finished_model_has_the_full_weights_and_the_adapter(train_toy, toy_model, bitsandbytes, tmp_path):
    model, _ = train_toy(tmp_path / "run", {"training.steps": 4, "training.eval_every": 2, **EIGHT_BIT})
    tuned, base = (load_file(Path(folder) / "model.safetensors") for folder in (model.uri, toy_model))
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    for name in changed:
        rank = torch.linalg.matrix_rank(tuned[name] - base[name], rtol=1e-3)
        assert rank <= 8, "the difference is the adapter's, without the rounding of 8 bits"


@pytest.mark.slow
def test_resumed_run_ends_with_equal_weights(train_toy, bitsandbytes, tmp_path):
    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    settings = {"training.steps": 4, "training.eval_every": 2, "model.lora_dropout": 0.1, **EIGHT_BIT}
    whole, _ = train_toy(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "run", settings, on_step=stop)
    resumed, _ = train_toy(tmp_path / "run", settings)
    ours, theirs = (load_file(Path(model.uri) / "model.safetensors") for model in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_8_bits_are_part_of_the_identity(toy_settings, toy_cache, toy_model):
    base = whisper_model.resolve(str(toy_model))
    lora = {"model.adapter": "lora"}
    plain, eight = (run_identity(toy_settings(one), toy_cache, base) for one in (lora, lora | EIGHT_BIT))
    assert "model.load_in_8bit" not in plain and eight["model.load_in_8bit"] is True


def test_8_bits_need_lora_a_gpu_and_the_package(toy_model, monkeypatch):
    with pytest.raises(ValueError, match="model.adapter must be 'lora'"):
        ModelSettings(load_in_8bit=True)
    model, settings = (
        whisper_model.load(whisper_model.resolve(str(toy_model))),
        ModelSettings(adapter="lora", load_in_8bit=True),
    )
    with pytest.raises(LabError, match="needs an NVIDIA GPU, and this machine computes on cpu"):
        adapters.prepare(model, settings)
    machine = replace(environment.detect(), device="cuda")
    monkeypatch.setattr(environment, "detect", lambda: machine)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LabError, match="Run: pip install 'bitsandbytes"):
        adapters.prepare(model, settings)
