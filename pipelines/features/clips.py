"""Why an example is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.whisper.log_mel import LogMel


class Rejected(LabError):
    """An example that cannot be used: `reason` is one word for tables, `detail` says it in full."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


MAX_LABEL_TOKENS = 448
"""Positions of Whisper's decoder: a longer label cannot be trained on."""


Recall = Callable[[bytes], tuple[LogMel, float] | None]
"""The log-mel and the duration in seconds of an audio file that was heard before, by its fingerprint; or None."""


@dataclass(frozen=True)
class Clip:
    """An example that passed: what the cache keeps of it."""

    example: Example
    text: str
    """The cleaned transcript."""
    labels: list[int]
    """Token ids that the decoder is to produce: language, task, no-timestamps, text, end. At most 448."""
    log_mel: LogMel
    duration_s: float
    fingerprint: bytes = b""
    """Of the audio file: what `Recall` finds the log-mel by. Empty where it is not to be found."""
    reused: bool = False
    """Whether the log-mel was recalled, not made."""
