"""Transcripts that say what nobody said: invented, repeating, empty."""

from __future__ import annotations

from pipelines.speech.repetition import LONGEST, RATIO, TIMES, compression_ratio, has_run

_WORDS, _LONGER, _SAID, _CER = 3, 3, 0.25, 0.7

DEFINITIONS = {
    "invented": f"At least {_WORDS} words and more than {_CER:.0%} of the letters wrong, where at most {_SAID:.0%} of "
    f"the words were said, or where there are at least {_LONGER} words more than were said. What was merely misheard "
    "keeps more of its letters.",
    "repeating": f"The same one to {LONGEST} words {TIMES} times or more in a row, where the reference has no such "
    f"run; or text that zlib shrinks to less than 1/{RATIO:g}, Whisper's own threshold.",
    "empty": "No word at all.",
}
"""What each of `kinds` means, as the page tells it. Case and punctuation are set aside."""


def kinds(reference: str, hypothesis: str, cer: float) -> list[str]:
    """Which of DEFINITIONS a transcript is; both texts normalised, `cer` their character error rate."""
    said, written = reference.split(), hypothesis.split()
    found = {
        "invented": _is_invented(said, written, cer),
        "repeating": _is_repeating(said, written),
        "empty": not written,
    }
    return [name for name, is_so in found.items() if is_so]


def _is_invented(said: list[str], written: list[str], cer: float) -> bool:
    if len(written) < _WORDS or cer <= _CER:
        return False
    known = sum(word in said for word in written)
    return known <= _SAID * len(written) or len(written) >= len(said) + _LONGER


def _is_repeating(said: list[str], written: list[str]) -> bool:
    if compression_ratio(" ".join(written)) > RATIO:
        return True
    return has_run(written) and not has_run(said)
