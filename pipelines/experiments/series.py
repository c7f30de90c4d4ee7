"""A series of experiments: recipes with several seeds, one after another, and what came of them as small tables.

run       features, training and the test score of each; what is finished is not made again
export    utterances.csv   one row per test utterance: id, speaker, gender, words; for each `recipe/seed` its word
                           edits as "substitutions insertions deletions"
          runs.csv         one row per run: where it came from, what it cost
          filters.json     what curation found of the planted faults (detection.py)
claims    WER with interval, and the difference to other recipes, computed from the exported tables alone
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines import recipes
from pipelines.experiments import compare, evaluation, fault_detection
from pipelines.experiments import lookup as gathered
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.experiments.evaluation import EvalReport
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import label_errors
from pipelines.infra import console, environment, manifest, redact
from pipelines.infra.errors import LabError, Unfinished
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring
from pipelines.speech.scoring import Edits
from pipelines.training import pipeline as training_pipeline
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

RECIPES = tuple(
    f"planted-{name}"
    for name in "raw checked filtered repaired augmented balanced more cleaned clean lr lora frozen".split()
)
"""What is run where nothing is named; the first one's model is the label model of others."""
SEEDS = (42, 43)
BASELINES = ("planted-checked", "planted-raw")
"""What the others are held against: the fair one, and the careless one."""
UTTERANCES, RUNS, FILTERS = "utterances.csv", "runs.csv", "filters.json"


def planned(
    names: Sequence[str] = RECIPES, seeds: Sequence[int] = SEEDS, overrides: dict[str, Any] | None = None
) -> list[Recipe]:
    """Every recipe with every seed of training, all recipes of one seed before the next seed."""
    return [recipes.load(name, {**(overrides or {}), "training.seed": seed}) for seed in seeds for name in names]


def run(experiments: Sequence[Recipe], *, runs: str | Path = "") -> tuple[list[EvalReport], list[str]]:
    """Features, training and the test score of each; their reports, and a line for each that failed.

    One that fails does not end the series. Raises errors.Unfinished where a signal ended a training.
    """
    reports, failed, spent = [], [], []
    for number, recipe in enumerate(experiments, 1):
        started = time.monotonic()
        title = f"[{number}/{len(experiments)}] {recipe.name}, seed {recipe.training.seed}"
        try:
            report, fresh = _one(recipe, runs)
        except Unfinished:
            raise
        except (
            LabError,
            OSError,
            MemoryError,
            RuntimeError,
        ) as error:  # the machine's fault
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            failed.append(f"{recipe.name}, seed {recipe.training.seed}: {reason}")
            logger.info(f"{title}: failed: {reason}")
            continue
        reports.append(report)
        minutes = (time.monotonic() - started) / 60
        spent += [minutes] if fresh else []
        left = (len(experiments) - number) * (sum(spent) / len(spent)) if spent else 0.0
        logger.info(
            f"{title}: {report.score}; {f'{minutes:.1f} min' if fresh else 'was there'}, about {left:.0f} min left"
        )
    return reports, failed


def _one(recipe: Recipe, runs: str | Path) -> tuple[EvalReport, bool]:
    """The test report of one experiment, and whether it was made now."""
    with console.silenced():
        cache = feature_pipeline.run(recipe, runs=runs)
        model = training_pipeline.run(recipe, cache, runs=runs)
        existing = set((recipe_runs.experiment_folder(recipe, runs) / "reports").glob("test-*"))
        report = experiment_pipeline.evaluate(recipe, cache, model.uri, "test", runs=runs)
    return report, report.folder not in existing


def found(experiments: Iterable[Recipe], runs: str | Path = "") -> dict[str, EvalReport]:
    """The test reports of finished experiments: `recipe/seed` to report, in the order of `experiments`.

    A report counts where the settings that its model was trained with are the recipe's; of several, the newest.
    """
    reports = {}
    for recipe in experiments:
        folders = (recipe_runs.experiment_folder(recipe, runs) / "reports").glob("test-*")
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime_ns):
            if manifest.problem(folder) is None:
                report = evaluation.read_report(folder)
                settings = report.lineage.get("settings")
                if settings and _told(recipes.resolve(settings, {})) == _told(recipe):
                    reports[f"{recipe.name}/{recipe.training.seed}"] = report
    return reports


def _told(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a model tells it: without the places of a machine."""
    return redact.redact_settings(recipe.model_dump(mode="json"))


def export(experiments: Sequence[Recipe], folder: Path, *, runs: str | Path = "") -> dict[str, EvalReport]:
    """Write the tables of all finished experiments to `folder`; their reports.

    Raises LabError where none is finished, or where they were not scored on one test set under one normaliser.
    """
    reports = found(experiments, runs)
    if not reports:
        raise LabError("no finished experiment to export: run them first (python -m pipelines experiments)")
    gathered.require_alike(list(reports.values()))
    folder.mkdir(parents=True, exist_ok=True)
    utterances(reports).to_csv(folder / UTTERANCES, index=False)
    pd.DataFrame([_run_row(name, report, runs) for name, report in reports.items()]).to_csv(folder / RUNS, index=False)
    told = filters([recipe for recipe in experiments if f"{recipe.name}/{recipe.training.seed}" in reports], runs)
    (folder / FILTERS).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return reports


def utterances(reports: dict[str, EvalReport]) -> pd.DataFrame:
    """id, speaker, gender and words of each test utterance, and a column of edits for each report."""
    table = None
    for name, report in reports.items():
        rows = report.predictions.sort_values("id", ignore_index=True)
        edits = scoring.count_edits(rows["reference"].tolist(), rows["hypothesis"].tolist())
        if table is None:
            table = rows[["id", "speaker", *(["gender"] if "gender" in rows else [])]].assign(words=edits.words)
        counts = zip(edits.substitutions, edits.insertions, edits.deletions, strict=True)
        table[name] = [" ".join(map(str, count)) for count in counts]
    return table


def _run_row(name: str, report: EvalReport, runs: str | Path) -> dict[str, Any]:
    recipe, seed = name.split("/")
    told = report.lineage
    folder = environment.runs_folder(runs) / recipe / f"train-{told['digest']}" / "model"
    trained = json.loads((folder / "training.json").read_text("utf-8"))
    return {
        "recipe": recipe,
        "seed": int(seed),
        "wer": round(report.score.wer, 4),
        "cer": round(report.score.cer, 4),
        "validation_wer": round(trained["validation"]["eval_wer"], 4),
        "best_step": told["best_step"],
        "training_clips": told["data"]["train"]["clips"],
        "training_hours": told["data"]["train"]["hours"],
        "training_seconds": round(told["training_seconds"], 1),
        "scoring_seconds": report.seconds,
        "model": told["digest"],
        "cache": told["cache"],
        "test_set": report.test_set,
        "normaliser": report.normaliser,
        "machine": told["machine"],
        **told["versions"],
    }


def filters(experiments: Sequence[Recipe], runs: str | Path = "") -> dict[str, Any]:
    """What curation found of the planted faults, for each seed of training: see detection.py.

    `checks` are those of each recipe that drops, `label_errors` the curve of the filter with the model of the first
    recipe that others name as `run:<recipe>`, over the rows that are left once leaks are dropped, `repairs` how near
    to what is said the repaired transcripts are.
    """
    told: dict[str, Any] = {}
    for seed in sorted({recipe.training.seed for recipe in experiments}):
        by_name = {recipe.name: recipe for recipe in experiments if recipe.training.seed == seed}
        if RECIPES[0] in by_name:
            told[str(seed)] = _filters_of(by_name, runs)
    return told


def _filters_of(by_name: dict[str, Recipe], runs: str | Path) -> dict[str, Any]:
    whole = _cache(by_name[RECIPES[0]], runs)
    told: dict[str, Any] = {"checks": {}, "limit": None, "label_errors": [], "repairs": {}}
    for name, recipe in by_name.items():
        if recipe.source != by_name[RECIPES[0]].source or recipe.curation == by_name[RECIPES[0]].curation:
            continue
        cache = _cache(recipe, runs)
        told["checks"][name] = fault_detection.of_checks(whole, cache)
        if not recipe.curation.max_label_cer:
            continue
        if recipe.curation.label_errors == "repair":
            told["repairs"][name] = fault_detection.of_repairs(cache)
        if not told["label_errors"]:
            told["limit"] = recipe.curation.max_label_cer
            told["label_errors"] = _curve(recipe, whole, cache, runs)
    return told


def _curve(recipe: Recipe, whole: FeatureCache, cache: FeatureCache, runs: str | Path) -> list[dict[str, Any]]:
    """The label filter's curve over the training rows that came to it: the transcripts are those before any repair."""
    ref: ModelRef = feature_pipeline.label_model(recipe, runs)
    earlier = cache.rejected
    gone = earlier["id"][earlier["reason"] != "label_error"]
    rows = whole.rows
    asked = np.flatnonzero((rows["split"] == "train") & ~rows["id"].isin(gone))
    folder = environment.runs_folder(runs) / "label_errors"
    heard = label_errors.transcribe(whole, asked, ref, recipe.language, recipe.evaluation, folder)
    return fault_detection.of_label_errors(rows.iloc[asked], heard)


def _cache(recipe: Recipe, runs: str | Path) -> FeatureCache:
    return feature_pipeline.run(recipe, runs=runs)


def claims(folder: Path, baselines: Sequence[str] = BASELINES) -> list[dict[str, Any]]:
    """What the exported tables say of each recipe, by the same functions as `compare`.

    Each tells `recipe`, `seeds`, `wer` and its `ci95`, `n`, `speakers`, and `against`: for each baseline `delta` (WER
    less the baseline's), its `ci95`, `p`, and `p_holm`, corrected for the number of recipes.
    """
    edits, speakers = _edits(pd.read_csv(folder / UTTERANCES))
    against = {baseline: _differences(edits, speakers, baseline) for baseline in baselines if baseline in edits}
    told = []
    for recipe, runs in edits.items():
        rest = [list(third.values()) for other, third in edits.items() if other != recipe]
        score = scoring.score_over_seeds(list(runs.values()), speakers, others=rest)
        told.append(
            {
                "recipe": recipe,
                "seeds": list(runs),
                "wer": score.wer,
                "ci95": score.ci95,
                "n": len(speakers),
                "speakers": score.speakers,
                "against": {name: found[recipe] for name, found in against.items() if recipe in found},
            }
        )
    return told


def _edits(table: pd.DataFrame) -> tuple[dict[str, dict[int, Edits]], list[str]]:
    """Word edits per recipe and seed, and the speaker of each utterance. Characters are not told."""
    words = table["words"].to_numpy(np.int64)
    nothing = np.zeros_like(words)
    edits: dict[str, dict[int, Edits]] = {}
    for column in (name for name in table if "/" in name):
        recipe, _, seed = column.partition("/")
        counts = np.array([cell.split() for cell in table[column]], dtype=np.int64)
        edits.setdefault(recipe, {})[int(seed)] = Edits(*counts.T, words, nothing, nothing)
    return edits, table["speaker"].tolist()


def _differences(edits: dict[str, dict[int, Edits]], speakers: list[str], baseline: str) -> dict[str, dict[str, Any]]:
    """How far each other recipe is from the baseline; what a seed changes is learnt from all of them."""
    runs = {recipe: list(by_seed.values()) for recipe, by_seed in edits.items()}
    theirs = runs.pop(baseline)
    found = {
        recipe: scoring.difference_over_seeds(
            ours, theirs, speakers, others=[third for other, third in runs.items() if other != recipe]
        )
        for recipe, ours in runs.items()
    }
    corrected = compare.holm([difference.p for difference in found.values()])
    return {
        recipe: {"delta": difference.delta, "ci95": difference.ci95, "p": difference.p, "p_holm": p_holm}
        for (recipe, difference), p_holm in zip(found.items(), corrected, strict=True)
    }


def headline(claim: dict[str, Any]) -> list[str]:
    """A claim as the lines that a recipe opens with."""
    low, high = claim["ci95"]
    n_seeds = len(claim["seeds"])
    lines = [
        f"WER {claim['wer']:.3f} (95 % {low:.3f} to {high:.3f}); normalised, {claim['n']} utterances, "
        f"{claim['speakers']} speakers, {n_seeds} seed{'s' if n_seeds > 1 else ''}."
    ]
    for baseline, told in claim["against"].items():
        low, high = told["ci95"]
        shown = not low <= 0 <= high and told["p_holm"] <= compare.ALPHA
        verdict = ("better" if told["delta"] < 0 else "worse") if shown else "no difference shown"
        lines.append(
            f"Against `{baseline}`: {told['delta']:+.3f} (95 % {low:+.3f} to {high:+.3f}, p = {told['p']:.2g}, "
            f"corrected {told['p_holm']:.2g}): {verdict}."
        )
    return lines
