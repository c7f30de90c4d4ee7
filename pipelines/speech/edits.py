"""Word and character edits between references and hypotheses, counted by Levenshtein alignment (jiwer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.infra.errors import LabError
from pipelines.speech import text


@dataclass(frozen=True)
class Edits:
    """Word and character edits of n utterances: int64 [n] each."""

    substitutions: np.ndarray
    """Words."""
    insertions: np.ndarray
    """Words."""
    deletions: np.ndarray
    """Words."""
    words: np.ndarray
    """Words in the reference."""
    char_edits: np.ndarray
    """Substituted, inserted and deleted characters, spaces included."""
    chars: np.ndarray
    """Characters in the reference, spaces included."""

    @property
    def word_edits(self) -> np.ndarray:
        """Substitutions, insertions and deletions of words: int64 [n]."""
        return self.substitutions + self.insertions + self.deletions


def count_edits(references: Sequence[str], hypotheses: Sequence[str], *, normalised: bool = True) -> Edits:
    """Return the edits of every utterance, over words and over characters.

    `normalised`: apply text.normalise to both sides; otherwise only white space is collapsed. Raises LabError for no
    utterance, unequal lengths, a text that is no string, such as None or NaN, or a reference of signs without a word.

    An empty reference means that nothing was said: every word of its transcript is an insertion. At least one
    reference must have a word.
    """
    if len(references) != len(hypotheses) or not len(references):
        raise LabError(
            f"scoring needs one transcript per reference and at least one, "
            f"got {len(references)} references and {len(hypotheses)} transcripts"
        )
    require_strings(references, hypotheses)
    rows = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        prepared = _prepare(reference, normalised)
        if not prepared and reference.strip():
            raise LabError(f"a reference without a word cannot be scored, got {reference[:60]!r}: remove that row")
        rows.append(_count_one(prepared, _prepare(hypothesis, normalised)))
    edits = Edits(*(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)))
    if not edits.words.any():
        raise LabError("scoring needs a reference that is not empty, got none: all are without a word")
    return edits


def require_strings(references: Sequence[Any], hypotheses: Sequence[Any]) -> None:
    """Raise LabError, naming the first, if a reference or a hypothesis is no string, such as None or NaN."""
    for what, texts in (("reference", references), ("transcript", hypotheses)):
        number = next((number for number, one in enumerate(texts) if not isinstance(one, str)), None)
        if number is not None:
            raise LabError(
                f"scoring needs strings, got the {what} {texts[number]!r} at position {number}: "
                f"{'remove that row' if what == 'reference' else 'write an empty string where nothing was transcribed'}"
            )


def _prepare(sentence: str, normalised: bool) -> str:
    return text.normalise(sentence) if normalised else " ".join(sentence.split())


def _count_one(reference: str, hypothesis: str) -> tuple[int, int, int, int, int, int]:
    """Return the values of one utterance in the order of the fields of `Edits`."""
    import jiwer

    if not reference:  # jiwer refuses it
        return 0, len(hypothesis.split()), 0, 0, len(hypothesis), 0
    words = jiwer.process_words(reference, hypothesis)
    chars = jiwer.process_characters(reference, hypothesis)
    return (
        words.substitutions,
        words.insertions,
        words.deletions,
        len(reference.split()),
        chars.substitutions + chars.insertions + chars.deletions,
        len(reference),
    )
