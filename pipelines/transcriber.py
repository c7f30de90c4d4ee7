"""ModelRef to Transcript: one class for the notebook, the app, the API and the command line.

A recording that the model can hear at once is decoded at once, at its own length. A longer one goes through in constant
memory: blocks of samples, windows of speech (segmentation.py), batches of windows of like length, segments in order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np

from pipelines import audio, engines, features, repetition, segmentation
from pipelines.audio import SAMPLE_RATE_HZ, Waveform
from pipelines.batches import padded_frames, sorted_batches
from pipelines.confidence import Calibration
from pipelines.decoding import Heard
from pipelines.features import FULL_FRAMES, LogMel
from pipelines.models import ModelRef
from pipelines.segmentation import Window

AHEAD_FRAMES = 12_000
"""Two minutes of speech are collected, sorted by length and decoded, so that batches hold windows of like length."""
BATCH_FRAMES = 6_000
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Tried in turn for a window whose transcript repeats itself: OpenAI's own steps."""
LONG_S = 6.0
"""Longer windows become one segment for each sentence."""
_UNSURE_LOGPROB, _NO_SPEECH = -1.0, 0.6
"""OpenAI's own thresholds: a window that the model holds for silent and is this unsure of holds no words."""
_SHORTEST_CONTEXT_S = 2.0
"""A model tuned on single words can hear a short sentence."""
_FULL_S = FULL_FRAMES / 100


@dataclass(frozen=True)
class Word:
    """One word, as it is split at blanks."""

    text: str
    confidence: float
    """The probability that it is right, 0 to 1: calibrated on the validation split where the model tells how."""


@dataclass(frozen=True)
class Segment:
    """What was said in a stretch of a recording."""

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...] = ()
    logprob: float = 0.0
    """Mean over tokens (decoding.Heard)."""

    @property
    def confidence(self) -> float:
        """The share of its words that is expected to be right, 0 to 1."""
        return sum(word.confidence for word in self.words) / len(self.words) if self.words else 0.0


@dataclass(frozen=True)
class Transcript:
    """What was heard."""

    text: str
    audio_s: float
    """Duration of the recording."""
    elapsed_s: float
    """Wall-clock time from recording to text: decoding, extraction, generation."""
    segments: tuple[Segment, ...] = ()

    @property
    def confidence(self) -> float:
        """The share of its words that is expected to be right, 0 to 1."""
        words = [word for segment in self.segments for word in segment.words]
        return sum(word.confidence for word in words) / len(words) if words else 0.0


@dataclass
class _Heard:
    """How much of a recording has come in."""

    samples: int = 0

    def counting(self, blocks: Iterable[np.ndarray], tell: Callable[[float], None]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.samples += len(block)
            yield block
            tell(self.samples / SAMPLE_RATE_HZ)


@dataclass
class Transcriber:
    """A loaded model that turns recordings into text. Any number of threads may call it; batches take turns."""

    ref: ModelRef
    language: str = "sv"
    engine: str = "auto"
    """engines.ENGINES."""
    device: str = ""
    compute_type: str = ""
    threads: int = 0
    max_new_tokens: int = engines.MAX_NEW_TOKENS
    log: Callable[[str], None] = field(default=print, repr=False)

    def __post_init__(self) -> None:
        self.loaded = engines.open_engine(
            self.ref,
            self.language,
            self.engine,
            device=self.device,
            compute_type=self.compute_type,
            threads=self.threads,
            max_new_tokens=self.max_new_tokens,
            log=self.log,
        )
        self.longest_s = longest_window_s(self.ref)
        self.calibration = Calibration.of(self.ref.facts)
        self._one_at_a_time = threading.Lock()

    def transcribe(
        self,
        recording: bytes | str | Path | Waveform,
        max_duration_s: float = float("inf"),
        *,
        on_audio: Callable[[float], None] = lambda seconds: None,
        on_segment: Callable[[Segment], None] = lambda segment: None,
    ) -> Transcript:
        """The transcript of a file's bytes, a path or a Waveform of any length.

        `on_audio` is told how many seconds have been read, `on_segment` each segment as soon as it is there. Raises
        audio.AudioError for what is not audio, empty, not finite or longer than `max_duration_s`.
        """
        started, heard, segments = time.monotonic(), _Heard(), []
        for segment in self._segments(heard.counting(_blocks(recording, max_duration_s), on_audio)):
            on_segment(segment)
            segments.append(segment)
        text = " ".join(segment.text for segment in segments)
        return Transcript(text, heard.samples / SAMPLE_RATE_HZ, time.monotonic() - started, tuple(segments))

    def segments(
        self, recording: bytes | str | Path | Waveform, max_duration_s: float = float("inf")
    ) -> Iterator[Segment]:
        """The segments of a recording in order, each as soon as it is there; in constant memory. Raises AudioError."""
        return self._segments(_blocks(recording, max_duration_s))

    def _segments(self, blocks: Iterator[np.ndarray]) -> Iterator[Segment]:
        head = list(islice(blocks, 2))
        whole = np.concatenate(head) if head else np.zeros(0, dtype=np.float32)
        more = next(blocks, None)
        if more is None and len(whole) <= self.longest_s * SAMPLE_RATE_HZ:
            yield from self.decode_windows([Window(whole, 0.0)] if len(whole) else [])
            return
        come = chain([whole], [] if more is None else [more], blocks)
        packed_s = self.longest_s if self.ref.context != "clip" else 0.0
        found = segmentation.windows(come, segmentation.detector(), longest_s=self.longest_s, joined_s=packed_s)
        for group in _groups(found):
            yield from self.decode_windows(group)

    def decode_windows(self, windows: list[Window]) -> list[Segment]:
        """The segments of `windows`, in their order; windows without words have none."""
        with self._one_at_a_time:
            return self._decode_windows(windows)

    def _decode_windows(self, windows: list[Window]) -> list[Segment]:
        log_mels = [self.loaded.log_mel(Waveform(window.samples)) for window in windows]
        heard: dict[int, Heard] = {}
        lengths = np.array([self._frames(len(log_mel.frames)) for log_mel in log_mels])
        for batch in sorted_batches(lengths, BATCH_FRAMES) if len(windows) else []:
            tensor = self._tensor([log_mels[i] for i in batch])
            heard |= zip(batch.tolist(), self.loaded.hear(tensor), strict=True)
        told = [self._settled(heard[i], log_mels[i]) for i in range(len(windows))]
        found = zip(windows, log_mels, told, strict=True)
        return [part for window, log_mel, one in found if one.text for part in self._segments_of(window, log_mel, one)]

    def _frames(self, n: int) -> int:
        return padded_frames(n) if self.ref.context == "clip" else FULL_FRAMES

    def _tensor(self, log_mels: list[LogMel]) -> np.ndarray:
        frames = max(self._frames(len(log_mel.frames)) for log_mel in log_mels)
        return np.stack([log_mel.padded(frames) for log_mel in log_mels])

    def _settled(self, heard: Heard, log_mel: LogMel) -> Heard:
        """What is believed of a window: nothing where it is silent, another try where it goes in circles."""
        if heard.logprob < _UNSURE_LOGPROB and self.loaded.no_speech(self._tensor([log_mel]))[0] > _NO_SPEECH:
            return Heard("", heard.logprob, heard.tokens)
        for temperature in TEMPERATURES:
            if not repetition.is_repeating(heard.text):
                break
            heard = self.loaded.hear(self._tensor([log_mel]), temperature)[0]
        return heard if not repetition.is_repeating(heard.text) else _cut(heard)

    def _segments_of(self, window: Window, log_mel: LogMel, heard: Heard) -> list[Segment]:
        """A window as one segment, a long one sentence by sentence where the engine tells when words begin."""
        words = tuple(Word(text, self.calibration(logprob)) for text, logprob in heard.words)
        start, end = round(window.start_s, 3), round(window.end_s, 3)
        firsts = _sentences(heard.text) if end - start > LONG_S and len(words) == len(heard.text.split()) else [0]
        begins: list[float] = []
        if len(firsts) > 1:
            (tensor,) = self._tensor([log_mel])
            begins = self.loaded.word_starts(tensor, min(len(log_mel.frames), tensor.shape[-1]), heard.text)
        if not begins:
            return [Segment(start, end, heard.text, words, heard.logprob)]
        starts = {first: round(start + begins[first], 3) for first in firsts[1:]}
        # a sentence without any length would be a subtitle that nobody sees: it stays with the one before it
        firsts = [0, *(n for m, n in pairwise(firsts) if max(start, starts.get(m, start)) < starts[n] < end)]
        edges = [start, *(starts[first] for first in firsts[1:]), end]
        parts = [words[a:b] for a, b in pairwise([*firsts, len(words)])]
        return [
            Segment(a, b, " ".join(word.text for word in part), part, heard.logprob)
            for (a, b), part in zip(pairwise(edges), parts, strict=True)
        ]


def longest_window_s(ref: ModelRef) -> float:
    """The longest window that the model was tuned to hear, as its own manifest tells; 30 s for all others."""
    told = ref.facts.get("context_s") if ref.context == "clip" else None
    return min(max(float(told), _SHORTEST_CONTEXT_S), _FULL_S) if told else _FULL_S


def _sentences(text: str) -> list[int]:
    """Which words of `text` begin a sentence."""
    words = text.split()
    return [0, *(n for n in range(1, len(words)) if words[n - 1].rstrip("\"'”’»)").endswith((".", "?", "!", "…")))]


def _cut(heard: Heard) -> Heard:
    """A transcript that goes round in circles at every temperature, up to where the first circle closes."""
    kept = repetition.without_repeats(heard.text)
    return Heard(kept, heard.logprob, heard.tokens, heard.words[: len(kept.split())])


def _blocks(recording: bytes | str | Path | Waveform, max_duration_s: float) -> Iterator[np.ndarray]:
    if not isinstance(recording, Waveform):
        return audio.blocks(recording, max_duration_s)
    step = int(audio.BLOCK_S * SAMPLE_RATE_HZ)
    return (recording.samples[at : at + step] for at in range(0, len(recording.samples), step))


def _groups(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Windows in order, collected to some AHEAD_FRAMES; the first group is small, so that something shows soon."""
    group: list[Window] = []
    frames, most = 0, AHEAD_FRAMES // 4
    for window in windows:
        group.append(window)
        frames += len(window.samples) // features.HOP_SAMPLES
        if frames >= most:
            yield group
            group, frames, most = [], 0, AHEAD_FRAMES
    if group:
        yield group
