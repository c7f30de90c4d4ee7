"""One example to a clip, or why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.features.clips import MAX_LABEL_TOKENS, Clip, Recall, Rejected
from pipelines.features.curation.quality import Limits
from pipelines.features.sources import SPLITS, Example
from pipelines.speech import audio
from pipelines.speech import text as speech_text
from pipelines.speech.audio import AudioError, Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper.log_mel import LogMel


@dataclass(frozen=True)
class Gate:
    """Turns examples into clips, or says why not. `tokenise` maps a clean transcript to label ids."""

    tokenise: Callable[[str], list[int]]
    n_mels: int
    min_duration_s: float
    max_duration_s: float
    min_peak: float
    limits: Limits = field(default_factory=Limits)
    """What training clips must keep to besides."""
    full_stop: bool = False
    """Whether training transcripts that end without punctuation get a full stop."""

    def admit(self, example: Example, recall: Recall | None = None) -> Clip:
        """Decode, check, extract. Raises Rejected; no other exception for whatever the file holds.

        What `recall` knows is neither decoded nor checked again: it passed a gate of the same settings.
        """
        try:
            return self._clip(example, recall)
        except AudioError as error:
            raise Rejected(error.reason, error.detail) from None

    def _clip(self, example: Example, recall: Recall | None) -> Clip:
        if example.split not in SPLITS:
            raise Rejected("unknown_split", f"{example.split!r} is none of {', '.join(SPLITS)}")
        training = example.split == "train"
        transcript, labels = self.label(example.text, training)
        limits = self.limits if training else Limits()
        sound = example.audio  # once: some sources make it on demand
        fingerprint = audio.fingerprint(sound)
        # limits look at the transcript and the split, too: what passed them elsewhere may not pass them here
        known = recall(fingerprint) if recall and limits == Limits() else None
        log_mel, duration_s = known or self._hear(sound, limits, transcript)
        return Clip(example, transcript, labels, log_mel, duration_s, fingerprint, known is not None)

    def label(self, told: str, training: bool = True) -> tuple[str, list[int]]:
        """The transcript as it is trained on or scored, and its label ids. Raises Rejected where it is unusable."""
        return labelled(told, self.tokenise, self.full_stop and training)

    def _hear(self, sound: bytes | Path, limits: Limits, transcript: str) -> tuple[LogMel, float]:
        waveform = audio.decode(sound, self.max_duration_s)
        self._check(waveform)
        if limits.active:
            limits.check(waveform, len(speech_text.normalise(transcript).replace(" ", "")))
        log_mel = features.extract(waveform, self.n_mels)
        if not np.isfinite(log_mel.pad_value):
            raise Rejected("not_finite", "samples so large that their power overflows")
        return log_mel, waveform.duration_s

    def _check(self, waveform: Waveform) -> None:
        if waveform.duration_s < self.min_duration_s:
            raise Rejected("too_short", f"{waveform.duration_s:.4f} s, at least {self.min_duration_s:g} s are needed")
        peak = float(np.abs(waveform.samples).max())
        if peak < self.min_peak:
            raise Rejected("silent", f"the loudest sample is {peak:.1e} of full scale, below {self.min_peak:g}")


def labelled(told: str, tokenise: Callable[[str], list[int]], full_stop: bool = False) -> tuple[str, list[int]]:
    """The transcript, cleaned, and its label ids by `tokenise`. Raises Rejected where it is unusable."""
    transcript = speech_text.clean(told)
    if not speech_text.normalise(transcript):
        raise Rejected("no_text", "the transcript holds no letter and no digit")
    if full_stop:
        transcript = speech_text.with_full_stop(transcript)
    labels = tokenise(transcript)
    if len(labels) > MAX_LABEL_TOKENS:
        raise Rejected("long_label", f"{len(labels)} tokens, the decoder has {MAX_LABEL_TOKENS} positions")
    return transcript, labels
