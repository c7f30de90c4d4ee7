"""Figures and tables of evaluations, comparisons, series and sweeps: of scores, and of what a model wrote."""

from pipelines.experiments.figures.scores import (
    forest,
    paired_speakers,
    power_curve,
    score_table,
    scores,
    series_figure,
    slice_figure,
    slices,
    speakers,
    sweep_figure,
)
from pipelines.experiments.figures.texts import compared_errors, samples, side_by_side

__all__ = [
    "compared_errors",
    "forest",
    "paired_speakers",
    "power_curve",
    "samples",
    "score_table",
    "scores",
    "series_figure",
    "side_by_side",
    "slice_figure",
    "slices",
    "speakers",
    "sweep_figure",
]
