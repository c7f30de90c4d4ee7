"""Exports held against the model that they were made of, and the folder that a deployment needs.

table        WER of models and their exports on a split, paired differences, agreement, size, speed: one table
production   weights, tokenizer, settings, card and manifest in one folder, proved to be served in a fresh process
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments import lookup
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.experiments.evaluation import EvalReport
from pipelines.features.cache import FeatureCache
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring
from pipelines.speech.scoring import Difference, Score
from pipelines.whisper import engines, export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import padded_frames
from pipelines.whisper.engines import Engine
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

TIMED_CLIPS = 40
"""Clips that are decoded one by one for their speed, spread over the split."""
_ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One model, or one export of it, on a split."""

    model: str
    """Name and revision; says which form."""
    form: str
    """One of export.FORMS; empty for the model itself."""
    folder: str
    engine: str
    """What decoded it for `ms`: engine, device, precision."""
    size_mb: float
    """All files of the folder that it is served from, in millions of bytes."""
    score: Score
    difference: Difference | None
    """WER less that of the model it was made of; of a further model, less that of the first; None for the first."""
    agreement: float | None
    """Share of clips with the very transcript of what it is held against, case and punctuation included."""
    first: Difference | None
    """WER less that of the first model of the table; None for that one."""
    ms: float
    """Milliseconds from the frames of a clip to its text, one clip at a time: the mean over clips of the fastest of
    three tries; all rows in turns."""

    def as_dict(self) -> dict[str, Any]:
        told = {**vars(self), "score": self.score.as_dict()}
        return told | {
            name: found.as_dict() if (found := getattr(self, name)) else None for name in ("difference", "first")
        }


def table(
    recipe: Recipe,
    cache: FeatureCache,
    uris: Sequence[str],
    forms: Sequence[str],
    *,
    split: str = "validation",
    runs: str | Path = "",
    threads: int = 0,
) -> list[Row]:
    """Each of the models `uris`, and after it its exports in `forms`, scored and timed on a split of the cache.

    Scores are those of lab.evaluate: what was scored before is not decoded again, and a test split's are counted.
    Raises LabError for a form that is none of export.FORMS, and what `export.convert` raises.
    """
    places = [  # all of them first: what cannot be made shows before anything is scored
        (form, str(export.convert(whisper_model.resolve(uri), form)) if form else uri)
        for uri in uris
        for form in ("", *forms)
    ]
    reports = [experiment_pipeline.evaluate(recipe, cache, there, split, runs=runs) for _, there in places]
    refs = [whisper_model.resolve(there) for _, there in places]
    rows = cache.split(split)
    timed = rows[:: max(1, -(-len(rows) // TIMED_CLIPS))]
    speeds = _speeds(recipe, cache, refs, timed, threads)
    made, first, own = [], reports[0], reports[0]
    for (form, _), ref, report, (engine, ms) in zip(places, refs, reports, speeds, strict=True):
        own, against = (own, own) if form else (report, first)
        held: tuple[Any, ...] = (None, None, None)
        if report is not first:
            held = (*_compared(recipe, report, against), _compared(recipe, report, first)[0])
        size_mb = sum(path.stat().st_size for path in ref.folder.iterdir() if path.is_file()) / 1e6
        made.append(
            Row(report.model, form, str(ref.folder), engine, round(size_mb, 1), report.score, *held, round(ms, 1))
        )
    return made


def _compared(recipe: Recipe, report: EvalReport, other: EvalReport) -> tuple[Difference, float]:
    """The paired difference of two reports on one split, and the share of clips with the very same text."""
    ours, theirs = (lookup.ordered(one) for one in (report, other))
    edits = [scoring.count_edits(one["reference"].tolist(), one["hypothesis"].tolist()) for one in (ours, theirs)]
    draw = {"samples": recipe.evaluation.bootstrap_samples, "seed": recipe.evaluation.seed}
    found = scoring.difference(*edits, ours["speaker"].tolist(), **draw)
    return found, float((ours["hypothesis"] == theirs["hypothesis"]).mean())


def in_words(rows: Sequence[Row]) -> str:
    """The table as lines of Markdown."""
    head = ["model", "form", "WER", "95 %", "ΔWER (95 %)", "same text", "ΔWER, first model (95 %)"]
    several = sum(not row.form for row in rows) > 1
    lines = [_line([*head[: None if several else -1], "MB", "ms a clip", "decoded by"])]
    lines.append(_line("---" for _ in lines[0].split(" | ")))
    for row in rows:
        cells = [row.model.partition(" @ ")[0].partition(" (")[0], row.form or "as it is", f"{row.score.wer:.3f}"]
        cells += ["{:.3f} to {:.3f}".format(*row.score.ci95), _told(row.difference)]
        cells += ["" if row.agreement is None else f"{row.agreement:.0%}"]
        cells += [_told(row.first)] if several else []
        lines.append(_line([*cells, f"{row.size_mb:.1f}", f"{row.ms:.0f}", row.engine]))
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _told(difference: Difference | None) -> str:
    return "" if difference is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(difference.delta, *difference.ci95)


def _speeds(
    recipe: Recipe, cache: FeatureCache, refs: Sequence[ModelRef], rows: np.ndarray, threads: int
) -> list[tuple[str, float]]:
    """Engine and milliseconds a clip of each model, all in turns on every clip, so that other load hits all alike."""
    logger.info(f"timing {len(refs)} on {len(rows)} clips, {_ROUNDS} times in turns")
    opened = [_opened(recipe, ref, threads) for ref in refs]
    took = np.empty((_ROUNDS, len(rows), len(refs)))
    for round_ in range(-1, _ROUNDS):  # the first one only warms up
        for place, row in enumerate(rows if round_ >= 0 else rows[:2]):
            for which, (engine, ref) in enumerate(zip(opened, refs, strict=True)):
                window = _window(cache, int(row), ref)
                started = time.perf_counter()
                engine.decode(window)
                took[round_, place, which] = time.perf_counter() - started
    best = took.min(axis=0).mean(axis=0) * 1_000
    return [(engine.name, float(ms)) for engine, ms in zip(opened, best, strict=True)]


def _opened(recipe: Recipe, ref: ModelRef, threads: int) -> Engine:
    engine = "auto" if export.is_export(ref) else "transformers"
    most = recipe.evaluation.max_new_tokens
    return engines.open_engine(ref, recipe.language, engine, threads=threads, max_new_tokens=most)


def _window(cache: FeatureCache, row: int, ref: ModelRef) -> np.ndarray:
    """A clip as it is served: float32 [1, n_mels, T]."""
    log_mel = cache.log_mel(row)
    return log_mel.padded(padded_frames(len(log_mel.frames)) if ref.context == "clip" else FULL_FRAMES)[None]
