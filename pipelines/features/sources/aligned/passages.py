"""Score the text of each group of lines in its sound, and say why the rest cannot be used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.features.sources.aligned import places
from pipelines.features.sources.aligned.hypotheses import Recording
from pipelines.features.sources.aligned.matching import Prediction
from pipelines.features.sources.aligned.places import MAX_S, MIN_S, Force, Group
from pipelines.features.sources.aligned.texts import Line

_OTHER_LOGPROB = -4.0
"""A mean below which a rejected text is not even a paraphrase."""
_MAX_FREE_S = 0.8
"""Speech of a clip that no line holds. Of 578 right groups none had more than 0.75 s, of 5 with a missing line all had
2 s. Subtitles may begin and end some tenths of a second early or late."""
_MIN_RATE = 0.72
"""Letters per second, as a share of the recording's median, below which the text lacks a word: so few had 8 of 83
paraphrased groups, and 3 of 578 right ones."""
_MIN_UNUSED_S = 2.0
_MIN_LANGUAGE_S = 5.0
"""Shortest sound of which the language is asked: whisper-tiny calls 3 to 7 of 24 Swedish ones of 1.5 to 4 s foreign."""

DetectOther = Callable[[Path, float, float], str]
"""Return what other language a part of a recording is in, from its path, start and end in seconds; "" if unknown."""


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


def find_passages(
    path: Path, recording: Recording, lines: Sequence[Line], predicted: Prediction, force: Force, min_logprob: float,
    detect_other: DetectOther = lambda path, start_s, end_s: "",
) -> Iterator[Passage]:  # fmt: skip
    """Yield the clips of a recording in order, then what was rejected. min_logprob: of every token."""
    placed = places.place(path, recording.windows, lines, predicted, force)
    groups = [*places.grouped(placed, recording.windows)]
    rate = float(np.median([group.letters_per_s for group in groups])) if groups else 0.0
    rejected: list[Passage] = []
    for group in groups:
        passage = _with_language(path, _judged(path, group, recording.gaps, rate, force, min_logprob), detect_other)
        if passage.reason:
            rejected.append(passage)
        else:
            yield passage
    yield from rejected
    used = {id(line) for group in groups for line in group.lines}
    for line, times in zip(lines, predicted.times_s, strict=True):
        if id(line) not in used:
            start_s, end_s = (0.0, 0.0) if np.isnan(times[0]) else np.maximum(times, 0.0).tolist()
            detail = "no speech of the recording fits this line"
            yield Passage(start_s, end_s, line.text, line.speaker, 0, 0, "no_match", detail)
    for passage in _unused(recording, [(group.start_s, group.end_s) for group in groups]):
        yield _with_language(path, passage, detect_other)


def _with_language(path: Path, passage: Passage, detect_other: DetectOther) -> Passage:
    """Return a passage, with the reason `wrong_language` if it has speech that no text fits in another language."""
    if passage.reason != "no_match" or passage.end_s - passage.start_s < _MIN_LANGUAGE_S:
        return passage
    language = detect_other(path, passage.start_s, passage.end_s)
    if not language:
        return passage
    return replace(passage, reason="wrong_language", detail=f"it sounds like {language}: {passage.detail}")


def _judged(
    path: Path, group: Group, gaps: list[list[float]], rate: float, force: Force, min_logprob: float
) -> Passage:
    start_s, end_s, text = group.start_s, group.end_s, group.text
    speakers = {line.speaker for line in group.lines}
    logprob = lowest = 0.0
    reason, detail = "", ""
    if any(a < end_s and b > start_s for a, b in gaps):
        reason, detail = "damaged", "a part of this passage cannot be read"
    elif not MIN_S <= end_s - start_s <= MAX_S:
        reason = "too_short" if end_s - start_s < MIN_S else "too_long"
        detail = f"{end_s - start_s:.1f} s without a pause at a line's end, clips last {MIN_S:g} to {MAX_S:g} s"
    elif group.free_s > _MAX_FREE_S:
        reason, detail = "no_match", f"{group.free_s:.1f} s of this speech have no line: {text[:80]}"
    elif lacks_a_word(group, rate):
        reason = "paraphrased"
        detail = f"{group.letters_per_s:.1f} letters per second, the recording has {rate:.1f}: {text[:80]}"
    else:
        scores = force(path, start_s, end_s, [line.text for line in group.lines])
        logprob, lowest = (min((getattr(one, name) for one in scores), default=-99.0) for name in ("logprob", "lowest"))
        if len(scores) < len(group.lines):
            reason, detail = "too_long", f"the text has more tokens than the decoder has positions: {text[:80]}"
        elif lowest < min_logprob:
            reason = "paraphrased" if logprob >= _OTHER_LOGPROB else "no_match"
            detail = f"a token has the log-probability {lowest:.1f}, at least {min_logprob:g} is required: {text[:80]}"
    speaker = speakers.pop() if len(speakers) == 1 else ""
    return Passage(start_s, end_s, text, speaker, logprob, lowest, reason, detail)


def lacks_a_word(group: Group, rate: float) -> bool:
    """Return whether a text is too short for its sound; never of one with digits, which are read as many letters."""
    return group.letters_per_s < _MIN_RATE * rate and not any(char.isdigit() for char in group.text)


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
