"""Transcripts of a split: decoded by the model, or taken from an earlier report of the same decoding."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments.report import predictions_file
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment, manifest
from pipelines.infra.parallel import process_pool
from pipelines.recipes.settings import Recipe
from pipelines.whisper import decoding, engines, export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding import Hypothesis, RowDecodingOptions
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

_SCORING_FIELDS = ("cache", "evaluation.bootstrap_samples", "evaluation.seed")
"""Fields of a report's identity that do not decide its transcripts, once the features are the same."""
_SPEED = ("decoding_seconds", "device", "threads")


@dataclass(frozen=True)
class Decoded:
    """The transcripts of a split."""

    hypotheses: list[Hypothesis]
    speed: dict[str, Any]
    """decoding_seconds (without loading the model), device, threads."""
    decoding: dict[str, Any]
    """How they were decoded (`decoding_facts`); empty if an older report has them and does not say so."""


def decoding_facts(engine: str, beam_size: int = 1) -> dict[str, Any]:
    """Return how an engine decodes the clips of a split: engine, precision, beam_size, timestamps.

    `engine` ends with its precision, as in `transformers cpu float32`.
    """
    return {"engine": engine, "precision": engine.rpartition(" ")[2], "beam_size": beam_size, "timestamps": False}


def describe(decoding: Mapping[str, Any] | None) -> str:
    """Return `decoding_facts` in one line; empty if they are unknown."""
    if not decoding:
        return ""
    search = "greedy" if decoding["beam_size"] == 1 else f"beam search with {decoding['beam_size']} beams"
    return f"{decoding['engine']}, {search}, {'with' if decoding['timestamps'] else 'without'} timestamps"


def decode(recipe: Recipe, cache: FeatureCache, ref: ModelRef, rows: Any, on_clips: Callable[[int], None]) -> Decoded:
    """Decode rows with the fastest engine that writes the text of transformers in float32; an export with its own.

    On a CPU that is whisper/greedy.py: float32 exports for other engines are not faster. Beams are searched by the
    engines for transcription.
    """
    import torch

    machine = environment.detect()
    if export.is_export(ref) or recipe.evaluation.beam_size > 1:
        return _decode_with_engine(recipe, cache, ref, rows, on_clips)
    model, processor = (
        whisper_model.load(ref, device=machine.device),
        whisper_model.load_processor(ref, recipe.language),
    )
    started = time.monotonic()
    hypotheses = decoding.decode_rows(model, processor, cache, rows, _decoding_options(recipe, ref), on_clips)
    seconds = max(round(time.monotonic() - started, 2), 0.01)
    speed = {"decoding_seconds": seconds, "device": machine.device_name, "threads": torch.get_num_threads()}
    return Decoded(hypotheses, speed, decoding_facts(decoding.engine_name(model)))


def _decode_with_engine(
    recipe: Recipe, cache: FeatureCache, ref: ModelRef, rows: Any, on_clips: Callable[[int], None]
) -> Decoded:
    """Decode with the engine for an export's format, and with transformers for other models."""
    name, settings = "auto" if export.is_export(ref) else "transformers", recipe.evaluation
    engine = engines.open_engine(ref, recipe.language, name, max_new_tokens=settings.max_new_tokens)
    search = DecodingOptions(
        recipe.language, timestamps=False, beam_size=settings.beam_size, max_new_tokens=settings.max_new_tokens
    )
    options = _decoding_options(recipe, ref)
    options = replace(options, batch_frames=options.batch_frames // settings.beam_size)  # each beam is a text in memory
    started = time.monotonic()
    hypotheses = decoding.decode_in_batches(
        lambda features: engine.decode(features.numpy(), search), cache, rows, options, on_clips
    )
    seconds = max(round(time.monotonic() - started, 2), 0.01)
    speed = {"decoding_seconds": seconds, "device": engine.name, "threads": process_pool.cores()}
    return Decoded(hypotheses, speed, decoding_facts(engine.name, settings.beam_size))


def _decoding_options(recipe: Recipe, ref: ModelRef) -> RowDecodingOptions:
    """Return the recipe's decoding options; a model that was not tuned at clip length gets the full 30 s window."""
    return RowDecodingOptions(
        recipe.language,
        recipe.evaluation.max_new_tokens,
        full_context=ref.context == "full",
        batch_frames=recipe.evaluation.batch_frames,
    )


def earlier_report(earlier: Iterable[Path], identity: dict[str, Any], cache: FeatureCache, rows: Any) -> Path | None:
    """Return the folder of an earlier report whose decoding was the same and that has its transcripts, or None."""
    expected = _decoding_identity(identity)
    for folder in earlier:
        fields = manifest.read(folder) or {}
        scored = fields.get("identity") or {}
        if _decoding_identity(scored) != expected or manifest.problem(folder) is not None:
            continue
        if scored.get("cache") != cache.digest and fields.get("features") != features_digest(cache, rows):
            continue
        if len(predictions_file.read(folder)) == len(rows) and _transcripts(folder):
            logger.info(f"the same clips were decoded by the same model: transcripts are taken from {folder}")
            return folder
    return None


def of_report(folder: Path) -> Decoded:
    """Return the transcripts of a report that `earlier_report` found."""
    speed, columns = _transcripts(folder)
    hypotheses = [Hypothesis(*values) for values in zip(*columns, strict=True)]
    facts = (manifest.read(folder) or {}).get("decoding", {})
    return Decoded(hypotheses, {name: speed[name] for name in _SPEED}, facts)


def _transcripts(folder: Path) -> tuple[dict[str, Any], list[list[Any]]] | None:
    """Return speed, and text, logprob and tokens of each clip, as columns; None for reports of early versions."""
    table, details = predictions_file.read(folder), folder / "report.json"
    speed = json.loads(details.read_text("utf-8")).get("speed") if details.is_file() else None
    names = ("hypothesis", "logprob", "tokens")
    return (speed, [table[name].tolist() for name in names]) if speed and {*names} <= set(table) else None


def _decoding_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that decide the transcripts, except those of the features."""
    return {name: value for name, value in identity.items() if name not in _SCORING_FIELDS}


def features_digest(cache: FeatureCache, rows: Any) -> str:
    """Return the digest of the features of rows, in their order: 16 hex digits."""
    sha256 = hashlib.sha256()
    for row in rows:
        log_mel = cache.log_mel(row)
        sha256.update(json.dumps([log_mel.frames.shape, str(log_mel.frames.dtype), log_mel.pad_value]).encode())
        sha256.update(np.ascontiguousarray(log_mel.frames).data)
    return sha256.hexdigest()[:16]
