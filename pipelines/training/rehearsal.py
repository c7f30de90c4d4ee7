"""fast_dev_run: two steps and a look at a few clips, to see that everything works; what it measures means nothing."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from pipelines.cache import FeatureCache
from pipelines.recipe import Recipe

CLIPS = 4
"""Validation and test clips that are looked at."""
TAUGHT = 64
"""Training clips that a teacher is asked for its transcripts of."""
NOTE = f"fast_dev_run: 2 steps, a look at {CLIPS} clips, folders of its own. Its figures mean nothing"


def folder_name(recipe: Recipe) -> str:
    """Where the runs of a recipe lie: a rehearsal leaves the real ones alone."""
    return f"{recipe.name}-fast-dev-run" if recipe.training.fast_dev_run else recipe.name


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with two steps and short transcripts."""
    training = {"steps": 2, "eval_every": 2, "warmup_steps": 0}
    evaluation = {"max_new_tokens": min(16, recipe.evaluation.max_new_tokens)}
    student = {"max_label_wer": 0.0} if recipe.distillation.teacher else {}  # a rehearsed teacher hears nothing right
    return recipe.model_copy(
        update={
            "distillation": recipe.distillation.model_copy(update=student),
            "training": recipe.training.model_copy(update=training),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
        }
    )


def few(cache: FeatureCache, taught: bool = False) -> FeatureCache:
    """The cache with all of its training clips and the first few of the others; of those, too, where `taught`."""
    rows = cache.rows
    kept = [
        rows[rows["split"] == "train"].head(TAUGHT if taught else len(rows)),
        *(rows[rows["split"] == name].head(CLIPS) for name in ("validation", "test")),
    ]
    return replace(cache, rows=pd.concat(kept).reset_index(drop=True))
