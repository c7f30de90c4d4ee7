"""What people look at: tables, players, pictures and live curves. Nothing here decides anything."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipelines.experiments.compare import ALPHA, Comparison
from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import environment
from pipelines.infra.plots import _ACCENT, _INK, _SOFT, _axes, _figure, _plain, _row
from pipelines.recipes.settings import ParameterSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler


def scores(reports: dict[str, EvalReport]) -> Figure:
    """WER of each report with its 95 % interval."""
    figure, axes = _axes(9, 0.9 + 0.5 * len(reports))
    for place, report in enumerate(reversed(reports.values())):
        low, high = report.score.ci95
        axes.plot([low, high], [place, place], color=_SOFT, linewidth=5, solid_capstyle="round")
        axes.plot(report.score.wer, place, "o", color=_ACCENT)
        axes.annotate(
            f"{report.score.wer:.3f}", (report.score.wer, place), textcoords="offset points", xytext=(0, 7), ha="center"
        )
    axes.set(
        yticks=range(len(reports)),
        yticklabels=list(reversed(reports)),
        xlabel="WER, normalised, with 95 % interval",
        xlim=(0, None),
        ylim=(-0.5, len(reports) - 0.3),
    )
    return figure


def forest(comparison: Comparison) -> Figure:
    """ΔWER of every experiment against the baseline with its 95 % interval, beside the line of no difference."""
    findings = comparison.findings[1:]
    figure, axes = _axes(9, 1.2 + 0.5 * len(findings))
    axes.axvline(0, color=_INK, linewidth=1, linestyle="--")
    for place, finding in enumerate(reversed(findings)):
        delta = finding.difference.delta
        colour = _ACCENT if finding.shown else _SOFT
        if finding.could_show is not None:  # with too few speakers there is no interval
            axes.plot(finding.difference.ci95, [place, place], color=colour, linewidth=4, solid_capstyle="round")
        axes.plot(delta, place, "o", color=_INK)
        axes.annotate(f"{delta:+.3f}", (delta, place), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(
        yticks=range(len(findings)),
        yticklabels=[f"{finding.experiment.name}\n{finding.verdict.split(' (')[0]}" for finding in reversed(findings)],
        xlabel=f"WER less that of {comparison.baseline.name}, with 95 % interval: left of the line is better",
        ylim=(-0.5, len(findings) - 0.2),
    )
    axes.margins(x=0.15)
    return figure


def of_series(claims: Sequence[dict[str, Any]], baseline: str, filters: dict[str, Any]) -> Figure:
    """What a series of experiments came to, from its exported tables (series.py).

    Left: ΔWER of each recipe against `baseline` with its 95 % interval; dark where a difference is shown after
    correction for their number. Right: precision and recall of the label-error filter over its limits, one curve for
    each seed of the model that heard the errors, the limit in use marked.
    """
    rows = [(claim["recipe"], claim["against"][baseline]) for claim in claims if baseline in claim["against"]]
    rows.sort(key=lambda row: -row[1]["delta"])
    figure, (left, right) = _row(2, 11, 1.4 + 0.36 * len(rows))
    left.axvline(0, color=_INK, linewidth=1, linestyle="--")
    for place, (_, told) in enumerate(rows):
        low, high = told["ci95"]
        shown = not low <= 0 <= high and told["p_holm"] <= ALPHA
        left.plot([low, high], [place, place], color=_ACCENT if shown else _SOFT, linewidth=4, solid_capstyle="round")
        left.plot(told["delta"], place, "o", color=_INK, markersize=4)
    left.set(
        yticks=range(len(rows)),
        yticklabels=[name for name, _ in rows],
        xlabel=f"WER less that of {baseline}, 95 % interval",
        ylim=(-0.6, len(rows) - 0.4),
    )
    for seed, told in filters.items():
        curve = [point for point in told["label_errors"] if point["precision"] is not None]
        right.plot([p["recall"] for p in curve], [p["precision"] for p in curve], label=f"model of seed {seed}")
        for point in (p for p in curve if p["limit"] == told["limit"]):
            right.plot(point["recall"], point["precision"], "o", color=_INK)
            right.annotate(
                f"CER > {point['limit']:g}",
                (point["recall"], point["precision"]),
                textcoords="offset points",
                xytext=(6, 6),
            )
    right.set(xlabel="recall of planted label errors", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    if right.lines:
        right.legend(frameon=False, loc="lower left")
    return figure


def of_sweep(table: pd.DataFrame, space: dict[str, ParameterSettings], mattered: list[dict[str, Any]]) -> Figure:
    """Each searched setting against the WER of its trials, that first which explains most (sweeps/results.py).

    A dot is a trial: the darker, the more steps; its WER is the best up to there, so pale dots would have come lower.
    What was searched is shaded.
    """
    figure = _figure(3.2 * max(2, len(mattered)), 3.2)
    known = table[table["wer"].notna()]
    panels = figure.subplots(1, len(mattered), sharey=True, squeeze=False)[0]
    for axes, told in zip(panels, mattered, strict=True):
        name = told["setting"]
        values = known[name].astype(str) if space[name].kind == "choice" else known[name]
        dots = _plain(axes).scatter(
            values, known["wer"], c=known["steps"], cmap="Blues", vmin=0, edgecolors=_INK, zorder=2
        )
        axes.set(xlabel=name, title=f"explains {told['explained']:.0%} of ranks at step {told['step']}")
        axes.title.set_fontsize(9)
        if space[name].kind == "loguniform":
            axes.set_xscale("log")
            axes.minorticks_off()
        if space[name].kind != "choice":
            axes.axvspan(space[name].low, space[name].high, color="#f3f5f7", zorder=0)
        axes.grid(axis="y", color="#e5e8ec")
    panels[0].set(ylabel="validation WER, best so far")
    figure.colorbar(dots, ax=list(panels), label="steps")
    return figure


def slices(report: EvalReport) -> Styler:
    """WER by slice with its 95 % interval, below a link to the report's page."""
    table = report.slices().replace({"value": {"": "not told"}})
    table["95 %"] = [f"{low:.3f} to {high:.3f}" for low, high in zip(table.pop("low"), table.pop("high"), strict=True)]
    styled = table.style.hide(axis="index").format({"wer": "{:.3f}"}, escape="html")
    return styled.set_caption(_link(report)) if report.page else styled


def _link(report: EvalReport) -> str:
    """A link as a notebook of the folder `notebooks` follows it, and where the page lies, for anywhere else."""
    place = html.escape(str(report.page))
    href = html.escape(os.path.relpath(report.page, environment.ROOT / "notebooks"))
    return f'<a href="{href}" target="_blank">The whole report</a>: {place}'


def side_by_side(before: EvalReport, after: EvalReport, n: int = 12) -> pd.DataFrame:
    """The tuned model's worst errors, with what the base model made of the same clips."""
    base = before.predictions.set_index("id")["hypothesis"]
    worst = after.predictions.nlargest(n, "wer")
    return pd.DataFrame(
        {
            "reference": worst["reference"],
            "base": worst["id"].map(base),
            "tuned": worst["hypothesis"],
            "WER": worst["wer"].round(2),
        }
    ).reset_index(drop=True)


def score_table(reports: dict[str, EvalReport]) -> pd.DataFrame:
    """WER and CER of each report, normalised and as written, with intervals."""
    return pd.DataFrame(
        {
            label: {
                "model": report.model,
                "WER": f"{report.score.wer:.3f}",
                "95 %": "{:.3f} to {:.3f}".format(*report.score.ci95),
                "CER": f"{report.score.cer:.3f}",
                "WER as written": f"{report.raw.wer:.3f}",
                "n": report.score.n,
                "speakers": report.score.speakers,
                "decoding (s)": report.seconds,
            }
            for label, report in reports.items()
        }
    ).T
