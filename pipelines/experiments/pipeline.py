"""TODO: describe this module."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from pipelines.experiments import evaluation, run_log, test_set_log
from pipelines.experiments.evaluation import EvalReport
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment, manifest
from pipelines.recipes.runs import REHEARSAL_FOLDER, clip_progress_bar, experiment_folder, record_stage
from pipelines.recipes.settings import Recipe
from pipelines.training import model_card
from pipelines.training.pipeline import apply_fast_dev_run
from pipelines.whisper import lineage
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
    """Score a model on a split of the cache; one that was scored before is read. A tuned model keeps its test score.

    Every scoring of the test split is counted (ledger.py), and the count told; a further one of the same model warns.
    `on_clips` is told of every batch how many clips it held.
    """
    if recipe.training.fast_dev_run:
        recipe, cache = apply_fast_dev_run(recipe, cache)
    ref = whisper_model.resolve(model_uri)
    made: list[int] = []
    with clip_progress_bar(f"{split}: {ref.name}", len(cache.split(split))) as step:

        def decoded(n: int) -> None:
            step(n)
            on_clips(n)

        report = evaluation.evaluate(
            recipe, cache, ref, split, _reports(recipe, runs), on_start=made.append, on_clips=decoded
        )
    if split == "test" and not recipe.training.fast_dev_run:
        looks = test_set_log.note(environment.runs_folder(runs), report, ref, recipe.name, made=bool(made))
        logger.info((made and looks.warning()) or str(looks))
    tuned = ref.facts.get("kind") == "model" and "made_of" not in ref.facts  # an export stays as it was made
    if split == "test" and tuned and ref.origin == "folder":
        _note_score(ref, report, recipe)
    run_log.add(report, environment.runs_folder(runs))
    return report


def _reports(recipe: Recipe, runs: str | Path) -> Path:
    rehearsed = REHEARSAL_FOLDER if recipe.training.fast_dev_run else ""
    return experiment_folder(recipe, runs) / rehearsed / "reports"


def evaluate_base_and_tuned(
    recipe: Recipe, cache: FeatureCache, model_uri: str, *, runs: str | Path = ""
) -> dict[str, EvalReport]:
    """Score the recipe's base model and the tuned one on the test split: `before` and `after`. Each is scored once."""
    with record_stage(recipe, runs, "scores") as note:
        reports = {
            label: evaluate(recipe, cache, uri, "test", runs=runs)
            for label, uri in (("before", recipe.model.base), ("after", model_uri))
        }
        note |= {label: str(report.folder) for label, report in reports.items()}
    return reports


def _note_score(ref: ModelRef, report: EvalReport, recipe: Recipe) -> None:
    """Tell the score in the model's manifest and card, at the time of the sealing: the app serves the newest model."""
    note = ref.folder / manifest.MANIFEST
    sealed_ns = note.stat().st_mtime_ns
    of = lineage.data_of(recipe.source.model_dump(mode="json"))
    scored = {"test_set": report.test_set, "normaliser": report.normaliser, "n": report.score.n}
    told = {"test": report.score.as_dict(), "test_raw": report.raw.as_dict(), "test_data": of, "test_scored": scored}
    model_card.refresh(ref.folder, **told)
    os.utime(note, ns=(sealed_ns, sealed_ns))
