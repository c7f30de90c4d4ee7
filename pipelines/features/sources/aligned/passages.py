"""Score the lines of a text in their windows, cut clips at pauses, and say why the rest cannot be used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.features.sources.aligned.hypotheses import DecodedWindow, Recording
from pipelines.features.sources.aligned.texts import Line
from pipelines.speech.text import normalise
from pipelines.whisper.engines.forced import ForcedLine

Force = Callable[[Path, float, float, list[str]], list[ForcedLine]]
"""Score lines in a part of a recording: its path, start and end in seconds, and the lines."""
MIN_S, MAX_S = 1.0, 30.0
_NEAR_S = 2.0
"""A line is tried in every window so near to its predicted time."""
_MAX_TRIED = 40
_MIN_SHARED_S, _MIN_SHARE = 0.3, 0.25
"""Two lines that each hold so much of a stretch of speech are joined: there is no pause between them. Starts of lines
are right to a few tenths of a second."""
_PAD_S = 0.1
"""Taken off each end of a stretch, which segmentation pads with 0.2 s."""
_OTHER_LOGPROB = -4.0
"""A mean below which a rejected line is not even a paraphrase."""
_MIN_UNUSED_S = 2.0


@dataclass(frozen=True)
class Passage:
    """A part of a recording with its text, or the reason why it is no clip."""

    start_s: float
    end_s: float
    text: str
    speaker: str
    logprob: float
    lowest: float
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Placed:
    line: Line
    window: int
    start_s: float
    score: ForcedLine


def find_passages(
    path: Path, recording: Recording, lines: Sequence[Line], predicted: np.ndarray, force: Force, min_logprob: float
) -> Iterator[Passage]:
    """Yield the clips of a recording in order, then what was rejected.

    predicted: start and end of each line in seconds, NaN if unknown (matching.py). min_logprob: of every token.
    """
    placed = _locate(path, recording.windows, lines, predicted, force)
    used: list[tuple[float, float]] = []
    rejected: list[Passage] = []
    for group, start_s, end_s in _groups(placed, recording.windows):
        hypothesis = " ".join(recording.windows[group[0].window].words)
        passage = _judged(group, (start_s, end_s), recording.gaps, hypothesis, min_logprob)
        used.append((start_s, end_s))
        if passage.reason:
            rejected.append(passage)
        else:
            yield passage
    yield from rejected
    for line, at in zip(lines, predicted, strict=True):
        if not any(one.line is line for one in placed):
            start_s, end_s = (0.0, 0.0) if np.isnan(at[0]) else at
            detail = "no speech of the recording fits this line"
            yield Passage(start_s, end_s, line.text, line.speaker, 0, 0, "no_match", detail)
    yield from _unused(recording, used)


def _locate(
    path: Path, windows: Sequence[DecodedWindow], lines: Sequence[Line], predicted: np.ndarray, force: Force
) -> list[_Placed]:
    """Return the lines that a window holds, each in the window where it scores best, in the order of the text."""
    best: dict[int, _Placed] = {}
    for number, window in enumerate(windows):
        near = (predicted[:, 0] < window.end_s + _NEAR_S) & (predicted[:, 1] > window.start_s - _NEAR_S)
        tried = np.flatnonzero(near)[:_MAX_TRIED].tolist()
        if not tried:
            continue
        scores = force(path, window.start_s, window.end_s, [lines[n].text for n in tried])
        for n, score in zip(tried, scores, strict=False):
            if n not in best or score.logprob > best[n].score.logprob:
                best[n] = _Placed(lines[n], number, window.start_s + score.start_s, score)
    return [best[n] for n in sorted(best)]


def _groups(
    placed: Sequence[_Placed], windows: Sequence[DecodedWindow]
) -> Iterator[tuple[list[_Placed], float, float]]:
    """Yield lines that no pause divides, with start and end of their speech."""
    rates = [_letters(a) / (b.start_s - a.start_s) for a, b in itertools.pairwise(placed) if b.start_s > a.start_s]
    rate = float(np.median(rates)) if rates else 12.0
    for number, members in itertools.groupby(placed, key=lambda one: one.window):
        rows = sorted(members, key=lambda one: one.start_s)
        window = windows[number]
        starts = [one.start_s for one in rows]
        longest_s = [max(1.0, 2 * _letters(one) / rate) for one in rows]
        ends = [
            min(following, start + length)
            for start, following, length in zip(starts, [*starts[1:], window.end_s], longest_s, strict=True)
        ]
        spans = [*zip(starts, ends, strict=True)]
        shared = np.array([[min(b, end) - max(a, start) for a, b in window.stretches] for start, end in spans])
        yield from _divided(rows, shared, window.stretches)


def _divided(
    rows: list[_Placed], shared: np.ndarray, stretches: list[list[float]]
) -> Iterator[tuple[list[_Placed], float, float]]:
    """Yield groups of lines; `shared` [lines, stretches] is the time that a line and a stretch have in common."""
    lengths_s = np.array([b - a for a, b in stretches])
    held = shared >= np.maximum(_MIN_SHARED_S, _MIN_SHARE * lengths_s)
    held[np.arange(len(rows)), shared.argmax(axis=1)] = True
    group: list[_Placed] = []
    parts: set[int] = set()
    for row, stretches_held in zip(rows, held, strict=True):
        held_parts = {*np.flatnonzero(stretches_held).tolist()}
        if group and not held_parts & parts and _length_s(parts, stretches) >= MIN_S:
            yield _group(group, parts, stretches)
            group, parts = [], set()
        group, parts = [*group, row], parts | held_parts
    if group:
        yield _group(group, parts, stretches)


def _group(group: list[_Placed], parts: set[int], stretches: list[list[float]]) -> tuple[list[_Placed], float, float]:
    return group, stretches[min(parts)][0] + _PAD_S, stretches[max(parts)][1] - _PAD_S


def _length_s(parts: set[int], stretches: list[list[float]]) -> float:
    return stretches[max(parts)][1] - stretches[min(parts)][0] - 2 * _PAD_S


def _judged(
    group: list[_Placed], part: tuple[float, float], gaps: list[list[float]], hypothesis: str, min_logprob: float
) -> Passage:
    (start_s, end_s), is_decoded = part, all(_contains(hypothesis, one.line.text) for one in group)
    speakers = {one.line.speaker for one in group}
    text = " ".join(one.line.text for one in group)
    logprob, lowest = (min(getattr(one.score, name) for one in group) for name in ("logprob", "lowest"))
    reason, detail = "", ""
    if any(a < end_s and b > start_s for a, b in gaps):
        reason, detail = "damaged", "a part of this passage cannot be read"
    elif not MIN_S <= end_s - start_s <= MAX_S:
        reason = "too_short" if end_s - start_s < MIN_S else "too_long"
        detail = f"{end_s - start_s:.1f} s without a pause at a line's end, clips last {MIN_S:g} to {MAX_S:g} s"
    elif not is_decoded and (lowest < min_logprob or logprob < min_logprob / 2):
        reason = "paraphrased" if logprob >= _OTHER_LOGPROB else "no_match"
        detail = f"a token has the log-probability {lowest:.1f}, at least {min_logprob:g} is required: {text[:80]}"
    speaker = speakers.pop() if len(speakers) == 1 else ""
    return Passage(start_s, end_s, text, speaker, logprob, lowest, reason, detail)


def _unused(recording: Recording, used: list[tuple[float, float]]) -> Iterator[Passage]:
    """Yield the stretches of speech that no line holds, and the longer sounds outside speech."""
    for window in recording.windows:
        free = [part for part in window.stretches if not any(a < part[1] and b > part[0] for a, b in used)]
        if sum(b - a for a, b in free) >= _MIN_UNUSED_S:
            detail = f"speech without a line: {' '.join(window.words)[:80]}"
            yield Passage(free[0][0], free[-1][1], "", "", 0, 0, "no_match", detail)
    for _, run in itertools.groupby(enumerate(recording.audible), key=lambda item: item[1] - item[0]):
        seconds = [second for _, second in run]
        if len(seconds) >= _MIN_UNUSED_S:
            yield Passage(seconds[0], seconds[-1] + 1, "", "", 0, 0, "music", "sound without speech")


def _contains(hypothesis: str, text: str) -> bool:
    """Return True if the model wrote the very words of a line."""
    return f" {normalise(text)} " in f" {normalise(hypothesis)} "


def _letters(one: _Placed) -> int:
    return len(normalise(one.line.text).replace(" ", ""))
