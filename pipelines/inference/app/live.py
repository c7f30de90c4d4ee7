"""Live microphones: pieces of sound in, words out, at the end a SessionTranscript. Does not import Gradio.

The browser keeps all sound, and every piece says where it begins. The answer says how much has been taken, from the
beginning and without a gap: what was lost on the way is sent again from there, and what came twice is heard once.
"""

from __future__ import annotations

import base64
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.inference import streaming
from pipelines.inference.app.service import HELD_S, MAX_DURATION_S, MIN_PEAK, SessionTranscript
from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError, Waveform

if TYPE_CHECKING:
    from pipelines.inference.app.service import Service
    from pipelines.inference.streaming import Partial, Stream
    from pipelines.inference.transcriber import Transcriber


MAX_PIECE_S = 12.0
"""The page sends at most ten seconds at once."""
MAX_TALKS = 100
"""Each may hold a minute of 16 kHz float32, 3.8 MB."""
FORGOTTEN_S = 1_800.0
"""A microphone of which nothing was heard for so long is forgotten."""
QUIET_S = 60.0
"""Where there are MAX_TALKS, it is forgotten after so long, to make room for another."""


class Live:
    """One visitor's open microphone."""

    def __init__(self, transcriber: Transcriber):
        self.stream: Stream = streaming.of(transcriber)
        self.taken = 0
        """Samples, at the microphone's own rate, that came in."""
        self.heard: SessionTranscript | None = None
        """What came of it, once it has ended."""
        self.told: Partial | None = None
        self._resampler = None
        self._rate_hz = 0
        self._ended = False
        self._held: list[np.ndarray] = []
        self._samples = 0
        self._peak = 0.0

    def take(self, start: int, samples: np.ndarray, rate_hz: int) -> Partial:
        """Hear what is new in `samples`, the first of which is number `start` of the recording; nothing where there is
        a gap before it. What was taken stays taken where decoding fails.

        Raises AudioError: `unreadable`, `too_long`.
        """
        if self._ended:
            return self.told
        new = samples[self.taken - start :] if start <= self.taken else samples[:0]
        if self.taken + len(new) > MAX_DURATION_S * rate_hz:
            raise AudioError("too_long", f"at most {MAX_DURATION_S:g} s can be used")
        resampled = self._resampled(new, rate_hz, last=False) if len(new) else new
        self.taken += len(new)
        self._keep(resampled)
        self.told = self.stream.feed(resampled)
        return self.told

    def end(self) -> SessionTranscript:
        """Nothing more comes; may be asked again. Raises AudioError `no_recording` where nothing came, or `silent`."""
        if self.heard is not None:
            return self.heard
        if not self._rate_hz:
            raise AudioError("no_recording", "the microphone sent nothing")
        if not self._ended:
            tail = self._resampled(np.zeros(0, dtype=np.float32), self._rate_hz, last=True)
            self._ended = True
            self._keep(tail)
            self.stream.feed(tail)
        if self._peak < MIN_PEAK:
            raise AudioError("silent", f"no sample reaches {MIN_PEAK:g} of full scale")
        told = self.told = self.stream.end()
        held = Waveform(np.concatenate(self._held)) if self._samples <= HELD_S * SAMPLE_RATE_HZ else None
        self.heard = SessionTranscript("", told.text, told.audio_s, told.latency_s, held, segments=told.segments)
        return self.heard

    def _keep(self, samples: np.ndarray) -> None:
        self._samples += len(samples)
        if len(samples):
            self._peak = max(self._peak, float(np.abs(samples).max()))
        if self._samples <= HELD_S * SAMPLE_RATE_HZ:
            self._held.append(samples)
        else:
            self._held.clear()

    def _resampled(self, samples: np.ndarray, rate_hz: int, *, last: bool) -> np.ndarray:
        import soxr

        if not self._rate_hz:
            self._rate_hz = rate_hz
            self._resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
        if rate_hz != self._rate_hz:
            raise AudioError("unreadable", f"pieces of one recording at {self._rate_hz} and {rate_hz} Hz")
        return self._resampler.resample_chunk(samples, last=last)


@dataclass
class Piece:
    """Sound as the page sends it, decoded."""

    talk: str
    """Whose: a name that the page makes up, and nobody can guess."""
    start: int
    """Number of its first sample in the recording."""
    samples: np.ndarray
    """Mono float32 [n]."""
    rate_hz: int
    last: bool
    """Whether nothing comes after it."""


def piece_of(told: Any) -> Piece:
    """A piece from what the page sends: {talk, start, rate: Hz, samples: base64 of int16, last}.

    Raises AudioError `unreadable` for anything else.
    """
    told = told if isinstance(told, dict) else {}
    talk, start, rate_hz, encoded = (told.get(name) for name in ("talk", "start", "rate", "samples"))
    if not isinstance(talk, str) or not 16 <= len(talk) <= 64 or type(start) is not int or start < 0:
        raise AudioError("unreadable", "expected a piece {talk, start, rate, samples}")
    if type(rate_hz) is not int or not 8_000 <= rate_hz <= audio.MAX_RATE_HZ or not isinstance(encoded, str):
        raise AudioError("unreadable", "expected a piece {talk, start, rate, samples}")
    if len(encoded) > MAX_PIECE_S * rate_hz * 2 * 4 / 3 + 4:
        raise AudioError("unreadable", f"a piece of {len(encoded)} letters, more than {MAX_PIECE_S:g} s of sound")
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise AudioError("unreadable", "a piece that is not base64") from None
    samples = np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2") / np.float32(32_768)
    return Piece(talk, start, samples, rate_hz, bool(told.get("last")))


class Talks:
    """The microphones that are open now. Any number of threads may call it."""

    def __init__(self, service: Service):
        self.service = service
        self._talks: dict[str, tuple[float, Live]] = {}
        self._waiting: set[str] = set()
        """Those of which a piece is here."""
        self._lock = threading.Lock()
        self._sweeping = False

    def take(self, piece: Piece, gone: Callable[[], bool] = lambda: False) -> tuple[Partial, int, bool]:
        """What has been heard by now; how many samples have been taken; whether that was all.

        Nothing is heard where, once its turn has come, `gone` tells that nobody waits for the answer. Raises
        AudioError: `busy` also where there are too many talks, or where one has a piece that still waits.
        """
        with self._alone(piece) as live, self.service.turn():
            if gone():
                raise AudioError("busy", "nobody waits for the answer")
            told = live.take(piece.start, piece.samples, piece.rate_hz)
            ends = piece.last and live.taken == piece.start + len(piece.samples)
            if ends:
                live.end()
            return told, live.taken, ends

    def collect(self, talk: str) -> SessionTranscript:
        """What came of a microphone that has ended, which is forgotten. Raises AudioError `no_recording`."""
        with self._lock:
            _, live = self._talks.pop(talk, (0.0, None))
        if live is None or live.heard is None:
            raise AudioError("no_recording", "no such microphone has ended")
        return live.heard

    def forget(self) -> None:
        """Drop what nobody has spoken into for long."""
        since = time.monotonic() - FORGOTTEN_S
        with self._lock:
            kept = self._talks.items()
            self._talks = {talk: one for talk, one in kept if one[0] > since or talk in self._waiting}

    def _sweep(self) -> None:
        """Looks again every minute as long as there is a talk."""
        self.forget()
        with self._lock:
            self._sweeping = bool(self._talks)
            if self._sweeping:
                self._sweep_later()

    def _sweep_later(self) -> None:
        again = weakref.WeakMethod(self._sweep)  # a timer must not keep what nobody else has any more
        timer = threading.Timer(60.0, lambda: (call := again()) and call())
        timer.daemon = True
        timer.start()

    @contextlib.contextmanager
    def _alone(self, piece: Piece) -> Iterator[Live]:
        """The talk of this piece, which has no other one meanwhile."""
        with self._lock:
            if piece.talk in self._waiting:
                raise AudioError("busy", "its last piece still waits")
            live = self._of(piece)
            self._waiting.add(piece.talk)
        try:
            yield live
        finally:
            with self._lock:
                self._waiting.discard(piece.talk)
                if self._talks.get(piece.talk, (0.0, None))[1] is live:
                    self._talks[piece.talk] = time.monotonic(), live

    def _of(self, piece: Piece) -> Live:
        """Under the lock."""
        _, live = self._talks.get(piece.talk, (0.0, None))
        if live is not None or piece.start > 0:  # one that begins with a gap takes nothing: there is nothing to keep
            return live or Live(self.service.transcriber)
        if len(self._talks) >= MAX_TALKS:
            self._make_room()
        live = Live(self.service.transcriber)
        self._talks[piece.talk] = time.monotonic(), live
        if not self._sweeping:
            self._sweeping = True
            self._sweep_later()
        return live

    def _make_room(self) -> None:
        """Drop the talk that was quiet for longest, whose page can send it again; it is not long where one speaks."""
        quiet = {talk: since for talk, (since, _) in self._talks.items() if talk not in self._waiting}
        longest = min(quiet, key=quiet.get, default=None)
        if longest is None or quiet[longest] > time.monotonic() - QUIET_S:
            raise AudioError("busy", f"{MAX_TALKS} microphones are open")
        del self._talks[longest]
