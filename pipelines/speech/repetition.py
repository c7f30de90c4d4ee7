"""Detect and cut transcripts that repeat themselves, a typical failure of autoregressive decoding."""

from __future__ import annotations

import itertools
import zlib

MAX_COMPRESSION_RATIO = 2.4
"""Transcripts with a higher ratio repeat themselves: `compression_ratio_threshold` in openai/whisper, transcribe.py."""
MAX_PHRASE_WORDS = 6
"""Longer repeated phrases are not searched for."""
MIN_REPEATS = 3
"""A run is a phrase of 1 to MAX_PHRASE_WORDS words that occurs this often or more in a row."""
_MIN_LOOP = 5
"""A phrase of several words that occurs this often in a row is a loop of the decoder."""
_MAX_WORD_REPEATS = 8
"""People repeat one word on purpose (nej, nej, nej, ...); a loop seldom stops before the limit of tokens."""
_MAX_WORDS_PER_S = 7.0
"""People say the same word at most so often in a second."""


def compression_ratio(text: str) -> float:
    """Return the bytes of a text divided by its bytes after zlib: as openai/whisper, utils.py, computes it."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def has_run(words: list[str]) -> bool:
    """Return True if a phrase of 1 to MAX_PHRASE_WORDS words occurs MIN_REPEATS times in a row."""
    return _first_run(words, MIN_REPEATS) is not None


def is_repeating(
    text: str, duration_s: float = float("inf"), max_compression_ratio: float = MAX_COMPRESSION_RATIO
) -> bool:
    """Return True if the transcript of `duration_s` seconds repeats itself more than speakers do.

    One word may occur up to eight times in a row if there is time to say it; the rest of the text decides then.
    """
    words = _without_deliberate_repeats(text.lower().split(), duration_s)
    return compression_ratio(" ".join(words)) > max_compression_ratio or _first_run(words, _MIN_LOOP) is not None


def without_repeats(text: str) -> str:
    """Return `text` up to the end of the first occurrence of its first repeated phrase."""
    run = _first_run(text.lower().split(), MIN_REPEATS)
    return " ".join(text.split()[: sum(run)]) if run else text


def _without_deliberate_repeats(words: list[str], duration_s: float) -> list[str]:
    """Return the words with each run of one word as one word, unless it is longer than speakers repeat a word."""
    runs = [list(run) for _, run in itertools.groupby(words)]
    most = min(_MAX_WORD_REPEATS, _MAX_WORDS_PER_S * duration_s)
    return [word for run in runs for word in (run[:1] if len(run) <= most else run)]


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
