"""What models wrote: the worst transcripts of two models side by side, and the same clips at each validation."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.experiments.comparison.findings import Finding
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.report import clips
from pipelines.features.cache import FeatureCache
from pipelines.infra.plots import html_table
from pipelines.recipes.data_settings import SourceSettings
from pipelines.recipes.settings import Recipe
from pipelines.speech import audio_uri, text
from pipelines.speech.alignment import align, marked
from pipelines.training.callbacks import samples as training_samples
from pipelines.training.run import TrainedModel

if TYPE_CHECKING:
    from IPython.display import HTML

_LEFT = "style='text-align: left'"
_BAR = 20
"""Characters of a bar in a table."""


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
            first: marked(clip.reference, earlier.get(clip.id, "")),
            last: marked(clip.reference, clip.hypothesis),
            "WER": f"{clip.wer:.2f}",
        }
        for clip in worst.itertuples()
    ]
    note = f"<p>Some clips have no sound: {html.escape(reason)}.</p>" if reason else ""
    return html_table(rows, as_html=("sound", first, last), note=note)


def samples(model: TrainedModel, cache: FeatureCache) -> HTML:
    """Return what the model wrote for a few validation clips, before training and at each validation, as a player.

    Words that differ from the reference are marked. It plays step by step with buttons and needs no kernel. Without
    JavaScript it is a table of all steps.
    """
    from IPython.display import HTML

    by_step = training_samples.read(Path(model.uri).parent)
    references = cache.rows.set_index("id")["text"].to_dict()
    ids = [name for name in next(iter(by_step.values()), {}) if name in references]
    if not ids:
        return HTML("There are no texts: the model was trained on another machine or by an older version.")
    bodies = [
        _body(
            f"<th {_LEFT}>reference</th><td {_LEFT}><b>{html.escape(references[name])}</b></td>",
            {step: marked(references[name], texts.get(name, "")) for step, texts in by_step.items()},
        )
        for name in ids
    ]
    wers = {row["step"]: row["eval_wer"] for row in model.history if "eval_wer" in row}
    sums = {
        step: _sum_line([(references[name], texts.get(name, "")) for name in ids], wers.get(step))
        for step, texts in by_step.items()
    }
    head = f"<th {_LEFT}>together</th><td {_LEFT}>words that are right</td>"
    script = Path(__file__).with_name("steps.js").read_text("utf-8")
    return HTML(f"<table class='lab-steps'>{''.join(bodies)}{_body(head, sums)}</table><script>{script}</script>")


def _body(head: str, cells: dict[int, str]) -> str:
    """Return a part of the player's table: a row with `head`, and a row for each step. All are HTML."""
    rows = "".join(
        f"<tr data-step='{step}'><td {_LEFT}>step {step}</td><td {_LEFT}>{cell}</td></tr>"
        for step, cell in cells.items()
    )
    return f"<tbody><tr>{head}</tr>{rows}</tbody>"


def _sum_line(pairs: list[tuple[str, str]], wer: float | None) -> str:
    """Return a bar of the words that are right, their number, and the WER of the whole validation split if known."""
    aligned = [align(*(text.normalise(one).split() for one in pair)) for pair in pairs]
    words = sum(len(step.reference) for steps in aligned for step in steps)
    right = sum(len(step.reference) for steps in aligned for step in steps if step.kind == "equal")
    filled = round(_BAR * right / max(1, words))
    validation = "" if wer is None else f"; WER of all validation clips {wer:.3f}"
    return f"{'█' * filled}{'░' * (_BAR - filled)} {right} of {words}{validation}"
