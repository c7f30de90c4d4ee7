"""Figures and tables of evaluations, comparisons, series and sweeps."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipelines.experiments.comparison.findings import Finding, is_significant
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.report import clips
from pipelines.experiments.report.alignment import align
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.infra.plots import (
    ACCENT,
    INK,
    SHADE,
    SOFT,
    empty_figure,
    figure_with_axes,
    figure_with_row,
    html_table,
    start_at_zero,
    without_frame,
)
from pipelines.recipes.data_settings import SourceSettings
from pipelines.recipes.search_settings import ParameterSettings
from pipelines.recipes.settings import Recipe
from pipelines.speech import audio_uri, scoring, text
from pipelines.speech.intervals import Units
from pipelines.training.callbacks import samples as training_samples
from pipelines.training.run import TrainedModel

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

_MAX_SPEAKERS = 40
"""Most speakers in one plot."""
_LONGEST_WORD = 32
"""Most letters of a word in a table."""
_MARK = f"background: {ACCENT}40; color: inherit"
"""Style of wrong words: a light background that can be read on white and on dark pages."""


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


def side_by_side(recipe: Recipe, before: EvalReport, after: EvalReport, n: int = 10) -> HTML:
    """Return the tuned model's worst transcripts beside the base model's of the same clips, with players.

    Words that differ from the reference are marked.
    """
    return _errors(recipe.source, recipe.language, {"base": before, "tuned": after}, n)


def compared_errors(findings: Sequence[Finding], n: int = 8) -> HTML:
    """Return the worst transcripts of the best experiment that is not the baseline, beside those of the baseline.

    They have players if the source of the recipe can be read on this machine.
    """
    baseline, best = findings[0].experiment, min(findings[1:], key=lambda finding: finding.score.wer).experiment
    reports = {one.name: one.reports[0] for one in (baseline, best)}
    lineage = next((one.lineages[0] for one in (best, baseline) if one.tuned), {})
    settings = lineage.get("settings") or {}
    try:
        source = SourceSettings.model_validate(settings.get("source") or {})
    except ValueError:  # pydantic's; another version of the lab wrote the report
        source = None
    return _errors(source, settings.get("language") or "sv", reports, n)


def _errors(source: SourceSettings | None, language: str, reports: dict[str, EvalReport], n: int) -> HTML:
    """Return the worst transcripts of the last report beside those of the first, with players."""
    (first, before), (last, after) = reports.items()
    earlier = before.predictions.set_index("id")["hypothesis"]
    worst = after.predictions.nlargest(n, "wer")
    sounds: dict[str, str] = {}
    reason = "this version of the lab does not know the source"
    if source:
        sounds, reason = clips.embedded(source, language, after.split, worst["id"])
    rows = [
        {
            "sound": audio_uri.player_of(sounds[clip.id]) if clip.id in sounds else "",
            "reference": clip.reference,
            first: _marked(clip.reference, earlier.get(clip.id, "")),
            last: _marked(clip.reference, clip.hypothesis),
            "WER": f"{clip.wer:.2f}",
        }
        for clip in worst.itertuples()
    ]
    note = f"<p>Some clips have no sound: {html.escape(reason)}.</p>" if reason else ""
    return html_table(rows, as_html=("sound", first, last), note=note)


def samples(model: TrainedModel, cache: FeatureCache) -> HTML:
    """Return what the model wrote for a few validation clips at each validation, with wrong words marked."""
    by_step = training_samples.read(Path(model.uri).parent)
    texts = cache.rows.set_index("id")["text"]
    ids = [name for name in next(iter(by_step.values()), {}) if name in texts.index]
    rows = [
        {
            "reference": texts[name],
            **{f"step {step}": _marked(texts[name], written.get(name, "")) for step, written in by_step.items()},
        }
        for name in ids
    ]
    missing = "" if rows else "There are no texts: the model was trained on another machine or by an older version."
    return html_table(rows, as_html=[f"step {step}" for step in by_step], note=missing)


def _marked(reference: str, hypothesis: str) -> str:
    """Return the words of a hypothesis as HTML; those that differ from the reference are marked, missing ones are …"""
    words = hypothesis.split()
    normal = text.normalise(hypothesis).split()
    if [text.normalise(word) for word in words] != normal:
        words = normal
    parts, left = [], iter(words)
    for step in align(text.normalise(reference).split(), normal):
        written = html.escape(" ".join(_shortened(next(left)) for _ in step.hypothesis)) or "…"
        parts.append(written if step.kind == "equal" else f"<mark style='{_MARK}'>{written}</mark>")
    return " ".join(parts)


def _shortened(word: str) -> str:
    """Return a word without its end if a repetition made it too long for a table."""
    return word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}…"


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
