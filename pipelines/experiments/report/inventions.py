"""Transcripts with text that is not in the recording: invented, repeating, empty."""

from __future__ import annotations

from pipelines.speech.repetition import MAX_COMPRESSION_RATIO, MAX_PHRASE_WORDS, MIN_REPEATS, compression_ratio, has_run

_MIN_WORDS, _MIN_EXTRA_WORDS, _MAX_SHARED, _MIN_CER = 3, 3, 0.25, 0.7

DEFINITIONS = {
    "invented": f"At least {_MIN_WORDS} words and more than {_MIN_CER:.0%} of the letters wrong, and either at most "
    f"{_MAX_SHARED:.0%} of the words are in the reference, or there are at least {_MIN_EXTRA_WORDS} words more than in "
    "the reference. Words that are merely misrecognised keep more of their letters.",
    "repeating": f"The same one to {MAX_PHRASE_WORDS} words {MIN_REPEATS} times or more in a row, without such a "
    f"run in the reference; or text that zlib compresses to less than 1/{MAX_COMPRESSION_RATIO:g}, Whisper's own "
    "threshold.",
    "empty": "No word at all.",
}
"""Explanation of each of `kinds`, as on the page. Case and punctuation do not count."""


def kinds(reference: str, hypothesis: str, cer: float) -> list[str]:
    """Return the keys of DEFINITIONS that apply to a transcript; both texts are normalised, `cer` is their CER."""
    expected, written = reference.split(), hypothesis.split()
    applies = {
        "invented": _is_invented(expected, written, cer),
        "repeating": _is_repeating(expected, written),
        "empty": not written,
    }
    return [name for name, is_kind in applies.items() if is_kind]


def _is_invented(expected: list[str], written: list[str], cer: float) -> bool:
    if len(written) < _MIN_WORDS or cer <= _MIN_CER:
        return False
    shared = sum(word in expected for word in written)
    return shared <= _MAX_SHARED * len(written) or len(written) >= len(expected) + _MIN_EXTRA_WORDS


def _is_repeating(expected: list[str], written: list[str]) -> bool:
    if compression_ratio(" ".join(written)) > MAX_COMPRESSION_RATIO:
        return True
    return has_run(written) and not has_run(expected)
