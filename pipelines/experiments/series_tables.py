"""Results of a series of experiments as small tables that can be committed, and the claims that follow from them.

utterances.csv   one row per test utterance: id, speaker, gender, words; for each `recipe/seed` its word edits as
                 "substitutions insertions deletions"
runs.csv         one row per run: data, scores, training time, machine, versions
filters.json     precision and recall of curation on the planted faults (fault_detection.py), if the series has them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation, fault_detection
from pipelines.experiments.comparison import lookup
from pipelines.experiments.comparison.findings import holm, is_significant
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.series import RECIPES
from pipelines.features import derived
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import label_errors
from pipelines.infra import environment, manifest, redact
from pipelines.infra.errors import LabError
from pipelines.infra.tables.formulas import decode_cell, encode_cell
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring
from pipelines.speech.intervals import CLIPS, Units
from pipelines.speech.scoring import Edits

BASELINES = ("planted-checked", "planted-raw")
"""Recipes that the others are compared with: a fair baseline, and one without any curation. In a series without them
it is the first recipe."""
UTTERANCES, RUNS, FILTERS = "utterances.csv", "runs.csv", "filters.json"


@dataclass(frozen=True)
class SeriesTables:
    """Tables that were written to a folder."""

    folder: Path
    reports: dict[str, EvalReport]
    """`recipe/seed` to test report."""
    claims: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "claims": self.claims}

    def __str__(self) -> str:
        lines = [line for claim in self.claims for line in (claim["recipe"], *(f"  {x}" for x in headline(claim)))]
        return "\n".join([*lines, f"tables in {self.folder}"])

    def write_figure(self) -> None:
        """Write experiments.png, if one of BASELINES is among the recipes."""
        from pipelines.experiments import figures
        from pipelines.infra import plots

        named = {claim["recipe"] for claim in self.claims}
        if baseline := next((name for name in BASELINES if name in named), None):
            filters = json.loads((self.folder / FILTERS).read_text("utf-8"))
            figure = figures.series_figure(self.claims, baseline, filters)
            (self.folder / "experiments.png").write_bytes(plots.png(figure))


def export(experiments: Sequence[Recipe], folder: Path, *, runs: str | Path = "") -> SeriesTables:
    """Write the tables of all finished experiments to `folder`.

    Raise LabError if none is finished, or if they have different test sets or normalisers.
    """
    reports = finished_reports(experiments, runs)
    if not reports:
        raise LabError("no finished experiment to export: run the same command without --export first")
    lookup.require_comparable(list(reports.values()))
    folder.mkdir(parents=True, exist_ok=True)
    _utterances(reports).map(encode_cell).to_csv(folder / UTTERANCES, index=False)
    costs = pd.DataFrame([_run_row(name, report, runs) for name, report in reports.items()])
    costs.map(encode_cell).to_csv(folder / RUNS, index=False)
    finished = [recipe for recipe in experiments if f"{recipe.name}/{recipe.training.seed}" in reports]
    if any(recipe.name in BASELINES for recipe in finished):
        filters = json.dumps(_filters(finished, runs), indent=1, ensure_ascii=False)
        (folder / FILTERS).write_text(filters + "\n", "utf-8")
    return SeriesTables(folder, reports, claims(folder))


def finished_reports(experiments: Iterable[Recipe], runs: str | Path = "") -> dict[str, EvalReport]:
    """Return the test reports of finished experiments: `recipe/seed` to report, in the order of `experiments`.

    A report counts if its model was trained with the recipe's settings; of several, the newest.
    """
    reports = {}
    for recipe in experiments:
        folders = (recipe_runs.experiment_folder(recipe, runs) / "reports").glob("test-*")
        complete = [folder for folder in folders if manifest.problem(folder) is None]
        for folder in sorted(complete, key=manifest.made_at):
            report = evaluation.read_report(folder)
            settings = report.lineage.get("settings")
            if settings and _is_trained_with(recipe, recipes.resolve(settings, {})):
                reports[f"{recipe.name}/{recipe.training.seed}"] = report
    return reports


def _is_trained_with(recipe: Recipe, recorded: Recipe) -> bool:
    """Return True if `recorded` are the recipe's settings; any number may be in place of `auto`, which derives it."""
    requested, actual = _redacted(recipe), _redacted(recorded)
    for group in ("training", "evaluation"):
        actual[group] |= {name: AUTO for name, value in requested[group].items() if value == AUTO}
    return actual == requested


def _redacted(recipe: Recipe) -> dict[str, Any]:
    """Return the settings as a model records them: without paths of a machine."""
    return redact.redact_settings(recipe.model_dump(mode="json"))


def _utterances(reports: dict[str, EvalReport]) -> pd.DataFrame:
    """Return id, speaker, gender and words of each test utterance, and a column of edits for each report."""
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
    lineage = report.lineage
    folder = environment.runs_folder(runs) / recipe / f"train-{lineage['digest']}" / "model"
    training = json.loads((folder / "training.json").read_text("utf-8"))
    return {
        "recipe": recipe,
        "seed": int(seed),
        "wer": round(report.score.wer, 4),
        "cer": round(report.score.cer, 4),
        "validation_wer": round(training["validation"]["eval_wer"], 4),
        "best_step": lineage["best_step"],
        "training_clips": lineage["data"]["train"]["clips"],
        "training_hours": lineage["data"]["train"]["hours"],
        "training_seconds": round(lineage["training_seconds"], 1),
        "scoring_seconds": report.seconds,
        "model": lineage["digest"],
        "cache": lineage["cache"],
        "test_set": report.test_set,
        "normaliser": report.normaliser,
        "machine": lineage["machine"],
        **lineage["versions"],
    }


# ---- curation, compared with the planted faults


def _filters(experiments: Sequence[Recipe], runs: str | Path) -> dict[str, Any]:
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


# ---- claims


def claims(folder: Path, baselines: Sequence[str] = BASELINES) -> list[dict[str, Any]]:
    """Compute the results of each recipe from the exported tables alone, with the functions of `compare`.

    A claim has `recipe`, `seeds`, `wer` and its `ci95`, `n`, `speakers`, `over` (what intervals resample), and
    `against`: for each baseline `delta` (WER minus the baseline's), its `ci95`, `p`, and `p_holm`, corrected for the
    number of recipes.
    """
    edits, speakers = _read_edits(pd.read_csv(folder / UTTERANCES).map(decode_cell))
    named = [baseline for baseline in baselines if baseline in edits] or [next(iter(edits))]
    against = {baseline: _differences(edits, speakers, baseline) for baseline in named}
    rows = []
    for recipe, by_seed in edits.items():
        rest = [list(third.values()) for other, third in edits.items() if other != recipe]
        score = scoring.score_over_seeds(list(by_seed.values()), speakers, others=rest)
        rows.append(
            {
                "recipe": recipe,
                "seeds": list(by_seed),
                "wer": score.wer,
                "ci95": score.ci95,
                "n": len(speakers),
                "speakers": score.speakers,
                "over": score.over,
                "against": {name: by_recipe[recipe] for name, by_recipe in against.items() if recipe in by_recipe},
            }
        )
    return rows


def _read_edits(table: pd.DataFrame) -> tuple[dict[str, dict[int, Edits]], list[str]]:
    """Return word edits per recipe and seed, and the speaker of each utterance; character counts are zero."""
    words = table["words"].to_numpy(np.int64)
    zeros = np.zeros_like(words)
    edits: dict[str, dict[int, Edits]] = {}
    for column in (name for name in table if "/" in name):
        recipe, _, seed = column.partition("/")
        counts = np.array([cell.split() for cell in table[column]], dtype=np.int64)
        edits.setdefault(recipe, {})[int(seed)] = Edits(*counts.T, words, zeros, zeros)
    return edits, table["speaker"].tolist()


def _differences(edits: dict[str, dict[int, Edits]], speakers: list[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Return the difference of each other recipe to the baseline; the seed variance is estimated from all of them."""
    by_recipe = {recipe: list(by_seed.values()) for recipe, by_seed in edits.items()}
    theirs = by_recipe.pop(baseline)
    differences = {
        recipe: scoring.difference_over_seeds(
            ours, theirs, speakers, others=[third for other, third in by_recipe.items() if other != recipe]
        )
        for recipe, ours in by_recipe.items()
    }
    corrected = holm([difference.p for difference in differences.values()])
    return {
        recipe: {"delta": difference.delta, "ci95": difference.ci95, "p": difference.p, "p_holm": p_holm}
        for (recipe, difference), p_holm in zip(differences.items(), corrected, strict=True)
    }


def headline(claim: dict[str, Any]) -> list[str]:
    """Return a claim as the comment lines at the top of a recipe."""
    units, n_seeds = Units.of(claim), len(claim["seeds"])
    lines = [
        f"WER {claim['wer']:.3f} (95 % {units.interval(claim['ci95'])}); normalised, {claim['n']} utterances, "
        f"{units.who}, {n_seeds} seed{'s' if n_seeds > 1 else ''}."
    ]
    for baseline, difference in claim["against"].items():
        direction = "better" if difference["delta"] < 0 else "worse"
        verdict = direction if is_significant(difference["ci95"], difference["p_holm"]) else "no difference shown"
        if units.over == CLIPS:
            verdict = f"no conclusion, {units.who}"
        lines.append(
            f"Against `{baseline}`: {difference['delta']:+.3f} (95 % {units.interval(difference['ci95'], '{:+.3f}')}, "
            f"p = {difference['p']:.2g}, corrected {difference['p_holm']:.2g}): {verdict}."
        )
    return lines
