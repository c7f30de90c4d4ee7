"""Transcripts: `clean` what is trained on, `normalise` what is scored. å ä ö é stay what they are in both."""

from __future__ import annotations

import re
import unicodedata

NORMALISER = "1"
"""Version of `normalise`: raised whenever the same transcript would come out otherwise."""
_QUOTES = "\"“”„»«'‘’"
_SOFT_HYPHEN = "\u00ad"
"""Where a word may be broken, not where it is: it goes without a trace."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\ufeff]+")


def clean(text: str) -> str:
    """A transcript for training: composed (NFC), one space between words, no quotes around the whole.

    Nothing that changes a word: case and punctuation are Whisper's to learn.
    """
    text = _CONTROL.sub(" ", unicodedata.normalize("NFC", text.replace(_SOFT_HYPHEN, "")))
    text = " ".join(text.split())
    if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES and not set(text[1:-1]) & set(_QUOTES):
        text = text[1:-1].strip()
    return text


def with_full_stop(text: str) -> str:
    """A clean transcript with a full stop where it ends in a letter or a digit: no word changes."""
    return f"{text}." if text and unicodedata.category(text[-1])[0] in "LN" else text


def normalise(text: str) -> str:
    """A transcript for scoring: lower case, words of letters and digits, one space between them.

    Punctuation and symbols become spaces; letters keep their marks, so that å, a and ä stay three letters.
    A mark without a letter (an emoji's variation selector) is no word. Numbers stay as they are written.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.replace(_SOFT_HYPHEN, "")).lower())
    kept = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in text)
    return " ".join(word for word in kept.split() if any(unicodedata.category(char)[0] in "LN" for char in word))
