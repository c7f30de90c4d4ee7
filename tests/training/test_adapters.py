from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import recipes
from pipelines.infra.errors import LabError
from pipelines.recipes import settings as recipes_settings
from pipelines.training import adapters
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.run import TrainingRun
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {"model.adapter": "lora", "model.lora_rank": 4, "training.learning_rate": 1e-2}
ENCODER = "model.encoder."


class CutOff(BaseException):
    """Like a kill."""


@pytest.fixture(scope="module")
def base(toy_model):
    return whisper_model.resolve(str(toy_model))


@pytest.fixture(scope="module")
def fit(toy_settings, toy_cache, base):
    """`fit(run, overrides)`: train in the folder `run`; `cut_at=5` cuts it off when step 5 is done."""

    def train(run: Path, overrides: dict, cut_at: int = 0):
        def on_step(step: int) -> None:
            if step == cut_at:
                raise CutOff

        progress = Progress(on_step=on_step)
        try:
            return training_loop.train(TrainingRun(toy_settings(overrides), toy_cache, base, run, progress))
        except CutOff:
            return None

    return train


def prepared(base, settings, **overrides):
    """The model as it is trained."""
    told = settings({f"model.{name}": value for name, value in overrides.items()}).model
    return adapters.prepare(whisper_model.load(base, dropout=told.dropout), told)


def trained_names(model) -> set[str]:
    return {name for name, weights in model.named_parameters() if weights.requires_grad}


def moved(toy_model: Path, model) -> set[str]:
    """The names of the weights that are not those of the base model."""
    before, after = load_file(toy_model / "model.safetensors"), load_file(Path(model.uri) / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- what is trained


def test_frozen_encoder_has_no_gradients_or_activations(base, toy_settings):
    model = prepared(base, toy_settings, freeze_encoder=True, dropout=0.5).train()
    assert not any(name.startswith(ENCODER) for name in trained_names(model))
    assert any(name.startswith("model.decoder.") for name in trained_names(model))
    features = torch.randn(1, 80, 100)
    encoded = model.model.encoder(features)[0]
    assert encoded.grad_fn is None
    assert torch.equal(encoded, model.model.encoder(features)[0]), "dropout in the frozen encoder"
    plain = prepared(base, toy_settings, dropout=0.5).train()
    assert plain.model.encoder(features)[0].grad_fn is not None
    assert not torch.equal(plain.model.encoder(features)[0], plain.model.encoder(features)[0])


def test_decoder_keeps_dropout_with_frozen_encoder(base, toy_settings):
    model = prepared(base, toy_settings, freeze_encoder=True, dropout=0.5).train()
    told = {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": torch.arange(9)[None]}
    assert not torch.equal(model(**told).logits, model(**told).logits)


@pytest.mark.parametrize(("frozen", "halves"), [(False, {"encoder", "decoder"}), (True, {"decoder"})])
def test_lora_trains_only_its_matrices(base, toy_settings, frozen, halves):
    model = prepared(base, toy_settings, adapter="lora", freeze_encoder=frozen, lora_targets=["q_proj", "fc1"])
    names = trained_names(model)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {name.split(".")[3] for name in names} == halves
    assert {name.split(".lora_")[0].rsplit(".")[-1] for name in names} == {"q_proj", "fc1"}
    assert any(".encoder_attn.q_proj." in name for name in names)


def test_clip_length_context_works_through_peft(base, toy_settings):
    wrapped, plain = prepared(base, toy_settings, adapter="lora").eval(), whisper_model.load(base).eval()
    told = {"input_features": torch.randn(2, 80, 104), "decoder_input_ids": torch.arange(10).reshape(2, 5)}
    with torch.no_grad():
        # new matrices add nothing: their product is zero
        assert torch.equal(wrapped(**told).logits, plain(**told).logits)
    assert wrapped.config.max_source_positions == 1500
    assert adapters.unwrap(wrapped).model.encoder.embed_positions.weight.shape == (1500, 32)
    assert not adapters.unwrap(wrapped).model.encoder.embed_positions.weight.requires_grad
    assert adapters.unwrap(plain) is plain


# ---- what comes out


def test_training_with_frozen_encoder_changes_only_decoder(fit, toy_model, tmp_path):
    names = moved(toy_model, fit(tmp_path / "run", {"model.freeze_encoder": True, "training.steps": 4}))
    assert names == {name for name in load_file(toy_model / "model.safetensors") if not name.startswith(ENCODER)}


def test_lora_model_is_a_plain_whisper(fit, base, toy_model, tmp_path):
    made = fit(tmp_path / "run", LORA)
    names = moved(toy_model, made)
    assert len(names) == 2 * (2 + 4)  # q_proj and v_proj: two layers of self-attention, and two with two attentions
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in names)
    folder = Path(made.uri)
    assert not list(folder.glob("adapter*"))
    assert whisper_model.resolve(made.uri).facts["base"] == f"(a local path) @ {base.revision}"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    losses = [row["loss"] for row in made.history if "loss" in row]
    assert losses[-1] < losses[0] - 0.05


def test_lora_checkpoint_has_no_base_weights_or_paths(fit, base, toy_cache, tmp_path):
    assert fit(tmp_path / "run", LORA, cut_at=5) is None
    (checkpoint,) = sealed_checkpoints.listed(tmp_path / "run" / "checkpoints")
    held = load_file(checkpoint / "adapter_model.safetensors")
    assert all(".lora_" in name for name in held)
    assert not (checkpoint / "model.safetensors").exists()
    assert not (checkpoint / "README.md").exists()
    assert str(base.folder) not in (checkpoint / "adapter_config.json").read_text()
    # merged, the weights answer as the adapter beside them does
    merged = adapters.load_checkpoint(checkpoint, base).eval()
    beside = adapters._peft().PeftModel.from_pretrained(whisper_model.load(base), checkpoint).eval()
    told = {"input_features": torch.randn(1, 80, 104), "decoder_input_ids": torch.arange(5)[None]}
    with torch.no_grad():
        answers = [model(**told).logits for model in (merged, beside, whisper_model.load(base).eval())]
    assert torch.allclose(answers[0], answers[1], atol=1e-4)
    assert not torch.allclose(answers[0], answers[2], atol=1e-2)


# ---- names and refusals


def test_default_settings_do_not_change_run_names(toy_settings, toy_cache, base):
    plain = training_run.run_identity(toy_settings(), toy_cache, base)
    assert not any("lora" in name or "freeze" in name or "adapter" in name for name in plain)
    told = training_run.run_identity(toy_settings(LORA | {"model.freeze_encoder": True}), toy_cache, base)
    changed = {name: value for name, value in told.items() if plain.get(name) != value}
    assert changed == {**LORA, "model.freeze_encoder": True}


def test_missing_peft_names_the_install_command(base, toy_settings, monkeypatch):
    def absent(name, *args, real=builtins.__import__):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(LabError, match=r"model.adapter = 'lora' needs the package peft.*pip install 'peft>="):
        prepared(base, toy_settings, adapter="lora")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"model.lora_rank": 4}, "model.lora_rank is set, so model.adapter must be 'lora'"),
        ({"model.adapter": "ia3"}, "setting model.adapter"),
        ({"model.adapter": "lora", "model.lora_targets": ["conv1"]}, "setting model.lora_targets.0"),
        ({"model.adapter": "lora", "model.lora_targets": []}, "setting model.lora_targets"),
    ],
)
def test_invalid_adapter_settings_are_refused(overrides, told):
    with pytest.raises(LabError) as error:
        recipes.load("tour", overrides)
    assert told in str(error.value)


def test_recipe_round_trips_through_toml(toy_settings):
    for settings in (toy_settings(), toy_settings(LORA)):
        assert recipes_settings.Recipe.model_validate(settings.model_dump(mode="json")) == settings
