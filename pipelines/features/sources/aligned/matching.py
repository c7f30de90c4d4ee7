"""Predict where each line is spoken, from the short strings that text and hypotheses share.

Letters are compared, not words: an untuned model writes few words of a new language right, but many letters. Matches
of five letters are kept where others lie on nearly the same diagonal. With subtitles, a line through the stated and the
real times (RANSAC) gives shift and drift, and breaks.py divides them where the shift changes. A manuscript has no
times: the longest chain of matches in order gives them. Memory grows with the matches, not with the product of both
lengths.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.features.sources.aligned import breaks
from pipelines.features.sources.aligned.breaks import EXACT_S, FIT_S, MIN_INLIERS, Fit, Points, Section
from pipelines.features.sources.aligned.hypotheses import DecodedWindow
from pipelines.features.sources.aligned.texts import Line
from pipelines.speech.text import normalise

_LETTERS = 5
_MAX_OCCURRENCES = 20
"""More frequent strings say nothing about the place."""
_CELL, _DIAGONAL = 150, 40
"""Size, in letters, of the cells in which matches support each other: along and across the diagonal."""
_MIN_SUPPORT = 4
_MAX_GAP = 400
"""A line of a manuscript further from any match, in letters, has no predicted time. A line of subtitles further outside
all sections has no exact time."""
_EXACT_NEAR_S = 0.3
"""The same as EXACT_S for the matches around one line: they are few."""


@dataclass(frozen=True)
class Prediction:
    """Where lines are spoken."""

    times_s: np.ndarray
    """Start and end of each line in seconds, float64 [n, 2]; NaN where nothing is known."""
    is_exact: np.ndarray
    """Whether these are the stated times, corrected for shift and drift, and the matches agree with them: bool [n]."""


def predict(lines: Sequence[Line], windows: Sequence[DecodedWindow]) -> Prediction:
    """Return where each line is spoken."""
    letters = [normalise(line.text).replace(" ", "") for line in lines]
    firsts = np.cumsum([0, *map(len, letters)])
    text, (recognised, times_s) = "".join(letters), _recognised_letters(windows)
    matches = _supported(_matches(text, recognised))
    if not len(matches):
        return Prediction(np.full((len(lines), 2), np.nan), np.zeros(len(lines), dtype=bool))
    chain = _chain(matches)
    if lines[0].start_s is not None:
        stated_s = np.array([[line.start_s, line.end_s] for line in lines])
        fit = _fit(_stated(firsts, stated_s, matches[:, 0]), times_s[matches[:, 1]])
        if fit is not None:
            points = Points(chain[:, 0], _stated(firsts, stated_s, chain[:, 0]), times_s[chain[:, 1]])
            return _from_sections(firsts, stated_s, points, breaks.divide(points, fit))
    return Prediction(_from_chain(firsts, chain, times_s), np.zeros(len(lines), dtype=bool))


def _stated(firsts: np.ndarray, stated_s: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """Return the stated times of letters: they are spread evenly over their lines."""
    owner = np.searchsorted(firsts, letters, side="right") - 1
    starts_s, ends_s = stated_s[owner].T
    return starts_s + (letters - firsts[owner]) / np.maximum(np.diff(firsts)[owner], 1) * (ends_s - starts_s)


def _from_sections(firsts: np.ndarray, stated_s: np.ndarray, points: Points, sections: list[Section]) -> Prediction:
    """Correct the stated times of each line by the section that holds it.

    Between two sections, and in both, the times go from the earlier to the later and are not exact. Nor are those of a
    line too far outside all sections, in a section of a few cues, or whose neighbours disagree with the section.
    """
    times_s, is_exact = np.empty_like(stated_s), np.empty(len(stated_s), dtype=bool)
    for n, (first, end) in enumerate(itertools.pairwise(firsts.tolist())):
        before = [section for section in sections if section.first < end]
        after = [section for section in sections if section.last >= first]
        candidates = [section for section in before if section in after] or [*before[-1:], *after[:1]]
        both_s = np.stack([stated_s[n] * section.slope + section.offset for section in candidates])
        times_s[n] = both_s[:, 0].min(), both_s[:, 1].max()
        section = candidates[0]
        gap = max(section.first - end, first - section.last)
        agrees = section.spread_s < EXACT_S and section.spread_near_s(points, first, end) < _EXACT_NEAR_S
        is_long = len(sections) == 1 or section.is_long
        is_exact[n] = len(candidates) == 1 and is_long and gap <= _MAX_GAP and agrees
    return Prediction(times_s, is_exact)


def _recognised_letters(windows: Sequence[DecodedWindow]) -> tuple[str, np.ndarray]:
    """Return the letters of all hypotheses and the time of each."""
    letters, times = [], []
    for window in windows:
        ends_s = [*window.starts_s[1:], window.end_s]
        for word, start_s, end_s in zip(window.words, window.starts_s, ends_s, strict=False):  # there may be no word
            word = normalise(word).replace(" ", "")
            letters.append(word)
            times.append(np.linspace(start_s, max(start_s, min(end_s, start_s + 1)), len(word), endpoint=False))
    return "".join(letters), np.concatenate([np.zeros(0), *times])


def _matches(text: str, recognised: str) -> np.ndarray:
    """Return the positions in both of all shared strings: int64 [n, 2], by place in the hypotheses."""
    numbers: dict[str, int] = {}
    in_text, in_hypotheses = (
        np.array(
            [numbers.setdefault(one[i : i + _LETTERS], len(numbers)) for i in range(len(one) - _LETTERS + 1)], np.int64
        )
        for one in (text, recognised)
    )
    by_number = np.argsort(in_text, kind="stable")
    firsts = np.searchsorted(in_text[by_number], in_hypotheses)
    counts = np.bincount(in_text, minlength=len(numbers))[in_hypotheses]
    counts[counts > _MAX_OCCURRENCES] = 0
    of = np.repeat(np.arange(len(in_hypotheses)), counts)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([by_number[firsts[of] + nth], of], axis=1)


def _supported(matches: np.ndarray) -> np.ndarray:
    """Return the matches whose cell and its neighbours hold at least _MIN_SUPPORT matches."""
    cells = np.stack([matches[:, 0] // _CELL, (matches[:, 0] - matches[:, 1]) // _DIAGONAL], axis=1)
    distinct, numbers, sizes = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    counts = dict(zip(map(tuple, distinct.tolist()), sizes.tolist(), strict=True))
    near = [sum(counts.get((a + x, b + y), 0) for x in (-1, 0, 1) for y in (-1, 0, 1)) for a, b in distinct.tolist()]
    return matches[np.array(near, dtype=np.int64)[numbers.ravel()] >= _MIN_SUPPORT]


def _fit(stated_s: np.ndarray, real_s: np.ndarray) -> Fit | None:
    """Return the line that most matches support; None if few do."""
    rng = np.random.default_rng(0)
    best, span_s = np.zeros(len(stated_s), dtype=bool), max(2.0, 0.1 * float(np.ptp(stated_s)))
    for a, b in rng.integers(0, len(stated_s), (2_000, 2)):
        if abs(stated_s[b] - stated_s[a]) < span_s:
            continue
        slope = (real_s[b] - real_s[a]) / (stated_s[b] - stated_s[a])
        if 0.8 < slope < 1.25:
            inliers = np.abs(real_s - real_s[a] - slope * (stated_s - stated_s[a])) < FIT_S
            best = inliers if inliers.sum() > best.sum() else best
    return breaks.fitted(stated_s[best], real_s[best]) if best.sum() >= MIN_INLIERS else None


def _chain(matches: np.ndarray) -> np.ndarray:
    """Return the longest chain of matches that go forward in both."""
    order = np.lexsort((-matches[:, 1], matches[:, 0]))
    tops: list[int] = []
    """Last match, by its place in the hypotheses, of the best chain of each length."""
    ends: list[int] = []
    before: dict[int, int] = {}
    for n in order.tolist():
        length = bisect_left(ends, matches[n, 1])
        before[n] = tops[length - 1] if length else -1
        tops[length : length + 1], ends[length : length + 1] = [n], [matches[n, 1]]
    chain, n = [], tops[-1]
    while n >= 0:
        chain.append(n)
        n = before[n]
    return matches[chain[::-1]]


def _from_chain(firsts: np.ndarray, chain: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """Return the times of lines from the matches of a chain."""
    at = np.interp(firsts, chain[:, 0], times_s[chain[:, 1]])
    nearest = np.array([np.abs(chain[:, 0] - first).min() for first in firsts])
    predicted = np.stack([at[:-1], at[1:]], axis=1)
    predicted[np.minimum(nearest[:-1], nearest[1:]) > _MAX_GAP] = np.nan
    return predicted
