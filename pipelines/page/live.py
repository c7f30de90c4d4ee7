"""A microphone that is heard while it is open: pieces of sound in, words out, at the end one Heard. Knows no Gradio."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines import audio, streaming
from pipelines.audio import SAMPLE_RATE_HZ, AudioError, Waveform
from pipelines.served import HELD_S, MAX_DURATION_S, MIN_PEAK, Heard

if TYPE_CHECKING:
    from pipelines.streaming import Partial, Stream
    from pipelines.transcriber import Transcriber

MAX_PIECE_S = 12.0
"""The page sends at most ten seconds at once."""


class Live:
    """One visitor's open microphone."""

    def __init__(self, transcriber: Transcriber):
        self.stream: Stream = streaming.of(transcriber)
        self.told: Partial | None = None
        self._resampler = None
        self._rate_hz = 0
        self._held: list[np.ndarray] = []
        self._samples = 0
        self._peak = 0.0
        self._number: int | None = None

    def take(self, piece: Any) -> Partial:
        """Hear the next piece (samples_of); one that came before, by its number, is not heard twice.

        Raises AudioError: `unreadable`, `too_long`.
        """
        number = piece.get("number") if isinstance(piece, dict) else None
        if self.told is not None and number is not None and number == self._number:
            return self.told
        samples = self._resampled(*samples_of(piece), last=False)
        self._number = number
        return self._feed(samples)

    def end(self) -> Heard:
        """Nothing more comes. Raises AudioError `no_recording` where nothing came, or `silent`."""
        if not self._rate_hz:
            raise AudioError("no_recording", "the microphone sent nothing")
        tail = self._resampled(np.zeros(0, dtype=np.float32), self._rate_hz, last=True)
        self._feed(tail[: int(MAX_DURATION_S * SAMPLE_RATE_HZ) - self._samples])
        told = self.told = self.stream.end()
        if self._peak < MIN_PEAK:
            raise AudioError("silent", f"no sample reaches {MIN_PEAK:g} of full scale")
        held = Waveform(np.concatenate(self._held)) if self._samples <= HELD_S * SAMPLE_RATE_HZ else None
        return Heard("", told.text, told.audio_s, told.latency_s, held, segments=told.segments)

    def _feed(self, samples: np.ndarray) -> Partial:
        if self._samples + len(samples) > MAX_DURATION_S * SAMPLE_RATE_HZ:
            raise AudioError("too_long", f"at most {MAX_DURATION_S:g} s can be used")
        self._samples += len(samples)
        if len(samples):
            self._peak = max(self._peak, float(np.abs(samples).max()))
        if self._samples <= HELD_S * SAMPLE_RATE_HZ:
            self._held.append(samples)
        else:
            self._held.clear()
        self.told = self.stream.feed(samples)
        return self.told

    def _resampled(self, samples: np.ndarray, rate_hz: int, *, last: bool) -> np.ndarray:
        import soxr

        if self._resampler is None:
            self._rate_hz = rate_hz
            self._resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
        if rate_hz != self._rate_hz:
            raise AudioError("unreadable", f"pieces of one recording at {self._rate_hz} and {rate_hz} Hz")
        return self._resampler.resample_chunk(samples, last=last)


def samples_of(piece: Any) -> tuple[np.ndarray, int]:
    """Mono float32 [n] and the rate in Hz of a piece as the page sends it: {rate: Hz, samples: base64 of int16}.

    Raises AudioError `unreadable` for anything else.
    """
    rate_hz, encoded = (piece.get("rate"), piece.get("samples")) if isinstance(piece, dict) else (None, None)
    if type(rate_hz) is not int or not 8_000 <= rate_hz <= audio.MAX_RATE_HZ or not isinstance(encoded, str):
        raise AudioError("unreadable", "expected a piece {rate, samples}")
    if len(encoded) > MAX_PIECE_S * rate_hz * 2 * 4 / 3 + 4:
        raise AudioError("unreadable", f"a piece of {len(encoded)} letters, more than {MAX_PIECE_S:g} s of sound")
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise AudioError("unreadable", "a piece that is not base64") from None
    return np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2") / np.float32(32_768), rate_hz
