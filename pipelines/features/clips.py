"""A clip that passed all checks, and the error for an example that did not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.whisper.log_mel import LogMel


class Rejected(LabError):
    """An example that cannot be used: `reason` is one word for tables, `detail` a sentence for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


MAX_LABEL_TOKENS = 448
"""Positions of Whisper's decoder: a longer label cannot be trained on."""


FindFeatures = Callable[[bytes], tuple[LogMel, float] | None]
"""Look up the fingerprint of an audio file in earlier caches: its log-mel and duration in seconds, or None."""


@dataclass(frozen=True)
class Clip:
    """An example that passed all checks, with its features and labels."""

    example: Example
    text: str
    """The cleaned transcript."""
    labels: list[int]
    """Target token ids of the decoder: language, task, no-timestamps, text, end. At most 448."""
    log_mel: LogMel
    duration_s: float
    fingerprint: bytes = b""
    """Fingerprint of the audio file, by which `FindFeatures` finds the log-mel. Empty: it cannot be found."""
    reused: bool = False
    """The log-mel was read from an earlier cache instead of computed."""
