"""Divide subtitles where their shift changes: a break was cut out, or two files were joined.

One line through the stated and the real times holds in the largest section only. Its slope (the drift) is nearly that
of the others, so each match outside names a shift. The shift that wins most matches in a row begins a new section.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

FIT_S = 1.5
"""Distance from a line up to which a match supports it."""
MIN_INLIERS = 12
EXACT_S = 0.2
"""Median distance of these matches from the line below which the stated times place the lines. It is 0.07 to 0.09 s
with exact times, 0.14 s if they vary by 0.2 s (standard deviation), 0.24 s with 0.4 s."""
_MIN_GAIN = 24
"""Inliers that a further section must win."""
_SMALL_S, _MIN_LETTERS = 0.5, 200
"""Distance up to which a match supports a line if the shift changes by less than 3 s, and letters of such a section.
A shorter section, of a few cues, gives no exact times: any line fits them."""
_MAX_TRIED = 300
"""Shifts that are tried for a section."""
_MIN_SPAN_S = 2.0
"""Stated times, such as those of one cue or label, from which a drift can be told."""
_REFITS = 3
_MAX_SECTIONS = 40
_AROUND = 200
"""Letters before and after a line whose matches tell whether its section holds there."""


@dataclass(frozen=True)
class Points:
    """Matches that go forward in text and sound."""

    letters: np.ndarray
    """Their places in the text."""
    stated_s: np.ndarray
    real_s: np.ndarray

    def distances_s(self, slope: float, offset: float) -> np.ndarray:
        """Return their distances from a line."""
        return np.abs(self.real_s - slope * self.stated_s - offset)


@dataclass(frozen=True)
class Fit:
    """A line through stated and real times."""

    slope: float
    offset: float
    """In seconds."""
    spread_s: float
    """Median distance of its matches."""


@dataclass(frozen=True)
class Section(Fit):
    """The fit of a part of the text."""

    first: int
    last: int
    """Letters of the text with its first and last match."""

    @property
    def is_long(self) -> bool:
        """Return whether it is longer than the few cues that any line fits by chance."""
        return self.last - self.first >= _MIN_LETTERS

    def spread_near_s(self, points: Points, first: int, end: int) -> float:
        """Return the median distance of the matches around these letters of the text; 0 if there is none."""
        limits = max(first - _AROUND, self.first), min(end + _AROUND, self.last + 1)
        near_s = points.distances_s(self.slope, self.offset)[slice(*np.searchsorted(points.letters, limits))]
        return float(np.median(near_s)) if len(near_s) else 0.0


def fitted(stated_s: np.ndarray, real_s: np.ndarray) -> Fit:
    """Return the line of least squares, without drift if the stated times span less than _MIN_SPAN_S."""
    if np.ptp(stated_s) < _MIN_SPAN_S:
        slope, offset = 1.0, np.mean(real_s - stated_s)
    else:
        slope, offset = np.polyfit(stated_s, real_s, 1)
    return Fit(float(slope), float(offset), float(np.median(np.abs(real_s - slope * stated_s - offset))))


def divide(points: Points, fit: Fit) -> list[Section]:
    """Return the sections in order of the text.

    fit: the line that most matches support. It is that of the only section if the shift does not change.
    """
    owner, distances_s = np.zeros(len(points.letters), dtype=np.int64), points.distances_s(fit.slope, fit.offset)
    _search(points, owner, distances_s, fit.slope, FIT_S, 0)
    sections = _sections(points, owner, distances_s, fit)
    _search(points, owner, distances_s, fit.slope, _SMALL_S, _MIN_LETTERS)
    smaller = _sections(points, owner, distances_s, fit)
    times_vary = any(section.spread_s >= EXACT_S for section in smaller)  # then small sections may be chance
    return sections if times_vary else smaller


def _search(
    points: Points, owner: np.ndarray, distances_s: np.ndarray, slope: float, near_s: float, min_letters: int
) -> None:
    """Give parts of the matches a new owner, and their distances from its line, until no further line wins enough."""
    for n in range(owner.max() + 1, _MAX_SECTIONS):
        run = _best_run(points, distances_s, slope, near_s, min_letters)
        if run is None:
            return
        part, new_s = run
        owner[part], distances_s[part] = n, new_s[part]


def _sections(points: Points, owner: np.ndarray, distances_s: np.ndarray, fit: Fit) -> list[Section]:
    """Return the sections of the matches with one owner in a row. The last that was searched is never too small."""
    parts = np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1)
    if not owner.any():
        return [Section(*astuple(fit), *points.letters[[0, -1]].tolist())]
    inliers = [part[distances_s[part] < FIT_S] for part in parts]
    return [
        Section(*astuple(fitted(points.stated_s[one], points.real_s[one])), *points.letters[one[[0, -1]]].tolist())
        for one in inliers
        if len(one) >= MIN_INLIERS
    ]


def _best_run(
    points: Points, distances_s: np.ndarray, slope: float, near_s: float, min_letters: int
) -> tuple[slice, np.ndarray] | None:
    """Return the part in which another line wins most inliers, and all distances from it; None if it wins few."""
    is_inlier = distances_s < near_s
    rest = np.flatnonzero(~is_inlier)
    tried = rest[np.linspace(0, len(rest) - 1, min(len(rest), _MAX_TRIED)).astype(int)]
    offsets = points.real_s[tried] - slope * points.stated_s[tried]
    gains = [_run(points.distances_s(slope, offset) < near_s, is_inlier)[1] for offset in offsets]
    if max(gains, default=0) < _MIN_GAIN:
        return None
    offset = offsets[int(np.argmax(gains))]
    for _ in range(_REFITS):  # its drift may differ
        supports = points.distances_s(slope, offset) < near_s
        part, gain = _run(supports, is_inlier)
        inliers = np.arange(len(supports))[part][supports[part]]
        if gain < _MIN_GAIN or np.ptp(points.letters[inliers]) < min_letters:
            return None
        fit = fitted(points.stated_s[inliers], points.real_s[inliers])
        slope, offset = fit.slope, fit.offset
    new_s = points.distances_s(slope, offset)
    part, gain = _run(new_s < near_s, is_inlier)
    return (part, new_s) if gain >= _MIN_GAIN else None


def _run(supports: np.ndarray, is_inlier: np.ndarray) -> tuple[slice, int]:
    """Return the part in which a line has most inliers more than the lines so far, and how many more."""
    total = np.concatenate([[0], np.cumsum(supports.astype(int) - is_inlier)])
    gains = total - np.minimum.accumulate(total)
    end = int(gains.argmax())
    first = end - int(total[: end + 1][::-1].argmin())  # the last of equal minima
    return slice(first, end), int(gains[end])
