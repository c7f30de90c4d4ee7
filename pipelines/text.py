"""Transcripts: `clean` what is trained on, `normalise` what is scored. å ä ö é stay what they are in both."""

from __future__ import annotations

import re
import unicodedata

_QUOTES = "\"“”„»«'‘’"
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u200b\u200e\u200f\u2028\u2029\ufeff]+")


def clean(text: str) -> str:
    """A transcript for training: composed (NFC), one space between words, no quotes around the whole.

    Nothing that changes a word: case and punctuation are Whisper's to learn.
    """
    text = _CONTROL.sub(" ", unicodedata.normalize("NFC", text))
    text = " ".join(text.split())
    if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES and not set(text[1:-1]) & set(_QUOTES):
        text = text[1:-1].strip()
    return text


def normalise(text: str) -> str:
    """A transcript for scoring: lower case, words of letters and digits, one space between them.

    Punctuation and symbols become spaces; letters keep their marks, so that å, a and ä stay three letters.
    Numbers stay as they are written.
    """
    text = unicodedata.normalize("NFC", text).lower()
    kept = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in text)
    return " ".join(kept.split())
