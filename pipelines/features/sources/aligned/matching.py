"""Predict where each line is spoken, from the short strings that text and hypotheses share.

Letters are compared, not words: an untuned model writes few words of a new language right, but many letters. Matches
of five letters are kept where others lie on nearly the same diagonal. With subtitles, a line through the stated and the
real times (RANSAC) gives shift and drift. A manuscript has no times: the longest chain of matches in order gives them.
Memory grows with the matches, not with the product of both lengths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
"""A line of a manuscript further from any match, in letters, has no predicted time."""
_FIT_S = 1.5
"""Distance from the fitted line up to which a match supports it."""
_MIN_INLIERS = 12
_EXACT_S = 0.2
"""Median distance of these matches from the line below which the stated times place the lines. It is 0.07 to 0.09 s
with exact times, 0.14 s if they vary by 0.2 s (standard deviation), 0.24 s with 0.4 s."""


@dataclass(frozen=True)
class Prediction:
    """Where lines are spoken."""

    times_s: np.ndarray
    """Start and end of each line in seconds, float64 [n, 2]; NaN where nothing is known."""
    is_exact: bool
    """Whether these are the stated times, corrected for shift and drift, and the matches agree with them."""


def predict(lines: Sequence[Line], windows: Sequence[DecodedWindow]) -> Prediction:
    """Return where each line is spoken."""
    letters = [normalise(line.text).replace(" ", "") for line in lines]
    firsts = np.cumsum([0, *map(len, letters)])
    text, (recognised, times_s) = "".join(letters), _recognised_letters(windows)
    matches = _supported(_matches(text, recognised))
    if not len(matches):
        return Prediction(np.full((len(lines), 2), np.nan), is_exact=False)
    if lines[0].start_s is not None:
        owner = np.searchsorted(firsts, matches[:, 0], side="right") - 1
        starts, ends = (np.array([getattr(line, name) for line in lines]) for name in ("start_s", "end_s"))
        share = (matches[:, 0] - firsts[owner]) / np.maximum(np.diff(firsts)[owner], 1)
        stated_s = starts[owner] + share * (ends - starts)[owner]
        fit = _fit(stated_s, times_s[matches[:, 1]])
        if fit is not None:
            slope, offset, spread_s = fit
            return Prediction(np.stack([starts, ends], axis=1) * slope + offset, is_exact=spread_s < _EXACT_S)
    return Prediction(_from_chain(firsts, matches, times_s), is_exact=False)


def _recognised_letters(windows: Sequence[DecodedWindow]) -> tuple[str, np.ndarray]:
    """Return the letters of all hypotheses and the time of each."""
    letters, times = [], []
    for window in windows:
        ends_s = [*window.starts_s[1:], window.end_s]
        for word, start_s, end_s in zip(window.words, window.starts_s, ends_s, strict=True):
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


def _fit(stated_s: np.ndarray, real_s: np.ndarray) -> tuple[float, float, float] | None:
    """Return slope and offset of the line that most matches support, and their median distance; None if few do."""
    rng = np.random.default_rng(0)
    best, span_s = np.zeros(len(stated_s), dtype=bool), max(2.0, 0.1 * float(np.ptp(stated_s)))
    for a, b in rng.integers(0, len(stated_s), (2_000, 2)):
        if abs(stated_s[b] - stated_s[a]) < span_s:
            continue
        slope = (real_s[b] - real_s[a]) / (stated_s[b] - stated_s[a])
        if 0.8 < slope < 1.25:
            inliers = np.abs(real_s - real_s[a] - slope * (stated_s - stated_s[a])) < _FIT_S
            best = inliers if inliers.sum() > best.sum() else best
    if best.sum() < _MIN_INLIERS:
        return None
    slope, offset = np.polyfit(stated_s[best], real_s[best], 1)
    distances_s = np.abs(real_s - slope * stated_s - offset)[best]
    return float(slope), float(offset), float(np.median(distances_s))


def _from_chain(firsts: np.ndarray, matches: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """Return the times of lines from the longest chain of matches that go forward in both."""
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
    points = matches[chain[::-1]]
    at = np.interp(firsts, points[:, 0], times_s[points[:, 1]])
    nearest = np.array([np.abs(points[:, 0] - first).min() for first in firsts])
    predicted = np.stack([at[:-1], at[1:]], axis=1)
    predicted[np.minimum(nearest[:-1], nearest[1:]) > _MAX_GAP] = np.nan
    return predicted
