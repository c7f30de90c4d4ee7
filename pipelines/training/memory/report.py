"""Compare the memory that a recipe needs with a device, for `doctor --recipe` and `training.micro_batch=auto`."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.features import derived
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import Recipe
from pipelines.training.memory import advice, base_config
from pipelines.training.memory.advice import Device, Option
from pipelines.training.memory.estimate import Estimate, Workload, workload
from pipelines.training.optimization import precision

logger = logging.getLogger(__name__)

_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "averaged weights (EMA)",
    "activations": "activations of the longest batch",
    "teacher": "teacher",
    "decoding": "or, in validation",
    "overhead": "process, libraries, fragmentation",
}


@dataclass(frozen=True)
class MemoryReport:
    """What a recipe needs, what the device has, and the settings that make it fit."""

    recipe: str
    device: Device
    work: Workload
    micro_batch: int
    estimate: Estimate
    options: tuple[Option, ...]

    @property
    def fits(self) -> bool:
        return self.estimate.total <= self.device.memory

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "device": asdict(self.device),
            "batches": [asdict(shape) for shape in self.work.shapes],
            "assumed": self.work.assumed,
            "micro_batch": self.micro_batch,
            "estimate": asdict(self.estimate) | {"total": self.estimate.total},
            "fits": self.fits,
            "options": [{"settings": o.settings, "total": o.estimate.total, "fits": o.fits} for o in self.options],
        }

    def __str__(self) -> str:
        device = self.device
        lines = [f"memory of recipe {self.recipe} on {device.name}, in {device.dtype} (an estimate)"]
        lines += [f"  longest batch: {s.clips} x {s.frames / 100:g} s, {s.tokens} tokens" for s in self.work.shapes]
        lines += [f"  {self.work.assumed}"] if self.work.assumed else []
        lines += [f"  clips at once: {self.micro_batch}"]
        values = {field.name: getattr(self.estimate, field.name) for field in fields(self.estimate)}
        lines += [f"  {_LABELS[name]:<36}{_gb(value):>10}" for name, value in values.items() if value]
        verdict = "fits" if self.fits else "does not fit"
        lines += [f"  {'total':<36}{_gb(self.estimate.total):>10}  {verdict} into {_gb(device.memory)}"]
        if self.options:
            lines += ["settings that need less, those that cost least first:"]
            for option in self.options:
                texts = " ".join(f"--set {name}={json.dumps(v).strip(chr(34))}" for name, v in option.settings.items())
                lines += [f"  {_gb(option.estimate.total):>9}  {'fits' if option.fits else 'no  '}  {texts}"]
            if not any(option.fits for option in self.options):
                lines += ["none does: take a smaller model.base, or shorter clips (features.max_duration_s)"]
        return "\n".join(lines)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def parse_gb(text: str) -> int:
    """Return `16GB`, `16` (GB) or `15.5 GiB` as bytes; raise LabError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gb|gib|g|)\s*", text, flags=re.IGNORECASE)
    n_bytes = float(match[1]) * (1 << 30 if match[2].lower() == "gib" else 1e9) if match else 0
    if not n_bytes:
        raise LabError(f"--gpu-memory takes a size such as 16GB, got {text!r}")
    return int(n_bytes)


def device_of(recipe: Recipe, gpu_memory: str = "") -> Device:
    """Return the GPU or CPU that a recipe trains on here, with all of its memory; or a GPU of the size `gpu_memory`."""
    import psutil
    import torch

    machine = environment.detect()
    requested = recipe.training.precision
    if gpu_memory:
        dtype = machine.dtype if machine.device == "cuda" else "float16"
        dtype = dtype if requested == "auto" else requested
        return Device(f"a GPU of {gpu_memory.strip()}", "cuda", dtype, parse_gb(gpu_memory))
    if machine.device == "cuda":
        return Device(machine.device_name, "cuda", precision.of_training(requested), torch.cuda.mem_get_info()[1])
    dtype = precision.of_training(requested)
    return Device(machine.device_name, machine.device, dtype, psutil.virtual_memory().total)


def fitting_micro_batch(recipe: Recipe, cache: FeatureCache) -> int:
    """Return the clips of a forward pass for `training.micro_batch=auto`, and log them with the estimate.

    They are the largest of the batch and its halves that fit into the memory that is free now; 1 if none fits.
    """
    device = device_of(recipe)
    device = replace(device, memory=min(device.memory, _free_memory(device.kind)))
    work, config = workload(recipe, cache), base_config.of_recipe(recipe)
    clips, needed = advice.best_micro_batch(recipe, config, work, device)
    logger.info(
        f"training.micro_batch=auto: {clips} of {recipe.training.batch_size} clips at once, about {_gb(needed.total)} "
        f"of {_gb(device.memory)} that are free on {device.name}"
    )
    return clips


def _free_memory(kind: str) -> int:
    """Return the bytes that this process may have: what is free, and what it holds already."""
    import psutil
    import torch

    if kind == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def examine(recipe: Recipe, *, runs: str | Path = "", cache: str = "", gpu_memory: str = "") -> MemoryReport:
    """Estimate the memory of a recipe, without loading weights.

    The longest clips are those of its cache. Without one, and without `cache`, they have the longest duration allowed.
    """
    opened: FeatureCache | None = None
    try:
        opened = feature_pipeline.open_cache(recipe, cache, runs=runs)
    except LabError:
        if cache:
            raise
    if opened:
        recipe = derived.resolve(recipe, opened)
    config, device = base_config.of_recipe(recipe), device_of(recipe, gpu_memory)
    work = workload(recipe, opened)
    if recipe.training.micro_batch == AUTO:
        largest, estimate_of_recipe = advice.best_micro_batch(recipe, config, work, device)
    else:
        largest = advice.largest_micro_batch(recipe)
        estimate_of_recipe = advice.estimate_for(recipe, config, work, device, largest)
    choices: tuple[Option, ...] = ()
    if estimate_of_recipe.total > device.memory:
        choices = tuple(advice.options(recipe, config, work, device))
    return MemoryReport(recipe.name, device, work, largest, estimate_of_recipe, choices)
