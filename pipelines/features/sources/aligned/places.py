"""Place lines in the speech of a recording, and group those that no pause divides.

Lines whose stated times are exact, once shift and drift are known (matching.py), are placed by them. So speech without
a line cannot pull the lines beside it. Other lines are placed by the model.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.features.sources.aligned.hypotheses import DecodedWindow
from pipelines.features.sources.aligned.matching import Prediction
from pipelines.features.sources.aligned.texts import Line
from pipelines.speech.text import normalise
from pipelines.whisper.engines.forced import ForcedLine

Force = Callable[[Path, float, float, list[str]], list[ForcedLine]]
"""Score lines in a part of a recording: its path, start and end in seconds, and the lines."""
MIN_S, MAX_S = 1.0, 30.0
"""Shortest and longest clip."""
_NEAR_S = 2.0
"""Without exact times a line is tried in every window so near to its predicted time."""
_MAX_TRIED = 40
_MIN_SHARED_S, _MIN_SHARE = 0.3, 0.25
"""A line holds a stretch of speech if they have so many seconds, and so much of the stretch, in common. Two lines that
hold one stretch are joined. Times of lines are right to a few tenths of a second."""
_MAX_PAUSE_S = 2.0
"""Lines further apart are not joined, also if the first is too short for a clip."""
_PAD_S = 0.1
"""Taken off each end of a stretch, which segmentation pads with 0.2 s."""


@dataclass(frozen=True)
class Placed:
    """A line, and where it is spoken."""

    line: Line
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Group:
    """Lines that no pause divides, and the part of the recording that holds them."""

    lines: list[Line]
    start_s: float
    end_s: float
    speech_s: float
    """Duration of its speech, without pauses."""
    free_s: float
    """Part of that speech which none of the lines holds."""

    @property
    def text(self) -> str:
        return " ".join(line.text for line in self.lines)

    @property
    def letters_per_s(self) -> float:
        return letters(self.text) / max(self.speech_s, _PAD_S)  # a stretch at the end may be shorter than its padding


def place(
    path: Path, windows: Sequence[DecodedWindow], lines: Sequence[Line], predicted: Prediction, force: Force
) -> list[Placed]:
    """Return the lines whose place is known, by start."""
    exact = np.flatnonzero(predicted.is_exact).tolist()
    placed = [Placed(lines[n], *predicted.times_s[n].tolist()) for n in exact]
    return sorted([*placed, *_located(path, windows, lines, predicted, force)], key=lambda one: one.start_s)


def grouped(placed: Iterable[Placed], windows: Sequence[DecodedWindow]) -> Iterator[Group]:
    """Yield groups of lines, given by start. A line that holds no speech is in none."""
    stretches = [(start, end) for window in windows for start, end in window.stretches]
    members: list[Placed] = []
    first = last = 0
    for one in placed:
        held = _held(one, stretches)
        if not held:
            continue
        if members and held[0] > last:
            pause_s = stretches[held[0]][0] - stretches[last][1]
            if pause_s > _MAX_PAUSE_S or stretches[last][1] - stretches[first][0] - 2 * _PAD_S >= MIN_S:
                yield _group(members, stretches[first : last + 1])
                members = []
        if not members:
            first = last = held[0]
        members, first, last = [*members, one], min(first, held[0]), max(last, held[-1])
    if members:
        yield _group(members, stretches[first : last + 1])


def letters(text: str) -> int:
    return len(normalise(text).replace(" ", ""))


def _held(one: Placed, stretches: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the stretches that a line holds: by the limits above, and the one it shares most with."""
    first = bisect_right(stretches, one.start_s, key=lambda part: part[1])
    last = bisect_left(stretches, one.end_s, key=lambda part: part[0])
    shared = {n: _shared_s(one, stretches[n]) for n in range(first, last)}
    limits = {n: max(_MIN_SHARED_S, _MIN_SHARE * (stretches[n][1] - stretches[n][0])) for n in shared}
    return [n for n in shared if shared[n] >= limits[n] or shared[n] == max(shared.values())]


def _shared_s(one: Placed, part: tuple[float, float]) -> float:
    return max(0.0, min(one.end_s, part[1]) - max(one.start_s, part[0]))


def _group(members: list[Placed], stretches: Sequence[tuple[float, float]]) -> Group:
    speech = [(start + _PAD_S, end - _PAD_S) for start, end in stretches]
    speech_s = sum(end - start for start, end in speech)
    free_s = speech_s - sum(_shared_s(one, part) for one in members for part in speech)
    return Group([one.line for one in members], speech[0][0], speech[-1][1], speech_s, free_s)


def _located(
    path: Path, windows: Sequence[DecodedWindow], lines: Sequence[Line], predicted: Prediction, force: Force
) -> Iterator[Placed]:
    """Yield the lines without exact times that a window holds, each in the window where it scores best."""
    times_s = predicted.times_s
    best: dict[int, tuple[float, int, float]] = {}
    for number, window in enumerate(windows):
        near = (times_s[:, 0] < window.end_s + _NEAR_S) & (times_s[:, 1] > window.start_s - _NEAR_S)
        tried = np.flatnonzero(near)[:_MAX_TRIED].tolist()
        if predicted.is_exact[tried].all():
            continue
        scores = force(path, window.start_s, window.end_s, [lines[n].text for n in tried])
        for n, score in zip(tried, scores, strict=False):
            if n not in best or score.logprob > best[n][0]:
                best[n] = score.logprob, number, window.start_s + score.start_s
    starts = [best[n][2] for n in sorted(best)]
    rates = [letters(lines[n].text) / (b - a) for n, (a, b) in zip(sorted(best), itertools.pairwise(starts)) if b > a]
    rate = float(np.median(rates)) if rates else 12.0
    for n, following in itertools.zip_longest(sorted(best), sorted(best)[1:]):
        if predicted.is_exact[n]:
            continue
        _, number, start_s = best[n]
        same_window = following is not None and best[following][1] == number and best[following][2] > start_s
        end_s = best[following][2] if same_window else windows[number].end_s
        yield Placed(lines[n], start_s, min(end_s, start_s + max(1.0, 2 * letters(lines[n].text) / rate)))
