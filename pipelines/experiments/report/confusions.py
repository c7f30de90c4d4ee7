"""What is taken for what: words, the letters å ä ö, and compounds that were split or joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pipelines.experiments.report.alignment import Step, align

SWEDISH = "åäö"
_PLAIN = str.maketrans("åäöé", "aaoe")
_MOST = 30
"""Entries of each list that a report tells."""


def confusions(alignments: list[list[Step]]) -> dict[str, Any]:
    """Counts over all utterances, normalised.

    `substitutions`, `deletions`, `insertions`: the most frequent, `reference`, `hypothesis`, `count`.
    `dots`: substituted words that differ in nothing but å ä ö é for a a o e.
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
    """For each of å, ä and ö: how often it was said, how often it was written, and what was written in its place.

    Counted in words that were recognised or nearly so: equal ones, compounds, and substituted ones of which at most
    half the letters differ: in any other pair of words it is chance which letter stands beside which.
    `taken_for` maps a letter (empty: none) to a count.
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
    """Words that were written as several (`splits`) and several that were written as one (`joins`), letters alike.

    `wer_without`: the WER where they count as right; other words are then aligned as well as can be.
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
    """(letter of the reference, letter of the transcript or none) of a word that was recognised or nearly so."""
    if step.kind not in ("equal", "split", "join", "substitution"):
        return []
    said, written = "".join(step.reference), "".join(step.hypothesis)
    if not set(said) & set(SWEDISH):
        return []
    if said == written:
        return list(zip(said, said, strict=True))
    pairs = [(*one.reference, *one.hypothesis) for one in align(said, written, pieces=1) if one.reference]
    wrong = sum(one.is_error for one in align(said, written, pieces=1))
    if wrong > max(len(said), len(written)) / 2:
        return []
    return [(pair[0], pair[1] if len(pair) > 1 else "") for pair in pairs]


def _differs_in_dots(step: Step) -> bool:
    return step.reference[0].translate(_PLAIN) == step.hypothesis[0].translate(_PLAIN)


def _most_frequent(steps: Iterable[Step]) -> list[dict[str, Any]]:
    counts = Counter((" ".join(step.reference), " ".join(step.hypothesis)) for step in steps)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))  # of equal counts, by the alphabet
    return [{"reference": a, "hypothesis": b, "count": count} for (a, b), count in ordered[:_MOST]]
