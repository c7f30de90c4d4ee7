"""How sure a transcript is: the probability that a word is right, calibrated on the validation split.

What the model itself says, the product p of the probabilities of a word's tokens, is more or less than it can keep. Two
numbers mend most of that: sigmoid(slope * logit(p) + intercept), fitted to the words of the validation split, each
right or wrong by the alignment that WER is counted with. On the logit a model that is right about itself is among the
curves (slope 1, intercept 0), which it is not on log p: Platt's (1999) would bend it there (Kull et al. 2017 say why).
The curve is kept only where it tells words that it was not fitted to better than p does. Insertions and substitutions
are wrong words; deletions are no words, and no confidence can speak of them.

An export carries the numbers of the float32 weights that it was made of.
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
    from pipelines.whisper.decoding import DecodingOptions


UNSURE = 0.5
"""A word below this is marked: it is more likely wrong than right."""
MOST_CLIPS = 512
"""Some thousand words fit two numbers well; a long validation split is thinned to so many clips."""
_FEWEST = 50
_FOLDS = 10
_RIDGE = 1e-3
_STEPS = 50
_SUREST = 1 - 1e-4
"""Probabilities nearer to 1, or to 0 than the rest of it, are told apart by nothing but rounding."""


@dataclass(frozen=True)
class Calibration:
    """From the log-probability of a word to the probability that it is right."""

    slope: float = 1.0
    intercept: float = 0.0
    words: int = 0
    """How many words it was fitted to; 0 where they were too few, or no curve was better than the model's own
    probability, which is all there is then."""
    ece_before: float = 0.0
    ece: float = 0.0
    """Expected calibration error over ten equal bins (Guo et al. 2017) on those words, before and after; after by
    cross-validation."""
    scale: str = "logit"
    """What the two numbers are applied to; `logprob` in models from before there was a choice."""

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Calibration:
        """What a model's manifest tells."""
        told = facts.get("confidence")
        told = {"scale": "logprob", **told} if isinstance(told, dict) and told else {}
        return Calibration(**{name: told[name] for name in asdict(Calibration()) if name in told})

    def __call__(self, logprob: float) -> float:
        """The probability, 0 to 1, that a word with this natural log-probability is right."""
        if not self.words:
            return float(np.exp(min(logprob, 0.0)))
        told = _logits(np.array([logprob])) if self.scale == "logit" else np.array([logprob])
        return float(_sigmoid(self.slope * told + self.intercept)[0])

    def as_dict(self) -> dict[str, Any]:
        return {name: round(told, 4) if isinstance(told, float) else told for name, told in asdict(self).items()}


def calibrate(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    cache: ClipFeatures,
    rows: np.ndarray,
    options: DecodingOptions,
) -> Calibration:
    """Decode cache rows of the validation split and return the calibration fitted to their words."""
    rows = rows[:: max(1, -(-len(rows) // MOST_CLIPS))]
    hypotheses = decoding.decode_rows(model, processor, cache, rows, replace(options, word_logprobs=True))
    return fit(*judged(cache.rows["text"].iloc[rows].tolist(), [one.words for one in hypotheses]))


def judged(references: Sequence[str], heard: Iterable[Sequence[tuple[str, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability float [n] of each word that was heard, and bool [n] whether it is right.

    `heard`: for each utterance its words (decoding.Hypothesis.words). Normalised as for WER; a word of which the
    normaliser leaves nothing is left out, one that it splits counts as its parts.
    """
    import jiwer

    logprobs: list[float] = []
    right: list[bool] = []
    for reference, words in zip(references, heard, strict=True):
        parts = [(part, logprob) for word, logprob in words for part in text.normalise(word).split()]
        said = text.normalise(reference)
        if not parts:
            continue
        own = [False] * len(parts)
        if said:
            aligned = jiwer.process_words(said, " ".join(part for part, _ in parts)).alignments[0]
            for chunk in aligned:
                if chunk.type == "equal":
                    own[chunk.hyp_start_idx : chunk.hyp_end_idx] = [True] * (chunk.hyp_end_idx - chunk.hyp_start_idx)
        logprobs += [logprob for _, logprob in parts]
        right += own
    return np.array(logprobs), np.array(right, dtype=bool)


def fit(logprobs: np.ndarray, right: np.ndarray) -> Calibration:
    """The two numbers; none for fewer than 50 words, nor where cross-validation finds the model's own probability at
    least as good (log loss)."""
    n, everything = len(right), np.arange(len(right))
    if n < _FEWEST:
        return Calibration()
    own, told, logits = np.exp(np.minimum(logprobs, 0.0)), np.empty(n), _logits(logprobs)
    for left_out in np.array_split(everything, _FOLDS):  # neighbours, for the words of a clip have much in common
        rest = np.delete(everything, left_out)
        slope, intercept = _numbers(logits[rest], right[rest])
        told[left_out] = _sigmoid(slope * logits[left_out] + intercept)
    before = expected_error(own, right)
    if _log_loss(told, right) >= _log_loss(own, right):
        return Calibration(ece_before=before, ece=before)
    return Calibration(*_numbers(logits, right), n, before, expected_error(told, right))


def _numbers(logits: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Slope and intercept by maximum likelihood (Newton's method, a little ridge towards what changes nothing).

    As Platt has it, the targets are a little within 0 and 1, so that a perfect validation split promises no perfection.
    """
    n_right, n = int(right.sum()), len(right)
    targets = np.where(right, (n_right + 1) / (n_right + 2), 1 / (n - n_right + 2))
    design = np.stack([logits, np.ones(n)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(_STEPS):
        told = _sigmoid(design @ weights)
        gradient = design.T @ (told - targets) + _RIDGE * (weights - [1.0, 0.0])
        curvature = (design * (told * (1 - told))[:, None]).T @ design + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-8:
            break
    return max(float(weights[0]), 0.0), float(weights[1])  # surer is never less right


def _logits(logprobs: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of natural log-probabilities, within what _SUREST bounds."""
    told = np.clip(logprobs, np.log1p(-_SUREST), np.log(_SUREST))
    return told - np.log(-np.expm1(told))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def _log_loss(told: np.ndarray, right: np.ndarray) -> float:
    told = np.clip(told, 1 - _SUREST, _SUREST)
    return float(-np.where(right, np.log(told), np.log(1 - told)).mean())


def expected_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """The mean distance, weighted by words, between confidence and the share of right words in equal bins."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(
        sum(abs(confidence[places == p].mean() - right[places == p].mean()) * (places == p).mean() for p in set(places))
    )
