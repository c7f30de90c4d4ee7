"""Decode windows of speech: batches of similar length, fallback, and what follows the last timestamp of a text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pipelines.inference.segmentation import Window
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.whisper.batching import padded_frames, sorted_batches
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import MAX_NEW_TOKENS, DecodingOptions
from pipelines.whisper.engines import Engine, fallback
from pipelines.whisper.engines.fallback import Accepted
from pipelines.whisper.log_mel import HOP_SAMPLES, LogMel

logger = logging.getLogger(__name__)

BATCH_FRAMES, _USUAL_BEAMS = 6_000, 5
"""Log-mel frames of a batch, and the number of beams above which a batch has fewer."""
_MIN_REST_S = 0.4
"""Speech after the last timestamp of a window that is decoded in another pass, if there is more than this."""
_MIN_ADVANCE_S = 0.3
"""A window is not continued after a timestamp that is closer to its start."""
_USUAL_CHARS_PER_S = 11.0
"""Texts with fewer characters to a second of speech may have ended before the speech: 15 are usual."""
_LONG_WORD_S, _MIN_UNWRITTEN_S = 0.7, 1.0
"""The last word of a text is taken to end after the first, and more speech than the second is no part of it."""
_NEAR_S = 0.6
"""A timestamp this close to the start of a stretch of speech means that start: detectors are more exact."""


@dataclass(frozen=True)
class Decoded:
    """A part of a window and its accepted hypothesis."""

    window: Window
    log_mel: LogMel
    accepted: Accepted
    starts: list[float] | None = None
    """Start of each word in the recording, in seconds, if they were needed before."""


@dataclass(frozen=True)
class WindowDecoder:
    """Decodes windows with an engine, at the length of the windows or padded to 30 s."""

    engine: Engine
    is_clip_length: bool
    full_frames: int
    """Frames that the model's encoder takes; windows that are not decoded at their own length are padded to it."""
    drops_silence: bool
    """Leave out windows that the model takes for silence: right without a detector, which knows better."""

    def decode(
        self, windows: Sequence[Window], options: DecodingOptions, before_batch: Callable[[], None]
    ) -> list[list[Decoded]]:
        """Return the decoded parts of each window, in order.

        A window is one part, unless its text ends before its speech does. `before_batch` is called before each batch
        and each further attempt; an exception in it stops the work.
        """
        results: list[list[Decoded]] = [[] for _ in windows]
        left: dict[int, Window] = dict(enumerate(windows))
        while left:
            numbers, pending = list(left), list(left.values())
            left = {}
            for number, decoded in zip(numbers, self._decode(pending, options, before_batch), strict=True):
                rest = remaining(decoded.window, decoded.accepted.hypothesis)
                results[number].append(replace(decoded, window=_until(decoded.window, rest)))
                if rest is not None:
                    left[number] = rest
        return results

    def features(self, log_mels: Sequence[LogMel]) -> np.ndarray:
        """Return features float32 [B, n_mels, T], padded to the longest."""
        n_frames = max(self._padded_length(log_mel) for log_mel in log_mels)
        return np.stack([log_mel.padded(n_frames) for log_mel in log_mels])

    def _padded_length(self, log_mel: LogMel) -> int:
        """Return the number of frames at which a window is decoded."""
        return padded_frames(len(log_mel.frames)) if self.is_clip_length else self.full_frames

    def _decode(
        self, windows: list[Window], options: DecodingOptions, before_batch: Callable[[], None]
    ) -> Iterator[Decoded]:
        log_mels = [self.engine.log_mel(Waveform(window.samples)) for window in windows]
        hypotheses: dict[int, Hypothesis] = {}
        lengths = np.array([self._padded_length(log_mel) for log_mel in log_mels])
        # further beams need the memory of further windows
        for batch in sorted_batches(lengths, BATCH_FRAMES * _USUAL_BEAMS // max(options.beam_size, _USUAL_BEAMS)):
            before_batch()
            features = self.features([log_mels[i] for i in batch])
            first = self.engine.decode(features, options, options.temperatures[0])
            hypotheses |= zip(batch.tolist(), first, strict=True)
        for i, (window, log_mel) in enumerate(zip(windows, log_mels, strict=True)):
            hypothesis, temperature = self._accept(hypotheses[i], log_mel, options, before_batch)
            if not options.timestamps and hypothesis.tokens < options.max_new_tokens:
                hypothesis = self._cut_at_unwritten(window, log_mel, hypothesis)
            yield Decoded(window, log_mel, Accepted(hypothesis, temperature))

    def _cut_at_unwritten(self, window: Window, log_mel: LogMel, hypothesis: Hypothesis) -> Hypothesis:
        """Return a hypothesis without timestamps up to the first speech that it leaves out, and where it ends.

        Suspected if the text is short for its speech. It ends before the first stretch of speech in which no word
        starts, or within a stretch if no word starts for long; words after that are decoded again.
        """
        texts, speech_s = hypothesis.text.split(), sum(b - a for a, b in window.speech)
        if not texts or len(hypothesis.text) > _USUAL_CHARS_PER_S * speech_s:
            return hypothesis
        (features,) = self.features([log_mel])
        starts = self.engine.word_starts(features, min(len(log_mel.frames), features.shape[-1]), hypothesis.text)
        if len(starts) != len(texts):
            return hypothesis
        times_s = [window.start_s + start for start in starts]
        for n, (start_s, next_s) in enumerate(pairwise([*times_s, window.end_s]), start=1):
            unwritten_s = _unwritten_speech(window, start_s, next_s)
            if unwritten_s is not None:
                end_s, is_last = unwritten_s - window.start_s, n == len(texts)
                first_words = {} if is_last else {"text": " ".join(texts[:n]), "words": hypothesis.words[:n]}
                cut = replace(hypothesis, end_s=end_s, **first_words)
                return cut if remaining(window, cut) else hypothesis
        return hypothesis

    def _accept(
        self, first: Hypothesis, log_mel: LogMel, options: DecodingOptions, before_batch: Callable[[], None]
    ) -> Accepted:
        """Return the hypothesis of a window after further attempts."""
        duration_s = len(log_mel.frames) * HOP_SAMPLES / SAMPLE_RATE_HZ
        if self.drops_silence and fallback.is_silence(first, options):
            return Accepted(replace(first, text="", words=(), end_s=None))

        def decode(temperature: float) -> Hypothesis:
            before_batch()
            return self.engine.decode(self.features([log_mel]), options, temperature)[0]

        accepted = fallback.accept(first, decode, options, duration_s)
        # a caller's own limit is no surprise
        if accepted.hypothesis.tokens >= options.max_new_tokens == MAX_NEW_TOKENS:
            logger.info(
                f"note: a part of {duration_s:.0f} s has more text than {options.max_new_tokens} tokens: its last "
                "words are missing. Cut the recording at a pause there, and transcribe the parts"
            )
        return accepted


def _unwritten_speech(window: Window, start_s: float, next_s: float) -> float | None:
    """Return where speech begins that no word covers, after a word that starts at `start_s`; None if there is none."""
    end_s = start_s + _LONG_WORD_S
    rests = [max(a, end_s) for a, b in window.speech if min(b, next_s) - max(a, end_s) > _MIN_UNWRITTEN_S]
    lowest_s, highest_s = start_s + _NEAR_S, next_s + _NEAR_S
    stretches = [a for a, b in window.speech if a > lowest_s and b < highest_s and b - a > _MIN_REST_S]
    return min([*rests, *stretches], default=None)


def remaining(window: Window, hypothesis: Hypothesis) -> Window | None:
    """Return what is left to decode of a window: from the last timestamp, if enough speech follows it."""
    if hypothesis.end_s is None or hypothesis.end_s < _MIN_ADVANCE_S:
        return None
    end_s = window.start_s + hypothesis.end_s
    near = [a for a, _ in window.speech[1:] if abs(a - end_s) < _NEAR_S]
    start_s = min(near, key=lambda a: abs(a - end_s), default=end_s)
    speech = tuple((max(a, start_s), b) for a, b in window.speech if b > start_s)
    if sum(b - a for a, b in speech) < _MIN_REST_S:
        return None
    first = round((speech[0][0] - window.start_s) * SAMPLE_RATE_HZ)
    return Window(window.samples[first:], window.start_s + first / SAMPLE_RATE_HZ, speech)


def _until(window: Window, rest: Window | None) -> Window:
    """Return a window up to what is left of it."""
    if rest is None:
        return window
    speech = tuple((a, min(b, rest.start_s)) for a, b in window.speech if a < rest.start_s)
    return Window(window.samples[: len(window.samples) - len(rest.samples)], window.start_s, speech)
