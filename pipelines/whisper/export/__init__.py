"""The same weights in the form that a deployment takes: made once and kept, sealed by a manifest.

    ctranslate2-int8       CTranslate2's own format, weights in eight bits: for a CPU
    ctranslate2-float16    the same in half precision: for a GPU; also -int8_float16, and -float32 to compare with
    onnx-int8              two graphs for ONNX Runtime, products in eight bits (graph.py): for a CPU
    onnx                   the same in float32
    safetensors-float16    a Hugging Face folder with half the bytes, which the lab computes in float32; also -float32

<cache>/ctranslate2/<digest>/
    model.bin, config.json, vocabulary.json   what CTranslate2 reads
    tokenizer.json, preprocessor_config.json  so that other CTranslate2 clients can open the folder, too
    manifest.json                             written last: where the weights came from
<cache>/onnx/<digest>/                        encoder.onnx, decoder.onnx and the same beside them
<cache>/safetensors/<digest>/                 what `models.resolve` takes
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipelines.infra import environment, manifest, stores
from pipelines.infra.errors import LabError, missing_package
from pipelines.recipes import digest
from pipelines.whisper import model as whisper_model
from pipelines.whisper.export import onnx_graph
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

COMPUTE_TYPES = ("int8", "int8_float16", "float16", "float32")
"""How CTranslate2 keeps and multiplies weights: int8 for a CPU, int8_float16 and float16 for a GPU."""
FORMS = (
    *(f"ctranslate2-{name}" for name in COMPUTE_TYPES), "onnx", "onnx-int8",
    "safetensors-float16", "safetensors-float32",
)  # fmt: skip
_FORMAT = "2"
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")
_CONFIGS = ("config.json", "processor_config.json", *_BESIDE)
_LASTING = ("base", "base_model", "language", "context", "context_s", "confidence")
"""What a model's manifest tells that holds for its exports, too: no score does, they have other rounding."""


def export(ref: ModelRef, compute_type: str = "int8", *, to: str | Path = "") -> Path:
    """`convert` to CTranslate2. Raises LabError where `compute_type` is none of COMPUTE_TYPES."""
    if compute_type not in COMPUTE_TYPES:
        raise LabError(f"compute type must be one of {', '.join(COMPUTE_TYPES)}, got {compute_type!r}")
    return convert(ref, f"ctranslate2-{compute_type}", to=to)


def convert(ref: ModelRef, form: str, *, to: str | Path = "") -> Path:
    """The folder of `ref` in one of FORMS: at hand, or converted now; below the cache, or at `to`.

    Raises LabError where a package is not installed, `form` is none of FORMS, `ref` is an export itself, `to` holds
    something else, or the model does not convert.
    """
    if form not in FORMS:
        raise LabError(f"an export must be one of {', '.join(FORMS)}, got {form!r}")
    if is_export(ref):
        raise LabError(f"{ref.title} is an export itself: name the model that it was made of")
    format_, _, precision = form.partition("-")
    make = {"ctranslate2": _convert, "onnx": _to_onnx, "safetensors": _cast}[format_]
    _require(form)
    told = _identity(ref, format_, precision)
    folder = Path(to).expanduser() if to else environment.cache_folder() / format_ / digest(told)
    facts, sealed = _facts(ref, form, told), manifest.read(folder) or {}
    if sealed.get("made_of") == told and manifest.problem(folder, thorough=False) is None:
        if not facts.items() <= sealed.items():  # the same weights are called something else now
            manifest.amend(folder, **facts)
        return folder
    if to and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} must be empty or a finished export of {ref.title} in {precision}; name another")
    for package in ("torch", "transformers"):  # the engine that reads an export needs neither
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, package, "making an export (`production` makes one to be served anywhere)")
    told_form = f"CTranslate2, {precision}" if format_ == "ctranslate2" else form
    logger.info(f"converting {ref.title} to {told_form} (once) ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # made beside and moved: of two processes that convert at once, the later one replaces an equal folder
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as place:
        made = Path(place) / "model"
        make(ref, precision, made)
        manifest.seal(made, name=_without_place(ref.name), revision=ref.revision, made_of=told, **facts)
        _put(made, folder)
    return folder


def _without_place(name: str) -> str:
    """A model's name; of one that is a path its last part, for a manifest travels."""
    return Path(name).name if stores.is_local_path(name) or name.startswith(("/", ".", "~")) else name


def installed(form: str = "ctranslate2-int8") -> bool:
    """Whether the packages for exports in `form` can be imported."""
    try:
        if form.startswith("onnx"):
            import onnxruntime  # noqa: F401

            return importlib.util.find_spec("onnx") is not None
        import ctranslate2  # noqa: F401
    except ImportError:  # absent, or a library that it needs is
        return False
    return True


def is_export(ref: ModelRef) -> bool:
    """Whether `ref` is a folder that an engine of its own reads, and not transformers."""
    return ref.facts.get("kind") in ("ctranslate2", "onnx")


def _require(form: str) -> None:
    format_ = form.partition("-")[0]
    if format_ == "ctranslate2" and not installed():
        raise missing_package("ctranslate2", "ctranslate2>=4.6", "decoding with CTranslate2")
    if format_ == "onnx" and importlib.util.find_spec("onnx") is None:
        raise missing_package("onnx", "onnx>=1.16", "an export to ONNX")
    if form == "onnx-int8" and importlib.util.find_spec("onnxruntime") is None:
        raise missing_package("onnxruntime", "onnxruntime>=1.20", "an export to ONNX in eight bits")


def _identity(ref: ModelRef, format_: str, precision: str) -> dict[str, Any]:
    """What decides the bytes of the export."""
    settings = ref.folder / "generation_config.json"  # its suppressed tokens are part of what an engine is told
    own = {
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
    }[format_]
    return {
        **whisper_model.identity(ref),
        "generation": manifest.sha256(Path(os.path.realpath(settings))) if settings.is_file() else "none",
        **own(),
    }


def _facts(ref: ModelRef, form: str, told: dict[str, Any]) -> dict[str, Any]:
    """What an export's manifest tells so that it can be used in the model's place."""
    format_, _, precision = form.partition("-")
    plain = format_ == "safetensors"  # a model like any other; float32 is what it was
    own = precision.replace("float32", "") if plain else form
    return {
        **{name: ref.facts[name] for name in _LASTING if name in ref.facts},
        "kind": "model" if plain else format_,
        "context": ref.context,
        "quantisation": ", ".join(filter(None, (ref.quantisation, own))) or None,
        "digest": digest(told),
    }


# ---- CTranslate2


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


# ---- ONNX, safetensors


def _to_onnx(ref: ModelRef, precision: str, made: Path) -> None:
    made.mkdir()
    onnx_graph.write(whisper_model.load(ref), made, int8=precision == "int8", seven_bits=onnx_graph.needs_seven_bits())
    _copy_configs(ref, made)


def _cast(ref: ModelRef, precision: str, made: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights, dtype = load_file(ref.folder / "model.safetensors"), getattr(torch, precision)
    large = [name for name, told in weights.items() if told.abs().max() > torch.finfo(dtype).max]
    if large:
        raise LabError(f"{ref.title} has weights that {precision} cannot hold ({large[0]}): take safetensors-float32")
    made.mkdir()
    cast = {name: told.to(dtype) if told.is_floating_point() else told for name, told in weights.items()}
    save_file(cast, made / "model.safetensors", metadata={"format": "pt"})
    _copy_configs(ref, made)
    config = json.loads((made / "config.json").read_text("utf-8"))
    manifest.write_json(made / "config.json", {**config, "dtype": precision})


def _copy_configs(ref: ModelRef, made: Path) -> None:
    for name in _CONFIGS:
        if (ref.folder / name).is_file():
            shutil.copyfile(ref.folder / name, made / name)


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
