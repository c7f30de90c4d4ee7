"""Recognise what a folder or a repository holds, and refuse what is no Whisper that the lab loads, with a remedy."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.whisper.bases import weights

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# fmt: off
TEXTS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "normalizer.json",
)
# fmt: on
"""Small files of a Whisper model that programs read."""
_LFS = b"version https://git-lfs"
_LFS_BYTES = 1000
"""Pointers are shorter."""
_SAVE = "save it with save_pretrained"
_FORMATS = (
    (r".*\.gguf|ggml.*\.bin", "is in the format of whisper.cpp", "name the model that it was made of"),
    (r"model\.bin", "is in the format of CTranslate2 (faster-whisper)", "name the model that it was converted from"),
    (r"flax_model.*\.msgpack", "holds weights for Flax", f"load it with from_flax=True in transformers 4 and {_SAVE}"),
    (r"tf_model.*\.h5", "holds weights for TensorFlow", f"load it with from_tf=True in transformers 4 and {_SAVE}"),
    (r"(.*/)?.*\.onnx", "holds a graph for ONNX", "name the model that it was made of"),
    (r".*\.nemo", "is a model of NeMo", "name a Whisper model"),
    (r".*\.npz", "holds weights for MLX", "name the model that it was made of"),
    (r".*\.(xml|mlmodelc|mlpackage)", "is a compiled model", "name the model that it was made of"),
    (
        r".*\.(pt|pth|ckpt)",
        "is a checkpoint of another program",
        "convert it (transformers has convert_openai_to_hf.py for OpenAI's files), or name a model of the Hub",
    ),
    (
        r".*\.(safetensors|bin)",
        "has a name that transformers does not look for",
        f"load it with the variant that its name has, and {_SAVE}",
    ),
)
"""Pattern of file names, what such files are, and what to do."""


def require_whisper(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """Return the content of config.json. Raises LabError if the folder, with files `names`, holds no Whisper."""
    config, adapter = manifest.read_json(folder / CONFIG), manifest.read_json(folder / ADAPTER)
    for name in sorted(names):
        if name.endswith((".safetensors", ".bin", ".json", ".txt")) and _is_pointer(folder / name):
            raise LabError(
                f"{name} in {folder} is a pointer of Git LFS, not the file itself: run `git lfs install` and "
                "`git lfs pull` in that folder"
            )
    require_files(names, str(folder), adapter)
    if config is None:
        raise LabError(f"{folder} is not a model that this lab can use: {CONFIG} is not a JSON object. Fetch it again")
    require_architecture(config, str(folder))
    if not names & {"tokenizer.json", "vocab.json"} or not ("tokenizer.json" in names or "merges.txt" in names):
        raise LabError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt): copy these files and "
            "tokenizer_config.json from the model that it was tuned from, such as openai/whisper-small"
        )
    return config


def require_files(names: Collection[str], uri: str, adapter: dict[str, Any] | None = None) -> None:
    """Raise LabError unless the files `names` are those of a model in transformers' format for torch.

    `adapter`: the content of adapter_config.json, if there is one.
    """
    chosen = weights.choose(names)
    if ADAPTER in names:
        raise LabError(_adapter_line(uri, chosen, adapter or {}))
    if not names:
        raise LabError(f"no model in {uri}: it is empty; expected a folder with config.json and model.safetensors")
    if chosen and CONFIG in names:
        return
    if chosen:
        raise LabError(f"no model in {uri}: it has {chosen} and no {CONFIG}; fetch the whole model")
    if shards := sorted(name for name in names if weights.SHARD.fullmatch(name)):
        index = (weights.PICKLE if shards[0].endswith(".bin") else weights.SAFETENSORS) + weights.INDEX
        raise LabError(f"no model in {uri}: it has {shards[0]} and no {index}. Fetch the whole model")
    for pattern, what, remedy in _FORMATS:
        if matches := sorted(name for name in names if re.fullmatch(pattern, name)):
            raise LabError(f"no model in {uri}: {matches[0]} {what}; {remedy}")
    if CONFIG in names:
        raise LabError(
            f"no {weights.SAFETENSORS} in {uri}, and no {weights.PICKLE}: it has no weights. Fetch the whole model, or "
            f"{_SAVE}"
        )
    raise LabError(f"no model in {uri}: expected a folder with config.json and model.safetensors")


def require_architecture(config: dict[str, Any], uri: str) -> None:
    """Raise LabError unless a config.json is that of a Whisper that writes text, in plain precision."""
    kind = config.get("model_type")
    if kind != "whisper":
        raise LabError(
            f"{uri} is not a model that this lab can use: it is a model of type {kind!r}, expected 'whisper'. Name a "
            "Whisper model"
        )
    architecture = next(iter(config.get("architectures") or ()), "WhisperForConditionalGeneration")
    if architecture not in ("WhisperForConditionalGeneration", "WhisperModel"):
        raise LabError(f"{uri} is a {architecture}, expected WhisperForConditionalGeneration: it does not write text")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "an unnamed method") if isinstance(quantised, dict) else quantised
        raise LabError(f"{uri} holds weights quantised by {method}: name the model in float16, bfloat16 or float32")


def refuse_file(path: Path) -> LabError:
    """Return the error for a file that is named instead of a folder."""
    head = path.open("rb").read(4) if path.stat().st_size >= 4 else b""
    if head in (b"GGUF", b"lmgg"):
        return LabError(f"{path} is a file for whisper.cpp: name the model that it was made of")
    if (path.parent / CONFIG).is_file():
        return LabError(f"{path} is a file: name the folder that it is in, {path.parent}")
    return LabError(f"{path} is a file: expected a folder with config.json and model.safetensors")


def _adapter_line(uri: str, chosen: str, adapter: dict[str, Any]) -> str:
    if chosen:
        return (
            f"{uri} has both {chosen} and {ADAPTER}: if the adapter is merged into the weights, remove adapter_*; "
            "otherwise merge it first"
        )
    base = adapter.get("base_model_name_or_path") or "its base model, which it does not name"
    kind = adapter.get("peft_type") or "PEFT"
    return (
        f"{uri} holds an adapter ({kind}) for {base}, not a whole model: load that model, then "
        "PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder), save its processor "
        "there, and name that folder"
    )


def _is_pointer(path: Path) -> bool:
    try:
        if path.stat().st_size >= _LFS_BYTES:
            return False
        with open(path, "rb") as file:
            return file.read(len(_LFS)) == _LFS
    except OSError:
        return False
