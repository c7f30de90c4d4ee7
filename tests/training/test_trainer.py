"""The loss with smoothed labels, and the precision of training."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pipelines.infra import environment
from pipelines.training import adapters, components, trainer
from pipelines.training.optimization import precision
from pipelines.training.trainer import token_mean_loss
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import IGNORED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    return SimpleNamespace(logits=torch.randn(2, 5, 11, requires_grad=True))


@pytest.fixture
def labels():
    return torch.tensor([[3, 1, 4, IGNORED, IGNORED], [IGNORED, 5, 9, 2, 6]])


def gradient(loss: torch.Tensor, outputs) -> torch.Tensor:
    return torch.autograd.grad(loss, outputs.logits)[0]


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_smoothing_has_its_own_gradient_and_the_plain_value(outputs, labels, smoothing):
    smoothed = token_mean_loss(outputs, labels, smoothing=smoothing)
    plain = token_mean_loss(outputs, labels)
    kept = labels != IGNORED
    expected = F.cross_entropy(outputs.logits[kept], labels[kept], label_smoothing=smoothing)
    found = gradient(smoothed, outputs)
    assert float(smoothed.detach()) == float(plain.detach()) != float(expected.detach())
    torch.testing.assert_close(found, gradient(expected, outputs))
    assert found[~kept].abs().sum() == 0, "padding has no part in the loss"
    assert not torch.allclose(found, gradient(plain, outputs))


def test_smoothed_micro_batches_have_the_gradient_of_the_batch(outputs, labels):
    whole = gradient(token_mean_loss(outputs, labels, smoothing=0.2), outputs)
    n, parts = (labels != IGNORED).sum(), torch.zeros_like(whole)
    for row in range(2):
        part = SimpleNamespace(logits=outputs.logits[row : row + 1])
        parts += gradient(token_mean_loss(part, labels[row : row + 1], n, smoothing=0.2), outputs)
    torch.testing.assert_close(parts, whole)


def test_layer_drop_skips_layers_in_training_alone(toy_settings, toy_model):
    base = whisper_model.resolve(str(toy_model))
    model = components.build_model(toy_settings({"model.layer_drop": 0.5}), base)
    ran: list[str] = []
    for part in ("encoder", "decoder"):
        for at, layer in enumerate(getattr(model.model, part).layers):
            layer.register_forward_hook(lambda *args, name=f"{part} {at}": ran.append(name))
    inputs = {"input_features": torch.zeros(1, 80, 200), "decoder_input_ids": torch.tensor([[1, 2]])}
    counts = {}
    for training in (True, False):
        torch.manual_seed(0)
        model.train(training)
        ran.clear()
        with torch.no_grad():
            for _ in range(20):
                model(**inputs)
        counts[training] = {name: ran.count(name) for name in sorted(set(ran))}
    assert set(counts[False].values()) == {20}
    assert len(counts[True]) == 4
    assert all(4 <= count <= 16 for count in counts[True].values())


def test_frozen_encoder_drops_no_layer(toy_settings, toy_model):
    settings = toy_settings({"model.layer_drop": 0.5, "model.freeze_encoder": True})
    model = components.build_model(settings, whisper_model.resolve(str(toy_model)))
    assert (model.model.encoder.layerdrop, model.model.decoder.layerdrop) == (0.0, 0.5)


@pytest.mark.parametrize(("by", "drops"), [("nothing", False), ("recipe", True), ("base model", True)])
def test_processes_look_for_unused_weights_if_layers_drop(toy_settings, toy_model, tmp_path, by, drops):
    folder = shutil.copytree(toy_model, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_layerdrop": 0.1 * (by == "base model")}))
    settings = toy_settings({"model.layer_drop": 0.1 * (by == "recipe")})
    model = components.build_model(settings, whisper_model.resolve(str(folder)))
    arguments = trainer.arguments_of(settings, tmp_path, "float32", drops_layers=adapters.drops_layers(model))
    assert arguments.ddp_find_unused_parameters == drops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_that_drops_all_lora_layers_has_gradient_zero(toy_settings, toy_model, checkpointing):
    settings = {"model.layer_drop": 0.99, "model.adapter": "lora", "training.checkpoint_activations": checkpointing}
    base = whisper_model.resolve(str(toy_model))
    torch.manual_seed(0)
    model = components.build_model(toy_settings(settings), base).train()
    inputs = {"input_features": torch.randn(1, 80, 200), "decoder_input_ids": torch.tensor([[1, 2]])}
    outputs = model(**inputs, use_cache=False)
    outputs.logits.logsumexp(-1).sum().backward()
    gradients = [weights.grad for weights in model.parameters() if weights.grad is not None]
    assert len(gradients) == 1, "the layers were not dropped"
    assert not gradients[0].any()
    with torch.no_grad():
        assert torch.equal(outputs.logits, adapters.unwrap(model)(**inputs).logits)


def test_bfloat16_trains_in_it_and_validates_in_float32(train_toy, tmp_path, monkeypatch):
    if not precision.has_bfloat16(environment.detect()):
        pytest.skip("this CPU has no bfloat16")
    seen = set()
    compute = F.linear

    def linear(*args):
        result = compute(*args)
        seen.add((torch.is_grad_enabled(), result.dtype))
        return result

    monkeypatch.setattr(F, "linear", linear)
    made, _ = train_toy(tmp_path / "run", {"training.precision": "bfloat16", "training.steps": 2})
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    stored = whisper_model.load(whisper_model.resolve(made.uri)).state_dict().values()
    assert {weights.dtype for weights in stored} == {torch.float32}
