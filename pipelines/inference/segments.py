"""Divide the words of a decoded window into segments, with times that follow the detected speech.

A segment begins at each pause in the speech and, in a long window, at each sentence. The starts of words come from the
model's cross-attention (whisper/engines/word_timestamps.py), which is right to a few tenths of a second; the detector
(speech/recordings/detection.py) says where there is speech at all. So no segment and no word lasts into silence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipelines.inference.transcript import Word

LONG_S = 6.0
"""Longer windows are divided at sentences."""
MIN_PAUSE_S = 0.6
"""Longer pauses, without the padding of the stretches around them, divide a window."""
_FINAL, _QUOTES = (".", "?", "!", "…"), "\"'”’»)"

Stretches = Sequence[tuple[float, float]]
"""Start and end of each stretch of speech in seconds, in order."""


class Part(NamedTuple):
    """The words of one segment and its times in seconds."""

    start_s: float
    end_s: float
    words: tuple[Word, ...]


class _Edge(NamedTuple):
    """Where a segment ends and the next, which begins with word number `first`, starts; equal except around silence."""

    first: int
    end_s: float
    start_s: float


def divide(
    words: tuple[Word, ...], stretches: Stretches, find_starts: Callable[[], list[float]], word_times: bool = False
) -> list[Part]:
    """Return the segments of a window with at least one stretch of speech.

    `find_starts` returns the start of each word in the recording, in seconds, or nothing if they are unknown: then
    words are placed by their number of characters. It is called only if it is needed. `word_times` adds times to the
    words.
    """
    start, end = stretches[0][0], stretches[-1][1]
    texts = [word.text for word in words]
    if not words or not (word_times or is_divided(texts, stretches)):
        return [Part(round(start, 3), round(end, 3), words)]
    pauses, sentences = _pauses(stretches), _sentences(texts, stretches)
    starts = [min(max(time, start), end) for time in find_starts()]
    if len(starts) != len(words):
        starts, sentences = starts_by_characters(words, stretches), []
    inner = _edges(starts, start, end, sentences, pauses)
    parts = []
    for this, following in pairwise([_Edge(0, start, start), *inner, _Edge(len(words), end, end)]):
        part_start, part_end = within_speech(this.start_s, following.end_s, stretches)
        part_words, part_starts = words[this.first : following.first], starts[this.first : following.first]
        if word_times:
            part_words = _with_times(part_words, [*part_starts, part_end], stretches, (part_start, part_end))
        parts.append(Part(round(part_start, 3), round(part_end, 3), part_words))
    return parts


def is_divided(texts: Sequence[str], stretches: Stretches) -> bool:
    """Return whether `divide` needs the starts of these words."""
    return bool(_pauses(stretches) or _sentences(texts, stretches))


def _pauses(stretches: Stretches) -> list[tuple[float, float]]:
    """Return the pauses at which a window is divided."""
    return [(a, b) for (_, a), (b, _) in pairwise(stretches) if b - a >= MIN_PAUSE_S]


def _sentences(texts: Sequence[str], stretches: Stretches) -> list[int]:
    """Return the words that begin a sentence at which a window is divided: in a long one."""
    return sentence_starts(texts) if stretches[-1][1] - stretches[0][0] > LONG_S else []


def sentence_starts(words: Sequence[str]) -> list[int]:
    """Return the indices of the words, after the first, that begin a sentence."""
    return [n for n in range(1, len(words)) if words[n - 1].rstrip(_QUOTES).endswith(_FINAL)]


def starts_by_characters(words: Sequence[Word], stretches: Stretches) -> list[float]:
    """Return the start of each word if the time of the speech is divided by the words' numbers of characters."""
    n_chars = np.cumsum([0, *(len(word.text) + 1 for word in words)])
    durations = np.cumsum([0.0, *(end - start for start, end in stretches)])
    spoken_s = durations[-1] * n_chars[:-1] / n_chars[-1]
    numbers = np.clip(np.searchsorted(durations, spoken_s, side="right") - 1, 0, len(stretches) - 1)
    return [stretches[n][0] + time - durations[n] for n, time in zip(numbers.tolist(), spoken_s.tolist(), strict=True)]


def within_speech(start_s: float, end_s: float, stretches: Stretches) -> tuple[float, float]:
    """Return these times without the silence at both ends; unchanged if there is no speech between them."""
    spoken = [(max(start_s, a), min(end_s, b)) for a, b in stretches if min(end_s, b) > max(start_s, a)]
    return (spoken[0][0], spoken[-1][1]) if spoken else (start_s, end_s)


def _edges(
    starts: list[float], start_s: float, end_s: float, sentences: list[int], pauses: list[tuple[float, float]]
) -> list[_Edge]:
    """Return the edges between segments, in order. Segments of no duration, invisible as subtitles, are joined."""
    edges = {first: _Edge(first, starts[first], starts[first]) for first in sentences}
    at_pauses: dict[int, _Edge] = {}
    for pause_start, pause_end in pauses:
        middle = (pause_start + pause_end) / 2
        if 0 < (first := bisect_left(starts, middle)) < len(starts):
            earlier = at_pauses.get(first)  # no word lies between the two pauses
            at_pauses[first] = _Edge(first, earlier.end_s if earlier else middle, middle)
    kept, last_s = [], start_s
    for _, edge in sorted((edges | at_pauses).items()):
        if last_s < edge.end_s and edge.start_s < end_s:
            kept.append(edge)
            last_s = edge.start_s
    return kept


def _with_times(
    words: tuple[Word, ...], edges: list[float], stretches: Stretches, segment: tuple[float, float]
) -> tuple[Word, ...]:
    """Add times to the words of a segment: from its start to the next word's, or to the end of the speech before it."""
    timed = []
    for word, (a, b) in zip(words, pairwise(edges), strict=True):
        spoken = max(stretches, key=lambda stretch: min(b, stretch[1]) - max(a, stretch[0]))
        if min(b, spoken[1]) > max(a, spoken[0]):
            a, b = max(a, spoken[0]), min(b, spoken[1])
        a, b = (round(min(max(time, segment[0]), segment[1]), 3) for time in (a, b))
        timed.append(replace(word, start_s=a, end_s=b))
    return tuple(timed)
