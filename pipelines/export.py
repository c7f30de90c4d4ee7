"""A Whisper model for CTranslate2: the same weights in eight bits or half precision, made once and kept.

<cache>/ctranslate2/<digest>/
    model.bin, config.json, vocabulary.json   what CTranslate2 reads
    tokenizer.json, preprocessor_config.json  so that other CTranslate2 clients can open the folder, too
    manifest.json                             written last: where the weights came from
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines import environment, manifest, models
from pipelines.errors import LabError, missing_package
from pipelines.models import ModelRef
from pipelines.recipe import digest

COMPUTE_TYPES = ("int8", "int8_float16", "float16", "float32")
"""How weights are kept and multiplied: int8 for a CPU, int8_float16 and float16 for a GPU, float32 to compare with."""
_FORMAT = "2"
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")


def export(
    ref: ModelRef, compute_type: str = "int8", *, to: str | Path = "", log: Callable[[str], None] = print
) -> Path:
    """The folder of `ref` in CTranslate2's format: at hand, or converted now; below the cache, or at `to`.

    Raises LabError where ctranslate2 is not installed, `compute_type` is none of COMPUTE_TYPES, `to` holds something
    else, or the model does not convert.
    """
    if compute_type not in COMPUTE_TYPES:
        raise LabError(f"compute type must be one of {', '.join(COMPUTE_TYPES)}, got {compute_type!r}")
    _require()
    told = _identity(ref, compute_type)
    folder = Path(to).expanduser() if to else environment.cache_folder() / "ctranslate2" / digest(told)
    if (manifest.read(folder) or {}).get("made_of") == told and manifest.problem(folder, thorough=False) is None:
        return folder
    if to and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} must be empty or a finished export of {ref.title} in {compute_type}; name another")
    log(f"converting {ref.title} to CTranslate2, {compute_type} (once) ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # made beside and moved: of two processes that convert at once, the later one replaces an equal folder
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as place:
        made = Path(place) / "model"
        _convert(ref, compute_type, made)
        facts = {name: ref.facts[name] for name in ("base", "language", "test", "confidence") if name in ref.facts}
        manifest.seal(made, kind="ctranslate2", name=ref.name, revision=ref.revision, made_of=told, **facts)
        _put(made, folder)
    return folder


def installed() -> bool:
    """Whether ctranslate2 can be imported."""
    try:
        import ctranslate2  # noqa: F401
    except ImportError:  # absent, or a library that it needs is
        return False
    return True


def _require() -> None:
    if not installed():
        raise missing_package("ctranslate2", "ctranslate2>=4.6", "decoding with CTranslate2")


def _identity(ref: ModelRef, compute_type: str) -> dict[str, Any]:
    """What decides the bytes of the export."""
    settings = ref.folder / "generation_config.json"  # its suppressed tokens are part of what CTranslate2 is told
    return {
        **models.identity(ref),
        "generation": manifest.sha256(Path(os.path.realpath(settings))) if settings.is_file() else "none",
        "compute_type": compute_type,
        "ctranslate2": importlib.metadata.version("ctranslate2"),
        "code.export": _FORMAT,
    }


def _convert(ref: ModelRef, compute_type: str, made: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    beside = [name for name in _BESIDE if (ref.folder / name).is_file()]
    if "tokenizer.json" not in beside:
        raise LabError(f"{ref.folder} has no tokenizer.json: save the model's processor again, with save_pretrained")
    try:
        # the folder, not the model: the converter reads the weights by itself
        TransformersConverter(str(ref.folder), copy_files=beside).convert(str(made), quantization=compute_type)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LabError(
            f"{ref.title} does not convert to CTranslate2: {reason}. Decode it with --engine transformers"
        ) from None
    _keep_heads_that_exist(ref, made)


def _keep_heads_that_exist(ref: ModelRef, made: Path) -> None:
    """Take out heads for word times that the decoder does not have: asked for those, CTranslate2 ends the process."""
    model = json.loads((ref.folder / "config.json").read_text("utf-8"))
    told = json.loads((made / "config.json").read_text("utf-8"))
    layers, heads = model["decoder_layers"], model["decoder_attention_heads"]
    known = [[layer, head] for layer, head in told.get("alignment_heads", []) if layer < layers and head < heads]
    manifest.write_json(made / "config.json", {**told, "alignment_heads": known})


def _put(made: Path, folder: Path) -> None:
    """Move a finished folder to its place, where an unfinished or an equal one may lie."""
    for _ in range(2):
        try:
            os.replace(made, folder)
            return
        except OSError:  # not empty
            if manifest.problem(folder, thorough=False) is None:
                return  # another process was faster
            shutil.rmtree(folder, ignore_errors=True)
    raise LabError(f"could not put the converted model at {folder}: remove that folder and try again")
