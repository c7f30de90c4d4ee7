"""The looks at the validation split between two checkpoints: WER decides which weights are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines import decoding, ranks, scoring
from pipelines.batches import IGNORED, Collator, sorted_batches
from pipelines.cache import FeatureCache
from pipelines.errors import LabError
from pipelines.features import FULL_FRAMES
from pipelines.recipe import Recipe
from pipelines.training.trainer import shift_right, token_mean_loss


def validator(
    recipe: Recipe, cache: FeatureCache, processor: Any, full_context: bool
) -> Callable[[Any], dict[str, float]]:
    """A function from a model to its validation loss, and its normalised WER with the 95 % interval."""
    rows = rows_of(cache, "validation")
    references, speakers = (cache.rows[name].iloc[rows].tolist() for name in ("text", "speaker"))
    settings = recipe.evaluation

    def validate(model: Any) -> dict[str, float]:
        heard = {}
        for batch in _own_batches(cache, rows, settings.batch_frames, full_context):
            told = decoding.decode_rows(
                model,
                processor,
                cache,
                batch,
                language=recipe.language,
                batch_frames=settings.batch_frames,
                max_new_tokens=settings.max_new_tokens,
                full_context=full_context,
            )
            heard |= dict(zip(batch.tolist(), told, strict=True))
        heard = ranks.merged(heard)
        hypotheses = [heard[row] for row in rows.tolist()]
        draw = {"samples": settings.bootstrap_samples, "seed": settings.seed}
        score = scoring.score(references, hypotheses, speakers, **draw)
        low, high = score.ci95
        return {
            "wer": score.wer,
            "wer_low": low,
            "wer_high": high,
            "loss": validation_loss(model, cache, rows, settings.batch_frames, full_context),
        }

    return validate


def validation_loss(model: Any, cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool) -> float:
    """Mean cross entropy per label token over `rows`, teacher-forced."""
    import torch

    collate, total, tokens = Collator(cache, full_context=full_context), 0.0, 0
    config, was_training = model.config, model.training
    model.eval()
    for batch in _own_batches(cache, rows, batch_frames, full_context):
        inputs = {name: value.to(model.device) for name, value in collate(batch.tolist()).items()}
        labels = inputs.pop("labels")
        with torch.inference_mode():
            outputs = model(
                **inputs, decoder_input_ids=shift_right(labels, config.decoder_start_token_id, config.pad_token_id)
            )
            total += float(token_mean_loss(outputs, labels, 1))
        tokens += int((labels != IGNORED).sum())
    model.train(was_training)
    total, tokens = ranks.summed(total, tokens)
    return total / tokens


def _own_batches(cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool) -> list[np.ndarray]:
    """The rows of this process, in the batches in which a single one would decode them: padding changes transcripts."""
    lengths = cache.rows["frames"].to_numpy()[rows]
    batches = sorted_batches(np.full_like(lengths, FULL_FRAMES) if full_context else lengths, batch_frames)
    return [rows[batch] for batch in batches[ranks.rank() :: ranks.size()]]


def rows_of(cache: FeatureCache, split: str) -> np.ndarray:
    """The rows of a split that training cannot do without."""
    rows = cache.split(split)
    if not len(rows):
        raise LabError(
            f"the cache {cache.folder} has no {split} clips: training needs a training and a validation split"
        )
    return rows
