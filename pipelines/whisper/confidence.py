"""Word confidences: the probability that a word is right, calibrated on the validation split.

The model's own estimate, the product p of the probabilities of a word's tokens, is over- or underconfident. Two numbers
correct most of that: sigmoid(slope * logit(p) + intercept), fitted to the words of the validation split, each marked
right or wrong by the alignment that WER is counted with. On the logit, a well calibrated model is among the curves
(slope 1, intercept 0); on log p it is not, and Platt scaling (1999) would distort it (Kull et al. 2017). The curve is
used only if it predicts words that it was not fitted to better than p does. Insertions and substitutions are wrong
words. Deletions are not words and have no confidence.

An export carries the numbers of the float32 weights that it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.speech import text
from pipelines.whisper import decoding

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from pipelines.whisper.batching import ClipFeatures
    from pipelines.whisper.decoding import RowDecodingOptions


UNSURE = 0.5
"""Words with a lower confidence are marked: they are more likely wrong than right."""
MAX_CLIPS = 512
"""A longer validation split is thinned to this many clips: some thousand words are enough to fit two numbers."""
_MIN_WORDS = 50
_FOLDS = 10
_RIDGE = 1e-3
_MAX_NEWTON_STEPS = 50
_MAX_PROBABILITY = 1 - 1e-4
"""Probabilities are clipped to 1 - this and this: nearer to 0 or 1 they differ by rounding only."""


@dataclass(frozen=True)
class Calibration:
    """Maps the log-probability of a word to the probability that it is right."""

    slope: float = 1.0
    intercept: float = 0.0
    words: int = 0
    """Words that it was fitted to; 0 if the model's own probability is used, because there were too few words or no
    curve was better."""
    ece_before: float = 0.0
    ece: float = 0.0
    """Expected calibration error over ten equal bins (Guo et al. 2017) on those words, before and after calibration;
    after by cross-validation."""
    scale: str = "logit"
    """Input of slope and intercept; `logprob` in models from before this field existed."""

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Calibration:
        """Return the calibration recorded in a model's manifest, or the default one."""
        recorded = facts.get("confidence")
        if not isinstance(recorded, dict) or not recorded:
            return Calibration()
        recorded = {"scale": "logprob", **recorded}
        return Calibration(**{name: recorded[name] for name in asdict(Calibration()) if name in recorded})

    def __call__(self, logprob: float) -> float:
        """Return the probability, 0 to 1, that a word with this natural log-probability is right."""
        if not self.words:
            return float(np.exp(min(logprob, 0.0)))
        inputs = _logits(np.array([logprob])) if self.scale == "logit" else np.array([logprob])
        return float(_sigmoid(self.slope * inputs + self.intercept)[0])

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def calibrate(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    cache: ClipFeatures,
    rows: np.ndarray,
    options: RowDecodingOptions,
) -> Calibration:
    """Decode cache rows of the validation split and return the calibration fitted to their words."""
    rows = rows[:: max(1, -(-len(rows) // MAX_CLIPS))]
    hypotheses = decoding.decode_rows(model, processor, cache, rows, replace(options, word_logprobs=True))
    return fit(*mark_words(cache.rows["text"].iloc[rows].tolist(), [hypothesis.words for hypothesis in hypotheses]))


def mark_words(
    references: Sequence[str], hypotheses: Iterable[Sequence[tuple[str, float]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probability float [n] of each hypothesis word, and bool [n] whether it is right.

    `hypotheses`: the words of each utterance (decoding.Hypothesis.words). They are normalised as for WER: words of
    punctuation only are left out, and the parts of a word that the normaliser splits count separately.
    """
    import jiwer

    logprobs: list[float] = []
    right: list[bool] = []
    for reference, words in zip(references, hypotheses, strict=True):
        parts = [(part, logprob) for word, logprob in words for part in text.normalise(word).split()]
        expected = text.normalise(reference)
        if not parts:
            continue
        marks = [False] * len(parts)
        if expected:
            for chunk in jiwer.process_words(expected, " ".join(part for part, _ in parts)).alignments[0]:
                if chunk.type == "equal":
                    marks[chunk.hyp_start_idx : chunk.hyp_end_idx] = [True] * (chunk.hyp_end_idx - chunk.hyp_start_idx)
        logprobs += [logprob for _, logprob in parts]
        right += marks
    return np.array(logprobs), np.array(right, dtype=bool)


def fit(logprobs: np.ndarray, right: np.ndarray) -> Calibration:
    """Fit a calibration to words: log-probabilities float [n], bool [n] whether each is right.

    Returns the default calibration for fewer than 50 words, or if cross-validation finds the model's own probability at
    least as good (log loss).
    """
    n, indices = len(right), np.arange(len(right))
    if n < _MIN_WORDS:
        return Calibration()
    uncalibrated, calibrated, logits = np.exp(np.minimum(logprobs, 0.0)), np.empty(n), _logits(logprobs)
    for fold in np.array_split(indices, _FOLDS):  # contiguous, because the words of a clip are correlated
        rest = np.delete(indices, fold)
        slope, intercept = _fit_sigmoid(logits[rest], right[rest])
        calibrated[fold] = _sigmoid(slope * logits[fold] + intercept)
    before = expected_error(uncalibrated, right)
    if _log_loss(calibrated, right) >= _log_loss(uncalibrated, right):
        return Calibration(ece_before=before, ece=before)
    return Calibration(*_fit_sigmoid(logits, right), n, before, expected_error(calibrated, right))


def expected_error(confidence: np.ndarray, right: np.ndarray, n_bins: int = 10) -> float:
    """Return the expected calibration error of `confidence` float [n] against `right` bool [n].

    That is the mean distance between confidence and the share of right words, over equal bins weighted by words.
    """
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    return float(
        sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    )


def _fit_sigmoid(logits: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept by maximum likelihood (Newton's method, a small ridge towards 1 and 0).

    The targets are slightly inside 0 and 1 (Platt 1999), so that a validation split without errors does not promise
    certainty.
    """
    n_right, n = int(right.sum()), len(right)
    targets = np.where(right, (n_right + 1) / (n_right + 2), 1 / (n - n_right + 2))
    design = np.stack([logits, np.ones(n)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(_MAX_NEWTON_STEPS):
        predicted = _sigmoid(design @ weights)
        gradient = design.T @ (predicted - targets) + _RIDGE * (weights - [1.0, 0.0])
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-8:
            break
    return max(float(weights[0]), 0.0), float(weights[1])  # confidence must not fall as the probability rises


def _logits(logprobs: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of natural log-probabilities, p clipped by _MAX_PROBABILITY."""
    clipped = np.clip(logprobs, np.log1p(-_MAX_PROBABILITY), np.log(_MAX_PROBABILITY))
    return clipped - np.log(-np.expm1(clipped))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def _log_loss(probabilities: np.ndarray, right: np.ndarray) -> float:
    clipped = np.clip(probabilities, 1 - _MAX_PROBABILITY, _MAX_PROBABILITY)
    return float(-np.where(right, np.log(clipped), np.log(1 - clipped)).mean())
