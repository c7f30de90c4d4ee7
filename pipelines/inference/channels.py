"""Transcribe each channel of a recording, and merge the segments by time: two microphones, two speakers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference.transcript import DamagedRecording, Segment, Transcript, join_texts
from pipelines.infra.errors import LabError
from pipelines.speech import channels
from pipelines.speech.audio import AudioError, Waveform

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Transcriber

logger = logging.getLogger(__name__)

MIX, SPLIT = "mix", "split"
MODES = (MIX, SPLIT)
"""Transcribe the mean of all channels, or each one."""
LEFT_RIGHT, NUMBERED = ("Left", "Right"), "Channel {number}"
MAX_NAME_CHARS = 40
WRONG_NUMBER = "channel_names"
"""Reason of an AudioError: the recording has another number of channels than there are names."""


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list. Raises LabError if one is empty, too long or occurs twice."""
    names = tuple(" ".join(name.split()) for name in text.split(",")) if text.strip() else ()
    if any(not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable() for name in names):
        raise LabError(f"channel names are 1 to {MAX_NAME_CHARS} characters, separated by commas, got {text!r}")
    if len(set(names)) < len(names):
        raise LabError(f"each channel needs another name, got {text!r}")
    return names


def parse_mode(mode: str, names: str = "") -> tuple[bool, tuple[str, ...]]:
    """Return whether channels are split, and their names. Raises LabError for anything else, or names without split."""
    if mode not in MODES:
        raise LabError(f"channels takes {' or '.join(MODES)}, got {mode!r}")
    if names.strip() and mode != SPLIT:
        raise LabError(f"channel names need channels {SPLIT}: add it, or leave the names out")
    return mode == SPLIT, parse_names(names)


@dataclass(frozen=True)
class ChannelTranscriber:
    """Transcribes as `transcriber` does, but each channel of a recording, with its name as the speaker.

    A recording with one channel, or with the same sound in all, is transcribed as one, without a speaker.
    """

    transcriber: Transcriber
    names: tuple[str, ...] = ()
    """Names of the channels; empty: `left_right` for two, else `numbered`."""
    left_right: tuple[str, str] = LEFT_RIGHT
    numbered: str = NUMBERED

    def transcribe(
        self,
        recording: bytes | str | Path | Waveform,
        max_duration_s: float = float("inf"),
        *,
        on_audio: Callable[[float], None] = lambda seconds: None,
        on_segment: Callable[[Segment], None] = lambda segment: None,
        track: int = 0,
        **options: Any,
    ) -> Transcript:
        """Return the transcript, as `Transcriber.transcribe` does.

        `on_audio` receives the share of the work that is done, in seconds of the recording. `on_segment` is called with
        the segments of all channels in order of time, at the end. Raises AudioError `channel_names` if there is another
        number of names than of channels.
        """
        callbacks = {"on_audio": on_audio, "on_segment": on_segment}
        if isinstance(recording, Waveform):
            return self.transcriber.transcribe(recording, max_duration_s, **callbacks, **options)
        found = channels.examine(recording, max_duration_s, track, on_block=lambda: on_audio(0.0))
        options["track"] = track or 1  # further tracks have been logged
        if found.n == 1 or found.are_same:
            if found.n > 1:
                logger.info("note: all channels hold the same sound: it is transcribed once, without speakers")
            return self.transcriber.transcribe(recording, max_duration_s, **callbacks, **options)
        transcripts, damage = [], None
        for number, name in enumerate(self._names(found.n)):

            def on_share(seconds: float, number: int = number) -> None:
                on_audio((number * found.duration_s + seconds) / found.n)

            try:
                one = self.transcriber.transcribe(
                    channels.select(recording, number), max_duration_s, on_audio=on_share, **options
                )
            except DamagedRecording as error:
                one, damage = error.transcript, error
            transcripts.append(with_speaker(one, name))
        transcript = merge(transcripts)
        for segment in transcript.segments:
            on_segment(segment)
        if damage:
            raise DamagedRecording(damage, transcript)
        return transcript

    def _names(self, n: int) -> Sequence[str]:
        if self.names and len(self.names) != n:
            raise AudioError(WRONG_NUMBER, f"{len(self.names)} names for {n} channels: give {n}, or none")
        return self.names or (self.left_right if n == 2 else [self.numbered.format(number=i + 1) for i in range(n)])


def with_speaker(transcript: Transcript, speaker: str) -> Transcript:
    """Return a transcript whose segments have a speaker."""
    segments = tuple(replace(segment, speaker=speaker) for segment in transcript.segments)
    return replace(transcript, segments=segments, text=join_texts(segments))


def merge(transcripts: Iterable[Transcript]) -> Transcript:
    """Return several transcripts of the same time as one, with the segments in order of their starts."""
    every = list(transcripts)
    segments = sorted((segment for one in every for segment in one.segments), key=lambda segment: segment.start_s)
    return Transcript(
        join_texts(segments),
        max(one.audio_s for one in every),
        sum(one.elapsed_s for one in every),
        tuple(segments),
        next((one.damage for one in every if one.damage), ""),
    )


def without_speakers(text: str, segments: Iterable[Segment]) -> str:
    """Return a text, which a listener may have corrected, without the names that begin its lines."""
    prefixes = [f"{speaker}:" for speaker in {segment.speaker for segment in segments} if speaker]
    if not prefixes:
        return text
    lines = (line.strip() for line in text.splitlines())
    names = ((line, next((prefix for prefix in prefixes if line.startswith(prefix)), "")) for line in lines)
    return " ".join(filter(None, (line.removeprefix(name).strip() for line, name in names)))
