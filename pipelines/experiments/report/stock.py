"""The second figure of a report: the same model on the same clips in transformers' own pipeline, for other programs.

It is computed on a fixed sample of the clips by default, because the pipeline computes 30 s for every clip. The sample
depends on the test set alone, and a larger one contains the smaller: models are compared on the clips they share.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.features.cache import FeatureCache
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.infra.tables.formulas import decode_cell, encode_cell
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import EvaluationSettings, Recipe
from pipelines.speech import scoring
from pipelines.speech.scoring import Difference, Score
from pipelines.whisper import export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import Collator, sorted_batches
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FILE = "stock.csv"
"""One row per clip of the sample: row (its position in predictions.csv), id, hypothesis."""
TITLE = "stock pipeline"
TOLERANCE = 0.02
"""A model whose WER is larger by more than this in the stock pipeline is said to need the lab's decoder."""
AUTO_CLIPS = 24
"""Clips of a tuned model that `evaluation.stock_pipeline = "auto"` decodes: 7 s with whisper-tiny on two CPU cores."""


@dataclass(frozen=True)
class StockFigure:
    """WER of a model in transformers' pipeline, on a sample of a report's clips."""

    score: Score
    """In the stock pipeline, normalised."""
    lab: Score
    """In this lab, on the same clips."""
    difference: Difference
    """`score` minus `lab`, paired over speakers."""
    hypotheses: dict[int, str]
    """Position in the report's predictions to the pipeline's transcript."""
    decoding: dict[str, Any]
    """Engine, precision, beams, timestamps."""

    @property
    def verdict(self) -> str:
        return verdict(self.difference.as_dict())

    @property
    def comparison(self) -> str:
        """Return both figures on the same clips and their difference, in one line."""
        ours, theirs = self.score, self.lab
        return (
            f"{TITLE} {ours.wer:.3f} ({ours.units.interval(ours.ci95)}), this lab {theirs.wer:.3f} on the same "
            f"{ours.n} clips: {self.verdict}"
        )


def verdict(difference: Mapping[str, Any]) -> str:
    """Return what a difference (scoring.Difference as a dictionary) between stock pipeline and lab means."""
    delta, interval = difference["delta"], difference["ci95"]
    if delta <= TOLERANCE:
        return f"{delta:+.3f}, not worse than in this lab by more than 0.02"
    if interval and interval[0] > 0:
        return f"{delta:+.3f}, this model needs the lab's decoder"
    return f"{delta:+.3f}, it may need the lab's decoder: evaluation.stock_pipeline=true scores all clips"


def facts(figure: StockFigure) -> dict[str, Any]:
    """Return the entry `stock` of a report's manifest and of report.json."""
    return {
        "score": figure.score.as_dict(),
        "lab": figure.lab.as_dict(),
        "difference": figure.difference.as_dict(),
        "decoding": figure.decoding,
        "verdict": figure.verdict,
    }


def figure(
    predictions: pd.DataFrame, hypotheses: Mapping[int, str], how: dict[str, Any], settings: EvaluationSettings
) -> StockFigure:
    """Score the pipeline's transcripts, and the lab's of the same clips."""
    table = predictions.iloc[sorted(hypotheses)]
    references, speakers = table["reference"].tolist(), table["speaker"].tolist()
    draw = {"samples": settings.bootstrap_samples, "seed": settings.seed}
    ours, theirs = (
        scoring.count_edits(references, texts)
        for texts in ([hypotheses[row] for row in sorted(hypotheses)], table["hypothesis"].tolist())
    )
    return StockFigure(
        scoring.score_edits(ours, speakers, **draw),
        scoring.score_edits(theirs, speakers, **draw),
        scoring.difference(ours, theirs, speakers, **draw),
        dict(hypotheses),
        how,
    )


def sample(ids: list[str], speakers: list[str], n: int) -> list[int]:
    """Return the positions of `n` clips, ascending: as many of each speaker, in an order given by the ids."""
    order = sorted(range(len(ids)), key=lambda row: hashlib.sha256(ids[row].encode()).hexdigest())
    counts: dict[str, int] = {}
    turns = {}
    for row in order:
        turns[row] = counts.setdefault(speakers[row], 0)
        counts[speakers[row]] += 1
    return sorted(sorted(order, key=lambda row: turns[row])[:n])


def n_clips(setting: bool | int | str, ref: ModelRef, n: int) -> int:
    """Return how many of `n` clips the pipeline decodes for `evaluation.stock_pipeline` = `setting`.

    Exports have no such figure: transformers does not read them. Raises LabError if one is requested.
    """
    if export.is_export(ref):
        if setting not in (AUTO, False):
            raise LabError(
                f"transformers' pipeline does not read {ref.title}, an export: set evaluation.stock_pipeline to "
                "auto or false, or score the model it was made of"
            )
        return 0
    if setting == AUTO:
        is_tuned = ref.facts.get("kind") == "model"
        return min(AUTO_CLIPS, n) if is_tuned else 0
    return n if setting is True else min(int(setting), n)


def score_clips(
    recipe: Recipe,
    cache: FeatureCache,
    ref: ModelRef,
    clips: tuple[np.ndarray, pd.DataFrame],
    n: int,
    same: Path | None,
) -> StockFigure | None:
    """Score `n` of the `clips`, cache rows and predictions in the same order, in the stock pipeline.

    Transcripts that the report `same` has, of the same model and clips, are not decoded again. None with `auto` if
    transformers refuses the model; with other settings that raises LabError.
    """
    rows, predictions = clips
    positions = sample(predictions["id"].tolist(), predictions["speaker"].tolist(), n)
    stored = (manifest.read(same) or {}).get("stock") if same else None
    texts, how = (_read_hypotheses(same), dict(stored["decoding"])) if stored else ({}, {})
    missing = [position for position in positions if position not in texts]
    if missing:
        try:
            decoded, how = _transcribe(recipe, cache, ref, rows, missing)
        except LabError as error:
            if recipe.evaluation.stock_pipeline != AUTO:
                raise
            logger.info(f"no score in the stock pipeline: {error}")
            return None
        texts |= decoded
    return figure(predictions, texts, how, recipe.evaluation)


def _transcribe(
    recipe: Recipe, cache: FeatureCache, ref: ModelRef, rows: np.ndarray, positions: list[int]
) -> tuple[dict[int, str], dict[str, Any]]:
    """Return the pipeline's transcripts of `positions` in the cache rows `rows`, and how they were decoded."""
    from pipelines.whisper.engines import stock_pipeline

    model = whisper_model.load(ref, device=environment.detect().device)
    processor = whisper_model.load_processor(ref, recipe.language)
    started, collate, texts = time.monotonic(), Collator(cache, full_context=True), {}
    for batch in sorted_batches(np.full(len(positions), FULL_FRAMES), recipe.evaluation.batch_frames):
        chosen = [positions[n] for n in batch]
        features: torch.Tensor = collate([int(rows[position]) for position in chosen])["input_features"]
        texts |= zip(chosen, stock_pipeline.decode(model, processor, features, recipe.language), strict=True)
    how = stock_pipeline.decoding_facts(model)
    logger.info(f"decoded {len(positions)} clips as transformers' pipeline does in {time.monotonic() - started:.0f} s")
    return texts, how


def content(predictions: pd.DataFrame, hypotheses: Mapping[int, str]) -> bytes:
    """Return the content of FILE."""
    rows = [(row, predictions["id"].iloc[row], hypotheses[row]) for row in sorted(hypotheses)]
    table = pd.DataFrame(rows, columns=["row", "id", "hypothesis"])
    texts = {name: table[name].map(encode_cell) for name in ("id", "hypothesis")}
    return table.assign(**texts).to_csv(index=False).encode()


def _read_hypotheses(folder: Path) -> dict[int, str]:
    """Return the transcripts in a report's folder by their position; none if it has no FILE."""
    path = folder / FILE
    if not path.is_file():
        return {}
    table = pd.read_csv(io.BytesIO(path.read_bytes()), keep_default_na=False, dtype={"id": str, "hypothesis": str})
    return dict(zip(table["row"].tolist(), table["hypothesis"].map(decode_cell), strict=True))


def read(folder: Path, stored: Mapping[str, Any] | None) -> StockFigure | None:
    """Return the figure of a report from the entry `stock` of its manifest; None if it has none."""
    if not stored:
        return None
    ours, lab = (Score(**_tuples(stored[name])) for name in ("score", "lab"))
    return StockFigure(
        ours, lab, Difference(**_tuples(stored["difference"])), _read_hypotheses(folder), dict(stored["decoding"])
    )


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
