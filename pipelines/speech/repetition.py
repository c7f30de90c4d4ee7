"""Detect and cut transcripts that repeat themselves, a typical failure of autoregressive decoding."""

from __future__ import annotations

import zlib

MAX_COMPRESSION_RATIO = 2.4
"""Transcripts with a higher ratio repeat themselves: `compression_ratio_threshold` in openai/whisper, transcribe.py."""
MAX_PHRASE_WORDS = 6
"""Longer repeated phrases are not searched for."""
MIN_REPEATS = 3
"""A run is a phrase of 1 to MAX_PHRASE_WORDS words that occurs this often or more in a row."""
_MIN_REJECTED_REPEATS = MIN_REPEATS + 2
"""People do say a word three times in a row (nej, nej, nej), so a transcript needs a longer run to be rejected."""


def compression_ratio(text: str) -> float:
    """Return the bytes of a text divided by its bytes after zlib: as openai/whisper, utils.py, computes it."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def has_run(words: list[str]) -> bool:
    """Return True if a phrase of 1 to MAX_PHRASE_WORDS words occurs MIN_REPEATS times in a row."""
    return _first_run(words, MIN_REPEATS) is not None


def is_repeating(text: str) -> bool:
    """Return True if a transcript repeats itself more than speakers do."""
    return (
        compression_ratio(text) > MAX_COMPRESSION_RATIO
        or _first_run(text.lower().split(), _MIN_REJECTED_REPEATS) is not None
    )


def without_repeats(text: str) -> str:
    """Return `text` up to the end of the first occurrence of its first repeated phrase."""
    run = _first_run(text.lower().split(), MIN_REPEATS)
    return " ".join(text.split()[: sum(run)]) if run else text


def _first_run(words: list[str], min_repeats: int) -> tuple[int, int] | None:
    """Return the index at which the first run starts and the number of words in its phrase."""
    first = None
    for size in range(1, MAX_PHRASE_WORDS + 1):
        equal = 0  # consecutive words that equal the word `size` positions later
        for index, (word, later) in enumerate(zip(words, words[size:], strict=False)):
            equal = equal + 1 if word == later else 0
            if equal == size * (min_repeats - 1):
                start = index - equal + 1
                if first is None or start < first[0]:
                    first = (start, size)
                break
    return first
