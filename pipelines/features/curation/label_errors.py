"""Label errors: training clips whose transcript differs from what a model recognises.

The transcripts of a model are stored beside the runs, one file per model, one line per clip, so that another threshold,
an interrupted run or a corpus with one more clip decodes nothing twice. Of several processes one decodes, the others
wait for its results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from pipelines.features.cache import FeatureCache
from pipelines.features.curation.leaks import fingerprint
from pipelines.infra import environment
from pipelines.recipes import digest
from pipelines.recipes.settings import EvaluationSettings
from pipelines.speech import scoring
from pipelines.whisper import decoding, model_files
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import sorted_batches
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

CODE = "1"
"""Version of the decoding code: raised when the same model and clip would give another transcript."""
_BATCHES = 8
"""Batches between two writes; a killed run repeats at most these."""


def label_cers(references: list[str], hypotheses: list[str]) -> np.ndarray:
    """Return the character error rate of each normalised transcript, float64 [n]."""
    edits = scoring.count_edits(references, hypotheses)
    return edits.char_edits / np.maximum(edits.chars, 1)


def label_wers(references: list[str], hypotheses: list[str]) -> np.ndarray:
    """Return the word error rate of each normalised transcript, float64 [n]."""
    edits = scoring.count_edits(references, hypotheses)
    return edits.word_edits / np.maximum(edits.words, 1)


def transcribe(
    cache: FeatureCache,
    rows: np.ndarray,
    ref: ModelRef,
    language: str,
    settings: EvaluationSettings,
    folder: Path,
    *,
    on_clips: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Return the model's transcript of each of `rows` of the cache; those stored in `folder` are not decoded again.

    A model tuned at clip length decodes at clip length, any other with 30 s of context.
    """
    identity = {
        **whisper_model.identity(ref),
        "language": language,
        "context": ref.context,
        "max_new_tokens": settings.max_new_tokens,
        "code": CODE,
    }
    path = folder / f"heard-{digest(identity)}.jsonl"
    names = fingerprints(cache, rows)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        transcripts = read(path)
        missing = {name: int(row) for name, row in zip(names, rows, strict=True) if name not in transcripts}
        on_clips(len(rows) - len(missing))
        if missing:
            transcripts |= _decode(cache, missing, ref, language, settings, path, on_clips)
    return [transcripts[name] for name in names]


def fingerprints(cache: FeatureCache, rows: np.ndarray) -> list[str]:
    """Return the fingerprint of each clip's audio, see `leaks.fingerprint`."""
    return [fingerprint(cache.log_mel(int(row))) for row in rows]


def _decode(
    cache: FeatureCache,
    missing: dict[str, int],
    ref: ModelRef,
    language: str,
    settings: EvaluationSettings,
    path: Path,
    on_clips: Callable[[int], None],
) -> dict[str, str]:
    model_files.require_full_window(ref.folder)
    model = whisper_model.load(ref, device=environment.detect().device)
    processor = whisper_model.load_processor(ref, language)
    full_context, transcripts = ref.context == "full", {}
    options = decoding.RowDecodingOptions(
        language, settings.max_new_tokens, full_context=full_context, batch_frames=settings.batch_frames
    )
    for names in _chunks(cache, missing, settings.batch_frames, full_context):
        rows = np.array([missing[name] for name in names])
        decoded = decoding.decode_rows_to_text(model, processor, cache, rows, options, on_clips)
        chunk = dict(zip(names, decoded, strict=True))
        _append(path, chunk)
        transcripts |= chunk
    return transcripts


def _chunks(cache: FeatureCache, missing: dict[str, int], batch_frames: int, full_context: bool) -> list[list[str]]:
    """Return the clips sorted by length, _BATCHES batches at a time."""
    names = list(missing)
    lengths = cache.rows["frames"].to_numpy()[[missing[name] for name in names]]
    batches = sorted_batches(np.full_like(lengths, FULL_FRAMES) if full_context else lengths, batch_frames)
    starts = range(0, len(batches), _BATCHES)
    return [[names[i] for batch in batches[start : start + _BATCHES] for i in batch] for start in starts]


def read(path: Path) -> dict[str, str]:
    """Read the stored transcripts by fingerprint; the first line of a clip counts, incomplete lines are ignored."""
    transcripts: dict[str, str] = {}
    if not path.exists():
        return transcripts
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
            transcripts.setdefault(entry["clip"], entry["heard"])
        except (ValueError, KeyError, TypeError):
            continue
    return transcripts


def _append(path: Path, transcripts: dict[str, str]) -> None:
    """Append in one write. The leading line break ends a line that an interrupted write left incomplete."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{format_lines(transcripts)}")


def format_lines(transcripts: dict[str, str]) -> str:
    """Format transcripts by fingerprint as the JSON lines that `read` reads."""
    return "".join(json.dumps({"clip": name, "heard": text}) + "\n" for name, text in transcripts.items())
