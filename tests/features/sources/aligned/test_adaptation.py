"""An aligner that is tuned on the passages that it scores best."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pipelines.features.sources.aligned import adaptation
from pipelines.features.sources.aligned.passages import Passage
from pipelines.infra.errors import LabError
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

STEPS = 12


@pytest.fixture
def candidates(tmp_path, monkeypatch):
    """Twenty passages of a recording; the later, the worse their scores."""
    monkeypatch.setattr(adaptation, "MIN_PASSAGES", 20)
    path = tmp_path / "talk.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 20 * 16_000), 16_000)
    return [(path, Passage(n, n + 0.9, "Hej då.", "", -1.0 - n, -2.0 - n)) for n in range(20)]


def test_better_half_of_the_passages_is_chosen_in_order(candidates):
    chosen = adaptation._best(candidates[::-1], 100)
    assert [one.start_s for _, one in chosen] == list(range(10))
    assert [one.start_s for _, one in adaptation._best(candidates, 4)] == [0, 3, 6, 9]


def test_adapted_aligner_expects_the_text_it_was_tuned_on(toy_model, candidates, tmp_path, monkeypatch):
    base = whisper_model.resolve(str(toy_model))
    adapted = adaptation.adapt(base, "sv", candidates, STEPS, tmp_path / "cache")
    assert adaptation.is_tuned(adapted) and not adaptation.is_tuned(base)
    before, after = (loss(ref, "Hej då.") for ref in (base, adapted))
    assert after < before - 0.02
    assert whisper_model.identity(adapted) != whisper_model.identity(base)
    monkeypatch.setattr(adaptation, "_train", lambda *args: pytest.fail("trained again"))
    assert adaptation.adapt(base, "sv", candidates, STEPS, tmp_path / "cache") == adapted


def test_adaptation_that_was_killed_is_done_again(toy_model, candidates, tmp_path):
    base = whisper_model.resolve(str(toy_model))
    first = adaptation.adapt(base, "sv", candidates, 2, tmp_path / "cache")
    (first.folder / "manifest.json").unlink()
    (first.folder / "model.safetensors").write_bytes(b"torn")
    again = adaptation.adapt(base, "sv", candidates, 2, tmp_path / "cache")
    assert whisper_model.identity(again) == whisper_model.identity(first)


def test_damaged_adapted_model_is_made_again(toy_model, candidates, tmp_path):
    base = whisper_model.resolve(str(toy_model))
    first = adaptation.adapt(base, "sv", candidates, 2, tmp_path / "cache")
    (first.folder / "model.safetensors").unlink()  # the manifest is whole
    again = adaptation.adapt(base, "sv", candidates, 2, tmp_path / "cache")
    assert whisper_model.identity(again) == whisper_model.identity(first)


def test_only_the_adapted_models_used_last_are_kept(toy_model, candidates, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "_MAX_STORED", 2)
    base = whisper_model.resolve(str(toy_model))
    cache = tmp_path / "cache"
    first, second = (adaptation.adapt(base, "sv", candidates, steps, cache).folder for steps in (1, 2))
    for path, used_at in ((first, 1), (second, 2)):
        os.utime(path, (used_at, used_at))
    adaptation.adapt(base, "sv", candidates, 1, cache)  # used again, so the second is older
    third = adaptation.adapt(base, "sv", candidates, 3, cache).folder
    assert {path for path in cache.glob("adapted-*") if path.is_dir()} == {first, third}


def test_dropout_of_the_base_does_not_make_two_adaptations_differ(toy_model, candidates, tmp_path):
    base = shutil.copytree(toy_model, tmp_path / "base", ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}), "utf-8")
    ref = whisper_model.resolve(str(base))
    one, other = (adaptation.adapt(ref, "sv", candidates, 2, tmp_path / name) for name in ("one", "other"))
    assert whisper_model.identity(one) == whisper_model.identity(other)


def test_aligner_that_diverges_is_not_stored(toy_model, candidates, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "read_piece", lambda path, start_s, end_s: np.full(16_000, np.nan, np.float32))
    base = whisper_model.resolve(str(toy_model))
    with pytest.raises(LabError, match=r"gradient of step 0 is nan.*adapt_steps=0$"):
        adaptation.adapt(base, "sv", candidates, 2, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("adapted-*/*"))


def test_too_little_memory_is_one_line(toy_model, candidates, tmp_path, monkeypatch):
    def allocate(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", allocate)
    base = whisper_model.resolve(str(toy_model))
    with pytest.raises(LabError, match=r"too little memory to adapt the aligner .*adapt_steps=0$"):
        adaptation.adapt(base, "sv", candidates, 2, tmp_path / "cache")


def test_few_passages_leave_the_aligner_as_it_is(candidates, tmp_path):
    base = ModelRef("base", Path("base"), "folder", "1")
    assert adaptation.adapt(base, "sv", candidates[:19], STEPS, tmp_path) is None


def loss(ref, text):
    """Return the loss of a text in silence."""
    model, processor = whisper_model.load(ref).eval(), whisper_model.load_processor(ref, "sv")
    labels = torch.tensor([processor.tokenizer(text).input_ids[1:]])
    with torch.inference_mode():
        return float(model(input_features=torch.zeros(1, 80, 96), labels=labels).loss)
