"""What a model's folder must hold: damaged, foreign and odd folders are one line, before weights are loaded."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import sinusoids

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.whisper import decoding, engines, model_files
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef
from tests import toy_whisper

CONFIG, GENERATION, EXTRACTOR = "config.json", "generation_config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
DEEP = "[" * 100_000


@pytest.fixture
def folder(toy_model, tmp_path) -> Path:
    """A copy of the toy model."""
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def change(folder: Path, name: str, **fields) -> None:
    manifest.write_json(folder / name, {**json.loads((folder / name).read_text()), **fields})


def refusal(folder: Path) -> str:
    """Return the line with which the folder is refused, before its weights are loaded."""
    with pytest.raises(LabError) as caught:
        whisper_model.load_processor(whisper_model.resolve(str(folder)), "sv")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (CONFIG, {"model_type": "wav2vec2"}, "it is a model of type 'wav2vec2', expected 'whisper'"),
        (CONFIG, {"encoder_layers": 10**7}, "encoder_layers is 10000000 in config.json, but model.safetensors has 2"),
        (CONFIG, {"decoder_layers": "two"}, "decoder_layers is 'two' in config.json"),
        (CONFIG, {"d_model": 0}, "d_model is 0 in config.json, but encoder.conv1.weight has 32"),
        (CONFIG, {"num_mel_bins": 128}, "num_mel_bins is 128 in config.json, but encoder.conv1.weight has 80"),
        (CONFIG, {"max_source_positions": 750}, "but encoder.embed_positions.weight has 1500"),
        (CONFIG, {"max_target_positions": 100}, "but decoder.embed_positions.weight has 448"),
        (CONFIG, {"vocab_size": 10}, "vocab_size is 10 in config.json"),
        (EXTRACTOR, {"feature_size": 128}, "its feature extractor makes 128 mel bands, and its weights take 80"),
        (EXTRACTOR, {"sampling_rate": 8000}, "sampling_rate 8000, Whisper's is 16000"),
        (EXTRACTOR, {"hop_length": 320}, "hop_length 320, Whisper's is 160"),
        (GENERATION, {"suppress_tokens": [10**7]}, "suppress_tokens in generation_config.json must be a list"),
        (GENERATION, {"begin_suppress_tokens": 5}, "must be a list of tokens from 0"),
        (GENERATION, {"eos_token_id": []}, "eos_token_id in generation_config.json must be a token, or some, from 0"),
        (GENERATION, {"eos_token_id": {}}, "eos_token_id in generation_config.json must be a token"),
        (GENERATION, {"begin_suppress_tokens": "x"}, "begin_suppress_tokens in generation_config.json must be"),
        (GENERATION, {"alignment_heads": [[-1, 0]]}, "alignment_heads in generation_config.json must be pairs"),
        (GENERATION, {"alignment_heads": [[0]]}, "alignment_heads in generation_config.json must be pairs"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(folder, name, fields, words):
    change(folder, name, **fields)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [(CONFIG, ""), (CONFIG, "[]"), (CONFIG, DEEP), (GENERATION, "[]"), (GENERATION, DEEP)]
    + [(WEIGHTS, ""), (WEIGHTS, "short"), (WEIGHTS, "version https://git-lfs.github.com/spec/v1\n")]
    + [(WEIGHTS, struct.pack("<Q", 2).decode() + "{}"), (WEIGHTS, struct.pack("<Q", 7).decode() + '{"a":1}')],
)
def test_damaged_files_are_one_line(folder, name, content):
    (folder / name).write_text(content)
    assert name in refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", DEEP, None])
@pytest.mark.parametrize("engine", ["transformers", "onnx", "ctranslate2"])
def test_damaged_tokenizer_is_one_line(folder, tmp_path, monkeypatch, engine, content):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink() if content is None else (folder / "tokenizer.json").write_text(content)
    with pytest.raises(LabError) as caught:
        engines.open_engine(whisper_model.resolve(str(folder)), engine=engine)
    assert "tokenizer" in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizer_of_another_model_is_one_line(folder):
    change(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer")
    with pytest.raises(LabError, match="tokenizer of another model .its largest token is"):
        whisper_model.load_processor(ModelRef("toy", folder, "folder", "0"), "sv")


@pytest.mark.parametrize("positions", [1, 50])
def test_encoder_of_less_than_two_seconds_is_one_line(folder, positions):
    toy_whisper.shorten(folder, source=positions)
    assert f"(max_source_positions {positions}), expected 2 to 30 s" in refusal(folder)


def test_shorter_encoder_is_loaded_but_not_trained_or_scored(folder):
    model_files.require_full_window(folder)
    toy_whisper.shorten(folder, source=750)
    assert model_files.source_frames(folder) == 1500
    model_files.require_usable(folder)
    with pytest.raises(LabError, match="an encoder of 15 s .max_source_positions 750.: such a model transcribes, but"):
        model_files.require_full_window(folder)
    full = WhisperForConditionalGeneration.from_pretrained(  # what the message says
        folder, max_source_positions=1500, ignore_mismatched_sizes=True
    )
    full.save_pretrained(folder)
    model_files.require_full_window(folder)
    table = full.model.encoder.embed_positions.weight
    assert torch.equal(table, sinusoids(1500, table.shape[1])), "positions are constants"


@pytest.mark.parametrize("engine", ["transformers", "onnx", "ctranslate2"])
def test_text_ends_at_the_last_position_of_the_decoder(folder, tmp_path, monkeypatch, engine):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    toy_whisper.shorten(folder, target=12)
    opened = engines.open_engine(whisper_model.resolve(str(folder)), engine=engine)
    window = np.random.default_rng(0).random((1, 80, 200), dtype=np.float32)
    (hypothesis,) = opened.decode(window)
    assert 0 < hypothesis.tokens <= 8  # after a prompt of four


@pytest.mark.parametrize("engine", ["transformers", "onnx", "ctranslate2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_one_line(folder, tmp_path, monkeypatch, engine, value):
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    weights = load_file(folder / WEIGHTS)
    weights["model.decoder.layers.1.fc1.weight"][3, 2] = value
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(LabError, match=r"not finite \(model.decoder.layers.1.fc1.weight\): its training diverged or"):
        engines.open_engine(whisper_model.resolve(str(folder)), engine=engine)


def test_settings_of_generation_do_not_change_decoding(folder):
    def decoded() -> list[list[int]]:
        model = whisper_model.load(whisper_model.resolve(str(folder)))
        return decoding.generate(model, torch.ones(1, 80, 200), [0, 1], 12).tolist()

    expected = decoded()
    change(
        folder, GENERATION, repetition_penalty=5.0, no_repeat_ngram_size=1, min_length=9, num_beams=3, temperature=2.0
    )
    assert decoded() == expected
    change(folder, GENERATION, repetition_penalty=0)
    assert decoded() == expected


# ---- folders that this lab wrote


def seal(folder: Path) -> Path:
    for name in ("recipe.json", "training.json"):
        (folder / name).write_text("{}")
    manifest.seal(folder, kind="model", digest="d1", name="toy-d1", context="clip")
    return folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "unfinished"),
        ("", "manifest.json is damaged"),
        ('{"kind": "mod', "manifest.json is damaged"),
        ("{}", "manifest.json is damaged"),
        (DEEP, "manifest.json is damaged"),
    ],
    ids=["missing", "empty", "cut", "without files", "deep"],
)
def test_torn_model_of_this_lab_is_refused(folder, content, words):
    path = seal(folder) / manifest.MANIFEST
    path.unlink() if content is None else path.write_text(content)
    assert words in refusal(folder)


def test_unfinished_model_in_a_run_is_refused(folder):
    (folder.parent / "run.json").write_text("{}")  # before the model's own files, and after them
    assert "unfinished" in refusal(folder)


def test_manifest_of_another_tool_is_no_damage(folder):
    (folder / manifest.MANIFEST).write_text('{"format": "of another tool"}')
    assert whisper_model.resolve(str(folder)).context == "full"


def test_model_with_an_edited_card_is_resolved(folder):
    (folder / "README.md").write_text("# Before")
    seal(folder)
    (folder / "README.md").write_text("# Edited")
    assert whisper_model.resolve(str(folder)).context == "clip"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whose permissions count")
def test_unreadable_weights_are_one_line(folder):
    seal(folder)
    (folder / WEIGHTS).chmod(0)
    assert "cannot be read (Permission denied)" in refusal(folder)
