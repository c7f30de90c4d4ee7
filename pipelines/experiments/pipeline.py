"""Notebook 02's scores, and the commands' evaluations: score models on a split of a feature cache.

evaluate(recipe, cache, model_uri, split)               -> EvalReport
evaluate_base_and_tuned(recipe, cache, model_uri)       -> {"before": EvalReport, "after": EvalReport}
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.experiments import evaluation, run_log, test_set_log
from pipelines.experiments.comparison import lookup
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.report import guards as report_guards
from pipelines.experiments.report import hypotheses, stock
from pipelines.experiments.report.guards import GuardScore
from pipelines.features import derived, guards
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.recipes.runs import REHEARSAL_FOLDER, clip_progress_bar, experiment_folder, record_stage
from pipelines.recipes.settings import Recipe
from pipelines.training import model_card
from pipelines.training.pipeline import apply_fast_dev_run, reduce_cache
from pipelines.whisper import lineage, model_files
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)


def evaluate(
    recipe: Recipe,
    cache: FeatureCache,
    model_uri: str,
    split: str = "test",
    *,
    runs: str | Path = "",
    on_clips: Callable[[int], None] = lambda n: None,
) -> EvalReport:
    """Score a model on a split of the cache, or load an existing report of the same evaluation.

    Transcripts of the same model and clips, decoded for any recipe below `runs`, are scored without decoding again.

    A tuned model and its base are also scored on the recipe's guard sets, if the split is test.

    Each scoring of the test split is counted (test_set_log.py) and logged; repeated scorings of a model log a warning.
    The test score of a tuned model is added to its manifest and card. `on_clips` is called with the number of clips of
    each batch.
    """
    if recipe.training.fast_dev_run:
        recipe, cache = apply_fast_dev_run(recipe, cache)
    recipe = derived.resolve(recipe, cache)
    ref = whisper_model.resolve(model_uri)
    model_files.require_full_window(ref.folder)
    environment.keep_freed_memory()
    decoded: list[int] = []
    with clip_progress_bar(f"{split}: {ref.name}", len(cache.split(split))) as step:

        def report_progress(n: int) -> None:
            decoded.append(n)
            step(n)
            on_clips(n)

        earlier = sorted(environment.runs_folder(runs).glob(f"*/reports/{split}-*"))
        report = evaluation.evaluate(
            recipe, cache, ref, split, _reports(recipe, runs), earlier=earlier, on_clips=report_progress
        )
    if split == "test" and not recipe.training.fast_dev_run:
        scorings = test_set_log.add(environment.runs_folder(runs), report, ref, recipe.name, is_new=bool(decoded))
        logger.info((decoded and scorings.warning()) or str(scorings))
    if split == "test" and recipe.guards and "digest" in report.lineage:
        scores = [_score_guard(recipe, cache, name, ref, runs) for name in recipe.guards]
        report = evaluation.add_guards(report, scores, recipe)
    tuned = ref.facts.get("kind") == "model" and "made_of" not in ref.facts  # an export is not changed
    if split == "test" and tuned and ref.origin == "folder":
        _save_score(ref, report, recipe)
    run_log.add(report, environment.runs_folder(runs))
    return report


def _score_guard(recipe: Recipe, cache: FeatureCache, name: str, ref: ModelRef, runs: str | Path) -> GuardScore:
    """Score a tuned model and the recipe's base model on a guard set, or load existing reports of the same scoring."""
    clips, settings = feature_pipeline.guard_cache(recipe, name, cache, runs=runs), guards.recipe_of(recipe, name)
    if recipe.training.fast_dev_run:
        clips = reduce_cache(clips)
    settings = derived.resolve(settings, clips)
    folder = _reports(recipe, runs).parent / "guards" / name / "reports"
    earlier = sorted(environment.runs_folder(runs).glob("*/guards/*/reports/test-*"))
    tables = []
    for model in (whisper_model.resolve(recipe.model.base), ref):
        n_decoded: list[int] = []
        with clip_progress_bar(f"guard {name}: {model.name}", len(clips.split("test"))) as step:
            report = evaluation.evaluate(
                settings,
                clips,
                model,
                "test",
                folder,
                earlier=earlier,
                on_clips=lambda n, step=step, n_decoded=n_decoded: (n_decoded.append(n), step(n)),
            )
        if not recipe.training.fast_dev_run:
            runs_folder = environment.runs_folder(runs)
            test_set_log.add(runs_folder, report, model, settings.name, is_new=bool(n_decoded))
        tables.append(report.predictions)
    draws = {"samples": recipe.evaluation.bootstrap_samples, "seed": recipe.evaluation.seed}
    return report_guards.compare(name, settings.language, recipe.guards[name].max_increase, *tables, **draws)


def _reports(recipe: Recipe, runs: str | Path) -> Path:
    subfolder = REHEARSAL_FOLDER if recipe.training.fast_dev_run else ""
    return experiment_folder(recipe, runs) / subfolder / "reports"


def evaluate_base_and_tuned(
    recipe: Recipe, cache: FeatureCache, model_uri: str, *, runs: str | Path = ""
) -> dict[str, EvalReport]:
    """Score the recipe's base model (`before`) and the tuned model (`after`) on the test split."""
    with record_stage(recipe, runs, "scores") as note:
        reports = {
            label: evaluate(recipe, cache, uri, "test", runs=runs)
            for label, uri in (("before", recipe.model.base), ("after", model_uri))
        }
        note |= {label: str(report.folder) for label, report in reports.items()}
    return reports


def _save_score(ref: ModelRef, report: EvalReport, recipe: Recipe) -> None:
    """Write the test score to the model's manifest and card."""
    model_card.refresh(
        ref.folder,
        test=report.score.as_dict(),
        test_raw=report.raw.as_dict(),
        test_caveats=list(report.caveats),
        **({"test_decoding": hypotheses.describe(report.decoding)} if report.decoding else {}),
        test_data=lineage.data_of(recipe.source.model_dump(mode="json")),
        **({"guards": [guard.as_dict() for guard in report.guards]} if report.guards else {}),
        test_scored={"test_set": report.test_set, "normaliser": report.normaliser, "n": report.score.n},
        **({"test_stock": _stock_facts(report)} if report.stock else {}),
    )


def _stock_facts(report: EvalReport) -> dict[str, Any]:
    """Return the score in transformers' pipeline for a card, with the digest of the clips that it was computed on."""
    scored = lookup.in_stock_pipeline(report)
    return {**stock.facts(report.stock), "test_set": scored.test_set, "normaliser": report.normaliser}
