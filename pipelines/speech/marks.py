"""Marks in transcripts that may not be spoken: `[skratt]`, `(ohörbart)`, `<unk>`, `&amp;`, `<|sv|>`.

Timestamps of Whisper, such as `<|0.00|>`, are never text. The other marks are reported; they stay as text unless
`curation.marks` is `remove`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from pipelines.speech import text as speech_text

_TIMESTAMP = re.compile(r"<\|\d{1,2}\.\d{2}\|>")
_NOISES = (
    r"skratt\w*|fniss\w*|ohörba\w*|otydlig\w*|oklart|host\w*|suck\w*|nys\w*|snyft\w*|snörvl\w*|harkl\w*|and(?:as|ning|etag)|"
    r"visk\w*|paus\w*|tyst\w*|musik|applåd\w*|brus|buller|ljud|smack\w*|avbrott|laugh\w*|chuckl\w*|inaudible|"
    r"unintelligible|unclear|indistinct|noise|music|cough\w*|sigh\w*|sneez\w*|sniff\w*|applause|crosstalk|breath\w*|"
    r"pause\w*|silence|clears throat|sic|\?+|x{2,}|\.{3}|…"
)
_KINDS = {
    "control tokens": re.compile(r"<\|[^<>|]{1,30}\|>"),
    "HTML entities": re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});"),
    "tags": re.compile(r"</?[^\W\d_][^<>]{0,60}>"),
    "brackets": re.compile(r"\[[^\[\]]{1,60}\]|\{[^{}]{1,60}\}"),
    "sounds": re.compile(rf"\((?:{_NOISES})\)|\*[^*\s][^*]{{0,30}}\*|[♪♫]", re.IGNORECASE),
}


def without_timestamps(transcript: str) -> str:
    """Return the transcript with a space for each timestamp of Whisper."""
    return _TIMESTAMP.sub(" ", transcript)


def find(transcript: str) -> Iterator[tuple[str, str]]:
    """Yield kind and spelling of each mark; a timestamp is a control token."""
    for kind, pattern in _KINDS.items():
        for match in pattern.finditer(transcript):
            if kind != "HTML entities" or html.unescape(match[0]) != match[0]:
                yield kind, match[0]


def remove(transcript: str) -> str:
    """Return the transcript without marks, with a space for each; HTML entities become their character."""
    transcript = html.unescape(without_timestamps(transcript))
    for kind, pattern in _KINDS.items():
        if kind != "HTML entities":
            transcript = pattern.sub(" ", transcript)
    return re.sub(r" +([,.!?])", r"\1", " ".join(transcript.split()))


def sentence_key(transcript: str) -> str:
    """Return the same key for sentences that differ in case, punctuation and marks."""
    return speech_text.normalise(remove(transcript))
