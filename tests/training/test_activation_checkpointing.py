"""Activation checkpointing computes layers twice and gives the same weights, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.training import components
from pipelines.training.run import run_identity
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKPOINTED = {"training.checkpoint_activations": True}
BASE = {
    "training.steps": 4,
    "training.batch_size": 8,
    "training.eval_every": 2,
    "model.dropout": 0.2,
    "model.spec_augment": True,
}


def weights(model) -> dict[str, torch.Tensor]:
    return load_file(Path(model.uri) / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"training.accumulation": 2},
        {"model.adapter": "lora", "model.lora_dropout": 0.2, "training.learning_rate": 1e-2},
        {"training.window_share": 0.5, "training.micro_batch": 3},
    ],
)
def test_checkpointed_activations_give_equal_weights(train_toy, tmp_path, settings):
    stored, _ = train_toy(tmp_path / "stored", BASE | settings)
    recomputed, _ = train_toy(tmp_path / "recomputed", BASE | settings | CHECKPOINTED)
    assert equal(weights(stored), weights(recomputed))
    assert stored.digest == recomputed.digest, "it is not part of the run's identity"


@pytest.mark.slow
def test_run_resumes_with_checkpointed_activations(train_toy, tmp_path):
    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole, _ = train_toy(tmp_path / "whole", BASE)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "run", BASE, on_step=stop)
    resumed, lines = train_toy(tmp_path / "run", BASE | CHECKPOINTED)
    assert any("resuming from checkpoint-2" in line for line in lines)
    assert equal(weights(whole), weights(resumed))


def test_checkpointed_layers_run_again_in_the_backward_pass(toy_settings, toy_cache, toy_model):
    passes = []
    parts = components.build(toy_settings(CHECKPOINTED), toy_cache)
    layer = parts.model.model.decoder.layers[0].fc1
    layer.register_forward_hook(lambda *_: passes.append(1))
    loss = parts.loss(next(parts.batches()))
    assert len(passes) == 1
    loss.backward()
    assert len(passes) == 2


def test_default_leaves_the_identity_unchanged(toy_settings, toy_cache, toy_model):
    base = whisper_model.resolve(str(toy_model))
    identities = [run_identity(toy_settings(overrides), toy_cache, base) for overrides in ({}, CHECKPOINTED)]
    assert identities[0] == identities[1]
    assert not [name for name in identities[0] if "checkpoint_activations" in name]
