"""Groups of weights, layer-wise learning rates, Muon, and 8-bit AdamW."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from pipelines.infra import environment
from pipelines.infra.environment import Environment
from pipelines.infra.errors import LabError
from pipelines.training import components
from pipelines.training.optimization import optimizers
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def build(toy_settings, toy_model):
    """`build({"training.optimizer": "muon"})`: a toy model and its optimizer."""

    def make(overrides: dict):
        settings = toy_settings({"training.weight_decay": 0.1, **overrides})
        model = components.build_model(settings, whisper_model.resolve(str(toy_model)))
        return model, optimizers.build(settings.training, model)

    return make


def rates_of(model, optimizer) -> dict[str, float]:
    names = {id(weights): name for name, weights in model.named_parameters()}
    return {names[id(weights)]: group["lr"] for group in optimizer.param_groups for weights in group["params"]}


def is_embedding(module) -> bool:
    return isinstance(module, torch.nn.Embedding)


def fill_gradients(model, seed: int) -> None:
    torch.manual_seed(seed)
    for weights in model.parameters():
        if weights.requires_grad:
            weights.grad = torch.randn_like(weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_decay_lowers_the_rate_layer_by_layer(build, optimizer):
    settings = {"training.learning_rate": 0.1, "training.layer_decay": 0.5, "training.optimizer": optimizer}
    model, built = build(settings)
    rates = rates_of(model, built)
    assert len(rates) == sum(weights.requires_grad for weights in model.parameters())
    for stack in ("encoder", "decoder"):
        expected = {"layers.1.fc1.weight": 0.1, "layers.0.fc1.bias": 0.05, "layer_norm.weight": 0.1}
        assert {name: rates[f"model.{stack}.{name}"] for name in expected} == pytest.approx(expected)
    below = ("encoder.conv1.weight", "decoder.embed_tokens.weight", "decoder.embed_positions.weight")
    assert [rates[f"model.{name}"] for name in below] == pytest.approx([0.025] * 3)
    assert built.param_groups[0]["lr"] == 0.1, "the rate of the first group is logged"
    decays = {group["weight_decay"] for group in built.param_groups for weights in group["params"] if weights.ndim < 2}
    assert decays == {0.0}


def test_layer_decay_counts_layers_of_lora_and_of_a_frozen_encoder(build):
    pytest.importorskip("peft")
    settings = {"training.learning_rate": 0.1, "training.layer_decay": 0.5, "model.adapter": "lora"}
    rates = rates_of(*build({**settings, "model.freeze_encoder": True}))
    assert sorted({name.partition(".layers.")[2][0]: rate for name, rate in rates.items()}.items()) == [
        ("0", pytest.approx(0.05)),
        ("1", pytest.approx(0.1)),
    ]


def test_muon_has_the_layers_matrices_and_adamw_the_rest(build):
    model, built = build({"training.optimizer": "muon"})
    muon, adamw = built.parts
    names = {id(weights): name for name, weights in model.named_parameters()}
    by_muon = {names[id(weights)] for group in muon.param_groups for weights in group["params"]}
    assert by_muon == {name for name, weights in model.named_parameters() if ".layers." in name and weights.ndim == 2}
    by_adamw = {names[id(weights)] for group in adamw.param_groups for weights in group["params"]}
    assert by_adamw == {name for name, weights in model.named_parameters() if weights.requires_grad} - by_muon


def test_muon_after_loading_its_state_continues_bit_equal(build):
    model, built = build({"training.optimizer": "muon"})
    fill_gradients(model, 1)
    built.step()
    saved, weights = copy.deepcopy(built.state_dict()), copy.deepcopy(model.state_dict())
    other_model, other = build({"training.optimizer": "muon"})
    other_model.load_state_dict(weights)
    other.load_state_dict(saved)
    for one, optimizer in ((model, built), (other_model, other)):
        fill_gradients(one, 2)
        optimizer.param_groups[0]["lr"] = 0.01  # as a schedule sets it
        optimizer.step()
    assert all(torch.equal(value, other_model.state_dict()[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.model.decoder.layers[0].fc1.weight, weights["model.decoder.layers.0.fc1.weight"])
    assert built.state_dict()["state"].keys() == saved["state"].keys()


def test_muon_without_torchs_class_names_the_version(build, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(LabError, match=r"needs torch 2.9 or newer"):
        build({"training.optimizer": "muon"})


def test_adamw8bit_without_gpu_is_a_one_line_error(build, monkeypatch):
    monkeypatch.setattr(environment, "detect", lambda: Environment("local", "cpu", "float32", "2 CPU threads"))
    with pytest.raises(LabError, match="needs a GPU of NVIDIA, and this machine has none: take 'adamw'"):
        build({"training.optimizer": "adamw8bit"})


def test_adamw8bit_without_package_names_the_command(build, monkeypatch):
    monkeypatch.setattr(environment, "detect", lambda: Environment("local", "cuda", "float16", "a GPU"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LabError, match=r"pip install 'bitsandbytes>=0.46'"):
        build({"training.optimizer": "adamw8bit"})


def test_adamw8bit_keeps_embeddings_in_32_bits(build, monkeypatch):
    overrides, made = [], []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, groups, **options):
            made.append(options)
            super().__init__(groups, **options)

    manager = SimpleNamespace(register_module_override=lambda module, *args: overrides.append((type(module), *args)))
    optim = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager), AdamW8bit=AdamW8bit)
    monkeypatch.setattr(environment, "detect", lambda: Environment("local", "cuda", "float16", "a GPU"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    model, built = build({"training.optimizer": "adamw8bit", "training.beta2": 0.98})
    assert type(built) is AdamW8bit
    assert made[0]["betas"] == (0.9, 0.98)
    assert overrides == [
        (type(module), "weight", {"optim_bits": 32}) for module in model.modules() if is_embedding(module)
    ]
    assert len(overrides) == 3
