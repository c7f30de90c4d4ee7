"""On whom and on what a model fails: the columns by which a report is cut, and the scores of the parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipelines.experiments.report.alignment import Step
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import quality
from pipelines.speech import scoring, text
from pipelines.whisper import log_mel as features
from pipelines.whisper.log_mel import LogMel

TOLD = ("gender", "variant", "origin", "accent", "age", "sentence_domain")
"""Columns of the cache, where the source tells them."""
_DURATIONS_S, _SNRS_DB = (2, 4, 8, 15), (10, 20, 30)
_FOUND = {
    "duration": ["under 2 s", "2 to 4 s", "4 to 8 s", "8 to 15 s", "15 s and more"],
    "snr": ["under 10 dB", "10 to 20 dB", "20 to 30 dB", "30 dB and more"],
    "words": ["all seen", "some unseen"],
}
"""Columns that are found out here, and their values in order."""
COLUMNS = (*TOLD, *_FOUND)

DEFINITIONS = {
    "variant": "The synthetic voice, or the variant of the language.",
    "origin": "The part of the corpus.",
    "sentence_domain": "The field that the sentence is from.",
    "duration": "How long the clip is.",
    "snr": "Signal over noise, estimated from the log-mel: what 95 % of the frames' powers stay below over what 15 % "
    "stay below, the pauses. A clip without pauses seems noisier than it is.",
    "words": "Whether every word of the sentence occurs somewhere in the training split of this cache.",
}
"""What slices are cut by, as the page tells it; what needs no word stands as the source tells it."""


def columns(cache: FeatureCache, rows: np.ndarray) -> pd.DataFrame:
    """What slices need of these rows of a cache, one row each.

    `duration`, `snr`, `words`: the buckets of _FOUND. `snr_db`: the estimate behind `snr`. `unseen_words`: words of
    the reference that occur nowhere in the training split.
    """
    table = cache.rows.iloc[rows]
    snrs_db = np.array([snr_db(cache.log_mel(int(row))) for row in rows])
    known = vocabulary(cache)
    unseen = np.array([sum(word not in known for word in text.normalise(said).split()) for said in table["text"]])
    return pd.DataFrame(
        {
            "duration": _bucket("duration", table["duration_s"].to_numpy(), _DURATIONS_S),
            "snr": _bucket("snr", snrs_db, _SNRS_DB),
            "snr_db": snrs_db.round(1),
            "words": np.array(_FOUND["words"], dtype=object)[(unseen > 0).astype(int)],
            "unseen_words": unseen,
        }
    )


def vocabulary(cache: FeatureCache) -> set[str]:
    """The words of a cache's training split, normalised."""
    training = cache.rows["text"].iloc[cache.split("train")]
    return {word for sentence in training for word in text.normalise(sentence).split()}


def snr_db(log_mel: LogMel) -> float:
    """Signal over noise in dB, never below 0: quality.snr_db on the powers of the log-mel's frames.

    Frames are 25 ms each 10 ms there, instead of 20 ms each 20 ms. Whisper clamps what lies 80 dB below the loudest
    band, so an estimate beyond 60 dB is too low.
    """
    power = 10.0 ** (4.0 * log_mel.frames.astype(np.float64) - 4.0)  # the extractor has (log10 + 4) / 4
    return quality.snr_db(power @ _band_weights(log_mel.frames.shape[1]))


@functools.lru_cache(maxsize=4)
def _band_weights(n_mels: int) -> np.ndarray:
    """float64 [n_mels]: about the widths of the mel bands, which the filters divide by, but for a constant: with them
    the sum over the bands is the power of a frame.
    """
    filters = features.mel_filters(n_mels)
    density = filters.sum(axis=1)
    return filters.sum(axis=0) / np.maximum(filters.T @ density, 1e-12)


def unseen_errors(alignments: list[list[Step]], known: set[str]) -> np.ndarray:
    """Of each utterance, the words of the reference that are unknown and did not come out; int64 [n]."""
    return np.array(
        [sum(word not in known for step in steps if step.is_error for word in step.reference) for steps in alignments],
        dtype=np.int64,
    )


def table(predictions: pd.DataFrame) -> pd.DataFrame:
    """WER per value of each slice column: slice, value, wer, low, high (95 %), n, speakers."""
    edits = scoring.count_edits(predictions["reference"].tolist(), predictions["hypothesis"].tolist())
    speakers = predictions["speaker"].tolist()
    rows = []
    for column in (name for name in COLUMNS if name in predictions):
        values = predictions[column].to_numpy()
        for value in _in_order(column, values):
            own = values == value
            told = rate(edits.word_edits[own], edits.words[own], [s for s, is_own in zip(speakers, own) if is_own])
            rows.append({"slice": column, "value": value, "wer": told.pop("rate"), **told})
    return pd.DataFrame(rows, columns=["slice", "value", "wer", "low", "high", "n", "speakers"])


def rate(errors: np.ndarray, of: np.ndarray, speakers: Sequence[str]) -> dict[str, Any]:
    """sum(errors) / sum(of) as `rate`, its 95 % interval over speakers as `low` and `high`, `n` utterances, `speakers`.

    `errors`, `of` int [n], `of` above 0; a speaker without a name is one of its own.
    """
    names = [name or f"\0{number}" for number, name in enumerate(speakers)]
    blocks = np.unique(names, return_inverse=True)[1]
    low, high = scoring.interval(errors, of, blocks, samples=1_000, seed=13)
    return {
        "rate": float(errors.sum() / of.sum()),
        "low": max(0.0, low),
        "high": high,
        "n": len(errors),
        "speakers": int(blocks.max()) + 1,
    }


def seen_and_unseen(predictions: pd.DataFrame, lost: np.ndarray) -> list[dict[str, Any]]:
    """The share of the reference's words that did not come out (substituted or deleted; insertions belong to no word),
    of words that the training split has and of others: `words` (seen, unseen), `count`, and the keys of `rate`.

    `lost` int [n]: the words of each utterance's reference that did not come out.
    """
    words = np.array([len(text.normalise(said).split()) for said in predictions["reference"]])
    unseen, unseen_lost = predictions["unseen_words"].to_numpy(), predictions["unseen_errors"].to_numpy()
    told = []
    for name, errors, of in (("seen", lost - unseen_lost, words - unseen), ("unseen", unseen_lost, unseen)):
        own = of > 0
        if own.any():
            found = rate(errors[own], of[own], predictions["speaker"][own].tolist())
            told.append({"words": name, "count": int(of.sum()), **found, "high": min(1.0, found["high"])})
    return told


def _bucket(column: str, values: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    return np.array(_FOUND[column], dtype=object)[np.digitize(values, bounds)]


def _in_order(column: str, values: np.ndarray) -> list[Any]:
    found = set(values)
    return [value for value in _FOUND.get(column, ()) if value in found] or sorted(found, key=str)
