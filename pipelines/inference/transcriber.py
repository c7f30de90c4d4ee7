"""ModelRef to Transcript: one class for the notebook, the app, the API and the command line.

A recording that the model can hear at once is decoded at once, at its own length. A longer one goes through in constant
memory: blocks of samples, windows of speech (segmentation.py), batches of windows of like length, segments in order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.inference import segmentation
from pipelines.inference.segmentation import Window
from pipelines.infra.errors import LabError
from pipelines.speech import audio, repetition
from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError, Waveform
from pipelines.whisper import engines
from pipelines.whisper import log_mel as features
from pipelines.whisper.batching import padded_frames, sorted_batches
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel
from pipelines.whisper.model import ModelRef

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
    start_s: float | None = None
    """None where nobody asked for the times of words."""
    end_s: float | None = None
    """Where the next word begins, or the segment ends."""


@dataclass(frozen=True)
class Segment:
    """What was said in a stretch of a recording."""

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...] = ()
    logprob: float = 0.0
    """Mean over tokens (decoding.Hypothesis)."""
    temperature: float = 0.0
    """At which it was decoded: above 0 where its text went in circles at first."""
    no_speech: float = 0.0
    """The probability that nobody speaks (decoding.no_speech); 0 where the words left no doubt, so that nobody asked:
    it costs another run of the model."""

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


class Damaged(AudioError):
    """A recording that cannot be read to its end: `heard` is the transcript of what comes before the damage."""

    def __init__(self, error: AudioError, heard: Transcript):
        super().__init__(error.reason, error.detail)
        self.heard = heard


@dataclass
class _Intake:
    """How much of a recording has come in, and what was wrong with the rest."""

    samples: int = 0
    damage: AudioError | None = None

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE_HZ

    def counting(self, blocks: Iterable[np.ndarray], tell: Callable[[float], None]) -> Iterator[np.ndarray]:
        """The blocks up to their end or to damage, so that what was read is heard before anybody is told of it."""
        try:
            for block in blocks:
                self.samples += len(block)
                yield block
                tell(self.seconds)
        except AudioError as error:
            if error.reason != audio.DAMAGED:
                raise
            self.damage = error


class _Settled(NamedTuple):
    """What is believed of a window, and how it came to that."""

    heard: Hypothesis
    temperature: float = 0.0
    no_speech: float = 0.0


def _nothing() -> None:
    pass


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

    def __post_init__(self) -> None:
        self.loaded = engines.open_engine(
            self.ref,
            self.language,
            self.engine,
            device=self.device,
            compute_type=self.compute_type,
            threads=self.threads,
            max_new_tokens=self.max_new_tokens,
        )
        self.longest_s = longest_window_s(self.ref)
        self.calibration = Calibration.of(self.ref.facts)
        self._one_at_a_time = threading.Lock()

    @property
    def times_words(self) -> bool:
        """Whether the engine can tell when words begin (Engine.word_starts)."""
        return getattr(self.loaded, "can_align", False)

    def transcribe(
        self,
        recording: bytes | str | Path | Waveform,
        max_duration_s: float = float("inf"),
        *,
        on_audio: Callable[[float], None] = lambda seconds: None,
        on_segment: Callable[[Segment], None] = lambda segment: None,
        word_times: bool = False,
    ) -> Transcript:
        """The transcript of a file's bytes, a path or a Waveform of any length.

        `on_segment` is told each segment as soon as it is there; `on_audio` how many seconds have been read, and the
        same once more before every batch that is decoded: what it raises ends the work there. `word_times` tells when
        each word is said, for about the time of decoding once more. Raises audio.AudioError for what is not audio,
        empty, not finite or longer than `max_duration_s`, Damaged for what can be read only in part, and LabError for
        `word_times` where the engine cannot tell (`times_words`).
        """
        if word_times and not self.times_words:
            raise LabError(f"{self.loaded.name} cannot tell when words are said: take --engine onnx or ctranslate2")
        started, intake, segments = time.monotonic(), _Intake(), []
        blocks = intake.counting(_blocks(recording, max_duration_s), on_audio)
        for segment in self._segments(blocks, lambda: on_audio(intake.seconds), word_times):
            on_segment(segment)
            segments.append(segment)
        text = " ".join(segment.text for segment in segments)
        heard = Transcript(text, intake.seconds, time.monotonic() - started, tuple(segments))
        if intake.damage:
            raise Damaged(intake.damage, heard)
        return heard

    def segments(
        self, recording: bytes | str | Path | Waveform, max_duration_s: float = float("inf")
    ) -> Iterator[Segment]:
        """The segments of a recording in order, each as soon as it is there; in constant memory. Raises AudioError,
        that of a damaged recording after the segments of what comes before."""
        intake = _Intake()
        yield from self._segments(intake.counting(_blocks(recording, max_duration_s), lambda seconds: None))
        if intake.damage:
            raise intake.damage

    def _segments(
        self, blocks: Iterator[np.ndarray], go_on: Callable[[], None] = _nothing, word_times: bool = False
    ) -> Iterator[Segment]:
        head = list(islice(blocks, 2))
        whole = np.concatenate(head) if head else np.zeros(0, dtype=np.float32)
        more = next(blocks, None)
        if more is None and len(whole) <= self.longest_s * SAMPLE_RATE_HZ:
            yield from self.decode_windows([Window(whole, 0.0)] if len(whole) else [], go_on, word_times)
            return
        come = chain([whole], [] if more is None else [more], blocks)
        packed_s = self.longest_s if self.ref.context != "clip" else 0.0
        found = segmentation.windows(come, segmentation.detector(), longest_s=self.longest_s, joined_s=packed_s)
        for group in _groups(found):
            yield from self.decode_windows(group, go_on, word_times)

    def decode_windows(
        self, windows: list[Window], go_on: Callable[[], None] = _nothing, word_times: bool = False
    ) -> list[Segment]:
        """The segments of `windows`, in their order; windows without words have none.

        `go_on` is called before each batch of them and each further try: what it raises ends the work.
        """
        with self._one_at_a_time:
            return self._decode_windows(windows, go_on, word_times)

    def _decode_windows(self, windows: list[Window], go_on: Callable[[], None], word_times: bool) -> list[Segment]:
        log_mels = [self.loaded.log_mel(Waveform(window.samples)) for window in windows]
        heard: dict[int, Hypothesis] = {}
        lengths = np.array([self._frames(len(log_mel.frames)) for log_mel in log_mels])
        for batch in sorted_batches(lengths, BATCH_FRAMES) if len(windows) else []:
            go_on()
            tensor = self._tensor([log_mels[i] for i in batch])
            heard |= zip(batch.tolist(), self.loaded.decode(tensor), strict=True)
        told = [self._settled(heard[i], log_mels[i], go_on) for i in range(len(windows))]
        parts: list[Segment] = []
        for window, log_mel, one in zip(windows, log_mels, told, strict=True):
            if one.heard.text:
                go_on()
                parts += self._segments_of(window, log_mel, one, word_times)
        return parts

    def _frames(self, n: int) -> int:
        return padded_frames(n) if self.ref.context == "clip" else FULL_FRAMES

    def _tensor(self, log_mels: list[LogMel]) -> np.ndarray:
        frames = max(self._frames(len(log_mel.frames)) for log_mel in log_mels)
        return np.stack([log_mel.padded(frames) for log_mel in log_mels])

    def _settled(self, heard: Hypothesis, log_mel: LogMel, go_on: Callable[[], None]) -> _Settled:
        """What is believed of a window: nothing where it is silent, another try where it goes in circles."""
        temperature = silent = 0.0
        if heard.logprob < _UNSURE_LOGPROB:
            go_on()
            silent = self.loaded.no_speech(self._tensor([log_mel]))[0]
            if silent > _NO_SPEECH:
                return _Settled(Hypothesis("", heard.logprob, heard.tokens))
        for warmer in TEMPERATURES:
            if not repetition.is_repeating(heard.text):
                break
            go_on()
            temperature, heard = warmer, self.loaded.decode(self._tensor([log_mel]), warmer)[0]
        return _Settled(heard if not repetition.is_repeating(heard.text) else _cut(heard), temperature, silent)

    def _segments_of(self, window: Window, log_mel: LogMel, told: _Settled, word_times: bool) -> list[Segment]:
        """A window as one segment, a long one sentence by sentence where the engine tells when words begin."""
        heard, *how = told
        words = tuple(Word(text, self.calibration(logprob)) for text, logprob in heard.words)
        start, end = round(window.start_s, 3), round(window.end_s, 3)
        firsts = _sentences(heard.text) if end - start > LONG_S and len(words) == len(heard.text.split()) else [0]
        begins: list[float] = []
        if len(firsts) > 1 or word_times:
            (tensor,) = self._tensor([log_mel])
            begins = self.loaded.word_starts(tensor, min(len(log_mel.frames), tensor.shape[-1]), heard.text)
        if word_times:
            words = _timed(words, start, end, begins)
        if len(firsts) == 1 or not begins:
            return [Segment(start, end, heard.text, words, heard.logprob, *how)]
        starts = {first: round(start + begins[first], 3) for first in firsts[1:]}
        # a sentence without any length would be a subtitle that nobody sees: it stays with the one before it
        firsts = [0, *(n for m, n in pairwise(firsts) if max(start, starts.get(m, start)) < starts[n] < end)]
        edges = [start, *(starts[first] for first in firsts[1:]), end]
        parts = [words[a:b] for a, b in pairwise([*firsts, len(words)])]
        return [
            Segment(a, b, " ".join(word.text for word in part), part, heard.logprob, *how)
            for (a, b), part in zip(pairwise(edges), parts, strict=True)
        ]


def _timed(words: tuple[Word, ...], start_s: float, end_s: float, begins: list[float]) -> tuple[Word, ...]:
    """Each word up to where the next one begins. Where the engine failed to tell, they share the time by letters."""
    if len(begins) != len(words):
        letters = np.cumsum([0, *(len(word.text) + 1 for word in words)])
        begins = ((end_s - start_s) * letters[:-1] / letters[-1]).tolist() if words else []
    edges = [*(round(min(start_s + begin, end_s), 3) for begin in begins), end_s]
    return tuple(replace(word, start_s=a, end_s=b) for word, (a, b) in zip(words, pairwise(edges), strict=True))


def longest_window_s(ref: ModelRef) -> float:
    """The longest window that the model was tuned to hear, as its own manifest tells; 30 s for all others."""
    told = ref.facts.get("context_s") if ref.context == "clip" else None
    return min(max(float(told), _SHORTEST_CONTEXT_S), _FULL_S) if told else _FULL_S


def _sentences(text: str) -> list[int]:
    """Which words of `text` begin a sentence."""
    words = text.split()
    return [0, *(n for n in range(1, len(words)) if words[n - 1].rstrip("\"'”’»)").endswith((".", "?", "!", "…")))]


def _cut(heard: Hypothesis) -> Hypothesis:
    """A transcript that goes round in circles at every temperature, up to where the first circle closes."""
    kept = repetition.without_repeats(heard.text)
    return Hypothesis(kept, heard.logprob, heard.tokens, heard.words[: len(kept.split())])


def _blocks(recording: bytes | str | Path | Waveform, max_duration_s: float) -> Iterator[np.ndarray]:
    if not isinstance(recording, Waveform):
        return audio.blocks(recording, max_duration_s)
    samples = audio.from_array(recording.samples, SAMPLE_RATE_HZ, max_duration_s).samples
    step = int(audio.BLOCK_S * SAMPLE_RATE_HZ)
    return (samples[at : at + step] for at in range(0, len(samples), step))


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
