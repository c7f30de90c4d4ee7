"""Experiments: the reports of a recipe on a cache, found by the names that people give, gathered over seeds."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation
from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes.settings import Recipe, flatten
from pipelines.speech import scoring, text
from pipelines.speech.scoring import Edits

logger = logging.getLogger(__name__)

SAME_DURATION_S = 0.02
"""Recordings of one id whose durations differ by more are not the same."""


@dataclass(frozen=True)
class Experiment:
    """One recipe on one cache, or one model that the lab did not tune, scored on one test set."""

    name: str
    reports: tuple[EvalReport, ...]
    """One for each seed of training, in their order."""

    @property
    def lineages(self) -> list[dict[str, Any]]:
        return [report.lineage for report in self.reports]

    @property
    def tuned(self) -> bool:
        return is_tuned(self.lineages[0])

    @property
    def seeds(self) -> list[int]:
        return [told["seed"] for told in self.lineages] if self.tuned else []

    @property
    def models(self) -> list[str]:
        """Digests of the tuned models; name and revision of any other."""
        return [report.lineage["digest"] if self.tuned else report.model for report in self.reports]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe, flat, with the settings of decoding that made the report."""
        return _settings(_facts(self.reports[0]))

    @cached_property
    def edits(self) -> list[Edits]:
        """Word edits of every utterance for each seed, normalised, in the order of `ordered`."""
        tables = [ordered(report) for report in self.reports]
        return [scoring.count_edits(table["reference"].tolist(), table["hypothesis"].tolist()) for table in tables]


def find(named: str, runs: str | Path = "") -> list[EvalReport]:
    """The reports that `named` means: of a report's folder that one.

    Of a run's folder, `runs/<recipe>`, or a recipe, the newest test report of a tuned model, and with it those of its
    other seeds. Raises LabError where there is none.
    """
    given = Path(named).expanduser()
    if (given / manifest.MANIFEST).is_file():
        return [_read(given)]
    name = recipes.load(named).name if named.endswith(".toml") else named
    place = environment.runs_folder(runs)
    folder = next((found for found in (place / name, given) if found.is_dir()), None)
    if folder is None:
        known = sorted(found.parents[2].name for found in place.glob("*/reports/*/manifest.json"))
        near = difflib.get_close_matches(name, known, n=1)
        raise LabError(
            f"no report {named!r}{f'; did you mean {near[0]!r}?' if near else ''} Expected the folder of a report, one "
            f"of a run such as runs/tour, or a recipe that was evaluated: python -m pipelines evaluate --recipe tour"
        )
    newest, *older = _tuned_reports(folder)
    key = _key(newest[1])
    seeds = {newest[1]["lineage"]["seed"]: newest[0]}
    for path, facts in older:
        if _key(facts) == key:
            seeds.setdefault(facts["lineage"]["seed"], path)
    left = len([facts for _, facts in older if _key(facts) != key])
    if left:
        logger.info(
            f"note: {folder} holds {left} older test report(s) of models tuned otherwise: name their folders for them"
        )
    return [_read(path) for _, path in sorted(seeds.items())]


def gather(reports: list[EvalReport]) -> list[Experiment]:
    """The reports gathered by all but the seed of training; the first report's experiment is the first.

    An experiment is named after its recipe; where two share that name, the first digits of their models follow it.
    """
    groups: dict[str, dict[int, EvalReport]] = {}
    for report in reports:
        key, seed = _key(_facts(report)), report.lineage.get("seed", 0)
        known = groups.get(key, {}).get(seed)
        if known and known.lineage.get("digest") != report.lineage.get("digest"):
            key += report.lineage["digest"]  # as a fork is: the same recipe, other weights to start from
        groups.setdefault(key, {}).setdefault(seed, report)
    gathered = [tuple(report for _, report in sorted(found.items())) for found in groups.values()]
    names = [_name(found[0]) for found in gathered]
    return [
        Experiment(f"{name} {_revision(found[0])}" if names.count(name) > 1 else name, found)
        for name, found in zip(names, gathered, strict=True)
    ]


def untuned_beside(report: EvalReport) -> EvalReport:
    """The report of the model that the report's model was tuned from, on the same test set: it lies beside.

    Of a student it is that of its teacher.
    """
    teacher = (report.lineage.get("teacher") or {}).get("digest")
    beside = [path.parent for path in report.folder.absolute().parent.glob(f"*/{manifest.MANIFEST}")]
    for path in beside:
        facts = manifest.read(path) or {}
        same = all(facts.get(name) == getattr(report, name) for name in ("test_set", "normaliser", "split"))
        told = facts.get("lineage") or {}
        if same and teacher and told.get("digest") == teacher:
            return _read(path)
        if same and is_tuned(report.lineage) and not is_tuned(told) and _weights(told) == _weights(report.lineage):
            return _read(path)
    recipe = report.lineage.get("recipe", "tour")
    if teacher:
        raise LabError(
            "a comparison needs two experiments, got one: name another, or score the student's teacher on the same: "
            f"python -m pipelines evaluate --recipe {recipe} --model <the teacher's folder>"
        )
    raise LabError(
        "a comparison needs two experiments, got one: name another, or score the model that it was tuned from: "
        f"python -m pipelines evaluate --recipe {recipe} --model {report.lineage.get('base', '').partition(' ')[0]}"
    )


def _require_alike_sound(first: EvalReport, other: EvalReport) -> None:
    """LabError where the same ids and references stand for other recordings: the durations tell."""
    ours, theirs = ordered(first), ordered(other)
    unlike = (ours["duration_s"] - theirs["duration_s"]).abs() > SAME_DURATION_S
    if unlike.any():
        row = int(unlike.idxmax())
        here, there = ours["duration_s"][row], theirs["duration_s"][row]
        raise LabError(
            f"only reports of the same recordings can be compared: {ours['id'][row]} lasts {there:.2f} s in "
            f"{other.folder} and {here:.2f} s in {first.folder} ({int(unlike.sum())} of {len(unlike)} differ). "
            "Evaluate both on the same, or leave one out"
        )


def require_alike(reports: list[EvalReport]) -> None:
    """LabError, naming the first report that differs, unless all are of one test set and one normaliser."""
    first = reports[0]
    for report in reports:
        if not report.test_set:
            raise LabError(
                f"{report.folder} is from before reports told what was scored: remove that folder and evaluate again"
            )
        for name, what in (("test_set", "test set"), ("normaliser", "normaliser")):
            wanted, found = getattr(first, name), getattr(report, name)
            if wanted != found:
                raise LabError(
                    f"only reports of one {what} can be compared: {report.folder} has {found} ({report.score.n} "
                    f"utterances), {first.folder} has {wanted} ({first.score.n}). Evaluate both on the same, or leave "
                    "one out"
                )
        _require_alike_sound(first, report)
    if first.normaliser != text.NORMALISER:
        raise LabError(
            f"{first.folder} was scored under normaliser {first.normaliser}, this version has {text.NORMALISER}: "
            "remove that folder and evaluate again"
        )


def is_tuned(lineage: Mapping[str, Any]) -> bool:
    """Whether a report's lineage is that of a model that the lab tuned."""
    return bool(lineage.get("digest") and lineage.get("settings"))


def ordered(report: EvalReport) -> pd.DataFrame:
    """The predictions in an order that all reports of a test set share."""
    return report.predictions.sort_values(["id", "reference"], ignore_index=True)


# ---- what a name means, and what makes two reports one experiment


def _read(folder: Path) -> EvalReport:
    kind = (manifest.read(folder) or {}).get("kind")
    if kind != "report":
        raise LabError(f"{folder} must be the folder of a report, it is that of a {kind}: name one below reports/")
    return evaluation.read_report(folder)


def _tuned_reports(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Test reports of tuned models below a run's folder with their facts, newest first; its own models' if any."""
    paths = sorted(folder.glob(f"reports/*/{manifest.MANIFEST}"), key=lambda path: -path.stat().st_mtime_ns)
    told = [(path.parent, manifest.read(path.parent) or {}) for path in paths]
    tuned = [
        (path, facts) for path, facts in told if facts.get("split") == "test" and is_tuned(facts.get("lineage") or {})
    ]
    own = [(path, facts) for path, facts in tuned if facts["lineage"]["recipe"] == folder.name]
    if not tuned:
        raise LabError(
            f"{folder} holds no test report of a tuned model that tells what made it: "
            f"python -m pipelines train --recipe {folder.name}, then evaluate --recipe {folder.name}"
        )
    return own or tuned


def _facts(report: EvalReport) -> dict[str, Any]:
    return manifest.read(report.folder) or {}


def _key(facts: Mapping[str, Any]) -> str:
    """All that makes an experiment besides its seed: settings, data, base, and how it was decoded."""
    told = facts.get("lineage") or {}
    settings = {name: value for name, value in _settings(facts).items() if name != "training.seed"}
    of = {name: told.get(name) for name in ("recipe", "cache", "base", "fork")}
    if settings.get("curation.max_label_cer") and str(settings.get("curation.label_model")).startswith("run:"):
        del of["cache"]  # that run has the same seed: what it hears, and so the cache, differs with the seed
    return json.dumps([settings, of, "" if is_tuned(told) else facts.get("model")], sort_keys=True)


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that came later than the report are at their defaults."""
    told, decoded = facts.get("lineage") or {}, facts.get("identity") or {}
    recipe = _defaults() | flatten(told["settings"]) if is_tuned(told) else {}
    return recipe | {name: value for name, value in decoded.items() if name.startswith(("evaluation.", "context"))}


def _weights(lineage: Mapping[str, Any]) -> str:
    """The base model without its name, which a tuned model tells without the place on the trainer's machine."""
    found = re.search(r"( \(\w+\))? @ [^@]*$", lineage.get("base") or "")
    return found[0] if found else ""


def _defaults() -> dict[str, Any]:
    return Recipe(name="defaults").settings()


def _name(report: EvalReport) -> str:
    return report.lineage["recipe"] if is_tuned(report.lineage) else report.model.partition(" @ ")[0]


def _revision(report: EvalReport) -> str:
    return (report.lineage["digest"] if is_tuned(report.lineage) else report.model.partition(" @ ")[2])[:6]
