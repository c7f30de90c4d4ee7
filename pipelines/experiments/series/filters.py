"""How well curation detected the faults of a planted corpus, for each training seed of a series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments import fault_detection
from pipelines.experiments.series.run import RECIPES
from pipelines.features import derived
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import label_errors
from pipelines.infra import environment
from pipelines.recipes.settings import Recipe


def of_series(experiments: Sequence[Recipe], runs: str | Path) -> dict[str, Any]:
    """Return, for each training seed, how well curation detected the planted faults.

    `checks` has an entry for each recipe with curation, `label_errors` is the curve of the label filter with the label
    model, over the training rows left after the leak check, and `repairs` is the WER of repaired transcripts.
    """
    filters: dict[str, Any] = {}
    for seed in sorted({recipe.training.seed for recipe in experiments}):
        by_name = {recipe.name: recipe for recipe in experiments if recipe.training.seed == seed}
        if RECIPES[0] in by_name:
            filters[str(seed)] = _filters_of_seed(by_name, runs)
    return filters


def _filters_of_seed(by_name: dict[str, Recipe], runs: str | Path) -> dict[str, Any]:
    uncurated = feature_pipeline.run(by_name[RECIPES[0]], runs=runs)
    filters: dict[str, Any] = {"checks": {}, "limit": None, "label_errors": [], "repairs": {}}
    for name, recipe in by_name.items():
        if recipe.source != by_name[RECIPES[0]].source or recipe.curation == by_name[RECIPES[0]].curation:
            continue
        cache = feature_pipeline.run(recipe, runs=runs)
        filters["checks"][name] = fault_detection.score_checks(uncurated, cache)
        if not recipe.curation.max_label_cer:
            continue
        if recipe.curation.label_errors == "repair":
            filters["repairs"][name] = fault_detection.score_repairs(cache)
        if not filters["label_errors"]:
            filters["limit"] = recipe.curation.max_label_cer
            filters["label_errors"] = _label_error_curve(recipe, uncurated, cache, runs)
    return filters


def _label_error_curve(
    recipe: Recipe, uncurated: FeatureCache, cache: FeatureCache, runs: str | Path
) -> list[dict[str, Any]]:
    """Return the label filter's curve over the training rows that reached it, with transcripts from before repair."""
    ref = feature_pipeline.label_model(recipe, runs)
    dropped_earlier = cache.rejected["id"][cache.rejected["reason"] != "label_error"]
    is_checked = (uncurated.rows["split"] == "train") & ~uncurated.rows["id"].isin(dropped_earlier)
    rows = np.flatnonzero(is_checked)
    folder, settings = environment.runs_folder(runs) / "label_errors", derived.resolve(recipe, uncurated).evaluation
    hypotheses = label_errors.transcribe(uncurated, rows, ref, recipe.language, settings, folder)
    return fault_detection.score_label_filter(uncurated.rows.iloc[rows], hypotheses)
