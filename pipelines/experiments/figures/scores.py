"""Figures and tables of scores: evaluations, comparisons, series and sweeps."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipelines.experiments.comparison.findings import Finding, is_significant
from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import environment
from pipelines.infra.plots import (
    ACCENT,
    INK,
    SHADE,
    SOFT,
    empty_figure,
    figure_with_axes,
    figure_with_row,
    start_at_zero,
    without_frame,
)
from pipelines.recipes.search_settings import ParameterSettings
from pipelines.speech import scoring
from pipelines.speech.intervals import Units

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

_MAX_SPEAKERS = 40
"""Most speakers in one plot."""


def scores(reports: dict[str, EvalReport]) -> Figure:
    """Plot the WER of each report with its 95 % interval."""
    figure, axes = figure_with_axes(9, 0.9 + 0.5 * len(reports))
    suffix = next((report.score.units.suffix for report in reports.values()), "")
    for y, report in enumerate(reversed(reports.values())):
        if report.score.ci95:
            axes.plot(report.score.ci95, [y, y], color=SOFT, linewidth=5, solid_capstyle="round")
        axes.plot(report.score.wer, y, "o", color=ACCENT)
        axes.annotate(
            f"{report.score.wer:.3f}", (report.score.wer, y), textcoords="offset points", xytext=(0, 7), ha="center"
        )
    axes.set(
        yticks=range(len(reports)),
        yticklabels=list(reversed(reports)),
        xlabel=f"WER, normalised, with 95 % interval{suffix}",
        ylim=(-0.5, len(reports) - 0.3),
    )
    start_at_zero(axes, "x")
    return figure


def forest(findings: Sequence[Finding]) -> Figure:
    """Plot ΔWER of every experiment against the baseline, the first finding, with its 95 % interval."""
    baseline, *findings = findings
    figure, axes = figure_with_axes(9, 1.2 + 0.5 * len(findings))
    axes.axvline(0, color=INK, linewidth=1, linestyle="--")
    for y, finding in enumerate(reversed(findings)):
        delta = finding.difference.delta
        colour = ACCENT if finding.is_conclusive else SOFT
        if finding.enough_speakers:  # else there is no interval
            axes.plot(finding.difference.ci95, [y, y], color=colour, linewidth=4, solid_capstyle="round")
        axes.plot(delta, y, "o", color=INK)
        axes.annotate(f"{delta:+.3f}", (delta, y), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(
        yticks=range(len(findings)),
        yticklabels=[f"{finding.experiment.name}\n{finding.verdict.split(' (')[0]}" for finding in reversed(findings)],
        xlabel=f"WER minus WER of {baseline.experiment.name}, with 95 % interval (left of the line is better)",
        ylim=(-0.5, len(findings) - 0.2),
    )
    axes.margins(x=0.15)
    return figure


def series_figure(claims: Sequence[dict[str, Any]], baseline: str, filters: dict[str, Any]) -> Figure:
    """Plot the results of a series of experiments, from its exported tables (series/tables.py).

    Left: ΔWER of each recipe against `baseline` with its 95 % interval, highlighted if a difference is shown after
    correction for the number of recipes. Right: precision and recall of the label-error filter over its limits, one
    curve per seed of the label model, with the limit in use marked.
    """
    rows = [(claim["recipe"], claim["against"][baseline]) for claim in claims if baseline in claim["against"]]
    rows.sort(key=lambda row: -row[1]["delta"])
    figure, (left, right) = figure_with_row(2, 11, 1.4 + 0.36 * len(rows))
    _plot_differences(left, rows, baseline)
    for seed, scores in filters.items():
        _plot_label_filter(right, seed, scores)
    right.set(xlabel="recall of planted label errors", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    if right.lines:
        right.legend(frameon=False, loc="lower left")
    return figure


def _plot_differences(axes: Any, rows: Sequence[tuple[str, dict[str, Any]]], baseline: str) -> None:
    axes.axvline(0, color=INK, linewidth=1, linestyle="--")
    for y, (_, difference) in enumerate(rows):
        colour = ACCENT if is_significant(difference["ci95"], difference["p_holm"]) else SOFT
        if difference["ci95"]:
            axes.plot(difference["ci95"], [y, y], color=colour, linewidth=4, solid_capstyle="round")
        axes.plot(difference["delta"], y, "o", color=INK, markersize=4)
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[name for name, _ in rows],
        xlabel=f"WER minus WER of {baseline}, 95 % interval",
        ylim=(-0.6, len(rows) - 0.4),
    )


def _plot_label_filter(axes: Any, seed: str, scores: dict[str, Any]) -> None:
    curve = [point for point in scores["label_errors"] if point["precision"] is not None]
    axes.plot([p["recall"] for p in curve], [p["precision"] for p in curve], label=f"model of seed {seed}")
    for point in (p for p in curve if p["limit"] == scores["limit"]):
        position = point["recall"], point["precision"]
        axes.plot(*position, "o", color=INK)
        axes.annotate(f"CER > {point['limit']:g}", position, textcoords="offset points", xytext=(6, 6))


def sweep_figure(table: pd.DataFrame, space: dict[str, ParameterSettings], importances: list[dict[str, Any]]) -> Figure:
    """Plot each searched setting against the WER of its trials, the most important setting first (sweeps/results.py).

    A dot is a trial, darker with more steps. Its WER is the best so far: trials that were stopped early (pale) might
    have improved further. The searched range is shaded.
    """
    figure = empty_figure(3.2 * max(2, len(importances)), 3.2)
    scored = table[table["wer"].notna()]
    panels = figure.subplots(1, len(importances), sharey=True, squeeze=False)[0]
    for axes, importance in zip(panels, importances, strict=True):
        name = importance["setting"]
        values = scored[name].astype(str) if space[name].kind == "choice" else scored[name]
        dots = without_frame(axes).scatter(
            values, scored["wer"], c=scored["steps"], cmap="Blues", vmin=0, edgecolors=INK, zorder=2
        )
        axes.set(xlabel=name, title=f"explains {importance['explained']:.0%} of ranks at step {importance['step']}")
        axes.title.set_fontsize(9)
        if space[name].kind == "loguniform":
            axes.set_xscale("log")
            axes.minorticks_off()
        if space[name].kind != "choice":
            axes.axvspan(space[name].low, space[name].high, color=SHADE, linewidth=0, zorder=0)
        axes.grid(axis="y", color=SHADE)
    panels[0].set(ylabel="validation WER, best so far")
    figure.colorbar(dots, ax=list(panels), label="steps")
    return figure


def slice_figure(report: EvalReport) -> Figure:
    """Plot the WER of each slice with its 95 % interval. A dashed line is the WER over all clips."""
    table = report.slices().replace({"value": {"": "not told"}})[::-1].reset_index(drop=True)
    figure, axes = figure_with_axes(9, 0.8 + 0.22 * len(table))
    axes.axvline(report.score.wer, color=INK, linewidth=1, linestyle="--")
    axes.hlines(table.index, table["low"], table["high"], color=SOFT, linewidth=4)
    axes.plot(table["wer"], table.index, "o", color=ACCENT, markersize=5)
    axes.set(yticks=table.index, yticklabels=table["slice"] + ": " + table["value"], xlabel="WER, with 95 % interval")
    start_at_zero(axes, "x")
    return figure


def power_curve(could_show: float, measured: float) -> Figure:
    """Plot the share of experiments that show a true difference in WER, over its size.

    `could_show` is the difference that four in five experiments show, `measured` the ΔWER of this one.
    """
    normal = NormalDist()
    limit = normal.inv_cdf(0.975)
    error = could_show / (limit + normal.inv_cdf(0.8))
    sizes = [could_show * n / 25 for n in range(51)]
    figure, axes = figure_with_axes(9, 2.6)
    axes.plot(sizes, [normal.cdf(x / error - limit) + normal.cdf(-x / error - limit) for x in sizes], color=INK)
    axes.plot([0, could_show, could_show], [0.8, 0.8, 0], color=SOFT, linewidth=1, linestyle="--")
    axes.annotate(f"{could_show:.3f}", (could_show, 0), textcoords="offset points", xytext=(5, 5), color=SOFT)
    if abs(measured) <= sizes[-1]:
        axes.axvline(abs(measured), color=ACCENT, linewidth=1)
        axes.annotate("measured", (abs(measured), 1), textcoords="offset points", xytext=(4, -8), color=ACCENT)
    axes.set(xlabel="true difference in WER", ylabel="shown in", ylim=(0, 1.05), yticks=[0, 0.5, 0.8, 1])
    axes.set_yticklabels(["0 %", "50 %", "80 %", "100 %"])
    axes.set_xlim(0, sizes[-1])
    return figure


def paired_speakers(findings: Sequence[Finding]) -> Figure:
    """Plot the WER of each speaker in the baseline and the next experiment, of their first training seed."""
    return speakers({one.experiment.name: one.experiment.reports[0] for one in findings[:2]})


def slices(report: EvalReport) -> Styler:
    """Return a table of WER by slice with 95 % intervals, and a link to the report page."""
    table = report.slices().replace({"value": {"": "not told"}})
    columns = [table.pop(name) for name in ("low", "high", "over")]
    table["95 %"] = [
        Units(over, n, speakers).interval(None if pd.isna(low) else (low, high))
        for low, high, over, n, speakers in zip(*columns, table["n"], table["speakers"], strict=True)
    ]
    styled = table.style.hide(axis="index").format({"wer": "{:.3f}"}, escape="html")
    return styled.set_caption(_link(report)) if report.page else styled


def _link(report: EvalReport) -> str:
    """Return a link that works in a notebook of the folder `notebooks`, followed by the path of the page."""
    path = html.escape(str(report.page))
    href = html.escape(os.path.relpath(report.page, environment.ROOT / "notebooks"))
    return f'<a href="{href}" target="_blank">The whole report</a>: {path}'


def speakers(reports: dict[str, EvalReport]) -> Figure:
    """Plot the WER of each speaker in each report, one row of dots per speaker, the best at the top.

    The last report gives the order. A dashed line is the WER over all speakers.
    """
    *_, last = reports.values()
    by_speaker = {label: _wer_by_speaker(report) for label, report in reports.items()}
    order = _wer_by_speaker(last).sort_values(ascending=False).index.tolist()[-_MAX_SPEAKERS:]
    figure, axes = figure_with_axes(9, 1.2 + 0.22 * len(order))
    for colour, (label, wers) in zip((SOFT, ACCENT, INK), by_speaker.items(), strict=False):
        axes.plot([wers.get(name) for name in order], range(len(order)), "o", color=colour, label=label)
        axes.axvline(reports[label].score.wer, color=colour, linewidth=1, linestyle="--")
    axes.set(yticks=range(len(order)), yticklabels=[name or "unknown" for name in order], xlabel="WER, normalised")
    axes.grid(axis="y", color=SHADE)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(reports))
    start_at_zero(axes, "x")
    return figure


def _wer_by_speaker(report: EvalReport) -> pd.Series:
    table = report.predictions
    edits = scoring.count_edits(table["reference"].tolist(), table["hypothesis"].tolist())
    sums = pd.DataFrame({"errors": edits.word_edits, "words": edits.words}).groupby(table["speaker"].to_numpy()).sum()
    return sums["errors"] / sums["words"].clip(lower=1)


def score_table(reports: dict[str, EvalReport]) -> pd.DataFrame:
    """Return WER and CER of each report, normalised and as written, with intervals, and WER in the stock pipeline."""
    return pd.DataFrame(
        {
            label: {
                "model": report.model,
                "WER": f"{report.score.wer:.3f}",
                "95 %": report.score.units.interval(report.score.ci95),
                "CER": f"{report.score.cer:.3f}",
                "WER as written": f"{report.raw.wer:.3f}",
                **_stock_columns(report),
                "n": report.score.n,
                "speakers": report.score.speakers or "unknown",
                "decoding (s)": report.seconds,
            }
            for label, report in reports.items()
        }
    ).T


def _stock_columns(report: EvalReport) -> dict[str, str]:
    """Return the WER in the stock pipeline and in this lab on the same clips, in short cells."""
    if not (figure := report.stock):
        return {"WER, stock pipeline": "not scored", "this lab, same clips": ""}
    score = figure.score
    return {
        "WER, stock pipeline": f"{score.wer:.3f} ({score.units.interval(score.ci95)}), {score.n} clips",
        "this lab, same clips": f"{figure.lab.wer:.3f}",
    }
