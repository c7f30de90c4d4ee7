"""How sure a transcript is: the probability that a word is right, calibrated on the validation split.

What the model itself says, the product of the probabilities of a word's tokens, is more than it can keep. Two numbers
mend most of that (Platt 1999): sigmoid(slope * logprob + intercept), fitted to the words of the validation split, each
right or wrong by the alignment that WER is counted with. Insertions and substitutions are wrong words; deletions are no
words, and no confidence can speak of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines import decoding, text

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from pipelines.cache import FeatureCache

UNSURE = 0.5
"""A word below this is marked: it is more likely wrong than right."""
MOST_CLIPS = 512
"""Some thousand words fit two numbers well; a long validation split is thinned to so many clips."""
_FEWEST = 50
_RIDGE = 1e-3
_STEPS = 50


@dataclass(frozen=True)
class Calibration:
    """From the log-probability of a word to the probability that it is right."""

    slope: float = 1.0
    intercept: float = 0.0
    words: int = 0
    """How many words it was fitted to; 0 where it was not, and the model's own probability is all there is."""
    ece_before: float = 0.0
    ece: float = 0.0
    """Expected calibration error over ten equal bins (Guo et al. 2017) on those words, before and after."""

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Calibration:
        """What a model's manifest tells."""
        told = facts.get("confidence")
        known = {name: told[name] for name in asdict(Calibration()) if name in told} if isinstance(told, dict) else {}
        return Calibration(**known)

    def __call__(self, logprob: float) -> float:
        """The probability, 0 to 1, that a word with this natural log-probability is right."""
        if not self.words:
            return float(np.exp(min(logprob, 0.0)))
        return float(1 / (1 + np.exp(-np.clip(self.slope * logprob + self.intercept, -30, 30))))

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def of_model(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    cache: FeatureCache,
    rows: np.ndarray,
    *,
    language: str,
    batch_frames: int,
    max_new_tokens: int,
    full_context: bool,
) -> Calibration:
    """The calibration of a model on cache rows, those of the validation split: it is decoded once more."""
    rows = rows[:: max(1, -(-len(rows) // MOST_CLIPS))]
    heard = decoding.hear_rows(
        model,
        processor,
        cache,
        rows,
        language=language,
        batch_frames=batch_frames,
        max_new_tokens=max_new_tokens,
        full_context=full_context,
        closely=True,
    )
    return fit(*judged(cache.rows["text"].iloc[rows].tolist(), [one.words for one in heard]))


def judged(references: Sequence[str], heard: Iterable[Sequence[tuple[str, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability float [n] of each word that was heard, and bool [n] whether it is right.

    `heard`: for each utterance its words (decoding.Heard.words). Normalised as for WER; a word of which the normaliser
    leaves nothing is left out, one that it splits counts as its parts.
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
    """The two numbers by maximum likelihood (Newton's method, a little ridge); none for fewer than 50 words.

    As Platt has it, the targets are a little within 0 and 1, so that a perfect validation split promises no perfection.
    """
    n_right, n = int(right.sum()), len(right)
    if n < _FEWEST:
        return Calibration()
    targets = np.where(right, (n_right + 1) / (n_right + 2), 1 / (n - n_right + 2))
    design = np.stack([np.maximum(logprobs, -30.0), np.ones(n)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(_STEPS):
        told = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (told - targets) + _RIDGE * (weights - [1.0, 0.0])
        curvature = (design * (told * (1 - told))[:, None]).T @ design + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-8:
            break
    slope, intercept = max(float(weights[0]), 0.0), float(weights[1])  # surer is never less right
    told = 1 / (1 + np.exp(-np.clip(slope * design[:, 0] + intercept, -30, 30)))
    return Calibration(slope, intercept, n, expected_error(np.exp(logprobs), right), expected_error(told, right))


def expected_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """The mean distance, weighted by words, between confidence and the share of right words in equal bins."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(
        sum(abs(confidence[places == p].mean() - right[places == p].mean()) * (places == p).mean() for p in set(places))
    )
