"""Read transcripts as the archive shows them: segments with the times and confidences of their words."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.infra.errors import LabError

SUFFIXES = (".json", ".vtt", ".srt")
"""Of transcripts, the most detailed first."""
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_CUE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
_TAG = re.compile(r"</?[\w.:-][^>]*>")


@dataclass(frozen=True)
class Line:
    """A segment of a transcript."""

    start_s: float
    text: str
    """NFC, words separated by one space."""
    speaker: str = ""
    starts_s: list[float] = field(default_factory=list)
    """Of each word; empty if they are unknown."""
    confidences: list[float] = field(default_factory=list)
    """Of each word, 0 to 1; empty if they are unknown."""


def read(path: Path) -> tuple[list[Line], str]:
    """Return the segments in a transcript, and what could not be read of the recording.

    Raises LabError if the file holds none of the supported forms.
    """
    try:
        text = path.read_text("utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else {}
        lines = [_segment(segment) for segment in content["segments"]] if content else _from_cues(text)
        damage = str(content.get("damage") or "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LabError(f"{path} is not a transcript: expected verbose JSON with segments, srt or vtt") from None
    return [line for line in lines if line.text], damage


def _segment(segment: dict[str, Any]) -> Line:
    """Return a segment of the verbose JSON of OpenAI's API, or of Whisper's own."""
    words, text = segment.get("words") or [], clean(segment["text"])
    confidences = [_number(word.get("probability", math.nan)) for word in words]
    if not words:
        confidences = [_number(value) for value in segment.get("word_confidences") or []]
    n_words = len(text.split())
    starts = [_number(word["start"]) for word in words]
    return Line(
        _number(segment["start"]),
        text,
        clean(str(segment.get("speaker") or "")),
        starts if len(starts) == n_words and all(map(math.isfinite, starts)) else [],
        confidences if len(confidences) == n_words and all(map(math.isfinite, confidences)) else [],
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _from_cues(text: str) -> list[Line]:
    """Return the cues of srt or vtt."""
    lines: list[Line] = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        rows = block.strip().split("\n")
        at = next((number for number, row in enumerate(rows) if _CUE.match(row)), None)
        if at is None:
            continue
        hours, minutes, seconds, fraction = _CUE.match(rows[at]).groups()[:4]
        start_s = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000
        lines.append(Line(start_s, clean(html.unescape(_TAG.sub("", " ".join(rows[at + 1 :]))))))
    if not lines:
        raise ValueError("no cue")
    return lines


def clean(text: str) -> str:
    """Return a text in NFC with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())
