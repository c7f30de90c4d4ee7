"""What the app serves: which model, and what happens between a recording and a row of feedback. Knows no Gradio."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.inference.pipeline import model_title
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Segment, Transcriber, Transcript
    from pipelines.speech.audio import Waveform


MAX_DURATION_S = 600.0
"""Longer recordings are refused."""
MIN_PEAK = 1e-3
"""Recordings whose largest sample is below this share of full scale are refused as silent."""
HELD_S = 60.0
"""Longer recordings are not held in memory for the listener's consent, and so never kept."""
TURN_S = 60.0
"""Whoever waits longer for the model is told that it is busy."""
TIMEOUT_S = 300.0
"""A recording that takes longer is given up."""


@dataclass(frozen=True)
class SessionTranscript:
    """One transcript, as a visitor's session remembers it."""

    source: str
    """The upload it was made from; the file itself is gone by now."""
    text: str
    audio_s: float
    elapsed_s: float
    """Wall-clock time from file to text."""
    recording: Waveform | None
    """Held in memory until the visitor consents or leaves; None where it is too long to be held."""
    noted: tuple[str, str, bool] | None = None
    """The verdict that was last given on it: flag, correction, recording kept."""
    segments: tuple[Segment, ...] = ()
    """When each part was said, and how sure the model is of each word."""


class Line:
    """Those who want the model, one after another in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._moved = threading.Condition()

    def enter(self, timeout_s: float) -> object | None:
        """A ticket as soon as all before have left; None where that took too long."""
        ticket = object()
        with self._moved:
            self._waiting.append(ticket)
        return ticket if self._comes(ticket, timeout_s) else None

    def give_way(self, ticket: object, timeout_s: float) -> bool:
        """Let all others that wait go first, each once; whether one's turn came again in time."""
        with self._moved:
            if len(self._waiting) == 1:
                return True
            self._waiting.rotate(-1)
            self._moved.notify_all()
        return self._comes(ticket, timeout_s)

    def leave(self, ticket: object) -> None:
        """Make room; nothing where the ticket is no longer valid."""
        with self._moved:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._moved.notify_all()

    def _comes(self, ticket: object, timeout_s: float) -> bool:
        with self._moved:
            came = self._moved.wait_for(lambda: self._waiting[0] is ticket, timeout_s)
        if not came:
            self.leave(ticket)
        return came


class Service:
    """A transcriber and a feedback log behind the buttons of a page. Any number of threads may call it."""

    def __init__(self, transcriber: Transcriber, log: Path, base: Callable[[], Transcriber] | None = None):
        """`base` loads the model from which this one was tuned, the first time that somebody wants to compare."""
        self.transcriber, self.log = transcriber, log
        self._load_base, self._base = base, None
        self._loading = threading.Lock()
        self._line = Line()

    @property
    def can_compare(self) -> bool:
        """Whether there is a model to hold this one against."""
        return self._load_base is not None or self._base is not None or self._loading.locked()

    def transcribe(
        self,
        path: str | None,
        before: SessionTranscript | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> SessionTranscript:
        """Transcribe the file `path`; the transcript `before` is the answer where it was made from the same upload.

        `on_progress` is told the share that is done, 0 to 1. Raises audio.AudioError with reason `no_recording`,
        `missing`, `empty`, `unreadable`, `not_finite`, `silent`, `too_long`, `busy` or `too_slow`.
        """
        from pipelines.speech import audio

        if path is None:
            raise audio.AudioError("no_recording", "nothing was recorded or chosen")
        if before is not None and before.source == path:
            return before
        started = time.monotonic()
        waveform = _decoded(path, _in_time(started + TIMEOUT_S))
        with self.turn() as give_way:
            told = _told(waveform.duration_s, started + TIMEOUT_S, give_way, on_progress)
            transcript = self.transcriber.transcribe(waveform, **told)
        held = waveform if waveform.duration_s <= HELD_S else None
        elapsed_s = time.monotonic() - started
        return SessionTranscript(
            path, transcript.text, waveform.duration_s, elapsed_s, held, segments=transcript.segments
        )

    def before_tuning(self, heard: SessionTranscript) -> tuple[str, Transcript]:
        """Title of the model from which this one was tuned, and what it hears in the same recording.

        Raises audio.AudioError with reason `no_recording`, `busy` or `too_slow`; LabError where that model is not to
        be had.
        """
        from pipelines.speech import audio

        if heard.recording is None or not self.can_compare:
            raise audio.AudioError("no_recording", "no recording is held that could be compared")
        base = self._loaded_base()
        with self.turn() as give_way:
            told = _told(heard.audio_s, time.monotonic() + TIMEOUT_S, give_way)
            return model_title(base.ref), base.transcribe(heard.recording, **told)

    def _loaded_base(self) -> Transcriber:
        """Loaded beside the queue of recordings, which go on meanwhile; what failed once is not tried again."""
        from pipelines.speech import audio

        if not self._loading.acquire(blocking=False):
            raise audio.AudioError("busy", "the model before tuning is being loaded")
        try:
            if self._base is None:
                load, self._load_base = self._load_base, None
                if load is None:
                    raise LabError("the model before tuning was not to be had")
                self._base = load()
            return self._base
        finally:
            self._loading.release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[[float], bool]]:
        """The model is this caller's alone, until it calls what it is given: that lets those who wait go first, and
        tells whether its turn came again within so many seconds.

        Raises audio.AudioError `busy` after TURN_S.
        """
        from pipelines.speech import audio

        ticket = self._line.enter(TURN_S)
        if ticket is None:
            raise audio.AudioError("busy", f"the model was not free for {TURN_S:g} s")
        try:
            yield lambda timeout_s: self._line.give_way(ticket, timeout_s)
        finally:
            self._line.leave(ticket)

    def note(
        self, heard: SessionTranscript, flag: str, correction: str = "", username: str = "", *, keep: bool = False
    ) -> SessionTranscript:
        """Write the verdict `flag` (right or wrong) on `heard` to the log; the same verdict twice is one row.

        An unchanged transcript is no correction. `keep` is the speaker's consent to store the recording.
        """
        from pipelines.inference import feedback

        correction = "" if flag == "right" or correction.strip() == heard.text.strip() else correction
        verdict = (flag, correction, keep and heard.recording is not None)
        if verdict != heard.noted:
            feedback.append(
                self.log,
                output=heard.text,
                flag=flag,
                model=model_title(self.transcriber.ref),
                reference=correction,
                username=username,
                recording=heard.recording if keep else None,
            )
        return replace(heard, noted=verdict)


def _decoded(path: str, in_time: Callable[[], float]) -> Waveform:
    """The recording, read block by block: ten minutes at 16 kHz are 38 MB, whatever rate and channels the file has."""
    import numpy as np

    from pipelines.speech import audio

    blocks = []
    for block in audio.blocks(path, MAX_DURATION_S):
        blocks.append(block)
        in_time()
    samples = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
    if not samples.size:
        raise audio.AudioError("empty", f"less than one sample at {audio.SAMPLE_RATE_HZ} Hz")
    if np.abs(samples).max() < MIN_PEAK:
        raise audio.AudioError("silent", f"no sample reaches {MIN_PEAK:g} of full scale")
    return audio.Waveform(samples)


def _in_time(ends_s: float) -> Callable[[], float]:
    """What tells how many seconds are left until `ends_s` on the monotonic clock, and raises `too_slow` after it."""
    from pipelines.speech import audio

    def left_s() -> float:
        left = ends_s - time.monotonic()
        if left <= 0:
            raise audio.AudioError("too_slow", f"not done after {TIMEOUT_S:g} s")
        return left

    return left_s


def _told(
    audio_s: float,
    ends_s: float,
    give_way: Callable[[float], bool],
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Callable[..., None]]:
    """What a transcriber is to call on its way, between two batches: others go first, progress goes on, and time that
    is up ends it."""
    left_s = _in_time(ends_s)

    def on_audio(seconds: float) -> None:
        give_way(left_s())
        left_s()

    def on_segment(segment: Segment) -> None:
        on_audio(segment.end_s)
        on_progress(min(segment.end_s / audio_s, 1.0))

    return {"on_audio": on_audio, "on_segment": on_segment}
