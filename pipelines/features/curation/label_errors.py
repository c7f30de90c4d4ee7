"""Label errors: training clips in which a model hears something else than their transcript says.

What a model heard is kept beside the runs, one file for each model, one line for each clip, so that another threshold,
a cut-off run or a corpus with one more clip decodes nothing twice. Of processes that ask at the same time one decodes,
and the others wait for its answers.
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
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import sorted_batches
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.model import ModelRef

CODE = "1"
"""Version of the code that decodes: raised whenever the same model and clip would give another transcript."""
_BATCHES = 8
"""Batches between two writes: what a killed run repeats."""


def label_cers(references: list[str], heard: list[str]) -> np.ndarray:
    """Character error rate of each transcript, normalised, float64 [n]: edits over characters of the reference."""
    edits = scoring.count_edits(references, heard)
    return edits.char_edits / edits.chars


def label_wers(references: list[str], heard: list[str]) -> np.ndarray:
    """Word error rate of each transcript, normalised, float64 [n]: edits over words of the reference."""
    edits = scoring.count_edits(references, heard)
    return edits.word_edits / edits.words


def heard(
    cache: FeatureCache,
    rows: np.ndarray,
    ref: ModelRef,
    language: str,
    settings: EvaluationSettings,
    folder: Path,
    *,
    on_clips: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """What the model hears in each of `rows` of the cache; what `folder` knows of already is not decoded again.

    A model tuned at clip length decodes so; any other sees the full 30 s.
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
        known = read(path)
        missing = {name: int(row) for name, row in zip(names, rows, strict=True) if name not in known}
        on_clips(len(rows) - len(missing))
        if missing:
            known |= _decode(cache, missing, ref, language, settings, path, on_clips)
    return [known[name] for name in names]


def fingerprints(cache: FeatureCache, rows: np.ndarray) -> list[str]:
    """What names the sound of each clip."""
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
    model = whisper_model.load(ref, device=environment.detect().device)
    processor = whisper_model.load_processor(ref, language)
    full_context, told = ref.context == "full", {}
    options = decoding.DecodingOptions(
        language, settings.max_new_tokens, full_context=full_context, batch_frames=settings.batch_frames
    )
    for names in _portions(cache, missing, settings.batch_frames, full_context):
        rows = np.array([missing[name] for name in names])
        transcripts = decoding.decode_rows_to_text(model, processor, cache, rows, options, on_clips)
        portion = dict(zip(names, transcripts, strict=True))
        _append(path, portion)
        told |= portion
    return told


def _portions(cache: FeatureCache, missing: dict[str, int], batch_frames: int, full_context: bool) -> list[list[str]]:
    """The clips, longest first, a few batches at a time: neighbours in length stay together."""
    names = list(missing)
    lengths = cache.rows["frames"].to_numpy()[[missing[name] for name in names]]
    batches = sorted_batches(np.full_like(lengths, FULL_FRAMES) if full_context else lengths, batch_frames)
    return [
        [names[i] for batch in batches[at : at + _BATCHES] for i in batch] for at in range(0, len(batches), _BATCHES)
    ]


def read(path: Path) -> dict[str, str]:
    """Fingerprint to what was heard, as the first line of a clip has it; one that a kill cut short is passed over."""
    known: dict[str, str] = {}
    if not path.exists():
        return known
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
            known.setdefault(entry["clip"], entry["heard"])
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _append(path: Path, portion: dict[str, str]) -> None:
    """One write: a cut-off one leaves whole lines and at most one torn; the line break before it closes that one."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{lines(portion)}")


def lines(heard: dict[str, str]) -> str:
    """What `read` reads."""
    return "".join(json.dumps({"clip": name, "heard": text}) + "\n" for name, text in heard.items())
