"""Decode windows of speech: batches of similar length, fallback, and what follows the last timestamp of a text."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.speech.recordings.segmentation import Window
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
    """Start of each word in the recording, in seconds; empty if they are unknown, None before they were needed."""


NeedsStarts = Callable[[int, Window, str], bool]
"""Returns whether the starts of a text's words are needed: number of its window, what is left of that, the text."""


def _never(number: int, window: Window, text: str) -> bool:
    return False


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
        self,
        windows: Sequence[Window],
        options: DecodingOptions,
        before_batch: Callable[[], None],
        needs_starts: NeedsStarts = _never,
    ) -> list[list[Decoded]]:
        """Return the decoded parts of each window, in order.

        A window is one part, unless its text ends before its speech does. `before_batch` is called before each batch
        and each further attempt; an exception in it stops the work. Parts have the starts of their words where
        `needs_starts` asks for them: a whole batch is then aligned at once, which takes little time.
        """
        results: list[list[Decoded]] = [[] for _ in windows]
        left: dict[int, Window] = dict(enumerate(windows))
        while left:
            pending, left = left, {}
            for number, decoded in self._decode(pending, options, before_batch, needs_starts).items():
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
        self,
        windows: dict[int, Window],
        options: DecodingOptions,
        before_batch: Callable[[], None],
        needs_starts: NeedsStarts,
    ) -> dict[int, Decoded]:
        """Return the decoded windows by the numbers of `windows`."""
        numbers = list(windows)
        log_mels = [self.engine.log_mel(Waveform(window.samples)) for window in windows.values()]
        decoded: dict[int, Decoded] = {}
        lengths = np.array([self._padded_length(log_mel) for log_mel in log_mels])
        # further beams need the memory of further windows
        for batch in sorted_batches(lengths, BATCH_FRAMES * _USUAL_BEAMS // max(options.beam_size, _USUAL_BEAMS)):
            before_batch()
            features = self.features([log_mels[i] for i in batch])
            first = self.engine.decode(features, options, options.temperatures[0])
            parts: dict[int, Decoded] = {}
            for i, hypothesis in zip(batch.tolist(), first, strict=True):
                accepted = self._accept(hypothesis, log_mels[i], options, before_batch)
                parts[numbers[i]] = Decoded(windows[numbers[i]], log_mels[i], accepted)
            decoded |= self._aligned(parts, features, options, needs_starts)
        return decoded

    def _aligned(
        self, parts: dict[int, Decoded], features: np.ndarray, options: DecodingOptions, needs_starts: NeedsStarts
    ) -> dict[int, Decoded]:
        """Return the parts of a batch with the starts of their words, where these are needed, cut at unwritten speech.

        The whole batch is aligned at once, with the encoder's states from which it was decoded.
        """
        texts = []
        for number, part in parts.items():
            text = part.accepted.hypothesis.text
            is_needed = _is_suspected(part, options) or needs_starts(number, part.window, text)
            texts.append(text if self.engine.can_align and text and is_needed else "")
        if not any(texts):
            return parts
        frames = [min(len(part.log_mel.frames), features.shape[-1]) for part in parts.values()]
        all_starts, aligned = self.engine.word_starts(features, frames, texts), dict(parts)
        for (number, part), text, starts in zip(parts.items(), texts, all_starts, strict=True):
            if text:
                timed = replace(part, starts=[part.window.start_s + start for start in starts])
                is_known = len(starts) == len(text.split())
                aligned[number] = _cut_at_unwritten(timed) if is_known and _is_suspected(part, options) else timed
        return aligned

    def _accept(
        self, first: Hypothesis, log_mel: LogMel, options: DecodingOptions, before_batch: Callable[[], None]
    ) -> Accepted:
        """Return the hypothesis of a window after further attempts."""
        duration_s = len(log_mel.frames) * HOP_SAMPLES / SAMPLE_RATE_HZ
        if self.drops_silence and fallback.is_silence(first, options):
            return Accepted(replace(first, text="", words=(), end_s=None))

        @functools.cache
        def features() -> np.ndarray:  # the same array for every temperature, so that it is encoded once
            return self.features([log_mel])

        def decode(temperature: float) -> Hypothesis:
            before_batch()
            return self.engine.decode(features(), options, temperature)[0]

        accepted = fallback.accept(first, decode, options, duration_s)
        # a caller's own limit is no surprise
        if accepted.hypothesis.tokens >= options.max_new_tokens == MAX_NEW_TOKENS:
            logger.info(
                f"note: a part of {duration_s:.0f} s has more text than {options.max_new_tokens} tokens: its last "
                "words are missing. Cut the recording at a pause there, and transcribe the parts"
            )
        return accepted


def _is_suspected(part: Decoded, options: DecodingOptions) -> bool:
    """Return whether a text without timestamps is so short for its speech that it may leave out some of it."""
    hypothesis, speech_s = part.accepted.hypothesis, sum(b - a for a, b in part.window.speech)
    is_whole = not options.timestamps and hypothesis.tokens < options.max_new_tokens
    return is_whole and len(hypothesis.text) <= _USUAL_CHARS_PER_S * speech_s


def _cut_at_unwritten(part: Decoded) -> Decoded:
    """Return a part, whose starts are known, up to the first speech that its text leaves out, and where it ends.

    It ends before the first stretch of speech in which no word starts, or within a stretch if no word starts for long;
    words after that are decoded again.
    """
    window, hypothesis, starts = part.window, part.accepted.hypothesis, part.starts or []
    for n, (start_s, next_s) in enumerate(pairwise([*starts, window.end_s]), start=1):
        unwritten_s = _unwritten_speech(window, start_s, next_s)
        if unwritten_s is not None:
            first_words = {"text": " ".join(hypothesis.text.split()[:n]), "words": hypothesis.words[:n]}
            changes = {} if n == len(starts) else first_words
            cut = replace(hypothesis, end_s=unwritten_s - window.start_s, **changes)
            accepted = part.accepted._replace(hypothesis=cut)
            return replace(part, accepted=accepted, starts=starts[:n]) if remaining(window, cut) else part
    return part


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
