"""What people look at: tables, players, pictures and live curves. Nothing here decides anything."""

from __future__ import annotations

import html
import io
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines import environment
from pipelines.cache import FeatureCache
from pipelines.comparison import ALPHA, Comparison
from pipelines.evaluation import EvalReport
from pipelines.page import shown
from pipelines.page.words import ENGLISH
from pipelines.recipe import ParameterSettings, Recipe
from pipelines.sources import Example
from pipelines.training import Progress
from pipelines.transcriber import Transcriber, Transcript

if TYPE_CHECKING:
    from IPython.display import HTML, Audio
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

_Draw = Callable[[list[dict[str, float]]], None]
_REDRAW_S = 5.0
"""Live curves are drawn at most this often: each picture takes time from training."""
_INK, _ACCENT, _SOFT = "#1f3a5f", "#c8553d", "#8aa1b8"


def heard(examples: list[Example], transcribers: dict[str, Transcriber]) -> pd.DataFrame:
    """What each model makes of the same clips, beside what was said."""
    rows = [
        {"said": example.text, **{label: model.transcribe(example.audio).text for label, model in transcribers.items()}}
        for example in examples
    ]
    return pd.DataFrame(rows)


def transcript(transcript: Transcript) -> HTML:
    """When each part was said, and with a wavy line the words that are more likely wrong than right."""
    from IPython.display import HTML

    look = "<style>mark {background: none; color: inherit; text-decoration: underline wavy #b45309}</style>"
    lines = "".join(
        f"<tr><td>{shown.clock(segment.start_s)}</td>"
        f"<td style='text-align: left'>{shown.words_of(segment, ENGLISH)}</td></tr>"
        for segment in transcript.segments
    )
    return HTML(f"{look}<table>{lines}</table><p>{transcript.confidence:.0%} sure of the words</p>")


def recipe_table(recipe: Recipe) -> Styler:
    """Every setting of a recipe that says something, one row for each group: what will run, before it runs."""
    groups: dict[str, list[str]] = {}
    for name, value in recipe.settings().items():
        group, _, leaf = name.rpartition(".")
        if value in ("", []):
            continue
        groups.setdefault(group or "recipe", []).append(f"{leaf} = {value}")
    table = pd.DataFrame({"settings": {group: ",   ".join(told) for group, told in groups.items()}})
    return table.style.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


def corpus_table(cache: FeatureCache) -> pd.DataFrame:
    """Clips, speakers, minutes and mean length of every split."""
    grouped = cache.rows.groupby("split", sort=False)
    return pd.DataFrame(
        {
            "clips": grouped.size(),
            "speakers": grouped["speaker"].nunique(),
            "minutes": (grouped["duration_s"].sum() / 60).round(1),
            "mean clip (s)": grouped["duration_s"].mean().round(2),
            "distinct sentences": grouped["text"].nunique(),
        }
    )


def sample_table(cache: FeatureCache, n: int = 8) -> pd.DataFrame:
    """The first clips of every split, without the columns that are for machines."""
    machine = ["label_offset", "label_count", "shard", "offset", "pad_value", "frames"]
    shown = cache.rows.drop(columns=machine)
    return shown.groupby("split", sort=False).head(max(1, n // 3)).reset_index(drop=True)


def curation_table(cache: FeatureCache) -> pd.DataFrame:
    """What each step of curation left: step, clips before and after, dropped, and transcripts that it changed."""
    columns = ["step", "before", "after", "dropped", "changed"]
    return pd.DataFrame(cache.curation, columns=columns).set_index("step")


def rejected_table(cache: FeatureCache) -> pd.DataFrame:
    """How many clips were not used, by reason, with one example each."""
    rejected = cache.rejected
    return rejected.groupby("reason").agg(clips=("id", "size"), example=("id", "first"), detail=("detail", "first"))


def size_table(cache: FeatureCache) -> pd.DataFrame:
    """The cache beside the padded float32 tensors of the classic recipe."""
    mb = pd.Series({"padded to 30 s, float32": cache.padded_bytes, "this cache": cache.bytes}) / 1e6
    return pd.DataFrame({"MB": mb.round(1), "share": (mb / mb.iloc[0]).map("{:.1%}".format)})


def player(example: Example) -> Audio:
    """An audio player for one example, as the source holds it."""
    from IPython.display import Audio

    data = example.audio if isinstance(example.audio, bytes) else example.audio.read_bytes()
    return Audio(data=data)


def log_mel(cache: FeatureCache, row: int) -> Figure:
    """The log-mel of one clip: what Whisper sees."""
    features, told = cache.log_mel(row), cache.rows.iloc[row]
    figure, axes = _axes(9, 2.6)
    axes.imshow(
        features.frames.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, len(features.frames) / 100, 0, cache.n_mels),
    )
    axes.set(xlabel="time (s)", ylabel="mel band", title=f"“{told['text']}”  {told['speaker']}")
    return figure


def durations(cache: FeatureCache) -> Figure:
    """How long the clips are, beside the 30 s that the classic recipe computes on for each."""
    figure, axes = _axes(9, 2.2)
    axes.hist(cache.rows["duration_s"], bins=40, color=_SOFT)
    mean = cache.rows["duration_s"].mean()
    axes.axvline(mean, color=_ACCENT)
    axes.set(
        xlabel="clip length (s)",
        ylabel="clips",
        title=f"mean {mean:.1f} s: a padded batch is {1 - mean / 30:.0%} silence",
    )
    return figure


def batch(batch: dict[str, Any]) -> Figure:
    """One training batch: the clips stacked, each as long as it is, padded to the longest."""
    features = batch["input_features"]
    figure, axes = _axes(9, 3.2)
    stacked = np.concatenate([clip.numpy()[::4] for clip in features])
    axes.imshow(
        stacked, origin="upper", aspect="auto", cmap="magma", extent=(0, features.shape[-1] / 100, len(features), 0)
    )
    axes.set(
        xlabel="time (s)",
        ylabel="clip of the batch",
        title=f"{len(features)} clips at {features.shape[-1] / 100:.1f} s instead of 30 s",
    )
    return figure


def curves(history: list[dict[str, float]]) -> Figure:
    """Training loss, validation loss, validation WER and clips per second over steps."""
    figure, (left, middle, right) = _row(3, 11, 2.6)
    for axes, name, colour, label in (
        (left, "loss", _SOFT, "training"),
        (left, "eval_loss", _INK, "validation"),
        (middle, "eval_wer", _ACCENT, "validation WER"),
        (right, "clips_per_s", _SOFT, "training"),
    ):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    left.set(xlabel="step", ylabel="loss per token", ylim=(0, None))
    middle.set(xlabel="step", ylabel="WER", ylim=(0, None))
    right.set(xlabel="step", ylabel="clips per second", ylim=(0, None))
    for axes in (left, middle, right):
        if axes.has_data():
            axes.legend(frameon=False)
    return figure


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


def console_progress(log: Callable[[str], None] = print) -> Progress:
    """A progress bar in steps, and a line for every validation."""
    return _progress(lambda history: None, log, lambda history: None)


def live_progress() -> Progress:
    """For notebooks: a progress bar in steps, and curves that are redrawn in place as the run goes on."""
    from IPython.display import display

    handle, drawn = display(curves([]), display_id=True), [0.0]

    def redraw(history: list[dict[str, float]]) -> None:
        if handle and time.monotonic() - drawn[0] > _REDRAW_S:
            handle.update(curves(history))
            drawn[0] = time.monotonic()

    def finish(history: list[dict[str, float]]) -> None:
        drawn[0] = float("-inf")
        redraw(history)

    return _progress(redraw, print, finish)


def _progress(draw: _Draw, log: Callable[[str], None], finish: _Draw) -> Progress:
    from tqdm.auto import tqdm

    bar = tqdm(unit="step", desc="training")

    def start(step: int, steps: int) -> None:
        bar.reset(total=steps)
        bar.initial = bar.n = bar.last_print_n = step  # steps of earlier sittings cost this one no time
        bar.refresh()

    def tell(history: list[dict[str, float]]) -> None:
        paces = [row["clips_per_s"] for row in history if "clips_per_s" in row]
        bar.set_postfix_str(f"{paces[-1]:.3g} clips/s" if paces else "", refresh=False)
        draw(history)

    def end(history: list[dict[str, float]]) -> None:
        bar.close()
        finish(history)

    return Progress(start, lambda step: bar.update(step - bar.n), tell, log, end, bar.close)


def png(figure: Figure) -> bytes:
    """A figure as a file's content."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _axes(width_in: float, height_in: float) -> tuple[Figure, Any]:
    figure = _figure(width_in, height_in)
    return figure, _plain(figure.subplots())


def _row(n: int, width_in: float, height_in: float) -> tuple[Figure, Any]:
    figure = _figure(width_in, height_in)
    return figure, [_plain(axes) for axes in figure.subplots(1, n)]


def _figure(width_in: float, height_in: float) -> Figure:
    """A figure outside pyplot's registry, that notebooks draw by itself: shown once, and nothing has to be closed."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture(figsize=(width_in, height_in), layout="constrained")


def _plain(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    return axes
