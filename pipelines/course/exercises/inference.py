"""Exercise 3: real-time factor, greedy decoding, beams, repetition loops, subtitles, windows, calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.course.exercise import Exercise, Task, call, is_close, items, number, require, tokens
from pipelines.speech import repetition

START, END = 0, 1
_LIMIT_OF_CALLS = 300
Word = tuple[str, float, float]
"""Text, start and end in seconds."""


def check_real_time_factor(real_time_factor: Any) -> None:
    """Check the time that a second of audio takes."""
    for audio_s, elapsed_s in ((10.0, 2.0), (4.0, 6.0)):
        result = number(real_time_factor, audio_s, elapsed_s)
        require(
            not is_close(result, audio_s / elapsed_s),
            f"{audio_s:g} s of audio in {elapsed_s:g} s gives {result:.2f}: this is its inverse, the speed. The "
            "real-time factor is below 1 if the model is faster than the speaker.",
        )
        require(is_close(result, elapsed_s / audio_s), f"Expected {elapsed_s / audio_s:.2f}, got {result:.2f}.")


def toy_decoder(table: dict[tuple[int, ...], dict[int, float]]) -> Callable[[list[int]], np.ndarray]:
    """Return a decoder: it takes the tokens so far and returns the log-probabilities of the next of 6 tokens.

    Sequences that are not in the table end. Raises RuntimeError after 300 calls: the caller is in an endless loop.
    """
    calls = 0

    def step(before: list[int]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > _LIMIT_OF_CALLS:
            raise RuntimeError("the decoder was called 300 times; is there a limit on the number of tokens?")
        probabilities = np.full(6, 1e-6)
        for token, probability in table.get(tuple(before), {END: 1.0}).items():
            probabilities[token] = probability
        return np.log(probabilities)

    return step


def _loop() -> Callable[[list[int]], np.ndarray]:
    """Return a decoder that repeats token 3 for ever."""
    return toy_decoder({(START, *[3] * n): {3: 0.9, END: 0.1} for n in range(400)})


_SENTENCE = {(START,): {2: 0.7, 3: 0.3}, (START, 2): {4: 0.6, END: 0.4}, (START, 2, 4): {END: 0.9, 5: 0.1}}
_TRAP = {
    (START,): {2: 0.6, 3: 0.4},
    (START, 2): {2: 0.3, 4: 0.25, 5: 0.25, END: 0.2},
    (START, 3): {5: 0.95, END: 0.05},
    (START, 3, 5): {END: 0.95, 2: 0.05},
}
"""Greedy decoding chooses 2 first, although 3 5 is the most probable text."""


def check_greedy(greedy: Any) -> None:
    """Check greedy decoding: greedy(step, limit) returns the text tokens."""
    result = tokens(greedy, toy_decoder(_SENTENCE), 10)
    require(START not in result, f"The start token {START} is no text: leave it out of the result.")
    require(END not in result, f"The end token {END} is no text: leave it out of the result.")
    require(result == [2, 4], f"Expected the tokens [2, 4], got {result}.")
    loop = tokens(greedy, _loop(), 10)
    require(len(loop) == 10, f"A decoder that repeats itself was not stopped at 10 tokens but at {len(loop)}.")


def check_beam_search(beam_search: Any) -> None:
    """Check beam search: beam_search(step, width, limit) returns the most probable text."""
    result = tokens(beam_search, toy_decoder(_TRAP), 2, 10)
    require(START not in result and END not in result, "The start and end tokens are no text: leave them out.")
    require(
        result[:1] != [2],
        "This is the greedy choice. Keep the two best beginnings by the *sum* of their log-probabilities, and compare "
        "complete texts at the end.",
    )
    require(result == [3, 5], f"Expected the tokens [3, 5], got {result}.")
    narrow = tokens(beam_search, toy_decoder(_TRAP), 1, 10)
    require(narrow[:1] == [2], f"With width 1, beam search is greedy and begins with token 2; got {narrow}.")
    require(
        len(tokens(beam_search, _loop(), 2, 10)) <= 10, "A decoder that repeats itself must be stopped at the limit."
    )


def check_is_loop(is_loop: Any) -> None:
    """Check the detection of repetition loops by compression."""
    loop = "det är bra " * 12
    short = "ja ja"
    sentence = "Vi ställde cyklarna bakom ladugården och gick ner till sjön för att bada."
    require(bool(call(is_loop, loop)), f"{loop[:33]!r}... is a loop: its compression ratio is above 2.4.")
    require(not call(is_loop, sentence), f"{sentence[:40]!r}... is not a loop.")
    require(not call(is_loop, short), f"{short!r} is not a loop: a short text compresses badly.")
    words = "åäö " * 11  # a loop by its 77 bytes, also with the header of gzip, and none by its 44 characters
    ratio = repetition.compression_ratio(words)
    require(
        call(is_loop, words),
        f"{words[:11]!r}... has the ratio {ratio:.2f}: divide bytes by bytes, since å, ä and ö have two each.",
    )


def check_srt_time(srt_time: Any) -> None:
    """Check the format of times in srt subtitles."""
    for seconds, expected in (
        (0.0, "00:00:00,000"),
        (83.5, "00:01:23,500"),
        (3_600.25, "01:00:00,250"),
        (59.9996, "00:01:00,000"),
    ):
        result = call(srt_time, seconds)
        require(result != expected.replace(",", "."), "srt has a comma before the milliseconds; the dot is WebVTT's.")
        require(
            "60" not in str(result) and "1000" not in str(result),
            f"{seconds} s gives {result}: round to whole milliseconds first, then divide.",
        )
        require(result == expected, f"Expected {expected!r} for {seconds} s, got {result!r}.")


def check_join(join: Any) -> None:
    """Check the merge of two windows that overlap: join(first, second, overlap_start_s, overlap_end_s)."""
    first = [("vi", 26.0, 26.4), ("gick", 26.5, 27.0), ("hem", 27.1, 27.6), ("sent", 28.2, 28.6), ("på", 28.7, 29.0)]
    second = [("hemm", 27.1, 27.6), ("sent", 28.25, 28.6), ("på", 28.7, 29.0), ("kvällen", 29.1, 29.8)]
    expected = ["vi", "gick", "hem", "sent", "på", "kvällen"]
    words = items(join, first, second, 27.0, 29.0)
    is_words = all(np.ndim(word) == 1 and len(word) == 3 for word in words)
    require(is_words, "Return words as they are given: text, start and end of each.")
    result = [str(word[0]) for word in words]
    require(len(result) < len(first) + len(second), "All words of both windows are there: those of the overlap twice.")
    require("hemm" not in result, "'hemm' is the second window's guess at a word that its edge cuts: take the first's.")
    require(len(result) == len(set(result)), f"A word is there twice: {result}.")
    require(
        result == expected,
        f"Expected {expected}, got {result}. Cut in the middle of the overlap: a word belongs to the window on whose "
        "side its own middle lies.",
    )
    require(call(join, [], second, 27.0, 29.0) is not None, "An empty window is allowed: it was silent.")


def check_calibration(calibration_error: Any) -> None:
    """Check the expected calibration error in 5 bins of equal width."""
    random = np.random.default_rng(5)
    confidences = random.uniform(size=400)
    correct = random.uniform(size=400) < 0.25 + confidences / 2
    bins = np.minimum((confidences * 5).astype(int), 4)
    gaps = [abs(confidences[bins == n].mean() - correct[bins == n].mean()) for n in range(5)]
    shares = [(bins == n).mean() for n in range(5)]
    result = number(calibration_error, confidences, correct)
    require(
        not is_close(result, float(np.mean(gaps)), 1e-9),
        "All bins count the same here. Weight each by its share of the words.",
    )
    require(
        not is_close(result, abs(confidences.mean() - correct.mean()), 1e-9),
        "This is the difference of the overall means: too high and too low confidences cancel out. Compare in bins.",
    )
    expected = float(np.dot(gaps, shares))
    require(is_close(result, expected), f"Expected {expected:.4f}, got {result:.4f}.")
    empty = number(calibration_error, np.array([0.9, 0.95]), np.array([True, True]))
    require(is_close(empty, 0.075), f"Bins without words count nothing: expected 0.075, got {empty:.3f}.")


exercise = Exercise(
    [
        Task("How fast is it?", check_real_time_factor),
        Task("Greedy decoding", check_greedy),
        Task("Beam search", check_beam_search),
        Task("Detect a repetition loop", check_is_loop),
        Task("Times in subtitles", check_srt_time),
        Task("Join two windows", check_join),
        Task("Is the confidence right?", check_calibration),
    ]
)
