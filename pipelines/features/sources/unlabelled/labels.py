"""Accept a pseudo-label or reject it, from what the models wrote about one window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.recipes import languages
from pipelines.speech import repetition, scoring
from pipelines.speech.text import normalise
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.decoding_options import MAX_NEW_TOKENS

REASONS = ("excluded", "no_speech", "repetition", "wrong_language", "low_confidence", "models_disagree")
"""Reasons of rejections that the recipe asks for: nothing is wrong with such a recording."""


@dataclass(frozen=True)
class Limits:
    """What a pseudo-label must reach."""

    min_confidence: float
    """Least mean confidence of its words, 0 to 1."""
    max_disagreement: float
    """Largest character error rate between the texts of both models."""
    language: str
    """Whisper's code."""


@dataclass(frozen=True)
class Label:
    """A window with its pseudo-label; `reason` says why it is not used, and is empty if it is."""

    start_s: float
    end_s: float
    text: str
    confidence: float
    reason: str = ""
    detail: str = ""


def label(
    window: dict[str, Any],
    calibration: Calibration,
    limits: Limits,
    gaps: Sequence[Sequence[float]] = (),
    *,
    other: dict[str, Any] | None = None,
    language: str = "",
) -> Label:
    """Return the label of a window: `window` is the record of the model that writes it (labeller.Labeller.decode).

    `other` is the record of the second model, `language` what a model detected, `gaps` start and end of the parts of
    the recording that cannot be read.
    """
    start_s, end_s, text = window["start_s"], window["end_s"], window["text"].strip()
    expected = confidence(window, calibration)
    reason, detail = "", ""
    if any(start < end_s and end > start_s for start, end in gaps):
        reason, detail = "damaged", "a part of it cannot be read"
    elif not normalise(text):
        reason, detail = "no_speech", "the model writes nothing"
    elif window["tokens"] >= MAX_NEW_TOKENS or repetition.is_repeating(text, end_s - start_s):
        reason, detail = "repetition", f"the model repeats itself: {text[:80]!r}"
    elif language and language != limits.language:
        reason, detail = "wrong_language", f"it sounds like {languages.NAMES[language].title()}: {text[:80]!r}"
    elif expected < limits.min_confidence:
        reason = "low_confidence"
        detail = f"confidence {expected:.2f}, at least {limits.min_confidence:g} is wanted: {text[:80]!r}"
    elif other is not None and (cer := disagreement(text, other["text"])) > limits.max_disagreement:
        reason = "models_disagree"
        detail = f"CER {cer:.2f}, at most {limits.max_disagreement:g} is wanted: {text[:60]!r}, {other['text'][:60]!r}"
    return Label(start_s, end_s, text, expected, reason, detail)


def confidence(window: dict[str, Any], calibration: Calibration) -> float:
    """Return the mean confidence of the words of a window: the expected share of right words among them, 0 to 1."""
    logprobs = [logprob for _, logprob in window["words"]] or [window["logprob"]]
    return float(np.mean([calibration(logprob) for logprob in logprobs]))


def disagreement(text: str, other: str) -> float:
    """Return the character error rate of `other` if `text` is taken as the reference, both normalised."""
    edits = scoring.count_edits([text], [other])
    return float(edits.char_edits[0] / max(edits.chars[0], 1))
