"""Render report.json as a page: one HTML file with its style, figures and some audio, which needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.experiments.report import hypotheses, pictures
from pipelines.experiments.report.guards import GuardScore
from pipelines.recipes.base_settings import flatten
from pipelines.speech import text
from pipelines.speech.alignment import align
from pipelines.speech.intervals import Units

_MAX_VALUES = 12
"""Values per slice on the page, those with the most utterances; report.json has all."""
_MAX_CONFUSIONS = 15
"""Entries of each list of confusions on the page."""


def render(facts: Mapping[str, Any], wers: Iterable[float], sounds: Mapping[str, str], missing_audio: str) -> str:
    """Return the report page. `facts`: the content of report.json. `wers`: WER per utterance. `sounds`: data URIs by
    utterance id. `missing_audio`: the reason why some of the worst utterances have no audio.

    The template engine escapes all texts; a content security policy forbids scripts and network access.
    """
    import jinja2
    import numpy as np

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": lambda value: f"{value:.1%}", "wer": lambda value: f"{value:.3f}", "flat": flatten}
    return environment.get_template("page.html").render(
        facts=facts,
        guards=list(map(GuardScore.of, facts.get("guards", ()))),
        decoded_by=hypotheses.describe(facts.get("decoding")),
        units=Units.of,
        sounds=sounds,
        missing_audio=missing_audio,
        max_confusions=_MAX_CONFUSIONS,
        slices=_slices(facts["slices"]),
        scale=max([0.01, *(1.4 * row["wer"] for row in facts["slices"])]),
        worst=[{**row, "words": _marked(row["reference"], row["hypothesis"])} for row in facts["worst"]],
        kept=_nearest_to_80_percent(facts["calibration"]["coverage"]),
        pictures={
            "wers": pictures.wers(np.fromiter(wers, float)),
            "reliability": pictures.reliability(facts["calibration"]["bins"]),
            "coverage": pictures.coverage(facts["calibration"]["coverage"]),
        },
    )


def _slices(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each slice the `rows` on the page, and the number of further values (`more`)."""
    parts: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["slice"] for row in rows):
        all_rows = [row for row in rows if row["slice"] == name]
        largest = sorted(all_rows, key=lambda row: -row["n"])[:_MAX_VALUES]
        parts[name] = {"rows": [row for row in all_rows if row in largest], "more": len(all_rows) - len(largest)}
    return parts


def _marked(reference: str, hypothesis: str) -> dict[str, list[tuple[str, str]]]:
    """Return the normalised words of reference and hypothesis, each with the kind of its alignment step."""
    steps = align(text.normalise(reference).split(), text.normalise(hypothesis).split())
    return {
        "reference": [(word, step.kind) for step in steps for word in step.reference],
        "hypothesis": [(word, step.kind) for step in steps for word in step.hypothesis],
    }


def _nearest_to_80_percent(points: list[dict[str, float]]) -> dict[str, float]:
    """Return the point of the coverage curve that is nearest to 80 % of the utterances."""
    return min(points, key=lambda point: abs(point["coverage"] - 0.8))
