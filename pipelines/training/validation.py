"""The looks at the validation split between two checkpoints: WER decides which weights are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring
from pipelines.training.callbacks.oom import Room
from pipelines.training.trainer import shift_right, token_mean_loss
from pipelines.whisper import decoding
from pipelines.whisper.batching import IGNORED, Collator, sorted_batches
from pipelines.whisper.log_mel import FULL_FRAMES


def validator(
    recipe: Recipe, cache: FeatureCache, processor: Any, full_context: bool, room: Room | None = None
) -> Callable[[Any], dict[str, float]]:
    """A function from a model to its validation loss, and its normalised WER with the 95 % interval.

    With `room` its batches become smaller where memory runs out.
    """
    rows = rows_of(cache, "validation")
    references, speakers = (cache.rows[name].iloc[rows].tolist() for name in ("text", "speaker"))
    settings = recipe.evaluation

    def fit(work: Callable[[int], Any]) -> Any:
        return room.fit(work) if room else work(settings.batch_frames)

    def hear(model: Any, batch_frames: int) -> dict[int, str]:
        options = decoding.DecodingOptions(
            recipe.language, settings.max_new_tokens, full_context=full_context, batch_frames=batch_frames
        )
        heard = {}
        for batch in _own_batches(cache, rows, batch_frames, full_context):
            texts = decoding.decode_rows_to_text(model, processor, cache, batch, options)
            heard |= dict(zip(batch.tolist(), texts, strict=True))
        return heard

    def validate(model: Any) -> dict[str, float]:
        was_training = model.training
        heard = distributed.gather_dicts(fit(lambda frames: hear(model, frames)))
        hypotheses = [heard[row] for row in rows.tolist()]
        draw = {"samples": settings.bootstrap_samples, "seed": settings.seed}
        score = scoring.score(references, hypotheses, speakers, **draw)
        low, high = score.ci95
        total, tokens = distributed.all_reduce_sum(
            *fit(lambda frames: _summed_loss(model, cache, rows, frames, full_context))
        )
        model.train(was_training)  # where memory ran out it was left as it was just then
        return {"wer": score.wer, "wer_low": low, "wer_high": high, "loss": total / tokens}

    return validate


def validation_loss(model: Any, cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool) -> float:
    """Mean cross entropy per label token over `rows`, teacher-forced."""
    total, tokens = distributed.all_reduce_sum(*_summed_loss(model, cache, rows, batch_frames, full_context))
    return total / tokens


def _summed_loss(
    model: Any, cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool
) -> tuple[float, int]:
    """The cross entropy of this process's share of `rows`, summed, and its label tokens."""
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
    return total, tokens


def _own_batches(cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool) -> list[np.ndarray]:
    """The rows of this process, in the batches in which a single one would decode them: padding changes transcripts."""
    lengths = cache.rows["frames"].to_numpy()[rows]
    batches = sorted_batches(np.full_like(lengths, FULL_FRAMES) if full_context else lengths, batch_frames)
    return [rows[batch] for batch in batches[distributed.rank() :: distributed.world_size()]]


def rows_of(cache: FeatureCache, split: str) -> np.ndarray:
    """The rows of a split that training cannot do without."""
    rows = cache.split(split)
    if not len(rows):
        raise LabError(
            f"the cache {cache.folder} has no {split} clips: training needs a training and a validation split"
        )
    return rows
