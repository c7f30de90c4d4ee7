"""Transcribe recordings of any length: one class for the notebook, the app, the API and the commands.

Every recording is processed in constant memory: blocks of samples, windows of speech (segmentation.py), batches of
windows of similar length, segments in order (segments.py). A recording without speech has no segments. One that fits
into a window, without long silence, is decoded as a whole, as the evaluation does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.inference import detection, segmentation
from pipelines.inference.segmentation import Window
from pipelines.inference.segments import divide
from pipelines.inference.transcript import DamagedRecording, Segment, Transcript, Word
from pipelines.infra.errors import LabError
from pipelines.recipes import languages
from pipelines.speech import audio, repetition
from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError, Waveform
from pipelines.whisper import engines, model_files
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import padded_frames, sorted_batches
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.log_mel import HOP_SAMPLES, LogMel
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

GROUP_FRAMES = 12_000
"""Windows are collected up to two minutes of speech, so that batches contain windows of similar length."""
BATCH_FRAMES = 6_000
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Tried in turn if a transcript repeats itself; the steps of OpenAI's decoder."""
EDGE_S = 1.0
"""Silence before and after the speech of a short recording up to which it is decoded as a whole."""
_UNSURE_LOGPROB, _NO_SPEECH = -1.0, 0.6
"""Thresholds of OpenAI's decoder: below the first and above the second, a window has no transcript. Used only without
Silero: whisper-tiny would drop half of the short words that Silero detects (benchmarks/non_speech.py)."""
_MIN_CONTEXT_S = 2.0
"""Shortest context of a model; one tuned on single words can still decode a short sentence."""


@dataclass
class _Reader:
    """Counts the samples of a recording that were read, and stores the error about parts that cannot be read."""

    n_samples: int = 0
    damage: AudioError | None = None

    @property
    def seconds(self) -> float:
        return self.n_samples / SAMPLE_RATE_HZ

    def read(self, blocks: Iterable[np.ndarray], on_audio: Callable[[float], None]) -> Iterator[np.ndarray]:
        """Yield the blocks; an error about damage, which comes after the last one, is stored."""
        try:
            for block in blocks:
                self.n_samples += len(block)
                yield block
                on_audio(self.seconds)
        except AudioError as error:
            if error.reason != audio.DAMAGED:
                raise
            self.damage = error


class _Decoded(NamedTuple):
    """The accepted hypothesis of a window, and the temperature at which it was decoded."""

    hypothesis: Hypothesis
    temperature: float = 0.0


def _continue() -> None:
    pass


@dataclass
class Transcriber:
    """A loaded model that transcribes recordings. Thread-safe: calls decode one after another."""

    ref: ModelRef
    language: str = ""
    """Whisper's code or another name of a language (recipes.languages); empty or `auto`: the model's own."""
    engine: str = "auto"
    """One of engines.ENGINES."""
    device: str = ""
    compute_type: str = ""
    threads: int = 0
    max_new_tokens: int = engines.MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        self.language = languages.parse_optional(self.language) or whisper_model.language_of(self.ref)
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
        self._full_frames = model_files.source_frames(self.ref.folder)
        self.calibration = Calibration.of(self.ref.facts)
        self._has_detector = detection.is_packaged()
        self._lock = threading.Lock()

    @property
    def times_words(self) -> bool:
        """Return whether the model can compute word times (Engine.word_starts)."""
        return self.loaded.can_align

    def transcribe(
        self,
        recording: bytes | str | Path | Waveform,
        max_duration_s: float = float("inf"),
        *,
        on_audio: Callable[[float], None] = lambda seconds: None,
        on_segment: Callable[[Segment], None] = lambda segment: None,
        word_times: bool = False,
        track: int = 0,
    ) -> Transcript:
        """Transcribe a path, the bytes of a file, or a Waveform.

        `track` is the audio track of a video (1: the first); 0 is the first, and other tracks are logged.
        `on_segment` is called with each segment; `on_audio` with the number of seconds read, and again before every
        batch. An exception in either stops the work. `word_times` adds times to the words and takes about as long
        as decoding. Raises AudioError if the recording is not audio, empty, not finite or longer than
        `max_duration_s`; DamagedRecording, with the transcript of the rest, if parts cannot be read; LabError for
        `word_times` if the model does not support it (`times_words`).
        """
        if word_times and not self.times_words:
            raise LabError(
                f"{self.ref.title} does not support word times: its generation_config.json names no alignment_heads"
            )
        started, reader, segments = time.monotonic(), _Reader(), []
        blocks = reader.read(_blocks(recording, max_duration_s, track), on_audio)
        for segment in self._decode_blocks(blocks, lambda: on_audio(reader.seconds), word_times):
            on_segment(segment)
            segments.append(segment)
        text = " ".join(segment.text for segment in segments)
        damage = reader.damage.detail if reader.damage else ""
        transcript = Transcript(text, reader.seconds, time.monotonic() - started, tuple(segments), damage)
        if reader.damage:
            raise DamagedRecording(reader.damage, transcript)
        return transcript

    def segments(
        self, recording: bytes | str | Path | Waveform, max_duration_s: float = float("inf")
    ) -> Iterator[Segment]:
        """Yield the segments of a recording as they are decoded, in constant memory.

        Raises AudioError; for a damaged recording after the segments of what can be read.
        """
        reader = _Reader()
        yield from self._decode_blocks(reader.read(_blocks(recording, max_duration_s), lambda seconds: None))
        if reader.damage:
            raise reader.damage

    def _decode_blocks(
        self, blocks: Iterator[np.ndarray], before_batch: Callable[[], None] = _continue, word_times: bool = False
    ) -> Iterator[Segment]:
        """Yield the segments of a recording."""
        for group in _groups(self._windows(blocks)):
            yield from self.decode_windows(group, before_batch, word_times)

    def _windows(self, blocks: Iterator[np.ndarray]) -> Iterator[Window]:
        """Yield the windows of speech of a recording."""
        first_blocks = list(islice(blocks, 2))
        samples = np.concatenate(first_blocks) if first_blocks else np.zeros(0, dtype=np.float32)
        third, detector = next(blocks, None), detection.open_detector()
        if third is None and len(samples) <= self.longest_s * SAMPLE_RATE_HZ:
            # twice the limit: a recording that fits into a window is not cut
            windows = segmentation.windows([samples], detector, longest_s=2 * self.longest_s, joined_s=self.longest_s)
            yield from _with_edges(list(windows), samples)
            return
        all_blocks = chain([samples], [] if third is None else [third], blocks)
        joined_s = self.longest_s if self.ref.context != "clip" else 0.0
        yield from segmentation.windows(all_blocks, detector, longest_s=self.longest_s, joined_s=joined_s)

    def decode_windows(
        self, windows: list[Window], before_batch: Callable[[], None] = _continue, word_times: bool = False
    ) -> list[Segment]:
        """Return the segments of `windows` in order; a window without words has none.

        `before_batch` is called before each batch and each further attempt; an exception in it stops the work.
        """
        with self._lock:
            return self._decode_windows(windows, before_batch, word_times)

    def _decode_windows(
        self, windows: list[Window], before_batch: Callable[[], None], word_times: bool
    ) -> list[Segment]:
        log_mels = [self.loaded.log_mel(Waveform(window.samples)) for window in windows]
        hypotheses: dict[int, Hypothesis] = {}
        lengths = np.array([self._padded_length(log_mel) for log_mel in log_mels])
        for batch in sorted_batches(lengths, BATCH_FRAMES) if len(windows) else []:
            before_batch()
            features = self._stack([log_mels[i] for i in batch])
            hypotheses |= zip(batch.tolist(), self.loaded.decode(features), strict=True)
        results = [self._check(hypotheses[i], log_mels[i], before_batch) for i in range(len(windows))]
        segments: list[Segment] = []
        for window, log_mel, result in zip(windows, log_mels, results, strict=True):
            if result.hypothesis.text:
                before_batch()
                segments += self._split_into_segments(window, log_mel, result, word_times)
        return segments

    def _padded_length(self, log_mel: LogMel) -> int:
        """Return the number of frames at which a window is decoded."""
        return padded_frames(len(log_mel.frames)) if self.ref.context == "clip" else self._full_frames

    def _stack(self, log_mels: list[LogMel]) -> np.ndarray:
        """Return features float32 [B, n_mels, T], padded to the longest."""
        n_frames = max(self._padded_length(log_mel) for log_mel in log_mels)
        return np.stack([log_mel.padded(n_frames) for log_mel in log_mels])

    def _check(self, hypothesis: Hypothesis, log_mel: LogMel, before_batch: Callable[[], None]) -> _Decoded:
        """Decode at higher temperatures if the text repeats itself; without Silero, drop a text without speech."""
        temperature, duration_s = 0.0, len(log_mel.frames) * HOP_SAMPLES / SAMPLE_RATE_HZ
        is_unsure = hypothesis.logprob < _UNSURE_LOGPROB and hypothesis.no_speech > _NO_SPEECH
        if is_unsure and not self._has_detector:
            return _Decoded(replace(hypothesis, text="", words=()))
        for next_temperature in TEMPERATURES:
            if not repetition.is_repeating(hypothesis.text, duration_s):
                break
            before_batch()
            temperature = next_temperature
            hypothesis = self.loaded.decode(self._stack([log_mel]), temperature)[0]
        if repetition.is_repeating(hypothesis.text, duration_s):
            hypothesis = _without_repeats(hypothesis)
        elif hypothesis.tokens >= self.max_new_tokens == engines.MAX_NEW_TOKENS:  # a caller's own limit is no surprise
            seconds = len(log_mel.frames) * HOP_SAMPLES / SAMPLE_RATE_HZ
            logger.info(
                f"note: a part of {seconds:.0f} s has more text than {self.max_new_tokens} tokens: its last words are "
                "missing. Cut the recording at a pause there, and transcribe the parts"
            )
        return _Decoded(hypothesis, temperature)

    def _split_into_segments(
        self, window: Window, log_mel: LogMel, result: _Decoded, word_times: bool
    ) -> list[Segment]:
        """Return a window as segments: at pauses and, if it is long, at sentences (segments.divide)."""
        hypothesis, temperature = result
        texts = hypothesis.text.split()
        words = tuple(Word(text, self.calibration(logprob)) for text, logprob in hypothesis.words)
        if len(words) != len(texts):
            words = tuple(Word(text, self.calibration(hypothesis.logprob)) for text in texts)

        def find_starts() -> list[float]:
            (features,) = self._stack([log_mel])
            n_frames = min(len(log_mel.frames), features.shape[-1])
            return [window.start_s + start for start in self.loaded.word_starts(features, n_frames, hypothesis.text)]

        parts = divide(words, window.speech, find_starts, word_times)
        return [
            Segment(
                part.start_s,
                part.end_s,
                " ".join(word.text for word in part.words) if len(parts) > 1 else hypothesis.text,
                part.words,
                hypothesis.logprob,
                temperature,
                hypothesis.no_speech,
            )
            for part in parts
        ]


def longest_window_s(ref: ModelRef) -> float:
    """Return the longest window that the model was tuned on, as recorded in its manifest.

    For other models it is the window of the encoder: 30 s, unless config.json has another `max_source_positions`.
    """
    full_s = model_files.source_frames(ref.folder) / 100
    context_s = ref.facts.get("context_s") if ref.context == "clip" else None
    return min(max(float(context_s), _MIN_CONTEXT_S), full_s) if context_s else full_s


def _with_edges(windows: list[Window], samples: np.ndarray) -> list[Window]:
    """Extend the first and last window to the edges of the recording `samples` if these are at most EDGE_S away."""
    if not windows:
        return []
    starts = [round(window.start_s * SAMPLE_RATE_HZ) for window in windows]
    ends = [start + len(window.samples) for start, window in zip(starts, windows, strict=True)]
    edge = int(EDGE_S * SAMPLE_RATE_HZ)
    starts[0] = 0 if starts[0] <= edge else starts[0]
    ends[-1] = len(samples) if len(samples) - ends[-1] <= edge else ends[-1]
    return [
        Window(samples[start:end], start / SAMPLE_RATE_HZ, window.stretches)
        for window, start, end in zip(windows, starts, ends, strict=True)
    ]


def _without_repeats(hypothesis: Hypothesis) -> Hypothesis:
    """Cut a hypothesis that repeats itself at every temperature after the first repetition."""
    text = repetition.without_repeats(hypothesis.text)
    return replace(hypothesis, text=text, words=hypothesis.words[: len(text.split())])


def _blocks(recording: bytes | str | Path | Waveform, max_duration_s: float, track: int = 0) -> Iterator[np.ndarray]:
    if not isinstance(recording, Waveform):
        return audio.blocks(recording, max_duration_s, track=track)
    samples = audio.from_array(recording.samples, SAMPLE_RATE_HZ, max_duration_s).samples
    step = int(audio.BLOCK_S * SAMPLE_RATE_HZ)
    return (samples[at : at + step] for at in range(0, len(samples), step))


def _groups(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Collect windows up to GROUP_FRAMES; the first group is a quarter of that, so that a result appears soon."""
    group: list[Window] = []
    n_frames, limit = 0, GROUP_FRAMES // 4
    for window in windows:
        group.append(window)
        n_frames += len(window.samples) // HOP_SAMPLES
        if n_frames >= limit:
            yield group
            group, n_frames, limit = [], 0, GROUP_FRAMES
    if group:
        yield group
