"""Turn one example into a clip: decode, check, extract features, tokenize; or reject it with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.features.clips import MAX_LABEL_TOKENS, Clip, FindFeatures, Rejected
from pipelines.features.curation.quality import Limits
from pipelines.features.sources import SPLITS, Example, NoAudio, NoTranscript
from pipelines.infra.tables import is_missing
from pipelines.speech import audio, marks
from pipelines.speech import text as speech_text
from pipelines.speech.audio import AudioError, Waveform
from pipelines.whisper import log_mel as log_mels
from pipelines.whisper.log_mel import LogMel


@dataclass(frozen=True)
class ClipFilter:
    """Creates clips from examples and rejects those that cannot be used."""

    tokenise: Callable[[str], list[int]]
    """Maps a clean transcript to label ids."""
    n_mels: int
    min_duration_s: float
    max_duration_s: float
    min_peak: float
    """Lowest peak, relative to full scale, of a clip that is not silent."""
    limits: Limits = field(default_factory=Limits)
    """Further limits for training clips."""
    full_stop: bool = False
    """Add a full stop to training transcripts that end without punctuation."""
    remove_marks: bool = False
    """Remove marks that may not be spoken from the transcripts of all splits (speech/marks.py)."""
    non_speech: bool = False
    """Accept training clips with an empty transcript: nothing is said in them, and they may be silent."""

    def create_clip(self, example: Example, find_features: FindFeatures | None = None) -> Clip:
        """Decode, check and extract one example. Raises Rejected, and no other exception for any file content.

        The audio of a clip that `find_features` finds is neither decoded nor checked again: it passed a filter with
        the same settings. Its transcript is always checked.
        """
        try:
            return self._create_clip(example, find_features)
        except AudioError as error:
            raise Rejected(error.reason, error.detail) from None

    def _create_clip(self, example: Example, find_features: FindFeatures | None) -> Clip:
        if example.split not in SPLITS:
            raise Rejected("unknown_split", f"{example.split!r} is none of {', '.join(SPLITS)}")
        training = example.split == "train"
        if is_non_speech := self._is_non_speech(example):
            transcript, labels = "", self.tokenise("")
        else:
            transcript, labels = self.label(example.text, training)
        limits = self.limits if training and not is_non_speech else Limits()
        sound = example.audio  # read once: some sources synthesise or fetch it on access
        if isinstance(sound, NoAudio):
            raise Rejected(sound.reason, sound.detail)
        fingerprint = audio.fingerprint(sound)
        # Limits depend on the transcript and the split too: a clip that passed in another cache may fail here.
        features = find_features(fingerprint) if find_features and limits == Limits() else None
        log_mel, duration_s = features or self._extract(sound, limits, transcript)
        return Clip(example, transcript, labels, log_mel, duration_s, fingerprint, features is not None)

    def label(self, text: str, training: bool = True) -> tuple[str, list[int]]:
        """Return the clean transcript and its label ids. Raises Rejected if it is unusable."""
        text = marks.remove(text) if self.remove_marks else text
        return label_transcript(text, self.tokenise, self.full_stop and training)

    def _extract(self, sound: bytes | Path, limits: Limits, transcript: str) -> tuple[LogMel, float]:
        waveform = audio.decode(sound, self.max_duration_s)
        self._check(waveform, self.min_peak if transcript else 0.0)
        if limits.active:
            limits.check(waveform, len(speech_text.normalise(transcript).replace(" ", "")))
        log_mel = log_mels.extract(waveform, self.n_mels)
        if not np.isfinite(log_mel.pad_value):
            raise Rejected("not_finite", "the samples are so large that their power overflows")
        return log_mel, waveform.duration_s

    def _is_non_speech(self, example: Example) -> bool:
        is_empty = not isinstance(example.text, NoTranscript) and not speech_text.clean(example.text)
        return self.non_speech and is_empty and example.split == "train"

    def _check(self, waveform: Waveform, min_peak: float) -> None:
        if waveform.duration_s < self.min_duration_s:
            raise Rejected("too_short", f"{waveform.duration_s:.4f} s, at least {self.min_duration_s:g} s are needed")
        peak = float(np.abs(waveform.samples).max())
        if peak < min_peak:
            raise Rejected("silent", f"the loudest sample is {peak:.1e} of full scale, below {min_peak:g}")


def label_transcript(text: str, tokenise: Callable[[str], list[int]], full_stop: bool = False) -> tuple[str, list[int]]:
    """Clean a transcript and tokenize it; timestamps are dropped.

    Raises Rejected if it is empty, if it is a word for a missing value, or for more than MAX_LABEL_TOKENS tokens.
    """
    transcript = speech_text.clean(marks.without_timestamps(text))
    if not speech_text.normalise(transcript):
        raise Rejected(
            "no_text",
            "the transcript holds no letter and no digit; training clips without speech need curation.non_speech_share",
        )
    if is_missing(transcript):
        raise Rejected("no_text", f"the transcript is {transcript!r}, which tables write for a missing value")
    if full_stop:
        transcript = speech_text.with_full_stop(transcript)
    labels = tokenise(transcript)
    if len(labels) > MAX_LABEL_TOKENS:
        raise Rejected("long_label", f"{len(labels)} tokens, the decoder has {MAX_LABEL_TOKENS} positions")
    return transcript, labels
