"""Convert a model to the format that an engine or a deployment reads. Each export is converted once and sealed.

    ctranslate2-int8       CTranslate2's format with int8 weights: for a CPU
    ctranslate2-float16    the same in half precision: for a GPU; also -int8_float16, and -float32 for comparison
    onnx-int8              two graphs for ONNX Runtime with int8 products (onnx_graph.py): for a CPU
    onnx                   the same in float32
    safetensors-float16    a Hugging Face folder of half the size, computed in float32; also -float32
    ggml-f16               whisper.cpp's format (ggml.py), for that program; also -q8_0 and -q5_0

<cache>/ctranslate2/<digest>/
    model.bin, config.json, vocabulary.json   read by CTranslate2
    tokenizer.json, preprocessor_config.json  read by other CTranslate2 clients
    manifest.json                             written last: source of the weights
<cache>/onnx/<digest>/                        encoder.onnx, decoder.onnx, tokenizer and configuration, manifest.json
<cache>/safetensors/<digest>/                 a model folder for model.resolve
<cache>/ggml/<digest>/                        ggml-model.bin, configuration, manifest.json
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.infra import environment, manifest, stores
from pipelines.infra.errors import LabError, is_disk_full, missing_package
from pipelines.infra.parallel import work_folder
from pipelines.recipes import digest
from pipelines.whisper import model as whisper_model
from pipelines.whisper import model_files
from pipelines.whisper.bases import kinds, weights
from pipelines.whisper.export import ggml, onnx_graph
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

COMPUTE_TYPES = ("int8", "int8_float16", "float16", "float32")
"""Precision of CTranslate2's weights and products: int8 for a CPU, int8_float16 and float16 for a GPU."""
FORMS = (
    *(f"ctranslate2-{name}" for name in COMPUTE_TYPES), "onnx", "onnx-int8",
    "safetensors-float16", "safetensors-float32", *(f"ggml-{name}" for name in ggml.PRECISIONS),
)  # fmt: skip
FOREIGN_FORMS = tuple(form for form in FORMS if form.startswith("ggml"))
"""Forms for another program: the lab writes and scores them, and does not transcribe with them."""
_FORMAT = "2"
_COPIED_CONFIGS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")
_CONFIGS = ("config.json", "processor_config.json", *_COPIED_CONFIGS)
_COPIED_FACTS = ("base", "base_model", "fork", "language", "context", "context_s", "windows", "confidence")
"""Fields of a model's manifest that hold for its exports, too. Scores do not: exports round differently."""


def export(ref: ModelRef, compute_type: str = "int8", *, to: str | Path = "") -> Path:
    """Convert to CTranslate2 (see `convert`). Raises LabError if `compute_type` is not in COMPUTE_TYPES."""
    if compute_type not in COMPUTE_TYPES:
        raise LabError(f"compute type must be one of {', '.join(COMPUTE_TYPES)}, got {compute_type!r}")
    return convert(ref, f"ctranslate2-{compute_type}", to=to)


def convert(ref: ModelRef, form: str, *, to: str | Path = "") -> Path:
    """Return the folder of `ref` in one of FORMS, converting it if there is none yet; in the cache, or at `to`.

    Raises LabError if a package is missing, `form` is not in FORMS, `ref` is an export itself, `to` holds something
    else, or the model does not convert.
    """
    if form not in FORMS:
        raise LabError(f"an export must be one of {', '.join(FORMS)}, got {form!r}")
    if is_export(ref):
        raise LabError(f"{ref.title} is an export itself: name the model that it was made of")
    _require_packages(form)
    model_files.require_usable(ref.folder)
    format_, _, precision = form.partition("-")
    identity = _identity(ref, format_, precision)
    folder = Path(to).expanduser() if to else environment.cache_folder() / format_ / digest(identity)
    facts, sealed = _facts(ref, form, identity), manifest.read(folder) or {}
    if sealed.get("made_of") == identity and (fault := manifest.problem(folder)) is None:
        if not facts.items() <= sealed.items():  # the model's facts have changed, its weights have not
            manifest.amend(folder, **facts)
        return folder
    if sealed.get("made_of") == identity:
        manifest.move_aside(folder, fault)
    if to and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} must be empty or a finished export of {ref.title} in {precision}; name another")
    for package in ("torch", "transformers"):  # the engine that reads an export needs neither
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, package, "making an export (`production` makes one to be served anywhere)")
    try:
        _write(ref, form, folder, {"revision": ref.revision, "made_of": identity, **facts})
    except Exception as error:
        if is_disk_full(error, folder.parent):
            line = f"the disk is full, so {ref.title} is not exported to {folder}: free some space, then try again"
            raise LabError(line) from None
        raise
    return folder


def _write(ref: ModelRef, form: str, folder: Path, facts: dict[str, Any]) -> None:
    """Convert `ref` in a temporary folder, seal it with `facts` and move it to `folder`."""
    format_, _, precision = form.partition("-")
    convert_to = {"ctranslate2": _write_ctranslate2, "onnx": _write_onnx, "safetensors": _write_safetensors}.get(
        format_, _write_ggml
    )
    title = f"CTranslate2, {precision}" if format_ == "ctranslate2" else form
    logger.info(f"converting {ref.title} to {title} (once) ...")
    with work_folder.create(folder.parent, "export") as temporary:
        target = temporary / "model"
        convert_to(ref, precision, target)
        manifest.seal(target, name=_without_path(ref.name), **facts)
        _move(target, folder)


def _without_path(name: str) -> str:
    """Return a model's name, or the last part of one that is a path: manifests are published."""
    return Path(name).name if stores.is_local_path(name) or name.startswith(("/", ".", "~")) else name


def installed(form: str = "ctranslate2-int8") -> bool:
    """Return True if the packages for exports in `form` can be imported."""
    try:
        if form.startswith("onnx"):
            import onnxruntime  # noqa: F401

            return importlib.util.find_spec("onnx") is not None
        if form in FOREIGN_FORMS:
            import pywhispercpp  # noqa: F401

            return True
        import ctranslate2  # noqa: F401
    except ImportError:  # also if a library that it needs is missing
        return False
    return True


def is_export(ref: ModelRef) -> bool:
    """Return True if `ref` is in the format of another program than transformers."""
    return ref.facts.get("kind") in ("ctranslate2", "onnx", "ggml")


def _require_packages(form: str) -> None:
    format_ = form.partition("-")[0]
    if format_ == "ctranslate2" and not installed():
        raise missing_package("ctranslate2", "ctranslate2>=4.6", "decoding with CTranslate2")
    if format_ == "onnx" and importlib.util.find_spec("onnx") is None:
        raise missing_package("onnx", "onnx>=1.16", "an export to ONNX")
    if form == "onnx-int8" and importlib.util.find_spec("onnxruntime") is None:
        raise missing_package("onnxruntime", "onnxruntime>=1.20", "an export to ONNX in eight bits")


def _identity(ref: ModelRef, format_: str, precision: str) -> dict[str, Any]:
    """Return the fields that determine the content of an export."""
    settings = ref.folder / "generation_config.json"  # engines read its suppressed tokens
    format_fields = {
        "ctranslate2": lambda: {
            "compute_type": precision,
            "ctranslate2": importlib.metadata.version("ctranslate2"),
            "code.export": _FORMAT,
        },
        "onnx": lambda: {
            "code.export": onnx_graph.FORMAT,
            **({"bits": 7 if onnx_graph.needs_seven_bits() else 8} if precision else {}),
        },
        "safetensors": lambda: {"dtype": precision, "code.export": _FORMAT},
        "ggml": lambda: {"precision": precision, "code.export": ggml.FORMAT},
    }[format_]
    return {
        **whisper_model.identity(ref),
        "generation": manifest.sha256(Path(os.path.realpath(settings))) if settings.is_file() else "none",
        **format_fields(),
    }


def _facts(ref: ModelRef, form: str, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an export's manifest with which it can be used like the model."""
    format_, _, precision = form.partition("-")
    is_model = format_ == "safetensors"
    quantisation = precision.replace("float32", "") if is_model else form
    return {
        **{name: ref.facts[name] for name in _COPIED_FACTS if name in ref.facts},
        "kind": "model" if is_model else format_,
        "context": ref.context,
        "quantisation": ", ".join(filter(None, (ref.quantisation, quantisation))) or None,
        "digest": digest(identity),
    }


# ---- CTranslate2


def _write_ctranslate2(ref: ModelRef, compute_type: str, folder: Path) -> None:
    from ctranslate2.converters import TransformersConverter
    from safetensors import safe_open

    configs = [name for name in _COPIED_CONFIGS if (ref.folder / name).is_file()]
    if "tokenizer.json" not in configs:
        raise LabError(f"{ref.folder} has no tokenizer.json: save the model's processor again, with save_pretrained")
    with safe_open(ref.folder / "model.safetensors", "pt") as stored:
        weights.require_finite(ref.folder, ((name, stored.get_tensor(name)) for name in stored.keys()))
    try:
        TransformersConverter(str(ref.folder), copy_files=configs).convert(str(folder), quantization=compute_type)
    except Exception as error:  # of any kind, for files with unexpected content
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LabError(
            f"{ref.title} does not convert to CTranslate2: {reason}. Decode it with --engine transformers"
        ) from None
    _complete_config(ref, folder)


def _complete_config(ref: ModelRef, folder: Path) -> None:
    """Remove alignment heads that the decoder does not have: CTranslate2 ends the process when it aligns with them.

    Also add the sizes of unusual contexts.
    """
    model = json.loads((ref.folder / "config.json").read_text("utf-8"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layers, heads = model["decoder_layers"], model["decoder_attention_heads"]
    existing = [[layer, head] for layer, head in config.get("alignment_heads", []) if layer < layers and head < heads]
    usual = {
        "max_source_positions": model_files.SOURCE_POSITIONS,
        "max_target_positions": model_files.TEXT_POSITIONS,
    }
    other = {name: model[name] for name, size in usual.items() if model.get(name, size) != size}
    manifest.write_json(folder / "config.json", {**config, "alignment_heads": existing, **other})


# ---- ONNX, ggml, safetensors


def _write_onnx(ref: ModelRef, precision: str, folder: Path) -> None:
    folder.mkdir()
    model, seven_bits = whisper_model.load(ref), onnx_graph.needs_seven_bits()
    onnx_graph.write(model, folder, int8=precision == "int8", seven_bits=seven_bits)
    _copy(ref, folder, _CONFIGS)


def _write_ggml(ref: ModelRef, precision: str, folder: Path) -> None:
    folder.mkdir()
    ggml.write(ref.folder, precision, folder / ggml.FILE_NAME)
    _copy(ref, folder, ("config.json", "generation_config.json"))  # of which language the file is


def _write_safetensors(ref: ModelRef, precision: str, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors, dtype = load_file(ref.folder / "model.safetensors"), getattr(torch, precision)
    large = [name for name, tensor in tensors.items() if tensor.abs().max() > torch.finfo(dtype).max]
    if large:
        raise LabError(f"{ref.title} has weights that {precision} cannot hold ({large[0]}): take safetensors-float32")
    folder.mkdir()
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    _copy(ref, folder, kinds.TEXTS)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    manifest.write_json(folder / "config.json", {**config, "dtype": precision})


def _copy(ref: ModelRef, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (ref.folder / name).is_file():
            shutil.copyfile(ref.folder / name, folder / name)


def _move(source: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`; keep a finished one that another process put there first."""
    for _ in range(2):
        try:
            os.replace(source, folder)
            return
        except OSError:  # not empty
            if manifest.problem(folder) is None:
                return
            shutil.rmtree(folder, ignore_errors=True)
    raise LabError(f"could not put the converted model at {folder}: remove that folder and try again")
