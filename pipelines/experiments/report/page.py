"""report.json as a page: one file that holds its style, its pictures and some sound, and asks for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.experiments.report import pictures
from pipelines.experiments.report.alignment import align
from pipelines.recipes.settings import flatten
from pipelines.speech import text

_VALUES = 12
"""Values of a slice that the page shows, those with most utterances; report.json has all."""
_SHOWN = 15
"""Entries of each list of confusions that the page shows."""


def render(facts: Mapping[str, Any], wers: Iterable[float], sounds: Mapping[str, str], silence: str) -> str:
    """The page of a report. `facts`: what report.json holds. `wers`: of each utterance. `sounds`: data URIs by
    utterance id, and `silence`: why others of the worst have none.

    Every text is escaped by the template engine, and a content security policy forbids scripts and the network.
    """
    import jinja2
    import numpy as np

    rooms = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rooms.filters |= {"share": lambda value: f"{value:.1%}", "wer": lambda value: f"{value:.3f}", "flat": flatten}
    return rooms.get_template("page.html").render(
        facts=facts,
        sounds=sounds,
        silence=silence,
        shown=_SHOWN,
        slices=_slices(facts["slices"]),
        scale=max([0.01, *(1.4 * row["wer"] for row in facts["slices"])]),
        worst=[{**row, "words": _marked(row["reference"], row["hypothesis"])} for row in facts["worst"]],
        kept=_kept(facts["calibration"]["coverage"]),
        pictures={
            "wers": pictures.wers(np.fromiter(wers, float)),
            "reliability": pictures.reliability(facts["calibration"]["bins"]),
            "coverage": pictures.coverage(facts["calibration"]["coverage"]),
        },
    )


def _slices(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Slice to the `rows` that are shown, and the number of values that are not (`more`)."""
    told: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["slice"] for row in rows):
        own = [row for row in rows if row["slice"] == name]
        largest = sorted(own, key=lambda row: -row["n"])[:_VALUES]
        told[name] = {"rows": [row for row in own if row in largest], "more": len(own) - len(largest)}
    return told


def _marked(reference: str, hypothesis: str) -> dict[str, list[tuple[str, str]]]:
    """The words that were `said` and `written`, normalised, each with the kind of its step."""
    steps = align(text.normalise(reference).split(), text.normalise(hypothesis).split())
    return {
        "said": [(word, step.kind) for step in steps for word in step.reference],
        "written": [(word, step.kind) for step in steps for word in step.hypothesis],
    }


def _kept(points: list[dict[str, float]]) -> dict[str, float]:
    """The point of the coverage curve nearest to 80 % of the utterances."""
    return min(points, key=lambda point: abs(point["coverage"] - 0.8))
