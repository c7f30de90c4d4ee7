"""Confusions: substituted words, the letters å ä ö, and compounds that were split or joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pipelines.speech.alignment import Step, align

SWEDISH = "åäö"
_PLAIN = str.maketrans("åäöé", "aaoe")
_MAX_ENTRIES = 30
"""Length of each list in a report."""


def confusions(alignments: list[list[Step]]) -> dict[str, Any]:
    """Count confusions over all utterances, normalised.

    `substitutions`, `deletions`, `insertions`: the most frequent ones, `reference`, `hypothesis`, `count`.
    `dots`: substituted words that differ only in å ä ö é for a a o e.
    `letters`: see `letters`. `compounds`: see `compounds`.
    """
    steps = [step for steps in alignments for step in steps]
    substituted = [step for step in steps if step.kind == "substitution"]
    return {
        "substitutions": _most_frequent(substituted),
        "deletions": _most_frequent(step for step in steps if step.kind == "deletion"),
        "insertions": _most_frequent(step for step in steps if step.kind == "insertion"),
        "dots": {
            "count": len(dotted := [step for step in substituted if _differs_in_dots(step)]),
            "examples": _most_frequent(dotted),
        },
        "letters": letters(steps),
        "compounds": compounds(steps),
    }


def letters(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """Count for each of å, ä and ö how often it is in the references, how often it is right, and what replaced it.

    Only equal words, compounds, and substituted words with at most half of their letters wrong count: in other pairs of
    words the alignment of letters is arbitrary. `taken_for` maps a letter (empty: none) to a count.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    for step in steps:
        pairs.update((a, b) for a, b in _letter_pairs(step) if a in SWEDISH)
    return [
        {
            "letter": letter,
            "said": sum(count for (a, _), count in pairs.items() if a == letter),
            "right": pairs[letter, letter],
            "taken_for": dict(
                Counter({b: count for (a, b), count in pairs.items() if a == letter and b != letter}).most_common()
            ),
        }
        for letter in SWEDISH
    ]


def compounds(steps: list[Step]) -> dict[str, Any]:
    """Count words written as several (`splits`) and several words written as one (`joins`), with the same letters.

    `wer_without`: the WER if they count as right.
    """
    splits, joins = ([step for step in steps if step.kind == kind] for kind in ("split", "join"))
    words = sum(len(step.reference) for step in steps)
    return {
        "splits": len(splits),
        "joins": len(joins),
        "wer_without": sum(step.is_error for step in steps) / words,
        "examples": _most_frequent([*splits, *joins]),
    }


def _letter_pairs(step: Step) -> list[tuple[str, str]]:
    """Return pairs (letter of the reference, letter of the transcript or empty) of a recognised or similar word."""
    if step.kind not in ("equal", "split", "join", "substitution"):
        return []
    reference, hypothesis = "".join(step.reference), "".join(step.hypothesis)
    if not set(reference) & set(SWEDISH):
        return []
    if reference == hypothesis:
        return list(zip(reference, reference, strict=True))
    aligned = align(reference, hypothesis, pieces=1)
    if sum(one.is_error for one in aligned) > max(len(reference), len(hypothesis)) / 2:
        return []
    pairs = [(*one.reference, *one.hypothesis) for one in aligned if one.reference]
    return [(pair[0], pair[1] if len(pair) > 1 else "") for pair in pairs]


def _differs_in_dots(step: Step) -> bool:
    return step.reference[0].translate(_PLAIN) == step.hypothesis[0].translate(_PLAIN)


def _most_frequent(steps: Iterable[Step]) -> list[dict[str, Any]]:
    counts = Counter((" ".join(step.reference), " ".join(step.hypothesis)) for step in steps)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))  # equal counts: alphabetically
    return [{"reference": a, "hypothesis": b, "count": count} for (a, b), count in ordered[:_MAX_ENTRIES]]
