"""Base models of every kind that is uploaded: each loads like the plain one, or is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from pipelines.features import pipeline as feature_pipeline
from pipelines.inference.transcriber import Transcriber
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform
from pipelines.training import pipeline as training_pipeline
from pipelines.whisper import bases, export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.bases import generation, weights

WEIGHTS, PICKLE = weights.SAFETENSORS, weights.PICKLE
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(toy_model, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(toy_model, tmp_path / "base"))


def change(folder: Path, name: str, **fields) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


def take(folder: Path) -> dict[str, torch.Tensor]:
    """Remove the weights from the folder and return them."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    return tensors


def pickled(folder: Path, prefix: str = "", nested: str = "", dtype=None, **options) -> None:
    stored = {prefix + name: tensor.to(dtype) for name, tensor in take(folder).items()}
    torch.save({nested: stored, "epoch": 3} if nested else stored, folder / PICKLE, **options)


def renamed(folder: Path, prefix: str, removed: str = "", dtype=None) -> None:
    tensors = {prefix + name.removeprefix(removed): tensor.to(dtype) for name, tensor in take(folder).items()}
    save_file(tensors, folder / WEIGHTS)


def sharded(folder: Path, suffix: str = ".safetensors") -> list[Path]:
    """Divide the weights into two shards; return their paths."""
    tensors = take(folder)
    stem, file = ("model", WEIGHTS) if suffix == ".safetensors" else ("pytorch_model", PICKLE)
    shards, names = [folder / f"{stem}-0000{number}-of-00002{suffix}" for number in (1, 2)], sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, part in zip(shards, parts, strict=True):
        stored = {name: tensors[name] for name in part}
        save_file(stored, shard) if suffix == ".safetensors" else torch.save(stored, shard)
    owners = {name: shard.name for shard, part in zip(shards, parts, strict=True) for name in part}
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    return shards


def without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def slow_tokenizer(folder: Path) -> None:
    """Leave vocab.json and merges.txt alone."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    without(folder, "tokenizer.json")


ACCEPTED = {
    "pytorch_model.bin": pickled,
    "bin before torch 1.6": lambda at: pickled(at, _use_new_zipfile_serialization=False),
    "bin of a training program": lambda at: pickled(at, nested="state_dict"),
    "bin with a prefix": lambda at: pickled(at, prefix="module."),
    "bin in float16": lambda at: pickled(at, dtype=torch.float16),
    "shards": sharded,
    "shards of bin": lambda at: sharded(at, ".bin"),
    "prefix module.": lambda at: renamed(at, "module."),
    "prefix _orig_mod.": lambda at: renamed(at, "_orig_mod."),
    "WhisperModel": lambda at: renamed(at, "", removed="model."),
    "float16": lambda at: renamed(at, "", dtype=torch.float16),
    "bfloat16": lambda at: renamed(at, "", dtype=torch.bfloat16),
    "float64": lambda at: renamed(at, "", dtype=torch.float64),
    "output matrix stored": lambda at: save_file(
        (tensors := take(at)) | {"proj_out.weight": tensors["model.decoder.embed_tokens.weight"].clone()}, at / WEIGHTS
    ),
    "no generation_config": lambda at: without(at, "generation_config.json"),
    "early generation_config": lambda at: (at / "generation_config.json").write_text('{"_from_model_config": true}'),
    "no preprocessor_config": lambda at: without(at, "preprocessor_config.json"),
    "no tokenizer.json": slow_tokenizer,
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_base_model_loads_like_the_plain_one(toy_model, folder, kind):
    ACCEPTED[kind](folder)
    ref = whisper_model.resolve(str(folder))
    model, expected = whisper_model.load(ref), load_file(toy_model / WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if "16" in kind else {"rtol": 0, "atol": 0}
    torch.testing.assert_close({name: model.state_dict()[name] for name in expected}, expected, **tolerance)
    processor = whisper_model.load_processor(ref, "sv")
    plain = whisper_model.load_processor(whisper_model.resolve(str(toy_model)), "sv")
    assert processor.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    assert processor.feature_extractor.feature_size == 80
    settings = json.loads((ref.folder / "generation_config.json").read_text("utf-8"))
    assert settings["lang_to_id"]["<|sv|>"] == processor.tokenizer.convert_tokens_to_ids("<|sv|>")
    assert {path.name for path in folder.iterdir()} == {path.name for path in folder.iterdir() if path.is_file()}
    again = whisper_model.resolve(str(folder))
    assert (again.folder, whisper_model.identity(again)) == (ref.folder, whisper_model.identity(ref))


def test_completed_base_keeps_the_identity_of_its_weights(toy_model, folder):
    without(folder, "generation_config.json", "preprocessor_config.json")
    ref, plain = whisper_model.resolve(str(folder)), whisper_model.resolve(str(toy_model))
    assert ref.folder != folder and whisper_model.identity(ref) == whisper_model.identity(plain)


def test_damaged_completed_base_is_made_again(folder):
    pickled(folder)
    completed = whisper_model.resolve(str(folder)).folder / WEIGHTS
    content = completed.read_bytes()
    completed.write_bytes(content[:-1] + b"\x01")
    assert whisper_model.resolve(str(folder)).folder / WEIGHTS == completed
    assert completed.read_bytes() == content


class Program:
    def __reduce__(self):
        return os.mkdir, ("written-by-a-pickle",)


def only(folder: Path, name: str) -> None:
    without(folder, WEIGHTS)
    (folder / name).write_bytes(b"0" * 2000)


def adapter(folder: Path, **fields) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(fields))


REFUSED = {
    "pickle with a program": (lambda at: torch.save({"a": Program()}, at / PICKLE) or without(at, WEIGHTS), "refused"),
    "pickle of text": (lambda at: only(at, PICKLE), "pytorch_model.bin is damaged"),
    "cut pickle": (lambda at: pickled(at) or os.truncate(at / PICKLE, 5000), "pytorch_model.bin is damaged"),
    "pickle of a list": (lambda at: torch.save([1], at / PICKLE) or without(at, WEIGHTS), "it holds a list"),
    "other names": (lambda at: renamed(at, "student.", removed="model.encoder"), "lacks weights|holds no weights"),
    "missing shard": (lambda at: sharded(at)[1].unlink(), "model-00002-of-00002.safetensors is missing"),
    "cut shard": (lambda at: os.truncate(sharded(at)[1], 900), "model-00002-of-00002.safetensors is damaged"),
    "cut shard of bin": (lambda at: os.truncate(sharded(at, ".bin")[0], 900), "pytorch_model-00001-of-00002.bin is da"),
    "damaged index": (lambda at: sharded(at) and (at / f"{WEIGHTS}.index.json").write_text("{"), "has no weight_map"),
    "index that leaves the folder": (
        lambda at: sharded(at) and change(at, f"{WEIGHTS}.index.json", weight_map={"a": "../b.safetensors"}),
        "outside of the folder",
    ),
    "shards without index": (lambda at: sharded(at) and without(at, f"{WEIGHTS}.index.json"), "and no model.safetens"),
    "float8": (lambda at: renamed(at, "", dtype=torch.float8_e4m3fn), "in F8_E4M3 .* float16, bfloat16 or float32"),
    "int8 in bin": (lambda at: pickled(at, dtype=torch.int8), "in int8 .* float16, bfloat16 or float32"),
    "quantised": (lambda at: change(at, "config.json", quantization_config={"quant_method": "gptq"}), "by gptq"),
    "untied output": (
        lambda at: save_file(
            (tensors := take(at)) | {"proj_out.weight": tensors["model.decoder.embed_tokens.weight"] + 1}, at / WEIGHTS
        ),
        "proj_out.weight.* differs from its embedding",
    ),
    "no tokenizer": (lambda at: without(at, "tokenizer.json", "vocab.json"), "has no tokenizer .*openai/whisper-small"),
    "empty folder": (lambda at: without(at, *(path.name for path in at.iterdir())), "it is empty"),
    "no config": (lambda at: without(at, "config.json"), "it has model.safetensors and no config.json"),
    "no weights": (lambda at: without(at, WEIGHTS), "it has no weights"),
    "LFS pointer": (lambda at: (at / WEIGHTS).write_text(POINTER), "model.safetensors .* is a pointer of Git LFS"),
    "LFS tokenizer": (lambda at: (at / "tokenizer.json").write_text(POINTER), "tokenizer.json .* is a pointer of Git"),
    "adapter": (
        lambda at: without(at, WEIGHTS, "config.json") or adapter(at, base_model_name_or_path="openai/whisper-small"),
        "an adapter .PEFT. for openai/whisper-small, .*merge_and_unload",
    ),
    "adapter without base": (lambda at: without(at, WEIGHTS) or adapter(at, peft_type="LORA"), "an adapter .LORA. for"),
    "adapter beside weights": (adapter, "has both model.safetensors and adapter_config.json"),
    "Flax": (lambda at: only(at, "flax_model.msgpack"), "weights for Flax; .*from_flax=True"),
    "TensorFlow": (lambda at: only(at, "tf_model.h5"), "weights for TensorFlow; .*from_tf=True"),
    "ggml": (lambda at: only(at, "ggml-small.bin"), "format of whisper.cpp"),
    "GGUF": (lambda at: only(at, "whisper.gguf"), "format of whisper.cpp"),
    "CTranslate2": (lambda at: only(at, "model.bin"), "format of CTranslate2"),
    "ONNX": (lambda at: only(at, "model.onnx"), "graph for ONNX"),
    "OpenAI's checkpoint": (lambda at: only(at, "small.pt"), "convert_openai_to_hf"),
    "another variant": (lambda at: only(at, "model.fp16.safetensors"), "a name that transformers does not look for"),
    "wav2vec2": (lambda at: change(at, "config.json", model_type="wav2vec2"), "of type 'wav2vec2', expected 'whisper'"),
    "text model": (lambda at: change(at, "config.json", model_type="qwen3"), "of type 'qwen3', expected 'whisper'"),
    "classifier": (
        lambda at: change(at, "config.json", architectures=["WhisperForAudioClassification"]),
        "WhisperForAudioClassification, .* does not write text",
    ),
    "config is no object": (lambda at: (at / "config.json").write_text("[]"), "config.json is not a JSON object"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_base_model_is_one_line(folder, kind, monkeypatch):
    make, words = REFUSED[kind]
    monkeypatch.chdir(folder.parent)
    make(folder)
    with pytest.raises(LabError, match=words) as caught:
        whisper_model.load(whisper_model.resolve(str(folder)))
    assert "\n" not in str(caught.value)
    assert not Path("written-by-a-pickle").exists()


def test_file_instead_of_a_folder_is_one_line(folder, tmp_path):
    for path, words in ((folder / WEIGHTS, "name the folder that it is in"), (tmp_path / "m.gguf", "for whisper.cpp")):
        if not path.exists():
            path.write_bytes(b"GGUF...")
        with pytest.raises(LabError, match=words):
            whisper_model.resolve(str(path))


# ---- from features to exports


def of_other_size(folder: Path, **sizes: int) -> None:
    config = WhisperConfig.from_pretrained(folder, **sizes)
    settings = WhisperForConditionalGeneration.from_pretrained(folder).generation_config
    without(folder, WEIGHTS)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = settings
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def english_only(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    for name in ("lang_to_id", "task_to_id"):
        del settings[name]
    (folder / "generation_config.json").write_text(json.dumps({**settings, "is_multilingual": False}))


def distilled_large_v3(folder: Path) -> None:
    of_other_size(folder, num_mel_bins=128, encoder_layers=3, decoder_layers=1)
    sharded(folder, ".bin")


WHOLE = {
    "128 bands, one decoder layer, shards of bin": (distilled_large_v3, "sv"),
    "English-only": (english_only, "en"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_base_model_goes_from_features_to_exports(folder, tmp_path, toy_settings, speech, kind):
    make, language = WHOLE[kind]
    make(folder)
    sizes = {"source.train": 8, "source.validation": 2, "source.test": 4, "training.steps": 2, "training.eval_every": 2}
    recipe = toy_settings({**sizes, "model.base": str(folder), "language": language, "evaluation.max_new_tokens": 3})
    cache = feature_pipeline.run(recipe, runs=tmp_path)
    tuned = whisper_model.resolve(training_pipeline.run(recipe, cache, runs=tmp_path).uri)
    assert whisper_model.language_of(tuned) == language
    folders = [tuned.folder, *(export.convert(tuned, form) for form in ("onnx", "ctranslate2-float32"))]
    clip = Waveform(speech(32_000))
    texts = [Transcriber(whisper_model.resolve(str(one))).transcribe(clip).text for one in folders]
    assert len(set(texts)) == 1


def test_english_only_base_is_refused_for_swedish(folder, toy_settings, tmp_path):
    english_only(folder)
    with pytest.raises(LabError, match=r"is English-only .* no tokens for language 'sv'. Name a multilingual model"):
        feature_pipeline.run(toy_settings({"model.base": str(folder)}), runs=tmp_path)
    assert whisper_model.language_of(whisper_model.resolve(str(folder))) == "en"


# ---- generation settings


def test_settings_are_filled_and_kept():
    vocabulary = {"<|notimestamps|>": 7, "<|sv|>": 3, "<|transcribe|>": 5, "<|translate|>": 4, "<|startofprev|>": 6}
    config = {"vocab_size": 51_865, "decoder_layers": 4, "encoder_layers": 4, "decoder_attention_heads": 6}
    given = {"forced_decoder_ids": [[1, 3]], "max_length": 225, "suppress_tokens": []}
    filled = generation.filled(given, vocabulary, {**config, "suppress_tokens": [1], "eos_token_id": 2})
    assert filled == {
        "alignment_heads": [[2, 2], [3, 0], [3, 2], [3, 3], [3, 4], [3, 5]],
        "eos_token_id": 2,
        "is_multilingual": True,
        "lang_to_id": {"<|sv|>": 3},
        "max_initial_timestamp_index": 50,
        "max_length": 225,
        "no_timestamps_token_id": 7,
        "prev_sot_token_id": 6,
        "return_timestamps": False,
        "suppress_tokens": [],
        "task_to_id": {"transcribe": 5, "translate": 4},
    }
    english = generation.filled({}, vocabulary, {**config, "vocab_size": 51_864})
    assert english["is_multilingual"] is False and "lang_to_id" not in english
    assert bases.generation.is_complete(filled, config) and not generation.is_complete({}, config)
