"""An aligner that is tuned on the passages that it scores best."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipelines.features.sources.aligned import adaptation
from pipelines.features.sources.aligned.passages import Passage
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


def test_few_passages_leave_the_aligner_as_it_is(candidates, tmp_path):
    base = ModelRef("base", Path("base"), "folder", "1")
    assert adaptation.adapt(base, "sv", candidates[:19], STEPS, tmp_path) is None


def loss(ref, text):
    """Return the loss of a text in silence."""
    import torch

    model, processor = whisper_model.load(ref).eval(), whisper_model.load_processor(ref, "sv")
    labels = torch.tensor([processor.tokenizer(text).input_ids[1:]])
    with torch.inference_mode():
        return float(model(input_features=torch.zeros(1, 80, 96), labels=labels).loss)
