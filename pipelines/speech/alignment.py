"""Align the words of a reference with those of a transcript, and mark the differences.

Split and joined compounds are kept together.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.infra.plots import ACCENT
from pipelines.speech import text

PIECES = 4
"""Largest number of parts of a split or joined word: `kväll s mat` for `kvällsmat` has three."""
_FREE = ("equal", "split", "join")
_ERROR = 1_000_000
"""Cost of an error, far above the total bonus for similar words."""
_VOWELS = frozenset("aeiouyåäöé")
_LONGEST_WORD = 32
"""Most letters of a word in a table."""
_MARK = f"background: {ACCENT}40; color: inherit"
"""Style of wrong words: a light background that can be read on white and on dark pages."""


@dataclass(frozen=True)
class Step:
    """Adjacent words of the reference and the words of the transcript that they are aligned with."""

    kind: str
    """equal, substitution, deletion, insertion, split (one word written as several) or join (several as one)."""
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]

    @property
    def is_error(self) -> bool:
        """True if the step counts as a word error when split and joined compounds do not."""
        return self.kind not in _FREE


def align(reference: Sequence[str], hypothesis: Sequence[str], pieces: int = PIECES) -> list[Step]:
    """Return the alignment with the fewest substitutions, deletions and insertions; splits and joins are free.

    Takes words, or letters with `pieces=1` (no splits and joins). Among alignments with equally many errors, the one
    with the most similar words is chosen. The run time is proportional to the product of the lengths.
    """
    if tuple(reference) == tuple(hypothesis):
        return [Step("equal", (word,), (word,)) for word in reference]
    n, m = len(reference), len(hypothesis)
    best: list[list[tuple[int, int, int]]] = [[(0, 0, 0)] * (m + 1) for _ in range(n + 1)]
    for i in range(n + 1):
        for j in range(m + 1):
            if i or j:
                best[i][j] = min(_arrivals(best, reference, hypothesis, i, j, pieces), key=lambda way: way[0])
    return _steps(best, reference, hypothesis)


def _arrivals(
    best: list[list[tuple[int, int, int]]],
    reference: Sequence[str],
    hypothesis: Sequence[str],
    i: int,
    j: int,
    pieces: int,
) -> list[tuple[int, int, int]]:
    """Return the possible last steps that align the first i with the first j words.

    Each is (total cost, number of reference words, number of transcript words).
    """
    ways = []
    if i and j:
        ways.append((best[i - 1][j - 1][0] + _cost(reference[i - 1], hypothesis[j - 1]), 1, 1))
        for k in range(2, pieces + 1):
            if k <= j and _is_joined(reference[i - 1], hypothesis, j - k, j):
                ways.append((best[i - 1][j - k][0], 1, k))
            if k <= i and _is_joined(hypothesis[j - 1], reference, i - k, i):
                ways.append((best[i - k][j - 1][0], k, 1))
    if i:
        ways.append((best[i - 1][j][0] + _ERROR, 1, 0))
    if j:
        ways.append((best[i][j - 1][0] + _ERROR, 0, 1))
    return ways


def _cost(reference: str, hypothesis: str) -> int:
    """Return the cost of a substitution: lower if two words share letters, or if two single letters are vowels."""
    if reference == hypothesis:
        return -100
    if len(reference) == len(hypothesis) == 1:
        return _ERROR - 50 * (reference in _VOWELS and hypothesis in _VOWELS)
    ours, theirs = set(reference), set(hypothesis)
    return _ERROR - 99 * len(ours & theirs) // len(ours | theirs)


def _is_joined(word: str, parts: Sequence[str], start: int, end: int) -> bool:
    """Return True if `word` is `parts[start:end]` written as one word."""
    return word.endswith(parts[end - 1]) and word == "".join(parts[start:end])


def _steps(best: list[list[tuple[int, int, int]]], reference: Sequence[str], hypothesis: Sequence[str]) -> list[Step]:
    i, j, steps = len(reference), len(hypothesis), []
    while i or j:
        _, back, across = best[i][j]
        ours, theirs = tuple(reference[i - back : i]), tuple(hypothesis[j - across : j])
        steps.append(Step(_kind(ours, theirs), ours, theirs))
        i, j = i - back, j - across
    return steps[::-1]


def _kind(reference: tuple[str, ...], hypothesis: tuple[str, ...]) -> str:
    if reference == hypothesis:
        return "equal"
    sizes = len(reference), len(hypothesis)
    named = {(1, 1): "substitution", (1, 0): "deletion", (0, 1): "insertion"}
    return named.get(sizes) or ("split" if sizes[0] == 1 else "join")


def marked(reference: str, hypothesis: str) -> str:
    """Return the words of a hypothesis as HTML; those that differ from the reference are marked, missing ones are …"""
    words = hypothesis.split()
    normal = text.normalise(hypothesis).split()
    if [text.normalise(word) for word in words] != normal:
        words = normal
    parts, left = [], iter(words)
    for step in align(text.normalise(reference).split(), normal):
        written = html.escape(" ".join(_shortened(next(left)) for _ in step.hypothesis)) or "…"
        parts.append(written if step.kind == "equal" else f"<mark style='{_MARK}'>{written}</mark>")
    return " ".join(parts)


def _shortened(word: str) -> str:
    """Return a word without its end if a repetition made it too long for a table."""
    return word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}…"
