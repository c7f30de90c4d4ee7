"""Write a Transcript as text, SubRip (srt), WebVTT (vtt), or the verbose JSON of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.inference.transcript import Segment, Transcript
from pipelines.recipes import languages
from pipelines.speech import repetition
from pipelines.whisper import tokens

LINE_CHARS = 42
"""Characters per line of a subtitle, with two lines at most: the usual limit of broadcasters."""
LONGEST_S = 7.0
"""Maximum duration of a subtitle."""
_SHORTEST_S = 0.001
"""WebVTT requires that a cue ends after it begins; its times are milliseconds."""
_LINES = 2


def text(transcript: Transcript) -> str:
    """Return one line per segment."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def srt(transcript: Transcript) -> str:
    """Return SubRip: numbered cues, times with a decimal comma."""
    cues = [cue for segment in transcript.segments for cue in split_into_cues(segment)]
    return "".join(
        f"{number}\n{_format_time(start, ',')} --> {_format_time(end, ',')}\n{lines.replace('-->', '->')}\n\n"
        for number, (start, end, lines) in enumerate(cues, 1)
    )


def vtt(transcript: Transcript) -> str:
    """Return WebVTT with escaped text."""
    cues = [cue for segment in transcript.segments for cue in split_into_cues(segment)]
    return "WEBVTT\n\n" + "".join(
        f"{_format_time(start, '.')} --> {_format_time(end, '.')}\n{_escape(lines)}\n\n" for start, end, lines in cues
    )


def as_dict(
    transcript: Transcript, language: str, word_times: bool = False, model: Path | None = None
) -> dict[str, Any]:
    """Return the verbose JSON of OpenAI's API, with confidences; `language` is Whisper's code.

    The tokens are those of the tokenizer in the folder `model`; without one there are none.

    As in Whisper's own results, the texts of segments and of their words begin with a space, and segments have `words`
    only if these have times. With `word_times` there is a list of all words even if it is empty.
    """
    segments = [_segment_fields(number, segment, model) for number, segment in enumerate(transcript.segments)]
    fields = {
        "task": "transcribe",
        "language": languages.NAMES[language],
        "duration": round(transcript.audio_s, 3),
        "text": transcript.text,
        "confidence": round(transcript.confidence, 4),
        **({"damage": transcript.damage} if transcript.damage else {}),
        "segments": segments,
    }
    if word_times or any("words" in segment for segment in segments):
        words = [word for segment in segments for word in segment.get("words", ())]
        fields["words"] = [{**word, "word": word["word"].strip()} for word in words]
    return fields


def _segment_fields(number: int, segment: Segment, model: Path | None) -> dict[str, Any]:
    confidences = [round(word.confidence, 4) for word in segment.words]
    fields = {
        "id": number,
        "seek": round(segment.start_s * 100),
        "start": segment.start_s,
        "end": segment.end_s,
        "text": f" {segment.text}",
        "tokens": tokens.token_ids(model, segment.text) if model else [],
        "temperature": segment.temperature,
        "avg_logprob": round(segment.logprob, 4),
        "compression_ratio": round(repetition.compression_ratio(segment.text), 4),
        "no_speech_prob": float(f"{segment.no_speech:.4g}"),
        "confidence": round(segment.confidence, 4),
        "word_confidences": confidences,
    }
    if segment.words and segment.words[0].start_s is not None:
        fields["words"] = [
            {"word": f" {word.text}", "start": word.start_s, "end": word.end_s, "probability": confidence}
            for word, confidence in zip(segment.words, confidences, strict=True)
        ]
    return fields


def verbose_json(transcript: Transcript, language: str = "sv", model: Path | None = None) -> str:
    """Return `as_dict` as JSON text."""
    return json.dumps(as_dict(transcript, language, model=model), ensure_ascii=False, indent=1) + "\n"


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": text, "srt": srt, "vtt": vtt, "json": verbose_json}
"""File suffix to writer."""


def split_into_cues(segment: Segment) -> list[tuple[float, float, str]]:
    """Return a segment as cues (start_s, end_s, lines) of at most two lines of 42 characters and 7 s.

    The time of a segment with several cues is divided by their numbers of characters.
    """
    pages = _pages(segment.text.split(), segment.end_s - segment.start_s)
    total = sum(map(_n_chars, pages)) or 1
    cues, start = [], segment.start_s
    for page in pages:
        end = start + max((segment.end_s - segment.start_s) * _n_chars(page) / total, _SHORTEST_S)
        cues.append((start, end, "\n".join(" ".join(line) for line in page)))
        start = end
    return cues


def _pages(words: list[str], duration_s: float) -> list[list[list[str]]]:
    """Divide words into pages of lines."""
    lines = _lines(words, LINE_CHARS)
    if not lines:
        return []
    # as many pages as lines or seconds require, of about equal length
    n = max(-(-len(lines) // _LINES), -(-duration_s // LONGEST_S))
    goal = sum(len(word) + 1 for word in words) / n
    pages: list[list[str]] = [[]]
    for word in words:
        page = pages[-1]
        if page and (len(_lines([*page, word], LINE_CHARS)) > _LINES or sum(len(w) + 1 for w in page) >= goal):
            pages.append([word])
        else:
            page.append(word)
    return [_lines(page, LINE_CHARS) for page in pages]


def _lines(words: list[str], width: int) -> list[list[str]]:
    lines: list[list[str]] = []
    for word in words:
        if lines and len(" ".join([*lines[-1], word])) <= width:
            lines[-1].append(word)
        else:
            lines.append([word])
    return lines


def _n_chars(page: list[list[str]]) -> int:
    return sum(len(word) + 1 for line in page for word in line)


def _format_time(time_s: float, separator: str) -> str:
    milliseconds = round(max(time_s, 0.0) * 1000)
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{separator}{rest:03d}"


def _escape(lines: str) -> str:
    return lines.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
