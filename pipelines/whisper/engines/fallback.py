"""Decode a window again, at higher temperatures, if its text repeats itself or is improbable, as OpenAI does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from pipelines.speech import repetition
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions


class Accepted(NamedTuple):
    """The accepted hypothesis of a window, and the temperature at which it was decoded."""

    hypothesis: Hypothesis
    temperature: float = 0.0


def accept(
    first: Hypothesis, decode: Callable[[float], Hypothesis], options: DecodingOptions, duration_s: float
) -> Accepted:
    """Return the first hypothesis that does not fail, of `first` and those at the further temperatures.

    `decode` returns the hypothesis at a temperature. If all fail, the likeliest that does not repeat itself is
    returned; if all repeat themselves, the last one, cut after its first repetition.
    """
    attempts = [Accepted(first, options.temperatures[0])]
    for temperature in options.temperatures[1:]:
        if not _fails(attempts[-1].hypothesis, options, duration_s):
            return attempts[-1]
        attempts.append(Accepted(decode(temperature), temperature))
    if not _fails(attempts[-1].hypothesis, options, duration_s):
        return attempts[-1]
    without_loops = [attempt for attempt in attempts if not _repeats(attempt.hypothesis, options, duration_s)]
    if without_loops:
        return max(without_loops, key=lambda attempt: attempt.hypothesis.logprob)
    return Accepted(without_repeats(attempts[-1].hypothesis), attempts[-1].temperature)


def is_silence(hypothesis: Hypothesis, options: DecodingOptions) -> bool:
    """Return whether a hypothesis is improbable and no speech probable."""
    return hypothesis.logprob < options.min_logprob and hypothesis.no_speech > options.no_speech_threshold


def without_repeats(hypothesis: Hypothesis) -> Hypothesis:
    """Cut a hypothesis that repeats itself at every temperature after the first repetition."""
    text = repetition.without_repeats(hypothesis.text)
    return replace(hypothesis, text=text, words=hypothesis.words[: len(text.split())])


def _fails(hypothesis: Hypothesis, options: DecodingOptions, duration_s: float) -> bool:
    return _repeats(hypothesis, options, duration_s) or hypothesis.logprob < options.min_logprob


def _repeats(hypothesis: Hypothesis, options: DecodingOptions, duration_s: float) -> bool:
    return repetition.is_repeating(hypothesis.text, duration_s, options.max_compression_ratio)
