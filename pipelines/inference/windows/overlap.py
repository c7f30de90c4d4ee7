"""Keep words whole where long speech without a pause had to be cut: neighbouring windows overlap, and share the words.

Both windows are decoded with a second of the other. A word that both have written, at about the same time, is the seam;
else the cut itself is, at the quietest moment that was to be found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipelines.inference.windows.decoding import Decoded
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings.segmentation import Window
from pipelines.speech.text import normalise

OVERLAP_S = 1.0
_SAME_S = 0.5
"""A word that both windows have written starts at times that differ by less than this."""


FindStarts = Callable[[Decoded], list[float]]
"""Returns the start of each word of a part in the recording, in seconds, or nothing if they are unknown."""


class TimedWord(NamedTuple):
    """A word and its start in the recording, in seconds."""

    text: str
    start_s: float


def overlapped(windows: Sequence[Window]) -> list[Window]:
    """Return the windows with a second of the next one where speech continues without a pause."""
    samples, starts_s = [window.samples for window in windows], [window.start_s for window in windows]
    n = int(OVERLAP_S * SAMPLE_RATE_HZ)
    for i, (a, b) in enumerate(pairwise(windows)):
        if touch(a, b):
            samples[i] = np.concatenate([samples[i], b.samples[:n]])
            samples[i + 1] = np.concatenate([a.samples[-n:], samples[i + 1]])
            starts_s[i + 1] -= len(a.samples[-n:]) / SAMPLE_RATE_HZ
    return [
        replace(window, samples=samples[i], start_s=starts_s[i], stretches=window.speech)
        for i, window in enumerate(windows)
    ]


def touch(a: Window, b: Window) -> bool:
    """Return whether window `b` continues the speech of `a`, which was cut. A short pause between them cuts no word."""
    return a.is_cut and abs(b.start_s - a.end_s) < 0.5 / SAMPLE_RATE_HZ


def share_words(
    windows: Sequence[Window], decoded: list[list[Decoded]], find_starts: FindStarts
) -> list[list[Decoded]]:
    """Return the decoded parts of `overlapped(windows)` so that each word is in one of them.

    `find_starts` returns the start of each word of a part in the recording, in seconds, or nothing if unknown.
    """
    decoded = [list(parts) for parts in decoded]
    for i, (a, b) in enumerate(pairwise(windows)):
        if touch(a, b) and decoded[i] and decoded[i + 1]:
            last, first = decoded[i][-1], decoded[i + 1][0]
            words_a, words_b = _timed(last, find_starts), _timed(first, find_starts)
            if words_a and words_b:
                end, start = seam(words_a, words_b, b.start_s)
                decoded[i][-1] = _part(last, words_a, 0, end)
                decoded[i + 1][0] = _part(first, words_b, start, len(words_b))
    return decoded


def seam(a: Sequence[TimedWord], b: Sequence[TimedWord], cut_s: float) -> tuple[int, int]:
    """Return how many words of `a` to keep, and the first word of `b` to keep after them."""
    same = [
        (abs(word.start_s - cut_s), i + 1, j + 1)
        for i, word in enumerate(a)
        for j, other in enumerate(b)
        if abs(word.start_s - other.start_s) < _SAME_S and normalise(word.text) == normalise(other.text)
    ]
    if same:
        _, end, start = min(same)
        return end, start
    end = sum(word.start_s < cut_s for word in a)
    return end, sum(word.start_s < cut_s for word in b)


def _timed(part: Decoded, find_starts: FindStarts) -> list[TimedWord]:
    """Return the words of a part; where their starts are unknown, the time is divided by their characters."""
    texts, window = part.accepted.hypothesis.text.split(), part.window
    starts = part.starts if part.starts is not None else find_starts(part)
    if len(starts) != len(texts):
        ends = np.cumsum([0, *(len(text) + 1 for text in texts)])
        starts = (window.start_s + ends[:-1] / ends[-1] * (window.end_s - window.start_s)).tolist()
    return [TimedWord(*pair) for pair in zip(texts, starts, strict=True)]


def _part(part: Decoded, words: Sequence[TimedWord], start: int, end: int) -> Decoded:
    """Return a part with its words from `start` to `end`."""
    hypothesis, shared = part.accepted.hypothesis, words[start:end]
    text = " ".join(word.text for word in shared)
    trimmed = replace(hypothesis, text=text, words=hypothesis.words[start:end])
    return replace(part, accepted=part.accepted._replace(hypothesis=trimmed), starts=[word.start_s for word in shared])
