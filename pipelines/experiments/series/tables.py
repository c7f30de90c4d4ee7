"""Results of a series of experiments as small tables that can be committed, and grow from machine to machine.

utterances.csv   one row per test utterance: id, speaker, gender, words; for each `recipe/seed` its word edits as
                 "substitutions insertions deletions"
runs.csv         one row per run: data, scores, training time, machine, versions, and the digest of its settings
filters.json     precision and recall of curation on the planted faults (filters.py), if the series has them
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation
from pipelines.experiments.comparison import lookup
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.series import claims, filters, table_files
from pipelines.experiments.series.claims import BASELINES
from pipelines.experiments.series.run import SeriesError, name_of
from pipelines.experiments.series.table_files import UTTERANCES
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment, manifest, redact
from pipelines.infra.errors import LabError
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring, text

FILTERS = "filters.json"
_NO_RESULT = (
    *("training.workers", "training.max_hours", "training.micro_batch", "training.checkpoint_activations"),
    *("training.tracker", "training.keep_checkpoints", "training.remove_checkpoints"),
    *("features.workers", "features.shard_clips", "evaluation.batch_frames", "evaluation.stock_pipeline"),
    *("evaluation.bootstrap_samples", "evaluation.seed"),
)
"""Settings that change neither a run's weights nor its transcripts."""
_GROUPS = ("source", "features", "curation", "augment", "model", "distillation", "training", "evaluation")


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
        lines = [
            line for claim in self.claims for line in (claim["recipe"], *(f"  {x}" for x in claims.headline(claim)))
        ]
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

    Rows of planned experiments that are there already and are not finished on this machine stay; others are removed.
    Raise LabError if none is finished, or if they have different test sets or normalisers.
    """
    reports, earlier = finished_reports(experiments, runs), names_in_tables(experiments, folder)
    if not reports and not earlier:
        raise LabError("no finished experiment to export: run the same command without --export first")
    names = [name for name in map(name_of, experiments) if name in reports or name in earlier]
    by_name = {name_of(recipe): recipe for recipe in experiments}
    if reports:
        lookup.require_comparable(list(reports.values()))
    with table_files.locked(folder):
        _write(folder, {name: (by_name[name], report) for name, report in reports.items()}, names, runs)
    finished = [by_name[name] for name in reports]
    if any(recipe.name in BASELINES for recipe in finished):
        path = folder / FILTERS
        stored = json.loads(path.read_text("utf-8")) if earlier and path.is_file() else {}
        content = json.dumps(stored | filters.of_series(finished, runs), indent=1, ensure_ascii=False)
        manifest.write_bytes(path, f"{content}\n".encode())
    return SeriesTables(folder, reports, claims.of_tables(folder))


def add(recipe: Recipe, report: EvalReport, folder: Path, *, runs: str | Path = "") -> None:
    """Add the result of one experiment to the tables in `folder`; the one that they hold of it is replaced.

    Raise LabError if they hold results on another test set.
    """
    with table_files.locked(folder):
        names = table_files.results(table_files.read(folder)[0])
        _write(folder, {name_of(recipe): (recipe, report)}, [*dict.fromkeys([*names, name_of(recipe)])], runs)


def callbacks(folder: Path, runs: str | Path = "") -> dict[str, Callable[..., None]]:
    """Return the arguments of `run.run` that add each result to the tables in `folder`, if the test set is theirs."""
    return {
        "on_cache": functools.partial(check, folder=folder),
        "on_report": functools.partial(add, folder=folder, runs=runs),
    }


def check(recipe: Recipe, cache: FeatureCache, folder: Path) -> None:
    """Raise SeriesError if the tables in `folder` hold results on another test set than that of `cache`."""
    rows = cache.rows.iloc[cache.split("test")].rename(columns={"text": "reference"})
    new = {"test_set": evaluation.test_set(rows), "normaliser": text.NORMALISER}
    _require_one_test_set(folder, _rows(table_files.read(folder)[1]) | {name_of(recipe): new})


def names_in_tables(experiments: Iterable[Recipe], folder: Path) -> set[str]:
    """Return `recipe/seed` of the experiments whose results are in the tables in `folder`, from the same settings.

    Tables of older versions do not record the settings: none of their results count. Raises LabError for rehearsals,
    whose results would take the place of real ones, and for damaged tables.
    """
    experiments = [*experiments]
    if any(recipe.training.fast_dev_run for recipe in experiments):
        raise LabError("training.fast_dev_run trains two steps, whose WER means nothing: make tables without it")
    table, costs = table_files.read(folder)
    recorded = {name: row.get("settings") for name, row in _rows(costs).items()}
    return {
        name
        for recipe in experiments
        if (name := name_of(recipe)) in table and recorded.get(name) == settings_digest(recipe)
    }


def settings_digest(recipe: Recipe) -> str:
    """Return the digest of the settings that decide a result, without local paths: 12 hexadecimal digits."""
    redacted = _redacted(recipe)
    changed = {name for group in _GROUPS for name in recipe.changed(group)} - {*_NO_RESULT}
    values = {name: redacted[group][key] for name in changed for group, _, key in [name.partition(".")]}
    return recipes.digest({"language": recipe.language, **values})


def _write(folder: Path, results: dict[str, tuple[Recipe, EvalReport]], names: Sequence[str], runs: str | Path) -> None:
    """Write both tables with the results `names`, in their order: new ones from `results`, others from the files."""
    table, costs = table_files.read(folder)
    rows = {name: row for name, row in _rows(costs).items() if name in names and name not in results}
    rows |= {name: _run_row(recipe, report, runs) for name, (recipe, report) in results.items()}
    _require_one_test_set(folder, rows)
    if results:
        new = _utterances({name: report for name, (_, report) in results.items()})
        kept = [name for name in names if name not in results]
        if kept and {*table["id"]} != {*new["id"]}:
            raise LabError(
                f"{folder / UTTERANCES} must have the {len(new)} utterances of the test set, got {len(table)} rows "
                "that are not the same: restore it, or name another folder"
            )
        table = new.assign(**{name: table.set_index("id")[name].reindex(new["id"]).to_numpy() for name in kept})
    described = [name for name in table if "/" not in name]
    table_files.write(folder, table[[*described, *names]], pd.DataFrame([rows[name] for name in names]))


def _rows(costs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the rows of runs.csv by `recipe/seed`."""
    return {f"{row['recipe']}/{row['seed']}": row for row in costs.to_dict("records")}


def _require_one_test_set(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Raise SeriesError unless the rows of runs.csv have one test set and one normaliser."""
    for column in ("test_set", "normaliser"):
        values = {str(row[column]): name for name, row in rows.items()}
        if len(values) > 1:
            (first, name), (second, other), *_ = values.items()
            raise SeriesError(
                f"the tables of a series need one {column}: {name} has {first}, {other} has {second}. Write the new "
                f"results to another folder than {folder}"
            )


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
                reports[name_of(recipe)] = report
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


def _run_row(recipe: Recipe, report: EvalReport, runs: str | Path) -> dict[str, Any]:
    lineage = report.lineage
    folder = environment.runs_folder(runs) / recipe.name / f"train-{lineage['digest']}" / "model"
    training = json.loads((folder / "training.json").read_text("utf-8"))
    return {
        "recipe": recipe.name,
        "seed": recipe.training.seed,
        "settings": settings_digest(recipe),
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
