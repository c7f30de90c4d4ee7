"""Find the settings with which a recipe fits into memory, those that cost least first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import Recipe
from pipelines.training.memory.estimate import Estimate, Workload, changed, estimate

LADDER: tuple[dict[str, Any], ...] = (
    {},
    {"training.checkpoint_activations": True},
    {"model.adapter": "lora"},
    {"model.adapter": "lora", "training.checkpoint_activations": True},
    {"model.adapter": "lora", "model.load_in_8bit": True, "training.checkpoint_activations": True},
    {"model.freeze_encoder": True},
    {"model.freeze_encoder": True, "training.checkpoint_activations": True},
)
"""Changes of a recipe, each beside a smaller micro-batch. The first two give the same model; then fewer weights are
trained."""


@dataclass(frozen=True)
class Device:
    """The memory that training may use, and how it computes there."""

    name: str
    kind: str
    """cuda, mps or cpu."""
    dtype: str
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Option:
    """Settings, and what the recipe needs with them."""

    settings: dict[str, Any]
    estimate: Estimate
    fits: bool


def largest_micro_batch(recipe: Recipe) -> int:
    """Return the clips of a forward pass if memory does not matter: `training.micro_batch`, or the whole batch."""
    settings = recipe.training
    return settings.batch_size if settings.micro_batch in (0, AUTO) else settings.micro_batch


def best_micro_batch(recipe: Recipe, config: Any, work: Workload, device: Device) -> tuple[int, Estimate]:
    """Return the largest micro-batch that fits, of the recipe's and its halves, with its estimate; 1 if none fits."""
    clips = largest_micro_batch(recipe)
    sizes = [clips]
    while clips > 1:
        clips //= 2
        sizes.append(clips)
    *larger, smallest = sizes
    best = smallest, estimate_for(recipe, config, work, device, smallest)
    for clips in reversed(larger):  # small batches first: the longest of them is counted once for all sizes
        needed = estimate_for(recipe, config, work, device, clips)
        if needed.total > device.memory:
            break
        best = clips, needed
    return best


def estimate_for(recipe: Recipe, config: Any, work: Workload, device: Device, clips: int) -> Estimate:
    """Return the estimate of a recipe with passes of at most `clips` clips."""
    return estimate(changed(recipe, {"training.micro_batch": clips}), config, work, device.kind, device.dtype)


def options(recipe: Recipe, config: Any, work: Workload, device: Device) -> list[Option]:
    """Return the settings of LADDER, each with its largest micro-batch that fits, or with the smallest."""
    options_tried = []
    for settings in LADDER:
        if not _applies(recipe, settings):
            continue
        clips, needed = best_micro_batch(changed(recipe, settings), config, work, device)
        if settings or clips != recipe.training.batch_size:
            settings = {"training.micro_batch": clips, **settings}
        if settings:
            options_tried.append(Option(settings, needed, needed.total <= device.memory))
    return options_tried


def _applies(recipe: Recipe, settings: dict[str, Any]) -> bool:
    """Return whether the settings change the recipe and are allowed in it."""
    values = recipe.settings("model", "training")
    if recipe.distillation.teacher and "model.adapter" in settings:
        return False
    return not settings or any(values.get(name) != value for name, value in settings.items())
