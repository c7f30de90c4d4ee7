"""Write a transcript as text, tab-separated values, SubRip (srt) or WebVTT (vtt)."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from itertools import pairwise

from pipelines.inference.subtitles import cues
from pipelines.inference.subtitles.cues import DEFAULT, MIN_GAP_S, Cue, Part, Style
from pipelines.inference.transcript import Transcript


def text(transcript: Transcript) -> str:
    """Return one line per segment, with the speaker if there is one."""
    return "".join(f"{segment.labelled_text}\n" for segment in transcript.segments)


def tsv(transcript: Transcript) -> str:
    """Return openai-whisper's table: start and end in milliseconds, text; with speakers also a column of these."""
    names = ["start", "end", "text", *(["speaker"] if transcript.has_speakers else [])]
    rows = [names]
    for segment in transcript.segments:
        times = (str(round(1000 * time_s)) for time_s in (segment.start_s, segment.end_s))
        rows.append([*times, " ".join(segment.text.split()), segment.speaker][: len(names)])
    return "".join("\t".join(row) + "\n" for row in rows)


def srt(transcript: Transcript, style: Style = DEFAULT) -> str:
    """Return SubRip: numbered cues, times with a decimal comma."""
    blocks = []
    for number, (start_ms, end_ms, cue) in enumerate(_shown(transcript, style), 1):
        lines = (_lines(part, (start_ms, end_ms), style, _without_arrow) for part in cue.parts)
        blocks.append(f"{number}\n{_times(start_ms, end_ms, ',')}\n" + "\n".join(lines) + "\n\n")
    return "".join(blocks)


def vtt(transcript: Transcript, style: Style = DEFAULT) -> str:
    """Return WebVTT with escaped text; a speaker is both a voice tag, which players do not show, and text."""
    blocks = ["WEBVTT\n\n"]
    for start_ms, end_ms, cue in _shown(transcript, style):
        lines = []
        for part in cue.parts:
            shown = _lines(part, (start_ms, end_ms), style, _escaped)
            lines.append(f"<v {_escaped(part.speaker)}>{shown}</v>" if part.speaker else shown)
        blocks.append(f"{_times(start_ms, end_ms, '.')}\n" + "\n".join(lines) + "\n\n")
    return "".join(blocks)


def _shown(transcript: Transcript, style: Style) -> Iterator[tuple[int, int, Cue]]:
    """Yield start, end and cue; with highlighted words, each cue once for each set of words that are spoken."""
    for cue in cues.divide(transcript, style):
        if not style.highlight_words:
            yield cue.start_ms, cue.end_ms, cue
            continue
        edges = {cue.start_ms, cue.end_ms}
        for part in cue.parts:
            edges |= {edge for span in _spans_ms(part) for edge in span if cue.start_ms < edge < cue.end_ms}
        yield from ((start_ms, end_ms, cue) for start_ms, end_ms in pairwise(sorted(edges)))


def _spans_ms(part: Part) -> list[tuple[int, int]]:
    """Return start and end of the highlight of each word: up to the next word if that follows soon."""
    spans = []
    for word, following in zip(part.words, [*part.words[1:], None], strict=False):
        is_close = following and following.start_s - word.end_s < MIN_GAP_S
        spans.append(tuple(round(1000 * t) for t in (word.start_s, following.start_s if is_close else word.end_s)))
    return spans


def _lines(part: Part, shown_ms: tuple[int, int], style: Style, escape: Callable[[str], str]) -> str:
    """Return the lines of a part; words that are spoken at that time are underlined if they are highlighted."""
    texts = [escape(token) for token in part.texts]
    for n, (start_ms, end_ms) in enumerate(_spans_ms(part) if style.highlight_words else ()):
        if start_ms <= shown_ms[0] and shown_ms[1] <= end_ms:
            word = escape(part.words[n].text)
            texts[n] = f"{texts[n].removesuffix(word)}<u>{word}</u>"
    return "\n".join(" ".join(texts[first:last]) for first, last in part.lines)


def _times(start_ms: int, end_ms: int, separator: str) -> str:
    return f"{_format_time(start_ms, separator)} --> {_format_time(end_ms, separator)}"


def _format_time(time_ms: int, separator: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{separator}{milliseconds:03d}"


def _without_arrow(token: str) -> str:
    return token.replace("-->", "->")


def _escaped(token: str) -> str:
    return html.escape(token, quote=False)
