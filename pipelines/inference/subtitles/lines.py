"""Break words into lines at clauses, with lines of about equal length."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import accumulate

_FINAL, _CLAUSE, _QUOTES = ".?!…。？！", ";:–—", "\"'”’»«“‘()[]"
_CONJUNCTIONS = frozenset(
    "och men eller för så utan samt fast att som när om medan eftersom därför innan sedan där vilket vilken "
    "and but or nor because that which who when while if since before after where although "
    "og aber und oder weil dass wenn et mais ou que parce".split()
)
"""Words before which a clause often begins."""
_LEADING = frozenset(
    "en ett den det de en min din sin vår i på av till med från hos vid över under inte är har att mycket "
    "a an the my your his her our their of in on at to with from by is are has very der die das ein eine le la les un "
    "une de du".split()
)
"""Words that belong to the following one."""
_IMBALANCE = 4.0
_JOINER, _MODIFIERS = "\u200d", frozenset(map(chr, range(0x1F3FB, 0x1F400)))
"""Joins emoji, and the colours of their skin."""
_FLAGS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
"""Two of these letters are a flag."""


def divide_word(word: str, width: int) -> list[str]:
    """Return the parts, of at most `width` characters, of a word that is longer than a line.

    Letters keep their accents, and emoji their modifiers, unless one of them alone is longer than a line.
    """
    parts, first = [], 0
    while len(word) - first > width:
        end = next((end for end in range(first + width, first, -1) if not _is_joined(word, end)), first + width)
        parts.append(word[first:end])
        first = end
    return [*parts, word[first:]]


def _is_joined(word: str, position: int) -> bool:
    """Return whether the characters before and after a position are shown as one."""
    before, after = word[position - 1], word[position]
    is_part = unicodedata.category(after).startswith("M") or after in _MODIFIERS or _JOINER in (before, after)
    n_flags = next((n for n, letter in enumerate(word[position - 1 :: -1]) if letter not in _FLAGS), position)
    return is_part or (after in _FLAGS and n_flags % 2 == 1)


def break_cost(before: str, after: str) -> float:
    """Return how bad a break between two words is: 0 after a sentence, 1 within a phrase, more after an article."""
    end, lower = before.rstrip(_QUOTES)[-1:], before.lower()
    if end and end in _FINAL:
        return 0.0
    if end and (end in _CLAUSE or before in ("-", "–", "—")):
        return 0.15
    if end in (",", "、", "，"):
        return 0.25
    if after.lower().strip(_QUOTES) in _CONJUNCTIONS and lower not in _CONJUNCTIONS:
        return 0.5
    return 1.5 if lower in _LEADING or lower in _CONJUNCTIONS else 1.0


def count_lines(words: Sequence[str], width: int) -> int:
    """Return the smallest number of lines of `width` characters; every word fits into one."""
    n_lines, length = 0, width
    for word in words:
        if length + 1 + len(word) <= width:
            length += 1 + len(word)
        else:
            n_lines, length = n_lines + 1, len(word)
    return n_lines


def wrap(words: Sequence[str], width: int) -> list[int]:
    """Return for each line, of the smallest number of lines, the index after its last word.

    The lines are balanced and end at clauses where that is possible.
    """
    n_lines, n = count_lines(words, width), len(words)
    ends = [0, *accumulate(len(word) + 1 for word in words)]
    goal = (ends[-1] - n_lines) / max(n_lines, 1)
    # cheapest[j]: cost of the first j words in the lines so far, and where these end
    cheapest: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(n_lines):
        following: dict[int, tuple[float, list[int]]] = {}
        for first, (cost, line_ends) in cheapest.items():
            for last in range(first + 1, n + 1):
                length = ends[last] - ends[first] - 1
                if length > width:
                    break
                new = cost + _IMBALANCE * ((length - goal) / width) ** 2
                new += break_cost(words[last - 1], words[last]) if last < n else 0.0
                if last not in following or new < following[last][0]:
                    following[last] = (new, [*line_ends, last])
        cheapest = following
    return cheapest[n][1]
