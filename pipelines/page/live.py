"""A microphone that is heard while it is open: pieces of a wav file in, words out, at the end one Heard. No Gradio."""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines import audio, streaming
from pipelines.audio import SAMPLE_RATE_HZ, AudioError, Waveform
from pipelines.served import HELD_S, MAX_DURATION_S, MIN_PEAK, Heard

if TYPE_CHECKING:
    from pipelines.streaming import Partial, Stream
    from pipelines.transcriber import Transcriber

MAX_PIECE_BYTES = 8_000_000
"""A piece of half a second has 100 kB; a browser that was asleep may send some more of them at once."""


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

    def take(self, piece: Path | str) -> Partial:
        """Hear the next piece, a wav file of 16-bit samples. Raises AudioError: `unreadable`, `too_long`."""
        return self._feed(self._resampled(*read_wav(Path(piece)), last=False))

    def end(self) -> Heard:
        """Nothing more comes. Raises AudioError `no_recording` where nothing came, or `silent`."""
        if not self._rate_hz:
            raise AudioError("no_recording", "the microphone sent nothing")
        self._feed(self._resampled(np.zeros(0, dtype=np.float32), self._rate_hz, last=True))
        told = self.told = self.stream.end()
        if self._peak < MIN_PEAK:
            raise AudioError("silent", f"no sample reaches {MIN_PEAK:g} of full scale")
        held = Waveform(np.concatenate(self._held)) if self._samples <= HELD_S * SAMPLE_RATE_HZ else None
        return Heard("", told.text, told.audio_s, told.latency_s, held, segments=told.segments)

    def _feed(self, samples: np.ndarray) -> Partial:
        self._samples += len(samples)
        if self._samples > MAX_DURATION_S * SAMPLE_RATE_HZ:
            raise AudioError("too_long", f"at most {MAX_DURATION_S:g} s can be used")
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


def read_wav(piece: Path) -> tuple[np.ndarray, int]:
    """Mono float32 [n] and the rate in Hz of a wav file of 16-bit samples, whatever length its header claims.

    A browser repeats the header of its first piece before every other one, so the lengths in it are not those of the
    piece. Raises AudioError `missing` or `unreadable`.
    """
    if not piece.is_file():
        raise AudioError("missing", "the piece is not there any more")
    if piece.stat().st_size > MAX_PIECE_BYTES:
        raise AudioError("unreadable", f"a piece of {piece.stat().st_size} bytes, at most {MAX_PIECE_BYTES}")
    content = piece.read_bytes()
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise AudioError("unreadable", "a piece that is no wav file")
    at, known = 12, None
    while at + 8 <= len(content):
        name, size = content[at : at + 4], struct.unpack_from("<I", content, at + 4)[0]
        if name == b"fmt " and at + 24 <= len(content):
            known = struct.unpack_from("<HHIIHH", content, at + 8)
        if name == b"data":
            break
        at += 8 + size + size % 2
    if known is None or content[at : at + 4] != b"data":
        raise AudioError("unreadable", "a wav piece without its format or its samples")
    coding, channels, rate_hz, _, _, bits = known
    if bits != 16 or coding not in (1, 0xFFFE) or not 1 <= channels <= audio.MAX_CHANNELS:
        raise AudioError(
            "unreadable", f"a wav piece of {bits} bits, coding {coding}, {channels} channels; 16, 1 needed"
        )
    if not 1_000 <= rate_hz <= audio.MAX_RATE_HZ:
        raise AudioError("unreadable", f"a wav piece at {rate_hz} Hz")
    samples = np.frombuffer(
        content, dtype="<i2", offset=at + 8, count=(len(content) - at - 8) // (2 * channels) * channels
    )
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float32) / np.float32(32_768), rate_hz


def data_url(recording: Waveform) -> str:
    """The recording as a wav file in a data URL, for the page's player: 32 kB a second, and a third more."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, recording.samples, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"
