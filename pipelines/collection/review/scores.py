"""How little a model believes each transcript: the order in which people listen.

The score of a clip is the mean negative log-likelihood of a token of its transcript, minus that of what the model heard
itself, in nats: high where the model can explain the recording by another text much better. Rare words and noise make
both likelihoods worse and cancel. Ground truth of planted faults is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.features.cache import FeatureCache, with_transcripts
from pipelines.features.clips import Rejected
from pipelines.features.curation import label_errors
from pipelines.features.curation.clip_filter import label_transcript
from pipelines.infra import environment
from pipelines.recipes.settings import EvaluationSettings
from pipelines.whisper import decoding, tokens
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import IGNORED, Collator, sorted_batches
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Suspicion:
    """What a model says about the transcripts of some clips, one value per clip."""

    rows: np.ndarray
    """Row numbers of the cache, int64 [n]."""
    heard: list[str]
    """What the model recognised."""
    loss: np.ndarray
    """Mean negative log-likelihood of the transcript's tokens; nats, float64 [n]."""
    gap: np.ndarray
    """`loss` minus the same of `heard`; nats, float64 [n]."""
    cer: np.ndarray
    """Character error rate between transcript and `heard`, float64 [n]."""


def score(
    cache: FeatureCache,
    ref: ModelRef,
    language: str,
    settings: EvaluationSettings,
    folder: Path,
    *,
    on_clips: Callable[[int], None] = lambda n: None,
) -> Suspicion:
    """Score the training clips of a cache that have a transcript; stored transcripts of the model are reused.

    `folder` is that of label_errors.transcribe. `on_clips` receives the clips that are transcribed.
    """
    rows = np.array([row for row in cache.split("train") if cache.rows["text"].iloc[row]], dtype=np.int64)
    texts = cache.rows["text"].iloc[rows].tolist()
    heard = (
        label_errors.transcribe(cache, rows, ref, language, settings, folder, on_clips=on_clips) if len(rows) else []
    )
    model = whisper_model.load(ref, device=environment.detect().device)
    processor = whisper_model.load_processor(ref, language)
    labeller, n_prompt = tokens.labeller(processor, language), len(tokens.prompt_ids(processor, language)) - 1
    own = {int(row): _label(text, labeller) for row, text in zip(rows, texts, strict=True)}
    others = {int(row): _label(text, labeller) for row, text in zip(rows, heard, strict=True)}
    texts_by = [with_transcripts(cache, labels) for labels in (own, others)] if len(rows) else []
    loss, other = _token_losses(model, texts_by, rows, n_prompt, ref.context == "full", settings.batch_frames)
    cer = label_errors.label_cers(texts, heard) if len(rows) else np.zeros(0)
    return Suspicion(rows, heard, loss, loss - other, cer)


def _token_losses(
    model: Any, caches: list[FeatureCache], rows: np.ndarray, n_prompt: int, full_context: bool, batch_frames: int
) -> np.ndarray:
    """Return the mean negative log-likelihood of the labels in each of two caches, float64 [2, n].

    The caches have the same clips, so that each is encoded once. The first `n_prompt` labels do not count.
    """
    losses = np.zeros((2, len(rows)))
    if not len(rows):
        return losses
    lengths = caches[0].rows["frames"].to_numpy()[rows]
    lengths = np.full_like(lengths, FULL_FRAMES) if full_context else lengths
    collator = Collator(caches[0], full_context=full_context)
    for indices in sorted_batches(lengths, batch_frames):
        batch = [int(rows[i]) for i in indices]
        encoded = decoding.encode(model, collator(batch)["input_features"])
        for number, cache in enumerate(caches):
            losses[number, indices] = _losses(model, encoded, [cache.labels(row) for row in batch], n_prompt)
    return losses


def _losses(model: Any, encoded: torch.Tensor, labels: list[list[int]], n_prompt: int) -> np.ndarray:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers.modeling_outputs import BaseModelOutput

    padded = pad_sequence([torch.tensor(ids) for ids in labels], batch_first=True, padding_value=IGNORED)
    padded = padded.to(model.device)
    start = torch.full((len(labels), 1), model.config.decoder_start_token_id, device=model.device)
    inputs = torch.cat([start, padded[:, :-1].clamp(min=0)], dim=1)
    with decoding.inference(model):
        logits = model(decoder_input_ids=inputs, encoder_outputs=BaseModelOutput(encoded)).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), padded, ignore_index=IGNORED, reduction="none"
        )
        counted = (padded != IGNORED) & (torch.arange(padded.shape[1], device=model.device) >= n_prompt)
        return ((losses * counted).sum(1) / counted.sum(1).clamp(min=1)).double().cpu().numpy()


def _label(text: str, labeller: Callable[[str], list[int]]) -> tuple[str, list[int]]:
    """Return a text and its labels; those of an empty text if it holds no word."""
    try:
        return label_transcript(text, labeller)
    except Rejected:
        return "", labeller("")
