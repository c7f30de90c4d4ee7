"""Compare experiments with a baseline on one test set: how large the difference is, how certain, on whom, at what cost.

An experiment is one recipe on one cache; its reports differ only in the training seed. Reports of different test sets
or normalisers are refused. "No difference shown" is a valid result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments.comparison import lookup, next_command, tables
from pipelines.experiments.comparison.findings import Finding, findings, is_significant, slice_findings
from pipelines.experiments.comparison.lookup import Experiment
from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.speech.intervals import CLIPS, MIN_SPEAKERS, Units

LAB, STOCK = "lab", "stock"
"""Decoders that experiments are compared by: this lab's, or transformers' own pipeline."""


@dataclass(frozen=True)
class Comparison:
    """Findings on one test set; the first is the baseline."""

    findings: tuple[Finding, ...]
    slices: pd.DataFrame
    """One row per slice value and experiment: slice, value, n, speakers, experiment, wer, delta, low, high (95 %
    interval of delta in this slice). NaN if there are too few speakers, and for the baseline."""
    runs: Path
    by: str = LAB
    """Whose transcripts are compared: LAB or STOCK."""

    @property
    def baseline(self) -> Experiment:
        return self.findings[0].experiment

    @property
    def best(self) -> Experiment:
        """The experiment with the lowest WER, even if the difference is not shown."""
        return min(self.findings, key=lambda finding: finding.score.wer).experiment

    @property
    def report(self) -> EvalReport:
        """One of the reports: all have the same test set and normaliser."""
        return self.baseline.reports[0]

    @property
    def units(self) -> Units:
        """Return what the intervals resample: speakers, or clips."""
        return self.findings[0].units

    @property
    def digest(self) -> str:
        """Digest of the compared reports."""
        reports = [[report.folder.name for report in finding.experiment.reports] for finding in self.findings]
        by = {} if self.by == LAB else {"by": self.by, "test_set": self.report.test_set}
        return recipes.digest({"reports": reports, **by})

    def table(self) -> pd.DataFrame:
        """Return one row per experiment: seeds, WER and ΔWER with intervals, p, p corrected (Holm), and the verdict."""
        return tables.score_table(self.findings)

    def costs(self) -> pd.DataFrame:
        """Return one row per experiment: training data, training time, machine, and models."""
        return tables.cost_table(finding.experiment for finding in self.findings)

    def guards(self) -> pd.DataFrame:
        """Return one row per experiment, report and guard set; empty without guard sets."""
        return tables.guard_table(finding.experiment for finding in self.findings)

    def slice_table(self) -> pd.DataFrame:
        """Return WER of every experiment for each slice value with enough speakers, and the interval of ΔWER."""
        return tables.slice_table(self.slices)

    def differences(self, experiment: Experiment) -> dict[str, list[Any]]:
        """Return the settings that differ: name to [baseline's value, experiment's value]; empty for untuned models."""
        if not (experiment.tuned and self.baseline.tuned):
            return {}
        ours, theirs = experiment.settings, self.baseline.settings
        names = sorted(ours.keys() | theirs.keys())
        return {
            name: [theirs.get(name), ours.get(name)]
            for name in names
            if name not in ("name", *lookup.NOT_COMPARED) and ours.get(name) != theirs.get(name)
        }

    def changes(self) -> pd.DataFrame:
        """Return one row per setting that differs from the baseline, one column per experiment."""
        tuned = [finding.experiment for finding in self.findings if finding.experiment.tuned]
        names = sorted({name for experiment in tuned for name in self.differences(experiment)})
        values = {
            experiment.name: [json.dumps(experiment.settings.get(name), ensure_ascii=False) for name in names]
            for experiment in tuned
        }
        return pd.DataFrame(values, index=pd.Index(names, name="setting"))

    def next_step(self) -> str:
        """Return a suggestion for the next experiment, in one line."""
        tuned = [finding.experiment for finding in self.findings if finding.experiment.tuned]
        single = next((experiment for experiment in tuned if len(experiment.seeds) == 1), None)
        if not self.findings[0].enough_speakers:
            first = {
                0: "name the speakers in the data (column `speaker`), or ",
                1: "for this speaker alone score more test sentences; for others ",
            }.get(self.units.speakers, "")
            return f"{first}score on a test set with at least {MIN_SPEAKERS} speakers, better some dozens"
        if single:
            experiments = [finding.experiment for finding in self.findings]
            return next_command.train_with_other_seed(single, experiments, self.runs)
        others = self.findings[1:]
        if not any(finding.is_conclusive for finding in others):
            least = min(finding.could_show for finding in others)
            return (
                f"a larger change, or more test speakers: this test set shows a ΔWER of {least:.3f} four times in five"
            )
        return f"read where {self.best.name} still fails: {self.best.reports[0].folder}"

    def notes(self, *, with_slices: bool = True) -> list[str]:
        """Return the caveats that apply to this comparison, and to its slices if they are shown."""
        n = len(self.findings) - 1
        notes = [] if self.by == LAB else ["transcripts are those of transformers' own pipeline, not of this lab"]
        if self.units.over == CLIPS:
            notes += [self.units.caveat, *(self._over_clips(finding) for finding in self.findings[1:])]
        elif not self.units.enough:
            notes.append(f"fewer than {MIN_SPEAKERS} test speakers: no interval is reported")
        if len(precisions := self._precisions()) > 1:
            parts = "; ".join(f"{precision}: {', '.join(names)}" for precision, names in precisions.items())
            notes.append(f"models were decoded in different precision ({parts}): a part of ΔWER may be due to that")
        if n > 1:
            notes.append(f"p (Holm) is corrected for {n} comparisons, intervals are not")
        if any(len(finding.experiment.seeds) == 1 for finding in self.findings):
            notes.append(
                f"one seed: the interval covers the choice of test {self.units.over}, but not the variation of training"
            )
        if n > 1 and any(len(finding.experiment.seeds) > 1 for finding in self.findings):
            notes.append("the variation between seeds is estimated from all experiments together")
        unknown = int((lookup.utterances([f.experiment for f in self.findings])["speaker"] == "").sum())
        if unknown and self.findings[0].enough_speakers:
            notes.append(f"{unknown} utterances have no speaker: together they count as one more speaker")
        if with_slices and len(self.slices):
            notes.append("slices are many and uncorrected: they suggest what to test next and prove nothing")
        return notes

    def _precisions(self) -> dict[str, list[str]]:
        """Return the experiments decoded in each precision, without old reports, which name none."""
        names: dict[str, list[str]] = {}
        for experiment in (finding.experiment for finding in self.findings):
            for precision in sorted({report.decoding.get("precision", "") for report in experiment.reports} - {""}):
                names.setdefault(precision, []).append(experiment.name)
        return names

    def as_dict(self) -> dict[str, Any]:
        """Return the content of comparison.json."""
        return {
            "test_set": self.report.test_set,
            "normaliser": self.report.normaliser,
            "split": self.report.split,
            "n": self.report.score.n,
            "speakers": self.units.speakers,
            "over": self.units.over,
            "by": self.by,
            "baseline": self.baseline.name,
            "experiments": [self._finding_fields(finding) for finding in self.findings],
            "slices": json.loads(self.slices.to_json(orient="records")),
            "notes": self.notes(),
            "next": self.next_step(),
        }

    def __str__(self) -> str:
        report = self.report
        parts = [
            f"{report.split} set {report.test_set}: {report.score.n} utterances, {self.units.who}; "
            f"normaliser {report.normaliser}; ΔWER against {self.baseline.name}, below 0 is better",
            tables.align_columns(self.table()),
            tables.align_columns(self.guards()) if len(self.guards()) else "",
            tables.align_columns(self.costs()),
            tables.align_columns(self.changes()) if len(self.changes()) else "",
            tables.align_columns(self.slice_table()) if (self.slices["speakers"] >= MIN_SPEAKERS).any() else "",
            "\n".join(f"note: {note}" for note in self.notes()),
        ]
        return "\n\n".join(part for part in parts if part)

    def write(self, folder: Path) -> None:
        """Write comparison.json and comparison.png."""
        from pipelines.experiments import figures
        from pipelines.infra import plots

        folder.mkdir(parents=True, exist_ok=True)
        manifest.write_json(folder / "comparison.json", self.as_dict())
        manifest.write_bytes(folder / "comparison.png", plots.png(figures.forest(self.findings)))

    def _over_clips(self, finding: Finding) -> str:
        """Return what the clips of these speakers show, where nothing can be said about other speakers."""
        difference = finding.difference
        significant = is_significant(difference.ci95, finding.p_holm)
        result = ("better" if difference.delta < 0 else "worse") if significant else "no difference shown"
        whose = "this speaker" if self.units.speakers == 1 else "these speakers"
        return f"{finding.experiment.name} on other clips of {whose}: {result}"

    def _finding_fields(self, finding: Finding) -> dict[str, Any]:
        experiment, difference, enough = finding.experiment, finding.difference, finding.enough_speakers
        lineages, over_clips = experiment.lineages, finding.units.over == CLIPS
        return {
            "experiment": experiment.name,
            "recipe": lineages[0].get("recipe"),
            "seeds": experiment.seeds,
            "models": experiment.models,
            "wer": finding.score.wer,
            "ci95": finding.score.ci95 if enough else None,
            "ci95_over_clips": finding.score.ci95 if over_clips else None,
            "wers": finding.score.wers,
            "delta": difference and difference.delta,
            "delta_ci95": difference.ci95 if difference and enough else None,
            "delta_ci95_over_clips": difference.ci95 if difference and over_clips else None,
            "p": difference.p if difference and enough else None,
            "p_holm": finding.p_holm if enough else None,
            "verdict": finding.verdict,
            "could_show": finding.could_show,
            "training_seconds": [one.get("training_seconds") for one in lineages if lookup.is_tuned(one)],
            "machines": tables.distinct(one.get("machine") for one in lineages),
            "data": lineages[0].get("data"),
            "cache": lineages[0].get("cache"),
            "differences": self.differences(experiment),
            "guards": [guard.as_dict() for report in experiment.reports for guard in report.guards],
            "reports": [_relative_to_runs(report.folder, self.runs) for report in experiment.reports],
        }


def compare(
    names: str | Path | Sequence[str | Path], baseline: str = "", *, by: str = LAB, runs: str | Path = ""
) -> Comparison:
    """Compare the experiments `names` with `baseline`, by default with the first of them.

    Each name is a report's folder, a run's folder or a recipe (lookup.find). A single tuned experiment is compared with
    the model that it was tuned from, if a report of that model exists. `by` STOCK compares what transformers' pipeline
    writes, on the clips that it decoded for all of them. Raise LabError if the reports have different test sets or
    normalisers, or if there is nothing to compare with.
    """
    check_decoder(by)
    names = [names] if isinstance(names, str | Path) else names
    matches = [lookup.find(name, runs) for name in ([baseline] if baseline else []) + list(names)]
    reports = list({report.folder.resolve(): report for reports in matches for report in reports}.values())
    if not reports:
        raise LabError("name what is to be compared: recipes, run folders or report folders")
    experiments = lookup.gather(reports)
    if len(experiments) == 1:
        untuned = lookup.untuned_report(reports[0], environment.runs_folder(runs))
        if untuned is None:
            raise LabError(
                "a comparison needs two experiments, got one: name another, or score the model that it was tuned from: "
                + next_command.score_untuned(reports[0], environment.runs_folder(runs))
            )
        reports = [untuned, *reports]
        experiments = lookup.gather(reports)
    lookup.require_comparable(reports)
    if by == STOCK:
        experiments = lookup.gather(lookup.all_in_stock_pipeline(reports))
    return Comparison(tuple(findings(experiments)), slice_findings(experiments), environment.runs_folder(runs), by)


def check_decoder(by: str) -> None:
    """Raise LabError unless `by` is LAB or STOCK."""
    if by not in (LAB, STOCK):
        raise LabError(f"--by must be {LAB} (this lab's decoder) or {STOCK} (transformers' pipeline), got {by!r}")


def _relative_to_runs(folder: Path, runs: Path) -> str:
    """Return a folder below `runs` as a relative path, any other unchanged."""
    inside = folder.absolute().is_relative_to(runs)
    return Path(os.path.relpath(folder.absolute(), runs)).as_posix() if inside else str(folder)
