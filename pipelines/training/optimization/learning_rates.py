"""Compare a recipe's learning rate with those that others published for models of that size.

KB-Whisper (Vesterbacka et al. 2025) has 6e-4 for tiny and 7e-5 for large in batches of 1,024: 0.4 of the rates that
Whisper itself was trained with (Radford et al. 2022, table 18), which gives the sizes between. CoRal (repository of the
Alexandra Institute, config/model) has 4e-5 to 5e-6 in batches of 256; its rate for small is interpolated. Other batches
scale the rate by the square root of the batch, the rule for Adam (Malladi et al. 2022).
"""

from __future__ import annotations

import math
from pathlib import Path

from pipelines.infra import manifest
from pipelines.recipes.settings import Recipe

PUBLISHED = {
    384: ("tiny", 4e-5, 6e-4),
    512: ("base", 2e-5, 4e-4),
    768: ("small", 1e-5, 2e-4),
    1024: ("medium", 6e-6, 1e-4),
    1280: ("large", 5e-6, 7e-5),
}
"""Width of a model to its size, CoRal's rate in batches of 256, and KB-Whisper's in batches of 1,024."""
CORAL_BATCH, KB_BATCH = 256, 1024
TOLERANCE = 5.0
"""A rate that is further below or above both than this factor gets a hint."""


def published(width: int, clips: int) -> tuple[float, float] | None:
    """Return the lower and the higher published rate for a model of `width` channels and steps of `clips` clips."""
    if width not in PUBLISHED:
        return None
    _, coral, kb = PUBLISHED[width]
    return coral * math.sqrt(clips / CORAL_BATCH), kb * math.sqrt(clips / KB_BATCH)


def hint(recipe: Recipe, base: Path) -> str:
    """Return one line if the recipe's learning rate is far from the published ones; empty otherwise.

    `base`: folder of the model that is tuned. Only rates of AdamW for whole models were published: LoRA, adafactor and
    sgd need others, and a student learns from its teacher.
    """
    settings = recipe.training
    if recipe.model.adapter or recipe.distillation.teacher or settings.optimizer in ("adafactor", "sgd"):
        return ""
    width = (manifest.read_json(base / "config.json") or {}).get("d_model", 0)
    clips = settings.batch_size * settings.accumulation
    if not (rates := published(width, clips)):
        return ""
    low, high = rates
    if low / TOLERANCE <= settings.learning_rate <= high * TOLERANCE:
        return ""
    return (
        f"hint: training.learning_rate={settings.learning_rate:g} is far from {low:.2g} to {high:.2g}, which "
        f"others take for whisper-{PUBLISHED[width][0]} with {clips} clips a step (docs/training.md)"
    )
