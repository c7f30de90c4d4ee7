"""The transcript of a recording: segments and words with times and confidences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from pipelines.speech.audio import AudioError


@dataclass(frozen=True)
class Word:
    """One word of a transcript, split at white space."""

    text: str
    confidence: float
    """Probability that the word is correct, 0 to 1, calibrated if the model has a calibration."""
    start_s: float | None = None
    """None unless word times were requested."""
    end_s: float | None = None
    """Start of the next word, or end of the speech before it."""
    logprob: float = 0.0
    """Natural logarithm of the model's probability of the word, not calibrated."""


@dataclass(frozen=True)
class Segment:
    """The transcript of one part of a recording."""

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...] = ()
    logprob: float = 0.0
    """Mean over tokens (decoding.Hypothesis)."""
    temperature: float = 0.0
    """Sampling temperature; above 0 if the first attempt repeated itself."""
    no_speech: float = 0.0
    """Probability of no speech in the window of this segment (decoding.no_speech_probabilities)."""
    speaker: str = ""
    """Name of the speaker or channel; "" if these are not told apart."""
    language: str = ""
    """Whisper's code of the language that was detected; "" if it was given."""

    @property
    def labelled_text(self) -> str:
        """The text, after the speaker's name if there is one."""
        return f"{self.speaker}: {self.text}" if self.speaker else self.text

    @property
    def confidence(self) -> float:
        """Expected share of correct words, 0 to 1."""
        return _mean_confidence(self.words)


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording."""

    text: str
    """In one line; if the speakers are told apart, a line for each turn: `Anna: Hej!`"""
    audio_s: float
    """Duration of the recording."""
    elapsed_s: float
    """Wall-clock time for reading, feature extraction and decoding."""
    segments: tuple[Segment, ...] = ()
    damage: str = ""
    """What could not be read of the recording, as in "it cannot be read from 7.0 to 7.1 s"; "" if nothing is lost."""

    @property
    def confidence(self) -> float:
        """Expected share of correct words, 0 to 1."""
        return _mean_confidence(tuple(word for segment in self.segments for word in segment.words))

    @property
    def language(self) -> str:
        """Whisper's code of the language that was detected; "" if it was given, or if there is no speech."""
        return self.segments[0].language if self.segments else ""

    @property
    def has_speakers(self) -> bool:
        """Return whether there are names of speakers."""
        return any(segment.speaker for segment in self.segments)

    @property
    def plain_text(self) -> str:
        """The text without names of speakers, in order of time."""
        return " ".join(segment.text for segment in self.segments) if self.has_speakers else self.text


def join_texts(segments: Iterable[Segment]) -> str:
    """Return the text of segments: in one line, or with speakers, a line for each turn."""
    turns = groupby(segments, key=lambda segment: segment.speaker)
    lines = ((speaker, " ".join(segment.text for segment in turn)) for speaker, turn in turns)
    return "\n".join(f"{speaker}: {text}" if speaker else text for speaker, text in lines)


class DamagedRecording(AudioError):
    """A recording of which parts cannot be read; `transcript` is that of the rest."""

    def __init__(self, error: AudioError, transcript: Transcript):
        super().__init__(error.reason, error.detail)
        self.transcript = transcript


def _mean_confidence(words: tuple[Word, ...]) -> float:
    return sum(word.confidence for word in words) / len(words) if words else 0.0
