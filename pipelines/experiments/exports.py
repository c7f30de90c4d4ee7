"""Compare exports with the models that they were made from: WER, paired differences, agreement, size and speed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments import pipeline
from pipelines.experiments.comparison import lookup
from pipelines.experiments.evaluation import EvalReport
from pipelines.features import derived
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
"""Number of clips, spread over the split, that are decoded one by one to measure the speed."""
_ROUNDS = 3


@dataclass(frozen=True)
class ExportRow:
    """One model, or one export of it, on a split."""

    model: str
    """Name and revision, with the form of an export."""
    form: str
    """One of export.FORMS; empty for the model itself."""
    folder: str
    engine: str
    """Engine, device and precision that were used for `ms`."""
    size_mb: float
    """Size of all files of its folder, in millions of bytes."""
    score: Score
    difference: Difference | None
    """For an export: WER minus that of its model; for a further model: minus that of the first; None for the first."""
    agreement: float | None
    """Share of clips whose transcript is identical to that of the model compared with, case and punctuation
    included."""
    first: Difference | None
    """WER minus that of the first model of the table; None for that model."""
    ms: float
    """Milliseconds from the frames of a clip to its text, one clip at a time: mean over clips of the fastest of three
    tries. All rows take turns."""

    def as_dict(self) -> dict[str, Any]:
        differences = {name: getattr(self, name) for name in ("difference", "first")}
        fields = {name: difference.as_dict() if difference else None for name, difference in differences.items()}
        return {**vars(self), "score": self.score.as_dict(), **fields}


@dataclass(frozen=True)
class ExportTable:
    """Models and their exports on a split."""

    split: str
    rows: tuple[ExportRow, ...]
    unscored: tuple[tuple[str, str], ...]
    """Form and folder of the exports whose program is not installed here, so that they are not scored."""
    load: float | None
    """Load average of the machine over the last minute, if the system reports it."""

    def as_dict(self) -> dict[str, Any]:
        n = self.rows[0].score.n
        return {
            "split": self.split,
            "n": n,
            "load": self.load,
            "rows": [row.as_dict() for row in self.rows],
            "unscored": [*self.unscored],
        }

    def __str__(self) -> str:
        folders = "\n".join(f"{row.form or 'model'}: {row.folder}" for row in self.rows)
        folders += "".join(
            f"\n{form}, not scored (for that: pip install 'pywhispercpp>=1.5'): {folder}"
            for form, folder in self.unscored
        )
        n = self.rows[0].score.n
        caveat = self.rows[0].score.units.caveat
        note = f"\nnote: {caveat}" if caveat else ""
        return f"{self.markdown()}\n\n{self.split}, {n} clips; load of the machine {self.load}{note}\n{folders}"

    def markdown(self) -> str:
        """Return the table as Markdown; the comparison with the first model appears if there are several models."""
        header = ["model", "form", "WER", "95 %", "ΔWER (95 %)", "same text"]
        several = sum(not row.form for row in self.rows) > 1
        header += ["ΔWER, first model (95 %)"] if several else []
        header += ["MB", "ms a clip", "decoded by"]
        lines = [_markdown_row(header), _markdown_row("---" for _ in header)]
        for row in self.rows:
            name = row.model.partition(" @ ")[0].partition(" (")[0]
            cells = [name, row.form or "model", f"{row.score.wer:.3f}", row.score.units.interval(row.score.ci95)]
            cells += [_difference_cell(row.difference), "" if row.agreement is None else f"{row.agreement:.0%}"]
            cells += [_difference_cell(row.first)] if several else []
            lines.append(_markdown_row([*cells, f"{row.size_mb:.1f}", f"{row.ms:.0f}", row.engine]))
        return "\n".join(lines)


def compare_exports(
    recipe: Recipe,
    cache: FeatureCache,
    uris: Sequence[str],
    forms: Sequence[str],
    *,
    split: str = "validation",
    runs: str | Path = "",
    threads: int = 0,
) -> ExportTable:
    """Score and time each model, and its exports in `forms`, on a split of the cache.

    Exports in export.FOREIGN_FORMS are only written if their program is not installed here. Existing reports are
    reused; scorings of the test split are counted. Raise LabError for a form that is not one of export.FORMS, and the
    errors of `export.convert`.
    """
    recipe = _without_stock_pipeline(derived.resolve(recipe, cache))
    unscored = tuple(
        (form, str(export.convert(whisper_model.resolve(uri), form)))
        for uri in uris
        for form in forms
        if form in export.FOREIGN_FORMS and not export.installed(form)
    )
    forms = [form for form in forms if form not in export.FOREIGN_FORMS or export.installed(form)]
    variants = [  # export everything first: errors appear before anything is scored
        (form, str(export.convert(whisper_model.resolve(uri), form)) if form else uri)
        for uri in uris
        for form in ("", *forms)
    ]
    reports = [pipeline.evaluate(recipe, cache, uri, split, runs=runs) for _, uri in variants]
    refs = [whisper_model.resolve(uri) for _, uri in variants]
    split_rows = cache.split(split)
    timed = split_rows[:: max(1, -(-len(split_rows) // TIMED_CLIPS))]
    speeds = _measure_speeds(recipe, cache, refs, timed, threads)
    rows, first, model = [], reports[0], reports[0]
    for (form, _), ref, report, (engine, ms) in zip(variants, refs, reports, speeds, strict=True):
        reference = model if form else first
        model = model if form else report
        row = ExportRow(
            report.model,
            form,
            str(ref.folder),
            engine,
            _size_mb(ref.folder),
            report.score,
            None if report is first else _difference(recipe, report, reference),
            None if report is first else _agreement(report, reference),
            None if report is first else _difference(recipe, report, first),
            round(ms, 1),
        )
        rows.append(row)
    return ExportTable(split, tuple(rows), unscored, os.getloadavg()[0] if hasattr(os, "getloadavg") else None)


def _size_mb(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6, 1)


def _without_stock_pipeline(recipe: Recipe) -> Recipe:
    """Return the recipe without the second figure, which transformers' pipeline cannot give for an export."""
    evaluation = recipe.evaluation.model_copy(update={"stock_pipeline": False})
    return recipe.model_copy(update={"evaluation": evaluation})


def _difference(recipe: Recipe, report: EvalReport, other: EvalReport) -> Difference:
    """Return the paired difference of two reports on one split."""
    tables = [lookup.ordered(one) for one in (report, other)]
    edits = [scoring.count_edits(one["reference"].tolist(), one["hypothesis"].tolist()) for one in tables]
    bootstrap = {"samples": recipe.evaluation.bootstrap_samples, "seed": recipe.evaluation.seed}
    return scoring.difference(*edits, tables[0]["speaker"].tolist(), **bootstrap)


def _agreement(report: EvalReport, other: EvalReport) -> float:
    """Return the share of clips with identical transcripts."""
    return float((lookup.ordered(report)["hypothesis"] == lookup.ordered(other)["hypothesis"]).mean())


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _difference_cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.delta:+.3f} ({difference.units.interval(difference.ci95, '{:+.3f}')})"


def _measure_speeds(
    recipe: Recipe, cache: FeatureCache, refs: Sequence[ModelRef], rows: np.ndarray, threads: int
) -> list[tuple[str, float]]:
    """Return engine and milliseconds per clip of each model. Models take turns on every clip, so other load is fair."""
    logger.info(f"timing {len(refs)} on {len(rows)} clips, {_ROUNDS} times in turns")
    opened = [_open_engine(recipe, ref, threads) for ref in refs]
    seconds = np.empty((_ROUNDS, len(rows), len(refs)))
    for round_ in range(-1, _ROUNDS):  # round -1 is a warm-up on two clips, overwritten later
        for clip, row in enumerate(rows if round_ >= 0 else rows[:2]):
            for index, (engine, ref) in enumerate(zip(opened, refs, strict=True)):
                window = _window(cache, int(row), ref)
                started = time.perf_counter()
                engine.decode(window)
                seconds[round_, clip, index] = time.perf_counter() - started
    best = seconds.min(axis=0).mean(axis=0) * 1_000
    return [(engine.name, float(ms)) for engine, ms in zip(opened, best, strict=True)]


def _open_engine(recipe: Recipe, ref: ModelRef, threads: int) -> Engine:
    name = "auto" if export.is_export(ref) else "transformers"
    max_new_tokens = recipe.evaluation.max_new_tokens
    return engines.open_engine(ref, recipe.language, name, threads=threads, max_new_tokens=max_new_tokens)


def _window(cache: FeatureCache, row: int, ref: ModelRef) -> np.ndarray:
    """Return the log-mel of a clip as it is served: float32 [1, n_mels, T]."""
    log_mel = cache.log_mel(row)
    return log_mel.padded(padded_frames(len(log_mel.frames)) if ref.context == "clip" else FULL_FRAMES)[None]
