"""Live transcription of open microphones: chunks of samples in, partial transcripts out. Does not import Gradio.

The browser stores all samples and every chunk states the offset of its first sample. The response says how many samples
have been received without a gap: lost chunks are sent again from there, and repeated samples are decoded only once.
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
from pipelines.inference.app.service import (
    MAX_DURATION_S,
    MAX_RETAINED_S,
    MIN_PEAK,
    NO_CHOICES,
    Choices,
    SessionTranscript,
)
from pipelines.speech import audio
from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError, Waveform

if TYPE_CHECKING:
    from pipelines.inference.app.service import Service
    from pipelines.inference.streaming import Partial, Stream
    from pipelines.inference.transcriber import Transcriber

MAX_CHUNK_S = 12.0
"""Maximum duration of a chunk; the page sends at most 10 s."""
MAX_SESSIONS = 100
"""Each may hold a minute of 16 kHz float32, 3.8 MB."""
EXPIRY_S = 1_800.0
"""Time after which an unused session is removed."""
IDLE_S = 60.0
"""Time after which an unused session may be removed to make room for a new one."""


class LiveSession:
    """One visitor's open microphone."""

    def __init__(self, transcriber: Transcriber, choices: Choices = NO_CHOICES):
        self.stream: Stream = streaming.create_stream(choices.configure(transcriber))
        self._choices = choices
        self.n_received = 0
        """Samples received, at the microphone's own rate."""
        self.transcript: SessionTranscript | None = None
        """The result, after `finish`."""
        self.partial: Partial | None = None
        self._resampler = None
        self._rate_hz = 0
        self._is_closed = False
        self._retained: list[np.ndarray] = []
        self._n_samples = 0
        self._peak = 0.0

    def receive(self, offset: int, samples: np.ndarray, rate_hz: int) -> Partial:
        """Decode what is new in `samples`, which begin at sample `offset`; ignore them if there is a gap before them.

        If decoding fails, the samples still count as received. Raises AudioError: `unreadable`, `too_long`.
        """
        if self._is_closed:
            return self.partial
        new = samples[self.n_received - offset :] if offset <= self.n_received else samples[:0]
        if self.n_received + len(new) > MAX_DURATION_S * rate_hz:
            raise AudioError("too_long", f"at most {MAX_DURATION_S:g} s can be used")
        resampled = self._resample(new, rate_hz, last=False) if len(new) else new
        self.n_received += len(new)
        self._retain(resampled)
        self.partial = self.stream.feed(resampled)
        return self.partial

    def finish(self) -> SessionTranscript:
        """Return the final transcript; may be called again.

        Raises AudioError: `no_recording` if nothing was received, `silent`.
        """
        if self.transcript is not None:
            return self.transcript
        if not self._rate_hz:
            raise AudioError("no_recording", "the microphone sent nothing")
        if not self._is_closed:
            tail = self._resample(np.zeros(0, dtype=np.float32), self._rate_hz, last=True)
            self._is_closed = True
            self._retain(tail)
            self.stream.feed(tail)
        if self._peak < MIN_PEAK:
            raise AudioError("silent", f"no sample reaches {MIN_PEAK:g} of full scale")
        final = self.partial = self.stream.end()
        recording = Waveform(np.concatenate(self._retained)) if self._is_retained else None
        self.transcript = SessionTranscript(
            "", final.text, final.audio_s, final.latency_s, recording, segments=final.segments, choices=self._choices
        )
        return self.transcript

    @property
    def _is_retained(self) -> bool:
        return self._n_samples <= MAX_RETAINED_S * SAMPLE_RATE_HZ

    def _retain(self, samples: np.ndarray) -> None:
        self._n_samples += len(samples)
        if len(samples):
            self._peak = max(self._peak, float(np.abs(samples).max()))
        if self._is_retained:
            self._retained.append(samples)
        else:
            self._retained.clear()

    def _resample(self, samples: np.ndarray, rate_hz: int, *, last: bool) -> np.ndarray:
        import soxr

        if not self._rate_hz:
            self._rate_hz = rate_hz
            self._resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
        if rate_hz != self._rate_hz:
            raise AudioError("unreadable", f"chunks of one recording at {self._rate_hz} and {rate_hz} Hz")
        return self._resampler.resample_chunk(samples, last=last)


@dataclass
class AudioChunk:
    """A chunk of samples from the page."""

    session_id: str
    """Random name that the page chose."""
    offset: int
    """Index of the first sample in the recording."""
    samples: np.ndarray
    """Mono float32 [n]."""
    rate_hz: int
    is_last: bool
    choices: Choices = NO_CHOICES
    """What the visitor has chosen when the microphone was opened; sent with the first chunk."""


def parse_chunk(message: Any) -> AudioChunk:
    """Parse the page's message {talk, start, rate: Hz, samples: base64 of int16, last, options}.

    `options`: prompt, hotwords and number of beams (service.Choices).

    Raises AudioError `unreadable` for anything else.
    """
    message = message if isinstance(message, dict) else {}
    session_id, offset, rate_hz, encoded = (message.get(name) for name in ("talk", "start", "rate", "samples"))
    if not isinstance(session_id, str) or not 16 <= len(session_id) <= 64 or type(offset) is not int or offset < 0:
        raise AudioError("unreadable", "expected a chunk {talk, start, rate, samples}")
    if type(rate_hz) is not int or not 8_000 <= rate_hz <= audio.MAX_RATE_HZ or not isinstance(encoded, str):
        raise AudioError("unreadable", "expected a chunk {talk, start, rate, samples}")
    if len(encoded) > MAX_CHUNK_S * rate_hz * 2 * 4 / 3 + 4:
        raise AudioError("unreadable", f"a chunk of {len(encoded)} characters, more than {MAX_CHUNK_S:g} s of audio")
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise AudioError("unreadable", "a chunk that is not base64") from None
    samples = np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2") / np.float32(32_768)
    options = message.get("options", [])
    if not isinstance(options, list) or len(options) > len(Choices._fields) - 1:
        raise AudioError("unreadable", "expected options [prompt, hotwords, beams]")
    return AudioChunk(session_id, offset, samples, rate_hz, bool(message.get("last")), Choices(False, *options))


class LiveSessions:
    """The sessions of all open microphones. Its methods are thread-safe."""

    def __init__(self, service: Service):
        self.service = service
        self._sessions: dict[str, tuple[float, LiveSession]] = {}
        """Time of last use and session, by session id."""
        self._in_use: set[str] = set()
        """Ids of sessions with a chunk that is waiting or being decoded."""
        self._lock = threading.Lock()
        self._is_timer_set = False

    def receive(
        self, chunk: AudioChunk, is_disconnected: Callable[[], bool] = lambda: False
    ) -> tuple[Partial, int, bool]:
        """Return the partial transcript, the number of samples received and whether the recording is complete.

        Nothing is decoded if `is_disconnected` returns true when the chunk's turn has come. Raises AudioError; `busy`
        also if there are too many sessions or if the session's previous chunk is still in use.
        """
        with self._exclusive(chunk) as session, self.service.turn():
            if is_disconnected():
                raise AudioError("busy", "the client has disconnected")
            partial = session.receive(chunk.offset, chunk.samples, chunk.rate_hz)
            is_complete = chunk.is_last and session.n_received == chunk.offset + len(chunk.samples)
            if is_complete:
                session.finish()
            return partial, session.n_received, is_complete

    def collect(self, session_id: str) -> SessionTranscript:
        """Return the transcript of a finished session and remove it. Raises AudioError `no_recording`."""
        with self._lock:
            _, session = self._sessions.pop(session_id, (0.0, None))
        if session is None or session.transcript is None:
            raise AudioError("no_recording", "no such microphone has finished")
        return session.transcript

    def remove_expired(self) -> None:
        """Remove sessions that were not used for EXPIRY_S."""
        oldest = time.monotonic() - EXPIRY_S
        with self._lock:
            self._sessions = {
                session_id: (used, session)
                for session_id, (used, session) in self._sessions.items()
                if used > oldest or session_id in self._in_use
            }

    def _remove_expired_and_repeat(self) -> None:
        self.remove_expired()
        with self._lock:
            self._is_timer_set = bool(self._sessions)
            if self._is_timer_set:
                self._start_timer()

    def _start_timer(self) -> None:
        remove = weakref.WeakMethod(self._remove_expired_and_repeat)  # the timer must not prolong this object's life
        timer = threading.Timer(60.0, lambda: (call := remove()) and call())
        timer.daemon = True
        timer.start()

    @contextlib.contextmanager
    def _exclusive(self, chunk: AudioChunk) -> Iterator[LiveSession]:
        """Yield the session of this chunk, which accepts no other chunk meanwhile."""
        with self._lock:
            if chunk.session_id in self._in_use:
                raise AudioError("busy", "the previous chunk is still waiting")
            session = self._get_or_create(chunk)
            self._in_use.add(chunk.session_id)
        try:
            yield session
        finally:
            with self._lock:
                self._in_use.discard(chunk.session_id)
                if self._sessions.get(chunk.session_id, (0.0, None))[1] is session:
                    self._sessions[chunk.session_id] = time.monotonic(), session

    def _get_or_create(self, chunk: AudioChunk) -> LiveSession:
        """Return the session of a chunk; the lock must be held."""
        _, session = self._sessions.get(chunk.session_id, (0.0, None))
        if session is not None or chunk.offset > 0:  # an unknown session with a gap receives nothing: do not store it
            return session or LiveSession(self.service.transcriber)
        if len(self._sessions) >= MAX_SESSIONS:
            self._evict_idle()
        session = LiveSession(self.service.transcriber, chunk.choices)
        self._sessions[chunk.session_id] = time.monotonic(), session
        if not self._is_timer_set:
            self._is_timer_set = True
            self._start_timer()
        return session

    def _evict_idle(self) -> None:
        """Remove the session that was idle longest, at least IDLE_S; its page can send everything again."""
        idle = {name: used for name, (used, _) in self._sessions.items() if name not in self._in_use}
        oldest = min(idle, key=idle.get, default=None)
        if oldest is None or idle[oldest] > time.monotonic() - IDLE_S:
            raise AudioError("busy", f"{MAX_SESSIONS} microphones are open")
        del self._sessions[oldest]
