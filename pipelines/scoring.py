"""WER and CER with 95 % intervals; the only definition of a score in the lab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines import text
from pipelines.errors import LabError


@dataclass(frozen=True)
class Score:
    """Errors over a set of utterances: sums of edits over sums of reference words, never an average of ratios."""

    wer: float
    """(substitutions + insertions + deletions) / words; can exceed 1."""
    ci95: tuple[float, float]
    """95 % percentile interval of `wer`, by bootstrap over speakers."""
    cer: float
    """The same over characters, spaces counted."""
    substitutions: int
    insertions: int
    deletions: int
    words: int
    """Words in the references."""
    n: int
    """Utterances."""
    speakers: int
    """Speakers, the units that the bootstrap draws; where they are unknown, each utterance is its own."""
    normalised: bool
    """Whether case and punctuation were set aside (text.normalise)."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.ci95
        told = f"95 % {low:.3f}-{high:.3f}, n = {self.n}, {self.speakers} speakers"
        return f"WER {self.wer:.3f} ({told}), CER {self.cer:.3f}"


@dataclass(frozen=True)
class Edits:
    """Word and character edits of each utterance; int64 [n] each."""

    substitutions: np.ndarray
    insertions: np.ndarray
    deletions: np.ndarray
    words: np.ndarray
    char_edits: np.ndarray
    chars: np.ndarray

    @property
    def word_edits(self) -> np.ndarray:
        return self.substitutions + self.insertions + self.deletions


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    speakers: Sequence[str] | None = None,
    *,
    normalised: bool = True,
    samples: int = 1_000,
    seed: int = 13,
) -> Score:
    """Score `hypotheses` against `references`, utterance by utterance.

    `speakers` names who says each utterance: utterances of one speaker are not independent, so the bootstrap draws
    speakers with replacement and takes all their utterances (Bisani & Ney 2004, with speakers as blocks).
    Raises LabError for no utterance, unequal lengths (of speakers, too) or a reference without a word.
    """
    edits = count_edits(references, hypotheses, normalised=normalised)
    blocks = _blocks(speakers, len(references))
    return Score(
        wer=_ratio(edits.word_edits, edits.words),
        ci95=interval(edits.word_edits, edits.words, blocks, samples=samples, seed=seed),
        cer=_ratio(edits.char_edits, edits.chars),
        substitutions=int(edits.substitutions.sum()),
        insertions=int(edits.insertions.sum()),
        deletions=int(edits.deletions.sum()),
        words=int(edits.words.sum()),
        n=len(references),
        speakers=int(blocks.max()) + 1,
        normalised=normalised,
    )


def count_edits(references: Sequence[str], hypotheses: Sequence[str], *, normalised: bool = True) -> Edits:
    """The edits of every utterance by Levenshtein alignment (jiwer), over words and over characters."""
    if len(references) != len(hypotheses) or not len(references):
        raise LabError(
            f"scoring needs one transcript per reference and at least one, "
            f"got {len(references)} references and {len(hypotheses)} transcripts"
        )
    rows = [
        _edits(_form(ref, normalised), _form(hyp, normalised)) for ref, hyp in zip(references, hypotheses, strict=True)
    ]
    return Edits(*(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)))


def interval(
    edits: np.ndarray, words: np.ndarray, blocks: np.ndarray, *, samples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of sum(edits) / sum(words), drawing whole blocks with replacement.

    `blocks` int64 [n] numbers each utterance's block from 0.
    """
    count = int(blocks.max()) + 1
    block_edits = np.bincount(blocks, weights=edits, minlength=count)
    block_words = np.bincount(blocks, weights=words, minlength=count)
    drawn = np.random.default_rng(seed).integers(count, size=(samples, count))
    ratios = block_edits[drawn].sum(axis=1) / block_words[drawn].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def difference(
    ours: Edits, theirs: Edits, speakers: Sequence[str] | None = None, *, samples: int = 1_000, seed: int = 13
) -> tuple[float, tuple[float, float]]:
    """WER of `ours` less that of `theirs` on the same utterances, and its 95 % interval.

    Paired: each resample draws speakers and takes all their utterances from both sides (Bisani & Ney 2004), so that
    what is hard for both does not blur the difference.
    """
    if len(ours.words) != len(theirs.words) or not np.array_equal(ours.words, theirs.words):
        raise LabError("two systems are compared on the same references in the same order: these are different ones")
    gained = ours.word_edits - theirs.word_edits
    blocks = _blocks(speakers, len(gained))
    return _ratio(gained, ours.words), interval(gained, ours.words, blocks, samples=samples, seed=seed)


def _edits(reference: str, hypothesis: str) -> tuple[int, int, int, int, int, int]:
    import jiwer

    if not reference:
        raise LabError("a reference without a word cannot be scored: remove that row")
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


def _form(sentence: str, normalised: bool) -> str:
    return text.normalise(sentence) if normalised else " ".join(sentence.split())


def _blocks(speakers: Sequence[str] | None, n: int) -> np.ndarray:
    """Block numbers: one per speaker; an utterance without a speaker is a block of its own."""
    if speakers is not None and len(speakers) != n:
        raise LabError(
            f"scoring needs one speaker per reference, got {n} references and {len(speakers)} speakers: "
            "name one for each, '' where unknown"
        )
    names = [name or f"\0{i}" for i, name in enumerate(speakers if speakers is not None else [""] * n)]
    return np.unique(names, return_inverse=True)[1]


def _ratio(edits: np.ndarray, of: np.ndarray) -> float:
    return float(edits.sum() / of.sum())
