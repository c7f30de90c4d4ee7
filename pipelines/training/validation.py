"""Score a model on the validation split: WER selects the best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.features.cache import FeatureCache
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring
from pipelines.training.callbacks.oom import ValidationBatch
from pipelines.training.trainer import shift_right, token_mean_loss
from pipelines.whisper import decoding
from pipelines.whisper.batching import IGNORED, Collator, sorted_batches
from pipelines.whisper.log_mel import FULL_FRAMES


def validator(
    recipe: Recipe, cache: FeatureCache, processor: Any, full_context: bool, batch: ValidationBatch | None = None
) -> Callable[[Any], dict[str, float]]:
    """Return a function from a model to its `wer`, `wer_low`, `wer_high` (95 %, normalised) and `loss` on validation.

    `cut` is the number of hypotheses that were cut at `evaluation.max_new_tokens`, if there are any. With `batch` its
    batches become smaller when memory runs out.
    """
    rows = rows_of(cache, "validation")
    references, speakers = (cache.rows[name].iloc[rows].tolist() for name in ("text", "speaker"))
    settings = recipe.evaluation

    def run(work: Callable[[int], Any]) -> Any:
        return batch.run_with_retries(work) if batch else work(settings.batch_frames)

    def decode(model: Any, batch_frames: int) -> tuple[dict[int, str], int]:
        cut: list[int] = []
        options = decoding.RowDecodingOptions(
            recipe.language,
            settings.max_new_tokens,
            full_context=full_context,
            batch_frames=batch_frames,
            on_cut=cut.append,
        )
        hypotheses = {}
        for part in _rank_batches(cache, rows, batch_frames, full_context):
            texts = decoding.decode_rows_to_text(model, processor, cache, part, options)
            hypotheses |= dict(zip(part.tolist(), texts, strict=True))
        return hypotheses, sum(cut)

    def validate(model: Any) -> dict[str, float]:
        was_training = model.training
        texts, cut = run(lambda frames: decode(model, frames))
        by_row, (n_cut,) = distributed.gather_dicts(texts), map(int, distributed.all_reduce_sum(cut))
        hypotheses = [by_row[row] for row in rows.tolist()]
        score = scoring.score(references, hypotheses, speakers, samples=settings.bootstrap_samples, seed=settings.seed)
        ends = dict(zip(("wer_low", "wer_high"), score.ci95 or (), strict=False))  # one clip has no interval
        loss = _mean_loss(run(lambda frames: _summed_loss(model, cache, rows, frames, full_context)))
        model.train(was_training)  # an out-of-memory error may have left it in evaluation mode
        return {"wer": score.wer, **ends, **({"cut": n_cut} if n_cut else {}), "loss": loss}

    return validate


def validation_loss(model: Any, cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool) -> float:
    """Return the mean cross entropy per label token over `rows`, teacher-forced."""
    return _mean_loss(_summed_loss(model, cache, rows, batch_frames, full_context))


def _mean_loss(summed: tuple[float, int]) -> float:
    """Return the mean over all processes of (summed loss, label tokens)."""
    total, tokens = distributed.all_reduce_sum(*summed)
    return total / tokens


def _summed_loss(
    model: Any, cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool
) -> tuple[float, int]:
    """Return the summed cross entropy and the label tokens of this process's part of `rows`."""
    import torch

    collate, total, tokens = Collator(cache, full_context=full_context), 0.0, 0
    config, was_training = model.config, model.training
    model.eval()
    for batch in _rank_batches(cache, rows, batch_frames, full_context):
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


def _rank_batches(cache: FeatureCache, rows: np.ndarray, batch_frames: int, full_context: bool) -> list[np.ndarray]:
    """Return this process's batches of rows.

    They are batches of the whole split, as in a single process: another padding may change transcripts.
    """
    lengths = cache.rows["frames"].to_numpy()[rows]
    batches = sorted_batches(np.full_like(lengths, FULL_FRAMES) if full_context else lengths, batch_frames)
    return [rows[batch] for batch in batches[distributed.rank() :: distributed.world_size()]]


def rows_of(cache: FeatureCache, split: str) -> np.ndarray:
    """Return the rows of a split; raise LabError if it is empty."""
    rows = cache.split(split)
    if not len(rows):
        raise LabError(
            f"the cache {cache.folder} has no {split} clips: training needs a training and a validation split"
        )
    return rows
