"""The models that are mixed: find them, refuse those that cannot be mixed, and average their weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.features.cache import FeatureCache
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.training import adapters
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.whisper import lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch

_SHAPE = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "num_mel_bins",
    "vocab_size",
    "max_source_positions",
    "max_target_positions",
)
"""Fields of a model's config that decide the shape of its weights, and what they mean."""


@dataclass(frozen=True)
class Ingredient:
    """A model or a checkpoint whose weights are mixed."""

    name: str
    ref: ModelRef
    sha256: str
    """Of the file of its weights, or of its LoRA matrices."""

    @property
    def lineage(self) -> dict[str, Any]:
        """Return what a mixture records of it."""
        return {"name": self.name, "weights_sha256": self.sha256}

    def weights(self, base: ModelRef) -> dict[str, torch.Tensor]:
        """Return its weights by name, float32; LoRA matrices are merged into those of `base`."""
        return adapters.load_checkpoint(self.ref.folder, base).state_dict()


def of_models(uris: Sequence[str]) -> list[Ingredient]:
    """Return finished models of the lab; raise LabError for another kind, or for the same weights twice."""
    ingredients: list[Ingredient] = []
    for uri in uris:
        path = Path(uri).expanduser()
        ref = whisper_model.resolve(str(path / "model") if (path / "run.json").is_file() else uri)
        if ref.facts.get("kind") != "model" or "made_of" in ref.facts or not (ref.folder / "recipe.json").is_file():
            raise LabError(
                f"merge mixes models that the lab tuned, got {ref.title}: name the folder of a run or its model"
            )
        if ref.quantisation:
            raise LabError(
                f"merge mixes weights in full precision, got {ref.title}: name the model that it was made of"
            )
        ingredients.append(Ingredient(ref.name, ref, whisper_model.identity(ref)["weights_sha256"]))
    for one, other in itertools.pairwise(ingredients):
        _refuse_difference(one, other)
    if twice := [one.name for one in ingredients if sum(one.sha256 == other.sha256 for other in ingredients) > 1]:
        raise LabError(f"merge mixes different weights, got {', '.join(twice)} with equal ones: name each model once")
    return ingredients


def of_checkpoints(run: Path, n: int) -> list[Ingredient]:
    """Return the newest `n` whole checkpoints of a run, newest first; raise LabError if it has fewer."""
    folders = [
        path
        for path in sealed_checkpoints.listed(run / "checkpoints")
        if manifest.problem(path, thorough=False) is None
    ]
    if len(folders) < n:
        raise LabError(
            f"--last {n} needs {n} checkpoints, {run} has {len(folders)}: train again with "
            f"--set training.remove_checkpoints=false --set training.keep_checkpoints={n} --set name=..., a new folder"
        )
    return [_checkpoint(folder) for folder in reversed(folders[-n:])]


def _checkpoint(folder: Path) -> Ingredient:
    facts = manifest.require_complete(folder, "checkpoint", "Name fewer with --last")
    (weights,) = [name for name in facts["files"] if name in ("model.safetensors", "adapter_model.safetensors")]
    ref = ModelRef(folder.name, folder, "folder", str(facts["step"]), context=facts.get("context", "clip"), facts=facts)
    return Ingredient(folder.name, ref, facts["files"][weights]["sha256"])


def _refuse_difference(one: Ingredient, other: Ingredient) -> None:
    """Raise LabError, naming the first difference, if two tuned models cannot be averaged."""
    ours, theirs = (_comparable(ingredient.ref) for ingredient in (one, other))
    for name, value in ours.items():
        if theirs[name] != value:
            raise LabError(
                f"merge mixes models with the same {name}, got {value} ({one.name}) and {theirs[name]} ({other.name}): "
                "leave one of them out"
            )


def _comparable(ref: ModelRef) -> dict[str, Any]:
    config, recipe = (json.loads((ref.folder / name).read_text("utf-8")) for name in ("config.json", "recipe.json"))
    return {
        **{name: config.get(name) for name in _SHAPE},
        "base model": ref.facts.get("base"),
        "language": ref.facts.get("language"),
        "context": ref.context,
        "training data": f"cache {ref.facts.get('cache')}",
        "trained weights": "LoRA matrices" if recipe["model"].get("adapter") else "all weights",
        "tokenizer": whisper_model.vocabulary_sha256(whisper_model.load_processor(ref, ref.facts["language"])),
    }


def refuse_other_base(model: ModelRef, base: ModelRef, cache: FeatureCache) -> None:
    """Raise LabError if a model was not tuned from `base`, or not on `cache`, whose validation clips select."""
    if model.facts.get("base") != lineage.base_of(base):
        raise LabError(
            f"{model.name} was tuned from {model.facts.get('base')}, the recipe names {lineage.base_of(base)}: set "
            "model.base to the model that it was tuned from"
        )
    theirs, ours = (json.loads((ref.folder / "config.json").read_text("utf-8")) for ref in (model, base))
    if changed := [name for name in _SHAPE if theirs.get(name) != ours.get(name)]:
        raise LabError(
            f"{model.name} has another shape than {base.title} ({changed[0]}: {theirs.get(changed[0])} and "
            f"{ours.get(changed[0])}), as a student has: only models of one shape can be mixed"
        )
    if model.facts.get("cache") != cache.digest:
        raise LabError(
            f"{model.name} was trained on the cache {model.facts.get('cache')}, the recipe's is {cache.digest}: its "
            "training may have used these validation clips. Name the recipe and settings that it was trained with"
        )


def average(weights: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of weights by name. Two are in memory at a time, and equal ones stay exactly as they are."""
    mean: dict[str, torch.Tensor] = {}
    for n, one in enumerate(weights, start=1):
        mean = {name: mean[name].lerp(tensor, 1 / n) for name, tensor in one.items()} if mean else one
    return mean


def interpolate(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """Return (1 - alpha) * base + alpha * tuned; exactly one of them if alpha is 0 or 1."""
    return {name: base[name].lerp(tuned[name], alpha) for name in base}
