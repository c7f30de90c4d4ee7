"""Transcribe recordings of any length: one class for the notebook, the app, the API and the commands.

Every recording is processed in constant memory: blocks of samples, windows of speech (speech/recordings/), batches of
windows of similar length, segments in order (segments.py). A recording without speech has no segments. One that fits
into a window, without long silence, is decoded as a whole, as the evaluation does.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.inference.segments import divide, is_divided
from pipelines.inference.transcript import DamagedRecording, Segment, Transcript, Word
from pipelines.inference.windows import overlap
from pipelines.inference.windows.decoding import Decoded, WindowDecoder
from pipelines.inference.windows.groups import Seams, groups
from pipelines.inference.windows.reader import Reader, blocks_of
from pipelines.infra.errors import LabError
from pipelines.recipes import languages
from pipelines.recipes.languages import AUTO
from pipelines.speech.audio import Waveform
from pipelines.speech.recordings import detection, segmentation
from pipelines.speech.recordings.segmentation import Window
from pipelines.whisper import engines, model_files, tokens
from pipelines.whisper import model as whisper_model
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.decoding_options import MAX_NEW_TOKENS, DecodingOptions
from pipelines.whisper.engines.window_length import joined_window_s, usual_window_s
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

DEFAULT = "sv"
"""The language of models without one."""


def _continue() -> None:
    pass


@dataclass
class Transcriber:
    """A loaded model that transcribes recordings. Thread-safe: calls decode one after another."""

    ref: ModelRef
    language: str = ""
    """Whisper's code or another name of a language (recipes.languages). Empty: the model's own, else Swedish. `auto`:
    the model's own, else detected in each recording."""
    engine: str = "auto"
    """One of engines.ENGINES."""
    device: str = ""
    compute_type: str = ""
    threads: int = 0
    max_new_tokens: int = MAX_NEW_TOKENS
    options: DecodingOptions = None  # type: ignore[assignment]
    """By default those that suit the model (`default_options`); `language` and `max_new_tokens` replace theirs."""

    def __post_init__(self) -> None:
        self.language = self._language_for(languages.parse_or_auto(self.language)) or DEFAULT
        options = self.options or default_options(self.ref)
        self.options = options.changed(language=self.language, max_new_tokens=self.max_new_tokens)
        self.loaded = engines.open_engine(
            self.ref,
            DEFAULT if self.language == AUTO else self.language,
            self.engine,
            device=self.device,
            compute_type=self.compute_type,
            threads=self.threads,
            max_new_tokens=self.max_new_tokens,
        )
        self.longest_s = usual_window_s(self.ref)
        full_frames = model_files.source_frames(self.ref.folder)
        self._full_s = full_frames / 100
        self.calibration = Calibration.of(self.ref.facts)
        is_clip_length, has_detector = self.ref.context == "clip", detection.is_packaged()
        self._decoder = WindowDecoder(self.loaded, is_clip_length, full_frames, drops_silence=not has_detector)
        self._lock = threading.Lock()
        self._detected, self._is_early = "", False

    def _language_for(self, requested: str) -> str:
        """Return the language for a requested code, `auto` or "": the last two mean the model's own, if it has one.

        Warn of a language that the model was not tuned for. Raises LabError for one that an English-only model lacks.
        """
        tuned_for, only = whisper_model.language_of(self.ref, default=""), tokens.only_language(self.ref.folder)
        own = tuned_for or only
        language = own if own and requested in ("", AUTO) else requested
        if only and language != only:
            known, lacking = (languages.NAMES[code].title() for code in (only, language))
            raise LabError(f"{self.ref.title} knows {known} only, got {lacking}: take a multilingual model")
        if only and requested == AUTO:
            logger.info(f"{self.ref.title} knows {languages.NAMES[only].title()} only: no language is detected")
        if tuned_for and language != tuned_for:
            logger.warning(f"{self.ref.title} was trained for {tuned_for}: its transcripts in {language} may be poor")
        return language

    def with_options(self, **changes: Any) -> Transcriber:
        """Return a transcriber with the same loaded model and other options; values of None change nothing.

        `language` may be any name of a language, or `auto`. Raises LabError for an option out of range, or that the
        engine or the model lacks.
        """
        tuned_for = whisper_model.language_of(self.ref, default="")
        if changes.get("language") is not None:
            language = languages.parse_or_auto(changes["language"])
            changes["language"] = self._language_for(language) if language else None
        other = copy.copy(self)
        other.options = self.options.changed(**changes)
        other.language = other.options.language
        if tuned_for and other.options.task == "translate":
            raise LabError(
                f"{self.ref.title} was fine-tuned to transcribe {languages.NAMES[tuned_for].title()} and does not "
                "translate: take a multilingual base model, such as openai/whisper-small"
            )
        self.loaded.check(replace(other.options, language=DEFAULT) if other.language == AUTO else other.options)
        return other

    def window_by_window(self) -> Transcriber:
        """Return a transcriber with the same loaded model whose segments come sooner, and the whole later."""
        other = copy.copy(self)
        other._is_early = True
        return other

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
        started, reader, segments = time.monotonic(), Reader(), []
        blocks = reader.read(blocks_of(recording, max_duration_s, track), on_audio)
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
        reader = Reader()
        yield from self._decode_blocks(reader.read(blocks_of(recording, max_duration_s), lambda seconds: None))
        if reader.damage:
            raise reader.damage

    def _decode_blocks(
        self,
        blocks: Iterator[np.ndarray],
        before_batch: Callable[[], None] = _continue,
        word_times: bool = False,
    ) -> Iterator[Segment]:
        """Yield the segments of a recording."""
        transcriber, seams = self, Seams()
        for group, following in groups(self._windows(blocks), early=self._is_early):
            if transcriber.options.language == AUTO:
                transcriber = self._in_language_of(group[0])
            yield from transcriber._decode_group(group, following, seams, before_batch, word_times)

    def _in_language_of(self, window: Window) -> Transcriber:
        """Return a transcriber for the language of a window of speech."""
        with self._lock:
            (features,) = self._decoder.features([self.loaded.log_mel(Waveform(window.samples))])
            language = self.loaded.detect_language(features)
        logger.info(f"language: {languages.NAMES[language].title()}")
        other = self.with_options(language=language)
        other._detected = language
        return other

    def _windows(self, blocks: Iterator[np.ndarray]) -> Iterator[Window]:
        """Yield the windows of speech of a recording."""
        cut_s = min(self.longest_s, self._full_s - 2 * overlap.OVERLAP_S)  # windows are decoded with their overlap
        detector, joined_s = detection.open_detector(), joined_window_s(self.ref)
        return segmentation.windows_or_whole(blocks, detector, self.longest_s, cut_s=cut_s, joined_s=joined_s)

    def decode_windows(
        self,
        windows: list[Window],
        before_batch: Callable[[], None] = _continue,
        word_times: bool = False,
    ) -> list[Segment]:
        """Return the segments of `windows` in order; a window without words has none.

        `before_batch` is called before each batch and each further attempt; an exception in it stops the work.
        """
        if self.options.language == AUTO and windows:
            return self._in_language_of(windows[0]).decode_windows(windows, before_batch, word_times)
        return self._decode_group(windows, None, Seams(), before_batch, word_times) if windows else []

    def _decode_group(
        self,
        windows: list[Window],
        following: Window | None,
        seams: Seams,
        before_batch: Callable[[], None],
        word_times: bool,
    ) -> list[Segment]:
        """Return the segments up to the last of `windows`, whose own wait if the window `following` continues it."""
        segments: list[Segment] = []
        with self._lock:
            overlapped = seams.overlapped(windows, following) if self.times_words else windows
            is_shared = [one.samples is not alone.samples for one, alone in zip(overlapped, windows, strict=True)]

            def needs_starts(number: int, window: Window, text: str) -> bool:
                return word_times or is_shared[number] or is_divided(text.split(), window.speech)

            decoded = self._decoder.decode(overlapped, self.options, before_batch, needs_starts)
            if self.times_words:
                decoded = seams.share_words(windows, decoded, following, self._word_starts)
            for parts in decoded:
                for part in parts:
                    if part.accepted.hypothesis.text:
                        before_batch()
                        segments += self._split_into_segments(part, word_times)
        return segments

    def _word_starts(self, decoded: Decoded) -> list[float]:
        """Return the start of each word in the recording, in seconds; nothing if they are unknown."""
        if decoded.starts is not None:
            return decoded.starts
        features = self._decoder.features([decoded.log_mel])
        n_frames, text = min(len(decoded.log_mel.frames), features.shape[-1]), decoded.accepted.hypothesis.text
        (starts,) = self.loaded.word_starts(features, [n_frames], [text])
        return [decoded.window.start_s + start for start in starts]

    def _split_into_segments(self, decoded: Decoded, word_times: bool) -> list[Segment]:
        """Return a part of a window as segments: at pauses and, if it is long, at sentences (segments.divide)."""
        window, (hypothesis, temperature) = decoded.window, decoded.accepted
        texts = hypothesis.text.split()
        words = tuple(Word(text, self.calibration(logprob), logprob=logprob) for text, logprob in hypothesis.words)
        if len(words) != len(texts):
            logprob = hypothesis.logprob
            words = tuple(Word(text, self.calibration(logprob), logprob=logprob) for text in texts)

        parts = divide(words, window.speech, lambda: self._word_starts(decoded), word_times)
        return [
            Segment(
                part.start_s,
                part.end_s,
                " ".join(word.text for word in part.words) if len(parts) > 1 else hypothesis.text,
                part.words,
                hypothesis.logprob,
                temperature,
                hypothesis.no_speech,
                language=self._detected,
            )
            for part in parts
        ]


def default_options(ref: ModelRef) -> DecodingOptions:
    """Return the options that suit a model.

    Models that were tuned by this lab have learnt no timestamps. WER on 60 clips of the tour's validation sentences: a
    model tuned on sentences has 0.242 without and 0.266 with timestamps; one tuned with windows 0.228 and 0.226, and
    0.284 without timestamps and without beams.
    """
    is_tuned = ref.context == "clip"
    return DecodingOptions(timestamps=not is_tuned, beam_size=5 if is_tuned else 1)
