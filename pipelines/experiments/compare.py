"""Comparison: experiments on one test set, each held against a baseline: by how much, how sure, on whom, at what cost.

An experiment is one recipe on one cache; its reports differ in the seed of training alone. Reports of other test sets
or normalisers are refused. That no difference was shown is a result.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines import recipes
from pipelines.experiments import lookup
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.lookup import Experiment
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.speech import scoring
from pipelines.speech.scoring import Difference, Edits, SeedsScore

MIN_SPEAKERS = 6
"""With fewer no interval is told: that all of five speakers gain is chance once in 16 times (p = 0.06)."""
ALPHA = 0.05
FOUND_IN_FOUR_OF_FIVE = 1.43
"""Half widths of a 95 % interval that a true difference must have: (1.96 + 0.84) / 1.96, of a normal distribution."""
_NOT_COMPARED = ("name", "training.seed")


@dataclass(frozen=True)
class Finding:
    """One experiment beside the baseline."""

    experiment: Experiment
    score: SeedsScore
    difference: Difference | None = None
    """None for the baseline itself."""
    p_holm: float | None = None
    """`difference.p` corrected for the number of experiments (Holm 1979)."""

    @property
    def speakers(self) -> int:
        return self.score.speakers

    @property
    def sure(self) -> bool:
        """Whether there are speakers enough for an interval to mean something."""
        return self.speakers >= MIN_SPEAKERS

    @property
    def could_show(self) -> float | None:
        """The difference that this test set would show four times in five, before any correction of p."""
        if self.difference is None or not self.sure:
            return None
        low, high = self.difference.ci95
        return FOUND_IN_FOUR_OF_FIVE * (high - low) / 2

    @property
    def verdict(self) -> str:
        """In words: `baseline`, `better`, `worse`, or why neither can be said."""
        if self.difference is None:
            return "baseline"
        if not self.sure:
            return f"cannot be told from {self.speakers} speaker(s)"
        low, high = self.difference.ci95
        if low <= 0 <= high:
            return f"no difference shown (one of {self.could_show:.3f} would be, four times in five)"
        if self.difference.p > ALPHA:
            return f"no difference shown: p is above {ALPHA:g}, though the interval leaves 0 out"
        if self.p_holm > ALPHA:
            return "no difference shown once corrected for the number of comparisons"
        return "better" if self.difference.delta < 0 else "worse"

    @property
    def shown(self) -> bool:
        return self.verdict in ("better", "worse")


@dataclass(frozen=True)
class Comparison:
    """Findings on one test set; the first is the baseline."""

    findings: tuple[Finding, ...]
    slices: pd.DataFrame
    """One row per experiment and value of a slice: slice, value, n, speakers, experiment, wer, delta, low, high (of
    delta, 95 %, of this slice alone); None where there are too few speakers, or for the baseline."""
    runs: Path

    @property
    def baseline(self) -> Experiment:
        return self.findings[0].experiment

    @property
    def best(self) -> Experiment:
        """That of the lowest WER, shown to be lower or not."""
        return min(self.findings, key=lambda finding: finding.score.wer).experiment

    @property
    def report(self) -> EvalReport:
        """Any of the reports: test set and normaliser are those of all."""
        return self.baseline.reports[0]

    @property
    def digest(self) -> str:
        """Names what is compared with what."""
        reports = [[report.folder.name for report in finding.experiment.reports] for finding in self.findings]
        return recipes.digest({"reports": reports})

    def table(self) -> pd.DataFrame:
        """One row per experiment: seeds, WER and ΔWER with intervals, p, p corrected after Holm, and the verdict."""
        return pd.DataFrame([_scores(finding) for finding in self.findings]).set_index("experiment")

    def costs(self) -> pd.DataFrame:
        """One row per experiment: what it was trained on, for how long and where, and which models came of it."""
        return pd.DataFrame([_cost(finding.experiment) for finding in self.findings]).set_index("experiment")

    def differences(self, experiment: Experiment) -> dict[str, list[Any]]:
        """Setting to its value in the baseline and in `experiment`, where they differ; none where one is untuned."""
        if not (experiment.tuned and self.baseline.tuned):
            return {}
        ours, theirs = experiment.settings, self.baseline.settings
        names = sorted(ours.keys() | theirs.keys())
        return {
            name: [theirs.get(name), ours.get(name)]
            for name in names
            if name not in _NOT_COMPARED and ours.get(name) != theirs.get(name)
        }

    def changes(self) -> pd.DataFrame:
        """One row per setting in which experiments differ from the baseline, one column per experiment."""
        tuned = [finding.experiment for finding in self.findings if finding.experiment.tuned]
        names = sorted({name for experiment in tuned for name in self.differences(experiment)})
        told = {
            experiment.name: [json.dumps(experiment.settings.get(name), ensure_ascii=False) for name in names]
            for experiment in tuned
        }
        return pd.DataFrame(told, index=pd.Index(names, name="setting"))

    def slice_table(self) -> pd.DataFrame:
        """WER of every experiment for each value of a slice with enough speakers, and ΔWER with its interval."""
        rows = self.slices[self.slices["speakers"] >= MIN_SPEAKERS]
        told = rows.assign(told=[_slice_cell(row) for row in rows.to_dict("records")])
        told["value"] = told["value"].replace("", "not told")
        table = told.pivot_table(
            index=["slice", "value", "n", "speakers"], columns="experiment", values="told", aggfunc="first", sort=False
        )
        return table.reset_index(["n", "speakers"]).rename_axis(columns=None)

    def next_step(self) -> str:
        """What to do now, in one line."""
        tuned = [finding.experiment for finding in self.findings if finding.experiment.tuned]
        single = next((experiment for experiment in tuned if len(experiment.seeds) == 1), None)
        if not self.findings[0].sure:
            return f"score on a test set with more speakers: at least {MIN_SPEAKERS}, better some dozens"
        if single:
            recipe, seed = single.lineages[0]["recipe"], single.seeds[0] + 1
            return (
                f"python -m pipelines train --recipe {recipe} --set training.seed={seed}, evaluate with the same "
                f"option, and compare again: one seed cannot tell the recipe from its luck"
            )
        others = self.findings[1:]
        if not any(finding.shown for finding in others):
            least = min(finding.could_show for finding in others)
            return f"a larger change, or more test speakers: these find one of {least:.3f} four times in five"
        return f"read where {self.best.name} still fails: {self.best.reports[0].folder}"

    def notes(self) -> list[str]:
        """What a reader has to know besides."""
        n = len(self.findings) - 1
        told = []
        if not self.findings[0].sure:
            told.append(f"fewer than {MIN_SPEAKERS} test speakers: no interval is told")
        if n > 1:
            told.append(f"p (Holm) is corrected for {n} comparisons, intervals are not")
        if any(len(finding.experiment.seeds) == 1 for finding in self.findings):
            told.append("one seed: the interval holds the luck of the test speakers, not that of the training")
        if n > 1 and any(len(finding.experiment.seeds) > 1 for finding in self.findings):
            told.append("how much a seed changes is taken from all experiments together")
        if unknown := int((self.report.predictions["speaker"] == "").sum()):
            told.append(
                f"{unknown} utterances tell no speaker: each counts as one of its own, and intervals are too narrow"
            )
        if len(self.slices):
            told.append("slices are many and uncorrected: they suggest what to test next, and prove nothing")
        return told

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "test_set": self.report.test_set,
            "normaliser": self.report.normaliser,
            "split": self.report.split,
            "n": self.report.score.n,
            "speakers": self.findings[0].speakers,
            "baseline": self.baseline.name,
            "experiments": [self._finding(finding) for finding in self.findings],
            "slices": json.loads(self.slices.to_json(orient="records")),
            "notes": self.notes(),
            "next": self.next_step(),
        }

    def in_words(self) -> str:
        """The tables as plain text, for a terminal."""
        report = self.report
        parts = [
            f"{report.split} set {report.test_set}: {report.score.n} utterances, {self.findings[0].speakers} speakers; "
            f"normaliser {report.normaliser}; ΔWER against {self.baseline.name}, below 0 is better",
            aligned(self.table()),
            aligned(self.costs()),
            aligned(self.changes()) if len(self.changes()) else "",
            aligned(self.slice_table()) if (self.slices["speakers"] >= MIN_SPEAKERS).any() else "",
            "\n".join(f"note: {note}" for note in self.notes()),
        ]
        return "\n\n".join(part for part in parts if part)

    def _finding(self, finding: Finding) -> dict[str, Any]:
        experiment, compared = finding.experiment, finding.difference
        sure = finding.sure
        return {
            "experiment": experiment.name,
            "recipe": experiment.lineages[0].get("recipe"),
            "seeds": experiment.seeds,
            "models": experiment.models,
            "wer": finding.score.wer,
            "ci95": finding.score.ci95 if sure else None,
            "wers": finding.score.wers,
            "delta": compared and compared.delta,
            "delta_ci95": compared.ci95 if compared and sure else None,
            "p": compared.p if compared and sure else None,
            "p_holm": finding.p_holm if sure else None,
            "verdict": finding.verdict,
            "could_show": finding.could_show,
            "training_seconds": [told.get("training_seconds") for told in experiment.lineages if lookup.is_tuned(told)],
            "machines": _distinct(told.get("machine") for told in experiment.lineages),
            "data": experiment.lineages[0].get("data"),
            "cache": experiment.lineages[0].get("cache"),
            "differences": self.differences(experiment),
            "reports": [_seen_from(self.runs, report.folder) for report in experiment.reports],
        }


def compare(named: Sequence[str], baseline: str = "", *, runs: str | Path = "") -> Comparison:
    """Hold the experiments `named` against `baseline`, else against the first of them.

    Each name is a report's folder, a run's folder or a recipe (experiments.find). A single tuned experiment is held
    against the model that it was tuned from, where that was scored, too. Raises LabError where the reports are of
    different test sets or normalisers, naming the one that differs, or where there is nothing to compare with.
    """
    found = [lookup.find(name, runs) for name in ([baseline] if baseline else []) + list(named)]
    reports = list({report.folder.resolve(): report for reports in found for report in reports}.values())
    if not reports:
        raise LabError("name what is to be compared: recipes, run folders or report folders")
    compared = lookup.gather(reports)
    if len(compared) == 1:
        reports = [lookup.untuned_beside(reports[0]), *reports]
        compared = lookup.gather(reports)
    lookup.require_alike(reports)
    return Comparison(tuple(_findings(compared)), _slices(compared), environment.runs_folder(runs))


def aligned(table: pd.DataFrame) -> str:
    """A table as plain text, its columns aligned to the left."""
    frame = table.reset_index().fillna("")
    rows = [frame.columns.tolist(), *frame.astype(str).to_numpy().tolist()]
    rows = [["".join(c if c.isprintable() else " " for c in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (1979), in the order given."""
    corrected, floor = [0.0] * len(ps), 0.0
    for rank, place in enumerate(np.argsort(ps, kind="stable")):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = floor
    return corrected


# ---- how they compare


def _findings(compared: list[Experiment]) -> Iterator[Finding]:
    baseline, *others = compared
    speakers = lookup.ordered(baseline.reports[0])["speaker"].tolist()
    differences = [
        scoring.difference_over_seeds(
            other.edits,
            baseline.edits,
            speakers,
            others=[third.edits for third in others if third is not other],
            untuned=(not other.tuned, not baseline.tuned),
        )
        for other in others
    ]
    corrected = holm([found.p for found in differences])
    for experiment, found, p_holm in zip(compared, [None, *differences], [None, *corrected], strict=True):
        rest = [third.edits for third in compared if third is not experiment] if experiment.tuned else []
        yield Finding(experiment, scoring.score_over_seeds(experiment.edits, speakers, others=rest), found, p_holm)


def _slices(compared: list[Experiment]) -> pd.DataFrame:
    columns = ["slice", "value", "n", "speakers", "experiment", "wer", "delta", "low", "high"]
    report = compared[0].reports[0]
    table, rows = lookup.ordered(report), []
    for column, values in report.slices().groupby("slice", sort=False)["value"]:
        for value in values if len(values) > 1 else ():
            part = table[table[column] == value]
            rows += _slice(compared, part.index.to_numpy(), part["speaker"].tolist(), column, value)
    return pd.DataFrame(rows, columns=columns).astype({"wer": float, "delta": float, "low": float, "high": float})


def _slice(
    compared: list[Experiment], rows: np.ndarray, speakers: list[str], column: str, value: str
) -> Iterator[dict[str, Any]]:
    cut = [[_some(of_seed, rows) for of_seed in experiment.edits] for experiment in compared]
    for experiment, edits in zip(compared, cut, strict=True):
        score = scoring.score_over_seeds(edits, speakers)
        told = {"slice": column, "value": value, "n": len(rows), "speakers": score.speakers}
        told |= {"experiment": experiment.name, "wer": score.wer}
        if experiment is not compared[0]:
            others = [third for third in cut[1:] if third is not edits]
            untuned = not experiment.tuned, not compared[0].tuned
            found = scoring.difference_over_seeds(edits, cut[0], speakers, others=others, untuned=untuned)
            low, high = found.ci95 if score.speakers >= MIN_SPEAKERS else (None, None)
            told |= {"delta": found.delta, "low": low, "high": high}
        yield told


def _some(edits: Edits, rows: np.ndarray) -> Edits:
    return Edits(*(getattr(edits, field.name)[rows] for field in fields(edits)))


# ---- how it is told


def _scores(finding: Finding) -> dict[str, str]:
    found, sure = finding.difference, finding.sure
    return {
        "experiment": finding.experiment.name,
        "seeds": ", ".join(map(str, finding.experiment.seeds)) or "untuned",
        "WER": f"{finding.score.wer:.3f}",
        "95 %": _span(finding.score.ci95, "{:.3f}") if sure else "",
        "ΔWER": f"{found.delta:+.3f}" if found else "",
        "95 % of Δ": _span(found.ci95, "{:+.3f}") if found and sure else "",
        "p": _p(found.p) if found and sure else "",
        "p (Holm)": _p(finding.p_holm) if found and sure else "",
        "verdict": finding.verdict,
    }


def _cost(experiment: Experiment) -> dict[str, str]:
    told = experiment.lineages[0]
    train = (told.get("data") or {}).get("train") or {}
    seconds = [lineage["training_seconds"] for lineage in experiment.lineages if lookup.is_tuned(lineage)]
    return {
        "experiment": experiment.name,
        "clips": f"{train['clips']:,}" if train else "",
        "hours": f"{train['hours']:.2f}" if train else "",
        "cache": ", ".join(_distinct(lineage.get("cache") for lineage in experiment.lineages)),
        "training (s)": f"{np.mean(seconds):.0f}" if seconds else "",
        "machine": ", ".join(_distinct(lineage.get("machine") for lineage in experiment.lineages)),
        "models": ", ".join(experiment.models),
    }


def _slice_cell(row: Mapping[str, Any]) -> str:
    if math.isnan(row["delta"]):
        return f"{row['wer']:.3f}"
    return f"{row['wer']:.3f} ({_span((row['low'], row['high']), '{:+.3f}')})"


def _span(interval: tuple[float, float] | None, form: str) -> str:
    return f"{form.format(interval[0])} to {form.format(interval[1])}" if interval else ""


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _distinct(values: Any) -> list[Any]:
    return [value for value in dict.fromkeys(values) if value]


def _seen_from(runs: Path, folder: Path) -> str:
    """A folder below the runs without the place of the runs on this machine."""
    within = folder.absolute().is_relative_to(runs)
    return Path(os.path.relpath(folder.absolute(), runs)).as_posix() if within else str(folder)
