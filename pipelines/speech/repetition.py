"""Transcripts that go round in circles: what a decoder does where it has lost the speech."""

from __future__ import annotations

import zlib

RATIO = 2.4
"""Whisper's own threshold (`compression_ratio_threshold`): what zlib shrinks by more than this repeats itself."""
TIMES, LONGEST = 3, 6
"""A run is the same one to LONGEST words TIMES times or more in a row."""


def compression_ratio(text: str) -> float:
    """Bytes of a text over its bytes after zlib, as Whisper's decoder computes it."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def has_run(words: list[str]) -> bool:
    """Whether one to LONGEST words come TIMES times in a row."""
    return _run(words) is not None


def is_repeating(text: str) -> bool:
    """Whether a transcript repeats itself more than people do; the same word thrice (nej, nej, nej) they may say."""
    words = text.lower().split()
    return compression_ratio(text) > RATIO or _run(words, times=TIMES + 2) is not None


def without_repeats(text: str) -> str:
    """`text` up to the first time that a run's words are said once."""
    found = _run(text.lower().split(), times=TIMES)
    return " ".join(text.split()[: sum(found)]) if found else text


def _run(words: list[str], times: int = TIMES) -> tuple[int, int] | None:
    """Where the first run begins, and how many words are repeated in it."""
    first = None
    for size in range(1, LONGEST + 1):
        alike = 0  # neighbours at this distance that are equal, in a row
        for at, (a, b) in enumerate(zip(words, words[size:], strict=False)):
            alike = alike + 1 if a == b else 0
            if alike == size * (times - 1):
                begin = at - alike + 1
                if first is None or begin < first[0]:
                    first = (begin, size)
                break
    return first
