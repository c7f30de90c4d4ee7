"""ggml files: what is written is what whisper.cpp's format says, and whisper.cpp reads it."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from pipelines.inference.deploy import package
from pipelines.infra.errors import LabError
from pipelines.whisper import engines, export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.export import ggml
from pipelines.whisper.mirror.ggml import hf_name, read_ggml
from pipelines.whisper.model import ModelRef

N_TEXT_TOKENS = 50_257
CONFIGS = ("config.json", "generation_config.json")


def make_model(folder, width=32):
    """Write a random Whisper with a vocabulary of OpenAI's size, whose tokens are `a0`, `a1`, ..., ` ` and ` ä`."""
    sizes = {"d_model": width, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads)).save_pretrained(folder)
    words = [*(f"a{number}" for number in range(N_TEXT_TOKENS - 2)), "Ġ", "ĠÃ¤"]
    vocabulary = {word: number for number, word in enumerate(words)}
    special = [{"id": N_TEXT_TOKENS, "content": "<|endoftext|>"}]
    tokenizer = {"added_tokens": special, "model": {"vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("ggml"))


def parse(path):
    """Return the vocabulary and the tensors of a ggml file: name to type, shape as in torch, and bytes."""
    data = path.read_bytes()
    n_mels, n_bins = struct.unpack_from("<2i", data, 48)
    at = 56 + 4 * n_mels * n_bins
    (count,), at, words, tensors = struct.unpack_from("<i", data, at), at + 4, [], {}
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, at)
        words.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    bytes_per_block = {0: (4, 1), 1: (2, 1), 6: (22, 32), 8: (34, 32)}
    while at < len(data):
        n_dims, name_length, kind = struct.unpack_from("<3i", data, at)
        shape = struct.unpack_from(f"<{n_dims}i", data, at + 12)[::-1]
        at += 12 + 4 * n_dims
        name, at = data[at : at + name_length].decode(), at + name_length
        size, block = bytes_per_block[kind]
        length = int(np.prod(shape)) * size // block
        tensors[name], at = (kind, shape, data[at : at + length]), at + length
    return words, tensors


def dequantised(kind, shape, data):
    """Return float32 values, by ggml's dequantize_row_q8_0 and dequantize_row_q5_0."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 34 if kind == 8 else 22)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == 8:
        return (scale * blocks[:, 2:].copy().view(np.int8)).reshape(shape), scale
    values = np.empty((len(blocks), 32), dtype=np.float32)
    for j in range(16):
        high = blocks[:, 2:6].copy().view("<u4")[:, 0]
        values[:, j] = ((blocks[:, 6 + j] & 15) | (((high >> j) & 1) << 4)).astype(np.int32) - 16
        values[:, j + 16] = ((blocks[:, 6 + j] >> 4) | (((high >> (j + 16)) & 1) << 4)).astype(np.int32) - 16
    return (scale * values).reshape(shape), scale


def test_f16_holds_every_weight_and_the_vocabulary(model, tmp_path):
    ggml.write(model, "f16", tmp_path / "model.bin")
    weights, content = load_file(model / "model.safetensors"), read_ggml(tmp_path / "model.bin")
    names = {hf_name(name): name for name in content.tensors}
    assert names.keys() == weights.keys() - {"proj_out.weight"}
    for name, weight in weights.items():
        if name in names:
            assert np.allclose(content.tensors[names[name]].reshape(weight.shape), weight.numpy(), atol=1e-7, rtol=1e-3)
    assert content.header["n_vocab"] == 51_865 and content.header["n_text_layer"] == 1
    words, _ = parse(tmp_path / "model.bin")
    assert len(words) == N_TEXT_TOKENS and words[7] == b"a7" and words[-1] == " ä".encode()


@pytest.mark.parametrize(("precision", "kind", "steps"), [("q8_0", 8, 0.57), ("q5_0", 6, 1.02)])
def test_quantised_matrices_are_within_a_step(model, tmp_path, precision, kind, steps):
    ggml.write(model, precision, tmp_path / "model.bin")
    weights, (_, tensors) = load_file(model / "model.safetensors"), parse(tmp_path / "model.bin")
    assert {tensors[name][0] for name in ("encoder.conv1.weight", "encoder.conv2.weight")} == {1}
    name = "decoder.blocks.0.mlp.0.weight"
    expected = weights[hf_name(name)].numpy()
    values, scale = dequantised(*tensors[name])
    assert tensors[name][0] == kind and np.abs(values).max() > 0
    assert (np.abs(values - expected).reshape(-1, 32) <= np.abs(scale) * steps + 1e-6).all()


def test_unsuitable_model_is_refused_in_one_line(tmp_path):
    narrow = make_model(tmp_path / "narrow", width=24)
    with pytest.raises(LabError, match="multiple of 32, got d_model=24: take ggml-f16"):
        ggml.write(narrow, "q5_0", tmp_path / "model.bin")
    with pytest.raises(LabError, match="needs encoder_ffn_dim = 4 . d_model = 96, got 128"):
        ggml.write(narrow, "f16", tmp_path / "model.bin")
    other = make_model(tmp_path / "other")
    (other / "tokenizer.json").write_text(
        '{"added_tokens": [{"id": 1000, "content": "<|endoftext|>"}], "model": {"vocab": {}}}'
    )
    with pytest.raises(LabError, match="OpenAI's models only .* got 51865 tokens, 1000 of them text"):
        ggml.write(other, "f16", tmp_path / "model.bin")


def test_export_is_sealed_and_never_served(model, tmp_path):
    ref = ModelRef("toy", model, "folder", "0")
    folder = export.convert(ref, "ggml-q8_0", to=tmp_path / "ggml")
    assert {path.name for path in folder.iterdir()} == {ggml.FILE_NAME, "manifest.json", *CONFIGS}
    for form in ("ggml-f16", "ggml-q8_0", "ggml-q5_0"):
        with pytest.raises(LabError, match=f"does not serve {form}: write it with"):
            package.production(ref, form, tmp_path / "served")


@pytest.mark.parametrize("precision", ggml.PRECISIONS)
def test_whisper_cpp_reads_the_file(model, tmp_path, precision):
    whisper_cpp = pytest.importorskip("pywhispercpp.model")
    ggml.write(model, precision, tmp_path / "model.bin")
    loaded = whisper_cpp.Model(str(tmp_path / "model.bin"), language="sv", max_tokens=4, temperature_inc=0.0)
    assert isinstance(loaded.transcribe(np.zeros(16_000, dtype=np.float32)), list)


def test_ggml_export_is_scored_but_not_transcribed_with(model, tmp_path):
    pytest.importorskip("pywhispercpp.model")
    folder = export.convert(ModelRef("toy", model, "folder", "0"), "ggml-q5_0", to=tmp_path / "ggml")
    engine = engines.open_engine(whisper_model.resolve(str(folder)), "sv", max_new_tokens=4)
    assert engine.name == "whisper.cpp cpu q5_0" and engine.n_mels == 80
    (hypothesis,) = engine.decode(np.zeros((1, 80, 200), dtype=np.float32))
    assert hypothesis.logprob <= 0 and hypothesis.tokens <= 5
    with pytest.raises(LabError, match="does not transcribe with them: use whisper.cpp"):
        engine.check(DecodingOptions("sv", timestamps=True))
