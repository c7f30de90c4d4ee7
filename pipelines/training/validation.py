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
from pipelines.training.callbacks import samples
from pipelines.training.callbacks.oom import ValidationBatch
from pipelines.training.trainer import shift_right, token_mean_loss
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import IGNORED, Collator, padded_frames, sorted_batches
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

_SILENCE_AFTER = 400
"""Frames of silence after a clip before training. 30 s take four times as long and are transcribed as badly."""


def validator(
    recipe: Recipe,
    cache: FeatureCache,
    processor: Any,
    full_context: bool,
    batch: ValidationBatch | None = None,
    on_texts: Callable[[list[str], list[str]], None] = lambda ids, hypotheses: None,
) -> Callable[[Any], dict[str, float]]:
    """Return a function from a model to its `wer`, `wer_low`, `wer_high` (95 %, normalised) and `loss` on validation.

    `cut` is the number of hypotheses that were cut at `evaluation.max_new_tokens`, if there are any. With `batch` its
    batches become smaller when memory runs out. `on_texts` receives the ids of all clips and their hypotheses.
    """
    rows = rows_of(cache, "validation")
    references, speakers = (cache.rows[name].iloc[rows].tolist() for name in ("text", "speaker"))
    settings = recipe.evaluation

    def run(work: Callable[[int], Any]) -> Any:
        return batch.run_with_retries(work) if batch else work(settings.batch_frames)

    def score_rows(model: Any, batch_frames: int) -> tuple[dict[int, str], int, float, int]:
        """Return texts by row, cut texts, summed cross entropy and label tokens of this process's part of the rows."""
        cut: list[int] = []
        options = decoding.RowDecodingOptions(recipe.language, settings.max_new_tokens, on_cut=cut.append)
        collate, hypotheses, loss, tokens = Collator(cache, full_context=full_context), {}, 0.0, 0
        for batch in _rank_batches(cache, rows, batch_frames, full_context):
            inputs = collate(batch.tolist())
            encoded = decoding.encode(model, inputs["input_features"])
            texts = decoding.decode_states_to_text(model, processor, encoded, options)
            hypotheses |= dict(zip(batch.tolist(), texts, strict=True))
            # losses are in float32: states in bfloat16 are computed again
            loss += _summed_loss(model, inputs, None if decoding.uses_bfloat16(model) else encoded)
            tokens += int((inputs["labels"] != IGNORED).sum())
        return hypotheses, sum(cut), loss, tokens

    def validate(model: Any) -> dict[str, float]:
        was_training = model.training
        texts, *sums = run(lambda frames: score_rows(model, frames))
        by_row, (n_cut, loss, tokens) = distributed.gather_dicts(texts), distributed.all_reduce_sum(*sums)
        hypotheses = [by_row[row] for row in rows.tolist()]
        on_texts(cache.rows["id"].iloc[rows].tolist(), hypotheses)
        score = scoring.score(references, hypotheses, speakers, samples=settings.bootstrap_samples, seed=settings.seed)
        ends = dict(zip(("wer_low", "wer_high"), score.ci95 or (), strict=False))  # one clip has no interval
        model.train(was_training)  # an out-of-memory error may have left it in evaluation mode
        return {"wer": score.wer, **ends, **({"cut": int(n_cut)} if n_cut else {}), "loss": loss / tokens}

    return validate


def transcripts_before_training(
    recipe: Recipe, cache: FeatureCache, model: Any, processor: Any
) -> tuple[list[str], list[str]]:
    """Return the ids and hypotheses of the clips that `samples` keeps.

    Silence is added to them, which a model needs that was not trained at clip length. Empty if memory runs out: only a
    table of the notebook needs the hypotheses.
    """
    import torch

    rows = rows_of(cache, "validation")
    rows = rows[samples.positions(len(rows))]
    clips = [cache.log_mel(int(row)) for row in rows]
    longest = FULL_FRAMES if recipe.training.context == "full" else max(len(clip.frames) for clip in clips)
    n_frames = padded_frames(longest + _SILENCE_AFTER)  # at most 30 s
    features = torch.stack([torch.from_numpy(clip.padded(n_frames)) for clip in clips])
    options = decoding.RowDecodingOptions(recipe.language, recipe.evaluation.max_new_tokens)
    try:
        hypotheses = decoding.decode_to_text(model, processor, features, options)
    except torch.OutOfMemoryError:
        return [], []
    return cache.rows["id"].iloc[rows].tolist(), hypotheses


def _summed_loss(model: Any, batch: dict[str, Any], encoded: Any = None) -> float:
    """Return the cross entropy of a batch summed over its label tokens, teacher-forced.

    `encoded` float [B, T / 2, d_model]: the states of its clips, computed here if None.
    """
    import torch

    config, was_training = model.config, model.training
    labels, features = (batch[name].to(model.device) for name in ("labels", "input_features"))
    known = {"input_features": features} if encoded is None else {"encoder_outputs": (encoded,)}
    decoder_input_ids = shift_right(labels, config.decoder_start_token_id, config.pad_token_id)
    model.eval()
    with torch.inference_mode():
        # without the autocast that accelerate adds to a model's forward pass: losses are in float32
        outputs = getattr(model, "_original_forward", model)(**known, decoder_input_ids=decoder_input_ids)
        loss = float(token_mean_loss(outputs, labels, 1))
    model.train(was_training)
    return loss


def token_losses(ref: ModelRef, cache: FeatureCache, row: int, device: str = "cpu") -> np.ndarray:
    """Return the cross entropy of each label token of one clip, float32 [n_labels], teacher-forced.

    The clip is padded to 30 s for a model that needs it.
    """
    import torch
    import torch.nn.functional as F

    model = whisper_model.load(ref, device=device).eval()
    batch = {
        name: value.to(device) for name, value in Collator(cache, full_context=ref.context == "full")([row]).items()
    }
    labels, config = batch["labels"], model.config
    decoder_input_ids = shift_right(labels, config.decoder_start_token_id, config.pad_token_id)
    with torch.inference_mode():
        logits = model(input_features=batch["input_features"], decoder_input_ids=decoder_input_ids).logits
    return F.cross_entropy(logits[0].float(), labels[0], reduction="none").cpu().numpy()


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
