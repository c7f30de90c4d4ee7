"""Score of each experiment, and its paired difference to a baseline with a 95 % interval and p-value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from pipelines.experiments.comparison import lookup
from pipelines.experiments.comparison.lookup import Experiment
from pipelines.experiments.report import slices
from pipelines.speech import scoring
from pipelines.speech.intervals import Units
from pipelines.speech.scoring import Difference, Edits, SeedsScore

ALPHA = 0.05
POWER_FACTOR = 1.43
"""True difference that is detected in four of five tests, in half widths of a 95 % interval: (1.96 + 0.84) / 1.96 for a
normal distribution."""
SLICE_COLUMNS = ["slice", "value", "n", "speakers", "experiment", "wer", "delta", "low", "high"]


@dataclass(frozen=True)
class Finding:
    """The result of one experiment, compared with the baseline."""

    experiment: Experiment
    score: SeedsScore
    difference: Difference | None = None
    """None for the baseline."""
    p_holm: float | None = None
    """`difference.p` corrected for the number of experiments (Holm 1979)."""

    @property
    def units(self) -> Units:
        """Return what the intervals resample: speakers, or clips."""
        return self.score.units

    @property
    def enough_speakers(self) -> bool:
        """True if there are enough known speakers for a conclusion about speakers."""
        return self.units.enough

    @property
    def could_show(self) -> float | None:
        """The difference that this test set detects in four of five tests, before any correction of p."""
        if self.difference is None or not self.enough_speakers:
            return None
        low, high = self.difference.ci95
        return POWER_FACTOR * (high - low) / 2

    @property
    def verdict(self) -> str:
        """`baseline`, `better`, `worse`, or the reason why no difference is shown."""
        if self.difference is None:
            return "baseline"
        if not self.enough_speakers:
            few = self.units.speakers
            return f"too few speakers for a conclusion: {few}" if few else "no conclusion: speakers unknown"
        low, high = self.difference.ci95
        if low <= 0 <= high:
            return f"no difference shown (one of {self.could_show:.3f} would be, four times in five)"
        if self.difference.p > ALPHA:
            return f"no difference shown: p is above {ALPHA:g}, although the interval excludes 0"
        if self.p_holm > ALPHA:
            return "no difference shown after correction for the number of comparisons"
        return "better" if self.difference.delta < 0 else "worse"

    @property
    def is_conclusive(self) -> bool:
        return self.verdict in ("better", "worse")


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (1979), in the given order."""
    corrected, floor = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = floor
    return corrected


def is_significant(ci95: Sequence[float] | None, p_holm: float) -> bool:
    """Return True if the interval of a difference excludes 0 and the corrected p-value is at most ALPHA."""
    return ci95 is not None and not ci95[0] <= 0 <= ci95[1] and p_holm <= ALPHA


def findings(experiments: list[Experiment]) -> Iterator[Finding]:
    """Yield one finding per experiment; the first experiment is the baseline."""
    baseline, *others = experiments
    speakers = lookup.utterances(experiments)["speaker"].tolist()
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
    corrected = holm([difference.p for difference in differences])
    for experiment, difference, p_holm in zip(experiments, [None, *differences], [None, *corrected], strict=True):
        rest = [third.edits for third in experiments if third is not experiment] if experiment.tuned else []
        yield Finding(experiment, scoring.score_over_seeds(experiment.edits, speakers, others=rest), difference, p_holm)


def slice_findings(experiments: list[Experiment]) -> pd.DataFrame:
    """Return one row per slice value and experiment, with the columns SLICE_COLUMNS (Comparison.slices)."""
    table, rows = lookup.utterances(experiments), []
    for column, values in slices.table(table).groupby("slice", sort=False)["value"]:
        for value in values if len(values) > 1 else ():
            part = table[table[column] == value]
            common = {"slice": column, "value": value, "n": len(part)}
            for row in _slice_rows(experiments, part.index.to_numpy(), part["speaker"].tolist()):
                rows.append(common | row)
    floats = {"wer": float, "delta": float, "low": float, "high": float}
    return pd.DataFrame(rows, columns=SLICE_COLUMNS).astype(floats)


def _slice_rows(experiments: list[Experiment], rows: np.ndarray, speakers: list[str]) -> Iterator[dict[str, Any]]:
    baseline = experiments[0]
    subsets = [[_select(edits, rows) for edits in experiment.edits] for experiment in experiments]
    for experiment, edits in zip(experiments, subsets, strict=True):
        score = scoring.score_over_seeds(edits, speakers)
        row = {"speakers": score.speakers, "experiment": experiment.name, "wer": score.wer}
        if experiment is not baseline:
            others = [third for third in subsets[1:] if third is not edits]
            untuned = not experiment.tuned, not baseline.tuned
            difference = scoring.difference_over_seeds(edits, subsets[0], speakers, others=others, untuned=untuned)
            low, high = difference.ci95 if difference.units.enough else (None, None)
            row |= {"delta": difference.delta, "low": low, "high": high}
        yield row


def _select(edits: Edits, rows: np.ndarray) -> Edits:
    return Edits(*(getattr(edits, field.name)[rows] for field in fields(edits)))
