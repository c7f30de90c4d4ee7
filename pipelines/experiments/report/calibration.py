"""Whether the model knows when it is right: confidence beside correctness, and what leaving out the unsure wins."""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10
_COVERAGES = np.arange(1, 21) / 20

DEFINITIONS = {
    "confidence": "The geometric mean of the probabilities that the model gave to the tokens of its transcript, the "
    "end token among them: exp(mean log-probability).",
    "ece": "Expected calibration error over ten equal bins of confidence (Guo et al. 2017): the mean distance, "
    "weighted by utterances, between confidence and the share of utterances without a wrong word.",
    "ece_words": "The same with the share of right words, 1 - WER and never below 0, in place of right utterances: "
    "confidence is a mean over tokens, so this is what it can be expected to meet.",
    "coverage": "Of so large a share of the utterances, those that the model is surest of, the WER.",
}


def calibration(logprobs: np.ndarray, errors: np.ndarray, words: np.ndarray) -> dict[str, Any]:
    """How far confidence can be trusted; all float or int [n], one for each utterance.

    `bins`: low, high, n, confidence, right (share of utterances without a word error), words_right (1 - WER of the
    bin, at least 0); empty bins are left out. `ece`, `ece_words`: DEFINITIONS. `coverage`: at 5 %, 10 % ... 100 % of
    the utterances, the surest first: coverage, confidence (the lowest among them), wer.
    """
    confidence = np.exp(logprobs)
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [_bin(place, places == place, confidence, errors, words) for place in np.unique(places)]
    weights = np.array([part["n"] for part in bins]) / len(confidence)
    return {
        "mean_confidence": float(confidence.mean()),
        "right": float((errors == 0).mean()),
        "ece": _distance(weights, bins, "right"),
        "ece_words": _distance(weights, bins, "words_right"),
        "bins": bins,
        "coverage": _coverage(confidence, errors, words),
    }


def _bin(place: int, own: np.ndarray, confidence: np.ndarray, errors: np.ndarray, words: np.ndarray) -> dict[str, Any]:
    return {
        "low": float(place) / BINS,
        "high": (float(place) + 1) / BINS,
        "n": int(own.sum()),
        "confidence": float(confidence[own].mean()),
        "right": float((errors[own] == 0).mean()),
        "words_right": max(0.0, 1 - float(errors[own].sum() / words[own].sum())),
    }


def _distance(weights: np.ndarray, bins: list[dict[str, Any]], name: str) -> float:
    return float(sum(weight * abs(part["confidence"] - part[name]) for weight, part in zip(weights, bins, strict=True)))


def _coverage(confidence: np.ndarray, errors: np.ndarray, words: np.ndarray) -> list[dict[str, float]]:
    order = np.argsort(-confidence, kind="stable")
    wers = errors[order].cumsum() / words[order].cumsum()
    counts = np.unique(np.ceil(_COVERAGES * len(order) - 1e-9).astype(int))
    return [
        {
            "coverage": float(count / len(order)),
            "confidence": float(confidence[order[count - 1]]),
            "wer": float(wers[count - 1]),
        }
        for count in counts
    ]
