"""Find the reports of experiments by name, and group them by everything but the training seed."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.report import slices
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes.base_settings import flatten
from pipelines.recipes.commands import command
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring, text
from pipelines.speech.scoring import Edits

logger = logging.getLogger(__name__)

NOT_COMPARED = ("training.seed", "evaluation.stock_pipeline")
"""Settings in which the runs of one experiment may differ."""
SAME_DURATION_S = 0.02
"""Largest difference in duration between two recordings that count as the same, in seconds."""


@dataclass(frozen=True)
class Experiment:
    """One recipe on one cache, or one model not tuned by the lab, scored on one test set."""

    name: str
    reports: tuple[EvalReport, ...]
    """One per training seed, in the order of the seeds."""

    @property
    def lineages(self) -> list[dict[str, Any]]:
        return [report.lineage for report in self.reports]

    @property
    def tuned(self) -> bool:
        return is_tuned(self.lineages[0])

    @property
    def seeds(self) -> list[int]:
        return [lineage["seed"] for lineage in self.lineages] if self.tuned else []

    @property
    def models(self) -> list[str]:
        """Digests of the tuned models; name and revision of any other model."""
        return [report.lineage["digest"] if self.tuned else report.model for report in self.reports]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings, flat, with the decoding settings of the report, and `fork` for a fork."""
        fork = self.lineages[0].get("fork")
        start = {"fork": f"run {fork['run']} step {fork['step']}"} if fork else {}
        return _settings(_manifest(self.reports[0])) | start

    @cached_property
    def edits(self) -> list[Edits]:
        """Word edits per utterance for each seed, normalised, in the order of `ordered`."""
        tables = [ordered(report) for report in self.reports]
        return [scoring.count_edits(table["reference"].tolist(), table["hypothesis"].tolist()) for table in tables]


def find(name: str | Path, runs: str | Path = "", *, log_older: bool = True) -> list[EvalReport]:
    """Return the reports that `name` refers to: one for the folder of a report.

    For the folder of a run, `runs/<recipe>`, or a recipe: the newest test report of a tuned model, and the reports of
    the same experiment with other seeds. Raise LabError if there is none.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise LabError(f"an experiment must be the name of a recipe or a folder, got {name!r}")
    name = str(name)
    path = Path(name).expanduser()
    if (path / manifest.MANIFEST).is_file():
        return [_read(path)]
    recipe = recipes.load(name).name if name.endswith(".toml") else name
    folder = _run_folder(recipe, path, environment.runs_folder(runs))
    newest, *older = _tuned_reports(folder)
    key = _key(newest[1])
    seeds = {newest[1]["lineage"]["seed"]: newest[0]}
    for report, fields in older:
        if _key(fields) == key:
            seeds.setdefault(fields["lineage"]["seed"], report)
    others = sum(_key(fields) != key for _, fields in older)
    if others and log_older:
        logger.info(
            f"note: {folder} holds {others} older test report(s) of models with other settings: name their folders to "
            "use them"
        )
    return [_read(report) for _, report in sorted(seeds.items())]


def _run_folder(recipe: str, path: Path, runs: Path) -> Path:
    folder = next((folder for folder in (runs / recipe, path) if folder.is_dir()), None)
    if folder:
        return folder
    evaluated = sorted(report.parents[2].name for report in runs.glob("*/reports/*/manifest.json"))
    near = difflib.get_close_matches(recipe, evaluated, n=1)
    known = recipes.load(recipe if recipe in recipes.names() else "tour")
    raise LabError(
        f"no report {recipe!r}{f'; did you mean {near[0]!r}?' if near else '.'} Expected the folder of a report, one "
        f"of a run such as runs/tour, or a recipe that was evaluated: {command('evaluate', recipe=known, runs=runs)}"
    )


def gather(reports: list[EvalReport]) -> list[Experiment]:
    """Group reports into experiments by everything but the training seed; keep the order of the first reports.

    An experiment is named after its recipe; if two have the same name, the first digits of their models are appended.
    """
    groups: dict[str, dict[int, EvalReport]] = {}
    for report in reports:
        key, seed = _key(_manifest(report)), report.lineage.get("seed", 0)
        existing = groups.get(key, {}).get(seed)
        if existing and existing.lineage.get("digest") != report.lineage.get("digest"):
            key += report.lineage["digest"]  # a fork: the same recipe from other initial weights
        groups.setdefault(key, {}).setdefault(seed, report)
    by_seed = [tuple(report for _, report in sorted(group.items())) for group in groups.values()]
    names = [_name(group[0]) for group in by_seed]
    return [
        Experiment(f"{name} {_revision(group[0])}" if names.count(name) > 1 else name, group)
        for name, group in zip(names, by_seed, strict=True)
    ]


def untuned_report(report: EvalReport, runs: Path) -> EvalReport | None:
    """Return the report, on the same test set, of the model that a model was tuned from; None if there is none.

    For a student it is the report of its teacher. A report in the same folder is preferred to those of other recipes.
    """
    teacher = (report.lineage.get("teacher") or {}).get("digest")
    beside = report.folder.absolute().parent.glob(f"*/{manifest.MANIFEST}")
    for folder in [path.parent for path in (*beside, *runs.glob(f"*/reports/*/{manifest.MANIFEST}"))]:
        fields = manifest.read(folder) or {}
        lineage = fields.get("lineage") or {}
        if any(fields.get(name) != getattr(report, name) for name in ("test_set", "normaliser", "split")):
            continue
        if teacher and lineage.get("digest") == teacher:
            return _read(folder)
        if is_tuned(report.lineage) and not is_tuned(lineage) and _weights(lineage) == _weights(report.lineage):
            return _read(folder)
    return None


def require_comparable(reports: list[EvalReport]) -> None:
    """Raise LabError, naming the first report that differs, unless all have one test set and one normaliser."""
    first = reports[0]
    for report in reports:
        if not report.test_set:
            raise LabError(
                f"{report.folder} is too old: it does not record what was scored. Remove that folder and evaluate again"
            )
        for name, label in (("test_set", "test set"), ("normaliser", "normaliser")):
            expected, actual = getattr(first, name), getattr(report, name)
            if expected != actual:
                raise LabError(
                    f"only reports of one {label} can be compared: {report.folder} has {actual} ({report.score.n} "
                    f"utterances), {first.folder} has {expected} ({first.score.n}). Evaluate both on the same, or "
                    "leave one out"
                )
        _require_same_recordings(first, report)
    if first.normaliser != text.NORMALISER:
        raise LabError(
            f"{first.folder} was scored under normaliser {first.normaliser}, this version has {text.NORMALISER}: "
            "remove that folder and evaluate again"
        )


def _require_same_recordings(first: EvalReport, other: EvalReport) -> None:
    """Raise LabError if recordings with the same id and reference differ in duration."""
    ours, theirs = ordered(first), ordered(other)
    differs = (ours["duration_s"] - theirs["duration_s"]).abs() > SAME_DURATION_S
    if differs.any():
        row = int(differs.idxmax())
        raise LabError(
            f"only reports of the same recordings can be compared: {ours['id'][row]} lasts "
            f"{theirs['duration_s'][row]:.2f} s in {other.folder} and {ours['duration_s'][row]:.2f} s in "
            f"{first.folder} ({int(differs.sum())} of {len(differs)} differ). Evaluate both on the same, or "
            "leave one out"
        )


def in_stock_pipeline(report: EvalReport, rows: Sequence[int] | None = None) -> EvalReport:
    """Return the report with transcripts and score of transformers' pipeline, of its clips alone or of `rows`.

    `test_set` is the digest of these clips. Raise LabError if the pipeline was not scored.
    """
    if report.stock is None:
        raise LabError(
            f"{report.folder} ({report.model}) has no score in the stock pipeline: evaluate that model again with "
            "--set evaluation.stock_pipeline=true"
        )
    chosen = sorted(report.stock.hypotheses) if rows is None else list(rows)
    table = report.predictions.iloc[chosen].reset_index(drop=True)
    table = table.assign(hypothesis=[report.stock.hypotheses[row] for row in chosen])
    texts = [table[name].tolist() for name in ("reference", "hypothesis", "speaker")]
    return replace(
        report,
        predictions=table,
        score=scoring.score(*texts),
        raw=scoring.score(*texts, normalised=False),
        test_set=evaluation.test_set(table),
        decoding=report.stock.decoding,
    )


def all_in_stock_pipeline(reports: Sequence[EvalReport]) -> list[EvalReport]:
    """Return the reports of one test set in transformers' pipeline, on the clips that it decoded for all of them."""
    shared = set.intersection(*(set(in_stock_pipeline(one).predictions["id"]) for one in reports))
    if not shared:
        raise LabError(
            "the stock pipeline decoded no clip for all of them: evaluate with evaluation.stock_pipeline=true"
        )
    return [
        in_stock_pipeline(one, [row for row in sorted(one.stock.hypotheses) if one.predictions["id"][row] in shared])
        for one in reports
    ]


def is_tuned(lineage: Mapping[str, Any]) -> bool:
    """Return True for the lineage of a model that the lab tuned."""
    return bool(lineage.get("digest") and lineage.get("settings"))


def ordered(report: EvalReport) -> pd.DataFrame:
    """Return the predictions in an order that is the same for all reports of a test set."""
    return report.predictions.sort_values(["id", "reference"], ignore_index=True)


def utterances(experiments: Sequence[Experiment]) -> pd.DataFrame:
    """Return the utterances of a test set in the order of `ordered`, with what any of the reports says about them.

    Reports of one test set may differ in what they know: a cache built before a speaker column was added has no
    speakers. A cell that is empty in one report is filled from another, and of two columns of speakers that
    contradict each other the one with fewer speakers counts. The order of the experiments makes no difference.
    """
    reports = {report.folder: ordered(report) for experiment in experiments for report in experiment.reports}
    tables = [table for _, table in sorted(reports.items())]
    merged = tables[0].copy()
    by_speakers = sorted(tables, key=lambda table: (table["speaker"].nunique(), table["speaker"].tolist()))
    for column in dict.fromkeys(name for table in tables for name in ("speaker", *slices.METADATA) if name in table):
        sources = [table[column] for table in (by_speakers if column == "speaker" else tables) if column in table]
        merged[column] = sources[0]
        for source in sources[1:]:
            merged[column] = merged[column].where(merged[column] != "", source)
    return merged


# ---- reading reports, and what identifies an experiment


def _read(folder: Path) -> EvalReport:
    kind = (manifest.read(folder) or {}).get("kind")
    if kind != "report":
        raise LabError(f"{folder} must be the folder of a report, it is that of a {kind}: name one below reports/")
    return evaluation.read_report(folder)


def _tuned_reports(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the test reports of tuned models in a run's folder with their manifests, newest first.

    Reports of the recipe's own models are preferred to those of other models.
    """
    paths = sorted(folder.glob(f"reports/*/{manifest.MANIFEST}"), key=lambda path: -manifest.made_at(path.parent))
    reports = [(path.parent, manifest.read(path.parent) or {}) for path in paths]
    tuned = [
        (path, fields)
        for path, fields in reports
        if fields.get("split") == "test" and is_tuned(fields.get("lineage") or {})
    ]
    if not tuned:
        raise LabError(
            f"{folder} holds no test report of a tuned model with a lineage: train and evaluate that recipe, with the "
            "options that it had, or name another"
        )
    trained = [(path, fields) for path, fields in tuned if not fields["lineage"].get("merge")] or tuned
    return [(path, fields) for path, fields in trained if fields["lineage"]["recipe"] == folder.name] or trained


def _manifest(report: EvalReport) -> dict[str, Any]:
    return manifest.read(report.folder) or {}


def _key(fields: Mapping[str, Any]) -> str:
    """Return the identity of an experiment: settings without the seed, data, base model, and decoding settings."""
    lineage = fields.get("lineage") or {}
    settings = {name: value for name, value in _settings(fields).items() if name not in NOT_COMPARED}
    source = {name: lineage.get(name) for name in ("recipe", "cache", "base", "fork")}
    source |= {"merge": lineage["merge"]} if lineage.get("merge") else {}
    if source["fork"]:
        del source["base"]  # the run that it started from has one; older versions recorded another name for it
    if settings.get("curation.max_label_cer") and str(settings.get("curation.label_model")).startswith("run:"):
        del source["cache"]  # the label model has the same seed: its transcripts, and so the cache, differ by seed
    return json.dumps([settings, source, "" if is_tuned(lineage) else fields.get("model")], sort_keys=True)


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a report; settings that are newer than the report have their defaults."""
    lineage, identity = fields.get("lineage") or {}, fields.get("identity") or {}
    tuned = {name: value for name, value in (lineage.get("settings") or {}).items() if name != "guards"}
    recipe = Recipe(name="defaults").settings() | flatten(tuned) if is_tuned(lineage) else {}
    return recipe | {name: value for name, value in identity.items() if name.startswith(("evaluation.", "context"))}


def _weights(lineage: Mapping[str, Any]) -> str:
    """Return the base model without its name: a tuned model records it without the path on the training machine."""
    match = re.search(r"( \(\w+\))? @ [^@]*$", lineage.get("base") or "")
    return match[0] if match else ""


def _name(report: EvalReport) -> str:
    return report.lineage["recipe"] if is_tuned(report.lineage) else report.model.partition(" @ ")[0]


def _revision(report: EvalReport) -> str:
    return (report.lineage["digest"] if is_tuned(report.lineage) else report.model.partition(" @ ")[2])[:6]
