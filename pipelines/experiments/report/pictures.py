"""Figures of a report as SVG elements of the page, in the page's colours."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_INK = "#010203"
"""Placeholder that is replaced by the text colour of the page, light or dark."""
_ACCENT, _SOFT = "#c8553d", "#8aa1b8"
_WIDTH_IN, _HEIGHT_IN = 4.4, 2.8
"""Small, so that labels are readable on a phone, where a figure is as wide as the screen."""


def wers(of_utterances: np.ndarray) -> str:
    """Plot the distribution of WER over utterances; float [n]."""
    counts = np.histogram(np.clip(of_utterances, 0, 1.01), [0, 1e-9, 0.1, 0.25, 0.5, 0.75, 1.0 + 1e-9, 2])[0]
    labels = ["none", "to 0.1", "to 0.25", "to 0.5", "to 0.75", "to 1", "over 1"]
    figure, axes = _axes()
    axes.bar(labels, counts / len(of_utterances), color=[_SOFT] + [_ACCENT] * 6, width=0.8)
    axes.set(ylabel="share of utterances", xlabel="word errors per word of the utterance")
    axes.tick_params(axis="x", labelsize=8)
    alt = "; ".join(f"{label}: {count / len(of_utterances):.0%}" for label, count in zip(labels, counts, strict=True))
    return _svg(figure, "wers", f"Share of utterances by word error rate. {alt}.")


def reliability(bins: list[dict[str, Any]]) -> str:
    """Plot correctness against confidence: `bins` of calibration.calibration."""
    figure, axes = _axes()
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle="--")
    confidence, largest = [part["confidence"] for part in bins], max(part["n"] for part in bins)
    sizes = [18 + 130 * part["n"] / largest for part in bins]
    for name, colour, label in (("right", _ACCENT, "utterances right"), ("words_right", _SOFT, "words right")):
        axes.scatter(confidence, [part[name] for part in bins], s=sizes, color=colour, label=label, alpha=0.85)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.03), ylim=(-0.05, 1.05))
    for handle in axes.legend(frameon=False, loc="upper left", fontsize=9).legend_handles:
        handle.set_sizes([30])
    alt = "; ".join(
        f"confidence {part['confidence']:.2f}: {part['right']:.0%} of {part['n']} utterances and "
        f"{part['words_right']:.0%} of their words right"
        for part in bins
    )
    return _svg(figure, "reliability", f"Reliability: {alt}.")


def coverage(points: list[dict[str, float]]) -> str:
    """Plot the WER of the most confident utterances: `coverage` of calibration.calibration."""
    figure, axes = _axes()
    coverages, rates = ([point[name] for point in points] for name in ("coverage", "wer"))
    axes.plot(coverages, rates, color=_ACCENT, marker="o", markersize=3)
    axes.set(xlabel="share of utterances kept, most confident first", ylabel="their WER", xlim=(0, 1.03))
    axes.set_ylim(0, max(*rates, 0.01) * 1.1)
    alt = "; ".join(
        f"{point['coverage']:.0%} kept: WER {point['wer']:.3f}" for point in points[:: max(1, len(points) // 5)]
    )
    return _svg(figure, "coverage", f"WER by coverage: {alt}.")


def _axes() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def _svg(figure: Figure, name: str, alt: str) -> str:
    """Return the figure as an SVG element with the text alternative `alt`. `name` makes its ids unique on the page."""
    from matplotlib import rc_context

    for axes in figure.axes:
        legend = axes.get_legend()
        for label in legend.get_texts() if legend else ():
            label.set_color(_INK)
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", drawn).replace("xlink:href", "href")
    drawn = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawn)  # ids of parts, identical in every figure
    drawn = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{_attribute(alt)}">', drawn)
    return drawn.replace(_INK, "currentColor")


def _attribute(alt: str) -> str:
    return html.escape(alt).replace("\\", r"\\")
