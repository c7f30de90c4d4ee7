"""Slices of a report: WER by speaker group, duration, noise and vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipelines.features.cache import FeatureCache
from pipelines.features.curation import quality
from pipelines.speech import intervals, scoring, text
from pipelines.speech.alignment import Step
from pipelines.whisper import log_mel as whisper_log_mel
from pipelines.whisper.log_mel import LogMel

METADATA = ("gender", "variant", "origin", "accent", "age", "sentence_domain")
"""Columns of the cache that a source may provide."""
_DURATIONS_S, _SNRS_DB = (2, 4, 8, 15), (10, 20, 30)
_COMPUTED = {
    "duration": ["under 2 s", "2 to 4 s", "4 to 8 s", "8 to 15 s", "15 s and more"],
    "snr": ["under 10 dB", "10 to 20 dB", "20 to 30 dB", "30 dB and more"],
    "words": ["all seen", "some unseen"],
}
"""Columns that are computed here, and their values in order."""
COLUMNS = (*METADATA, *_COMPUTED)

DEFINITIONS = {
    "variant": "Synthetic voice, or variant of the language.",
    "origin": "Part of the corpus.",
    "sentence_domain": "Subject of the sentence.",
    "duration": "Duration of the clip.",
    "snr": "Signal-to-noise ratio, estimated from the log-mel: the 95th percentile of the frames' powers over the 15th "
    "percentile, which is the level of pauses. A clip without pauses seems noisier than it is.",
    "words": "All words of the sentence occur in the training split of this cache, or some do not.",
}
"""Explanations of slices on the page. Values of other slices are those of the source."""


def columns(cache: FeatureCache, rows: np.ndarray) -> pd.DataFrame:
    """Compute the slice columns for these rows of a cache, one row each.

    `duration`, `snr`, `words`: the buckets of _COMPUTED. `snr_db`: the estimate behind `snr`. `unseen_words`: number of
    words of the reference that do not occur in the training split.
    """
    table = cache.rows.iloc[rows]
    snrs_db = np.array([snr_db(cache.log_mel(int(row))) for row in rows])
    seen = vocabulary(cache)
    unseen = np.array([sum(word not in seen for word in text.normalise(line).split()) for line in table["text"]])
    return pd.DataFrame(
        {
            "duration": _bucket("duration", table["duration_s"].to_numpy(), _DURATIONS_S),
            "snr": _bucket("snr", snrs_db, _SNRS_DB),
            "snr_db": snrs_db.round(1),
            "words": np.array(_COMPUTED["words"], dtype=object)[(unseen > 0).astype(int)],
            "unseen_words": unseen,
        }
    )


def vocabulary(cache: FeatureCache) -> set[str]:
    """Return the words of a cache's training split, normalised."""
    training = cache.rows["text"].iloc[cache.split("train")]
    return {word for sentence in training for word in text.normalise(sentence).split()}


def snr_db(log_mel: LogMel) -> float:
    """Estimate the signal-to-noise ratio in dB, at least 0, with quality.snr_db on the powers of log-mel frames.

    The frames are 25 ms long with a hop of 10 ms, instead of 20 ms and 20 ms. Whisper clamps values 80 dB below the
    loudest band, so estimates above 60 dB are too low.
    """
    power = 10.0 ** (4.0 * log_mel.frames.astype(np.float64) - 4.0)  # the extractor has (log10 + 4) / 4
    return quality.snr_db(power @ _band_weights(log_mel.frames.shape[1]))


@functools.lru_cache(maxsize=4)
def _band_weights(n_mels: int) -> np.ndarray:
    """Return the approximate widths of the mel bands up to a constant, float64 [n_mels].

    The mel filters are normalised by the band width; with these weights the sum over bands is the power of a frame.
    """
    filters = whisper_log_mel.mel_filters(n_mels)
    density = filters.sum(axis=1)
    return filters.sum(axis=0) / np.maximum(filters.T @ density, 1e-12)


def unseen_errors(alignments: list[list[Step]], seen: set[str]) -> np.ndarray:
    """Return the number of unseen reference words that were not recognised, per utterance; int64 [n]."""
    return np.array(
        [sum(word not in seen for step in steps if step.is_error for word in step.reference) for steps in alignments],
        dtype=np.int64,
    )


def table(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return WER per value of each slice column: slice, value, wer, and low, high, n, speakers, over of `rate`."""
    names = ["slice", "value", "wer", "low", "high", "n", "speakers", "over"]
    return pd.DataFrame(rows(predictions), columns=names).astype({"low": float, "high": float})


def rows(predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of `table`."""
    edits = scoring.count_edits(predictions["reference"].tolist(), predictions["hypothesis"].tolist())
    speakers = predictions["speaker"].tolist()
    scored_rows = []
    for column in (name for name in COLUMNS if name in predictions):
        values = predictions[column].to_numpy()
        for value in _in_order(column, values):
            inside = values == value
            part = [speaker for speaker, is_inside in zip(speakers, inside, strict=True) if is_inside]
            scores = rate(edits.word_edits[inside], edits.words[inside], part)
            scored_rows.append({"slice": column, "value": value, "wer": scores.pop("rate"), **scores})
    return scored_rows


def rate(errors: np.ndarray, of: np.ndarray, speakers: Sequence[str]) -> dict[str, Any]:
    """Return sum(errors) / sum(of) as `rate`, its 95 % interval (`low`, `high`), `n`, `speakers` and `over`.

    `errors`, `of` int [n], `of` above 0. `over`: what the interval resamples (intervals.Units). One utterance has no
    interval: `low` and `high` are None.
    """
    blocks, units = intervals.group(speakers, len(errors))
    low, high = intervals.bootstrap_ci95(errors, of, blocks, samples=1_000, seed=13) or (None, None)
    return {
        "rate": float(errors.sum() / of.sum()),
        "low": low and max(0.0, low),
        "high": high,
        "n": units.n,
        "speakers": units.speakers,
        "over": units.over,
    }


def seen_and_unseen(predictions: pd.DataFrame, missed: np.ndarray) -> list[dict[str, Any]]:
    """Return the share of reference words that were substituted or deleted, for words seen in training and for others.

    Each row has `words` (seen, unseen), `count`, and the keys of `rate`. `missed` int [n]: the number of such words per
    utterance.
    """
    words = np.array([len(text.normalise(reference).split()) for reference in predictions["reference"]])
    unseen, unseen_missed = predictions["unseen_words"].to_numpy(), predictions["unseen_errors"].to_numpy()
    rows = []
    for name, errors, of in (("seen", missed - unseen_missed, words - unseen), ("unseen", unseen_missed, unseen)):
        has_words = of > 0
        if has_words.any():
            scores = rate(errors[has_words], of[has_words], predictions["speaker"][has_words].tolist())
            high = scores["high"] and min(1.0, scores["high"])
            rows.append({"words": name, "count": int(of.sum()), **scores, "high": high})
    return rows


def _bucket(column: str, values: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    return np.array(_COMPUTED[column], dtype=object)[np.digitize(values, bounds)]


def _in_order(column: str, values: np.ndarray) -> list[Any]:
    distinct = set(values)
    return [value for value in _COMPUTED.get(column, ()) if value in distinct] or sorted(distinct, key=str)
