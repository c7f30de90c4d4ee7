"""Divide a transcript into cues: the texts that a player shows one after another.

The limits are those of broadcasters and streaming services: two lines of 42 characters, 20 characters per second, one
to seven seconds, no overlap. A cue ends at the end of a sentence or clause if possible, and stays into the following
pause if it cannot be read while it is spoken. A text that is spoken faster, without a pause, remains too fast: no word
is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise

from pipelines.inference.subtitles.lines import break_cost, divide_word, wrap
from pipelines.inference.transcript import Segment, Transcript
from pipelines.infra.errors import LabError

MAX_CHARS_PER_S = 20.0
SHORTEST_S, LONGEST_S = 1.0, 7.0
"""Duration of a cue: shorter only if the next one follows, never longer."""
MIN_GAP_S = 0.08
"""A shorter gap between cues flickers and is closed: two frames of 25 per second."""
MIN_LINE_WIDTH = 10
_MAX_PAUSE_S = 0.5
"""Segments are joined in a cue only over shorter pauses."""
_TOGETHER_S = 0.25
"""Two texts that overlap for longer are shown together, if there is room."""
_JOINED_SEGMENTS, _LACKING_S, _BREAK, _UNEVEN = 1.5, 3.0, 2.0, 0.5
"""Costs, in cues: of a segment's end within a cue, of a second that is missing to read it, of a break within a phrase,
and of an empty cue."""


@dataclass(frozen=True)
class Style:
    """Options of subtitles, with the names and meanings of openai-whisper's writers."""

    max_line_width: int = 42
    """Characters in a line, with the speaker's name."""
    max_line_count: int = 2
    """Lines in a cue."""
    highlight_words: bool = False
    """Underline each word while it is spoken."""

    def __post_init__(self) -> None:
        if self.max_line_width < MIN_LINE_WIDTH or self.max_line_count < 1:
            raise LabError(
                f"subtitles need lines of at least {MIN_LINE_WIDTH} characters and at least one line, got "
                f"{self.max_line_count} of {self.max_line_width}: set max-line-width and max-line-count"
            )


DEFAULT = Style()


@dataclass(frozen=True)
class TimedWord:
    """A word with its times, or a part of one that is longer than a line."""

    text: str
    start_s: float
    end_s: float
    opens_segment: bool = False


@dataclass(frozen=True)
class Part:
    """What one speaker says in a cue."""

    speaker: str
    """Name as it is shown; "" if the speakers are not known."""
    words: tuple[TimedWord, ...]
    width: int
    """Characters in a line."""

    @cached_property
    def texts(self) -> list[str]:
        """The words, the first with the speaker's name before it."""
        return _with_speaker(self.speaker, [word.text for word in self.words])

    @cached_property
    def lines(self) -> list[tuple[int, int]]:
        """Indices of the first word of each line, and after the last one."""
        return list(pairwise([0, *wrap(self.texts, self.width)]))

    @property
    def n_chars(self) -> int:
        return sum(map(len, self.texts)) + len(self.texts) - 1


@dataclass(frozen=True)
class Cue:
    """A text that is shown for a time, in milliseconds as the files have them."""

    start_ms: int
    end_ms: int
    parts: tuple[Part, ...]

    @property
    def reading_ms(self) -> int:
        """Time to read the text."""
        return -int(-1000 * (sum(part.n_chars + 1 for part in self.parts) - 1) // MAX_CHARS_PER_S)

    @property
    def n_lines(self) -> int:
        return sum(len(part.lines) for part in self.parts)


def divide(transcript: Transcript, style: Style = DEFAULT) -> list[Cue]:
    """Return the cues of a transcript in order; each is at least a millisecond long."""
    cues = []
    for segments in _by_speaker(transcript.segments):
        speaker = _shortened(segments[0].speaker, style.max_line_width)
        room = style.max_line_width - len(_prefix(speaker))
        runs = _runs([word for segment in segments for word in _timed_words(segment, room)])
        for run, following in pairwise([*runs, None]):
            until_s = following[0].start_s if following else max(transcript.audio_s, run[-1].end_s)
            for words in _divide_run(run, until_s, speaker, style):
                start_ms, end_ms = _milliseconds(words[0].start_s), _milliseconds(words[-1].end_s)
                part = Part(speaker, tuple(words), style.max_line_width)
                cues.append(Cue(start_ms, max(end_ms, start_ms + 1), (part,)))
    cues.sort(key=lambda cue: (cue.start_ms, cue.end_ms))
    return _set_ends(_separate(cues, style), _milliseconds(transcript.audio_s))


def _milliseconds(time_s: float) -> int:
    return round(1000 * max(time_s, 0.0))


def _by_speaker(segments: Iterable[Segment]) -> list[list[Segment]]:
    groups: dict[str, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(segment.speaker, []).append(segment)
    return list(groups.values())


def _shortened(speaker: str, width: int) -> str:
    """Return a name that leaves half of a line free."""
    longest = width // 2 - 2
    return speaker if len(speaker) <= longest else f"{speaker[: longest - 1].rstrip()}…"


def _prefix(speaker: str) -> str:
    return f"{speaker}: " if speaker else ""


def _with_speaker(speaker: str, texts: list[str]) -> list[str]:
    return [_prefix(speaker) + texts[0], *texts[1:]]


def _timed_words(segment: Segment, room: int) -> list[TimedWord]:
    """Return the words of a segment, none longer than `room`; without word times these follow from their lengths."""
    texts = segment.text.split()
    has_times = len(segment.words) == len(texts) and all(word.start_s is not None for word in segment.words)
    if has_times:
        timed = [TimedWord(text, word.start_s, word.end_s) for text, word in zip(texts, segment.words, strict=True)]
    else:
        timed = _spread(texts, segment.start_s, segment.end_s)
    words = list(chain.from_iterable(_chunks(word, room) for word in timed))
    return [replace(words[0], opens_segment=True), *words[1:]] if words else []


def _spread(texts: Sequence[str], start_s: float, end_s: float) -> list[TimedWord]:
    """Divide a time among words by their numbers of characters."""
    n_chars = [0, *accumulate(len(text) + 1 for text in texts)]
    per_char_s = max(end_s - start_s, 0.0) / max(n_chars[-1], 1)
    times = (start_s + per_char_s * n for n in n_chars)
    return [TimedWord(text, *span) for text, span in zip(texts, pairwise(times), strict=True)]


def _chunks(word: TimedWord, room: int) -> list[TimedWord]:
    """Return a word, or the parts of one that is too long for a line, as in languages without spaces."""
    if len(word.text) <= room:
        return [word]
    return _spread(divide_word(word.text, room), word.start_s, word.end_s)


def _runs(words: list[TimedWord]) -> list[list[TimedWord]]:
    """Divide words at pauses, and where segments overlap: a cue lies within one run."""
    runs: list[list[TimedWord]] = []
    for word in words:
        last = runs[-1][-1] if runs else None
        if last and not (word.opens_segment and not -0.05 <= word.start_s - last.end_s <= _MAX_PAUSE_S):
            runs[-1].append(word)
        else:
            runs.append([word])
    return runs


def _divide_run(run: list[TimedWord], until_s: float, speaker: str, style: Style) -> list[list[TimedWord]]:
    """Return the words of each cue of a run: the division of the least cost. The next text follows at `until_s`."""
    n = len(run)
    starts = [*(word.start_s for word in run), max(until_s, run[-1].end_s)]
    breaks = [0.0 if b.opens_segment else break_cost(a.text, b.text) for a, b in pairwise(run)]
    # cheapest[j]: cost of the first j words, and the first word of the last of their cues
    cheapest: list[tuple[float, int]] = [(0.0, 0)] + [(float("inf"), 0)] * n
    for first in range(n):
        joined = 0
        for last, n_chars in _possible_ends(run, first, speaker, style):
            joined += last - 1 > first and run[last - 1].opens_segment
            shown_s = min(starts[last] - starts[first], LONGEST_S)
            lacking_s = max(n_chars / MAX_CHARS_PER_S, SHORTEST_S) - shown_s
            cost = cheapest[first][0] + 1 + _JOINED_SEGMENTS * joined + _LACKING_S * max(lacking_s, 0.0)
            cost += _BREAK * breaks[last - 1] if last < n else 0.0
            cost += _UNEVEN * (1 - n_chars / (style.max_line_width * style.max_line_count)) ** 2
            if cost < cheapest[last][0]:
                cheapest[last] = (cost, first)
    edges = [n]
    while edges[-1]:
        edges.append(cheapest[edges[-1]][1])
    return [run[first:last] for first, last in pairwise(reversed(edges))]


def _possible_ends(run: list[TimedWord], first: int, speaker: str, style: Style) -> Iterable[tuple[int, int]]:
    """Yield the index after the last word, and the number of characters, of each cue that can begin with a word."""
    width, n_lines, length, n_chars = style.max_line_width, 1, len(_prefix(speaker)) - 1, len(_prefix(speaker)) - 1
    for last in range(first, len(run)):
        n_new = len(run[last].text)
        if length + 1 + n_new <= width:
            length += 1 + n_new
        else:
            n_lines, length = n_lines + 1, n_new
        n_chars += 1 + n_new
        is_too_long = run[last].end_s - run[first].start_s > LONGEST_S
        if last > first and (n_lines > style.max_line_count or is_too_long):
            return
        yield last + 1, n_chars


def _separate(cues: list[Cue], style: Style) -> list[Cue]:
    """Return the cues without overlaps: of speakers who talk at once, both are shown, or one after the other."""
    separate: list[Cue] = []
    for cue in cues:
        last = separate[-1] if separate else None
        if last is None or cue.start_ms >= last.end_ms:
            separate.append(cue)
        elif joined := _joined(last, cue, style):
            separate[-1] = joined
        else:
            end_ms = max(last.end_ms, cue.end_ms)
            share = last.reading_ms / (last.reading_ms + cue.reading_ms)
            fair_ms = last.start_ms + min(last.reading_ms, round(share * (end_ms - last.start_ms)))
            at_ms = max(cue.start_ms, fair_ms, last.start_ms + 1)
            separate[-1] = replace(last, end_ms=at_ms)
            separate.append(replace(cue, start_ms=at_ms, end_ms=max(cue.end_ms, at_ms + 1)))
    return separate


def _joined(first: Cue, second: Cue, style: Style) -> Cue | None:
    """Return two texts that are spoken at the same time as one cue; None if there is no room."""
    end_ms = max(first.end_ms, second.end_ms)
    overlap_ms = min(first.end_ms, second.end_ms) - second.start_ms
    if overlap_ms <= 1000 * _TOGETHER_S or end_ms - first.start_ms > 1000 * LONGEST_S:
        return None
    if first.n_lines + second.n_lines > style.max_line_count:
        return None
    return Cue(first.start_ms, end_ms, first.parts + second.parts)


def _set_ends(cues: list[Cue], audio_ms: int) -> list[Cue]:
    """Show each text until it can be read, if the next one leaves time, and close short gaps."""
    timed, min_gap_ms = [], round(1000 * MIN_GAP_S)
    for cue, following in zip(cues, [*cues[1:], None], strict=False):
        latest_ms = cue.start_ms + round(1000 * LONGEST_S)
        next_ms = following.start_ms if following else max(audio_ms, cue.end_ms)
        end_ms = max(cue.end_ms, cue.start_ms + max(cue.reading_ms, round(1000 * SHORTEST_S)))
        end_ms = min(end_ms, next_ms, latest_ms)
        if following and 0 < next_ms - end_ms < min_gap_ms:
            end_ms = next_ms if next_ms <= latest_ms else next_ms - min_gap_ms
        timed.append(replace(cue, end_ms=end_ms))
    return timed
