"""Calibration of confidence: confidence compared with correctness, and WER of the most confident utterances."""

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
    "ece_words": "The same with the share of right words (1 - WER, at least 0) instead of right utterances: confidence "
    "is a mean over tokens, so it should match this share.",
    "coverage": "WER of the most confident utterances, for each share of utterances that is kept.",
}


def calibration(logprobs: np.ndarray, errors: np.ndarray, words: np.ndarray) -> dict[str, Any]:
    """Compare confidence with correctness; all arguments are float or int [n], one value per utterance.

    `bins`: low, high, n, confidence, right (share of utterances without a word error), words_right (1 - WER of the
    bin, at least 0); empty bins are left out. `ece`, `ece_words`: DEFINITIONS. `coverage`: at 5 %, 10 % ... 100 % of
    the utterances, the most confident first: coverage, confidence (the lowest among them), wer.
    """
    confidence = np.exp(logprobs)
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [_bin(index, bin_of == index, confidence, errors, words) for index in np.unique(bin_of)]
    weights = np.array([part["n"] for part in bins]) / len(confidence)
    return {
        "mean_confidence": float(confidence.mean()),
        "right": float((errors == 0).mean()),
        "ece": _distance(weights, bins, "right"),
        "ece_words": _distance(weights, bins, "words_right"),
        "bins": bins,
        "coverage": _coverage(confidence, errors, words),
    }


def _bin(
    index: int, inside: np.ndarray, confidence: np.ndarray, errors: np.ndarray, words: np.ndarray
) -> dict[str, Any]:
    return {
        "low": float(index) / BINS,
        "high": (float(index) + 1) / BINS,
        "n": int(inside.sum()),
        "confidence": float(confidence[inside].mean()),
        "right": float((errors[inside] == 0).mean()),
        "words_right": max(0.0, 1 - float(errors[inside].sum() / words[inside].sum())),
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
