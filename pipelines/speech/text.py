"""Clean transcripts for training and normalise them for scoring. Both keep letters with marks (å ä ö é)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

NORMALISER = "1"
"""Version of `normalise`: raised whenever its result changes for some transcript."""
_QUOTES = "\"“”„»«'‘’"
_SOFT_HYPHEN = "\u00ad"
"""Marks where a word may be hyphenated; removed without a space."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\ufeff]+")

_NUMBER = re.compile(r"(^|/)0*(\d+)(?:\.0+)?$")
"""A speaker's number, which spreadsheets and pandas write with other zeros; `/` follows the name of a mix's part."""
_UNKNOWN_SPEAKERS = frozenset("? - unknown unk unspecified anonymous okänd okänt anonym nan none null n/a".split())
"""Words in lower case for an unknown speaker."""


def speaker_key(speaker: str) -> str:
    """Return the same key for all spellings of a speaker: `3`, `3.0` and `03`; NFC and NFD; any case and blanks.

    It is empty for an unknown speaker, also for words that say so.
    """
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", speaker).casefold())
    key = _NUMBER.sub(r"\1\2", " ".join(composed.split()))
    return "" if key in _UNKNOWN_SPEAKERS or key.rpartition("/")[2] in _UNKNOWN_SPEAKERS else key


def same_speakers(speakers: Iterable[str]) -> list[str]:
    """Return the speakers with one spelling for each: the first that occurs; empty for unknown ones."""
    first = {"": ""}
    return [first.setdefault(speaker_key(speaker), speaker) for speaker in speakers]


def clean(text: str) -> str:
    """Return a transcript for training: composed (NFC), one space between words, no quotes around the whole.

    Words, case and punctuation do not change: Whisper learns to write them.
    """
    text = _CONTROL.sub(" ", unicodedata.normalize("NFC", text.replace(_SOFT_HYPHEN, "")))
    text = " ".join(text.split())
    if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES and not set(text[1:-1]) & set(_QUOTES):
        text = text[1:-1].strip()
    return text


def with_full_stop(text: str) -> str:
    """Append a full stop to a clean transcript that ends in a letter or a digit."""
    return f"{text}." if text and unicodedata.category(text[-1])[0] in "LN" else text


def normalise(text: str) -> str:
    """Return a transcript for scoring: lower case, words of letters and digits, one space between them.

    Punctuation and symbols become spaces. Letters keep their marks, so å, a and ä are three letters. Marks without a
    letter (an emoji's variation selector) are dropped. Numbers keep their spelling.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.replace(_SOFT_HYPHEN, "")).lower())
    spaced = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in text)
    return " ".join(word for word in spaced.split() if any(unicodedata.category(char)[0] in "LN" for char in word))
