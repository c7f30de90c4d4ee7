"""Read weights as they are stored: in one file or in shards, safetensors or pytorch_model.bin, under any prefix.

A pickle is read with `weights_only`: it can hold tensors and nothing that runs.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
CHOICES = (SAFETENSORS, SAFETENSORS + INDEX, PICKLE, PICKLE + INDEX)
"""Files that name the weights of a model, in the order in which transformers looks for them."""
SHARD = re.compile(r"(model-\d+-of-\d+\.safetensors)|(pytorch_model-\d+-of-\d+\.bin)")
_FIRST, _OUTPUT = "encoder.conv1.weight", "proj_out.weight"
_EMBEDDING = "model.decoder.embed_tokens.weight"
_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs store the weights beside other state."""
_PLAIN_PREFIXES = ("model.", "")
"""Prefixes of names that transformers reads."""
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def choose(names: Collection[str]) -> str:
    """Return the file of CHOICES that is read; empty if there is none."""
    return next((name for name in CHOICES if name in names), "")


def to_download(names: Collection[str]) -> list[str]:
    """Return the files of a repository that hold the weights which are read: one file, or an index and its shards."""
    chosen = choose(names)
    if not chosen.endswith(INDEX):
        return [chosen] if chosen else []
    kind = 1 if chosen.startswith(SAFETENSORS) else 2
    shards = [name for name in names if (match := SHARD.fullmatch(name)) and match[kind]]
    return [chosen, *sorted(shards)]


def files(folder: Path, chosen: str) -> list[str]:
    """Return the names of `chosen` and, for an index, of its shards. Raises LabError if one is missing."""
    if not chosen.endswith(INDEX):
        return [chosen]
    index = manifest.read_json(folder / chosen) or {}
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise LabError(f"{chosen} in {folder} is damaged (it has no weight_map): fetch the model again")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise LabError(f"{chosen} in {folder} names {name!r}, which is outside of the folder: refused")
        if not (folder / name).is_file():
            raise LabError(
                f"{name} is missing in {folder}: it is one of the {len(names)} shards in {chosen}. Fetch it, or the "
                "whole model again"
            )
    return [chosen, *names]


def prefix_in_header(path: Path) -> str:
    """Return the prefix of the names in a safetensors file that transformers does not read; empty if it reads them.

    A file whose header cannot be read is left to model_files.py, which reports it.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            names = json.loads(file.read(min(length, 100_000_000)))
        prefix = _prefix(names)
    except (OSError, ValueError, struct.error, RecursionError, TypeError):
        return ""
    return "" if prefix is None or prefix in _PLAIN_PREFIXES else prefix


def write(folder: Path, chosen: str, path: Path) -> None:
    """Write the weights that `chosen` names to one safetensors file, under transformers' names, in their precision.

    Raises LabError if a file is damaged or unsafe, or holds no weights of a Whisper.
    """
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    for name in files(folder, chosen):
        if not name.endswith(INDEX):
            stored |= _read(folder / name)
    save_file(_renamed(stored, folder, chosen), path, metadata={"format": "pt"})


def require_finite(folder: Path, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise LabError if a tensor of `named` (name, tensor) holds NaN or infinity, with which every text is wrong."""
    for name, tensor in named:
        if not tensor.isfinite().all():
            raise LabError(
                f"{folder} has weights that are not finite ({name}): its training diverged or the file is damaged. "
                "Fetch the model again, or name another"
            )


def tie_output(folder: Path, model: WhisperForConditionalGeneration) -> None:
    """Make the output matrix the embedding, as in every Whisper. Raises LabError if the two differ."""
    embedding = model.model.decoder.embed_tokens.weight
    if model.proj_out.weight is embedding:
        return
    if not model.proj_out.weight.equal(embedding):
        raise LabError(
            f"{folder} has an output matrix ({_OUTPUT}) that differs from its embedding: a Whisper has one matrix for "
            "both. Name another model"
        )
    model.proj_out.weight, model.config.tie_word_embeddings = embedding, True


def _read(path: Path) -> dict[str, torch.Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, or one of torch for a type that it lacks
        raise _damaged(path, error) from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that torch.save wrote. Raises LabError if it holds other objects."""
    import pickle

    import torch

    try:
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # the format before torch 1.6 cannot be mapped
                raise
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_saved_by_torch(path):
            raise _damaged(path, "it was not written by torch.save") from None
        named = re.search(r"GLOBAL ([\w.]+)|class '?([\w.]+)", str(error))
        what = f" ({next(filter(None, named.groups()))})" if named else ""
        raise LabError(
            f"{path} holds objects that are no tensors{what}, and such a file can run any program when it is read: "
            "refused. Name a model with model.safetensors, or convert it yourself if you trust its author"
        ) from None
    except Exception as error:  # of any kind, for files with unexpected content
        raise _damaged(path, error) from None
    return _tensors(stored, path)


def _is_saved_by_torch(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(4)
    return head[:2] == b"\x80\x02" or head == b"PK\x03\x04"


def _tensors(stored: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the dictionary of tensors in a loaded file, which may be a field of a training program's state."""
    import torch

    for name in _NESTED:
        if isinstance(stored, Mapping) and isinstance(stored.get(name), Mapping):
            stored = stored[name]
    if not isinstance(stored, Mapping):
        raise _damaged(path, f"it holds a {type(stored).__name__}, expected named tensors")
    return {str(name): value for name, value in stored.items() if isinstance(value, torch.Tensor)}


def _damaged(path: Path, reason: object) -> LabError:
    line = (str(reason).strip() or type(reason).__name__).splitlines()[0][:200]
    return LabError(f"{path} is damaged or no file of weights ({line}): fetch the model again")


def _renamed(stored: Mapping[str, torch.Tensor], folder: Path, chosen: str) -> dict[str, torch.Tensor]:
    """Return the weights under transformers' names; the output matrix only if it differs from the embedding."""
    import torch

    prefix = _prefix(stored)
    if prefix is None:
        raise LabError(
            f"{chosen} in {folder} holds no weights of a Whisper in transformers' format (its first is "
            f"{next(iter(stored), 'missing')!r}): {_other_names(stored)}"
        )
    parts = (f"{prefix}encoder.", f"{prefix}decoder.")
    renamed = {f"model.{name.removeprefix(prefix)}": one for name, one in stored.items() if name.startswith(parts)}
    outputs = [tensor for name, tensor in stored.items() if name == _OUTPUT or name.endswith(f".{_OUTPUT}")]
    embedding = renamed.get(_EMBEDDING)
    if outputs and (embedding is None or not torch.equal(outputs[0], embedding)):
        renamed[_OUTPUT] = outputs[0]
    for name, tensor in renamed.items():
        precision = str(tensor.dtype).removeprefix("torch.")
        if precision not in _FLOATS:
            raise LabError(
                f"{chosen} in {folder} holds weights in {precision} ({name}), whose scales are not read here: name the "
                "model in float16, bfloat16 or float32"
            )
    return {name: _plain(tensor) for name, tensor in sorted(renamed.items())}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that shares memory with no other, in at most 32 bits."""
    import torch

    return (tensor.float() if tensor.dtype == torch.float64 else tensor).detach().clone().contiguous()


def _prefix(names: Iterable[str]) -> str | None:
    """Return what precedes the names of encoder and decoder; None if there is no encoder under transformers' names."""
    return next((name.removesuffix(_FIRST) for name in names if name == _FIRST or name.endswith(f".{_FIRST}")), None)


def _other_names(names: Iterable[str]) -> str:
    """Return whose names these are, and what to do."""
    names = [*names]
    if any("encoder.blocks." in name for name in names):
        return "these are OpenAI's names. Convert it with convert_openai_to_hf.py of transformers"
    return "name a Whisper model"
