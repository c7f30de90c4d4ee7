"""Files of Whisper's tokenizer that older programs read: transformers 4, and the converter of whisper.cpp.

transformers 5 saves tokenizer.json and a tokenizer_config.json that version 4 cannot open. The converter reads
vocab.json and added_tokens.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError

_FAST, _CONFIG, _MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_LOCAL = ("is_local", "local_files_only", "name_or_path")
"""Fields about the machine on which transformers 5 saved a tokenizer."""


def vocabulary(folder: Path) -> dict[str, int]:
    """Return token to id, by tokenizer.json. Raises LabError if that is damaged."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / _FAST)).get_vocab()
    except Exception as error:  # the library raises plain Exception for all causes
        raise LabError(
            f"{folder} has no usable tokenizer.json ({' '.join(str(error).split())[:200]}): fetch the model again"
        ) from None


def write_fast(folder: Path, target: Path) -> None:
    """Write tokenizer.json to `target` from vocab.json, merges.txt and the other files in `folder`."""
    from transformers import WhisperTokenizer

    try:
        tokenizer = WhisperTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.save(str(target / _FAST))
    except Exception as error:  # of any kind, for files with unexpected content
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise LabError(f"{folder} has no usable vocab.json and merges.txt ({reason}): fetch the model again") from None
    if not (target / _CONFIG).is_file():
        manifest.write_json(target / _CONFIG, {"tokenizer_class": "WhisperTokenizer"})


def write_all(folder: Path, base: Path) -> None:
    """Give `folder`, where transformers 5 saved a tokenizer, all tokenizer files: those of `base` where it has them."""
    for name in (_FAST, _CONFIG, _MAP, "vocab.json", "merges.txt", "added_tokens.json", "normalizer.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    content = json.loads((folder / _FAST).read_text("utf-8"))
    model, added = content["model"], content["added_tokens"]
    _write_missing(folder / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not (folder / "merges.txt").exists():
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    beyond = {token["content"]: token["id"] for token in added if token["content"] not in model["vocab"]}
    _write_missing(folder / "added_tokens.json", beyond)
    config = _for_version_4(json.loads((folder / _CONFIG).read_text("utf-8")))
    manifest.write_json(folder / _CONFIG, config)
    special = {name: config[name] for name in (*_SPECIAL, "additional_special_tokens") if config.get(name)}
    _write_missing(folder / _MAP, special)


def _for_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json that transformers 4 and 5 read."""
    extra = config.get("extra_special_tokens")
    plain = {name: value for name, value in config.items() if name not in _LOCAL}
    if isinstance(extra, list):
        plain.pop("extra_special_tokens")
        plain["additional_special_tokens"] = plain.get("additional_special_tokens") or extra
    return plain


def _write_missing(path: Path, content: dict[str, Any]) -> None:
    if not path.exists():
        manifest.write_json(path, content)
