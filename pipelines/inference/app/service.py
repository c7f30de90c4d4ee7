"""The app without its user interface: from an uploaded recording to a row of feedback. Does not import Gradio."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.inference.channels import LEFT_RIGHT, NUMBERED, ChannelTranscriber, without_speakers
from pipelines.inference.pipeline import model_title
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Transcriber
    from pipelines.inference.transcript import Segment, Transcript
    from pipelines.speech.audio import Gap, Waveform

MAX_OPTION_CHARS, MAX_BEAMS = 2_000, 10
"""Longest prompt and list of hotwords, and most beams, that a visitor may choose."""
ChannelLabels = tuple[str, str, str]
"""Names of the left and the right channel, and a format of the names of several."""
MAX_DURATION_S = 600.0
"""Maximum duration of a recording."""
MIN_PEAK = 1e-3
"""Recordings with a smaller peak (share of full scale) are refused as silent."""
MAX_RETAINED_S = 60.0
"""Longer recordings are not held in memory for the visitor's consent, and so cannot be saved."""
MAX_WAIT_S = 60.0
"""Time after which a waiting request is refused as busy."""
TIMEOUT_S = 300.0
"""Maximum time for one recording."""


class Choices(NamedTuple):
    """What a visitor has chosen beside the recording."""

    split_channels: bool = False
    prompt: str = ""
    hotwords: str = ""
    """Separated by commas or lines."""
    beam_size: int = 0
    """0: that of the model."""

    def configure(self, transcriber: Transcriber) -> Transcriber:
        """Return the transcriber with these options. Raises AudioError `options` if they cannot be used."""
        from pipelines.speech.audio import AudioError
        from pipelines.whisper.decoding_options import parse_hotwords

        are_texts = all(isinstance(text, str) and len(text) <= MAX_OPTION_CHARS for text in self[1:3])
        if not are_texts or type(self.beam_size) is not int or not 0 <= self.beam_size <= MAX_BEAMS:
            raise AudioError("options", f"expected texts of at most {MAX_OPTION_CHARS} characters, and a number")
        changes = self.prompt.strip() or None, parse_hotwords(self.hotwords) or None, self.beam_size or None
        if not any(changes):
            return transcriber
        try:
            return transcriber.with_options(**dict(zip(("prompt", "hotwords", "beam_size"), changes, strict=True)))
        except LabError as error:
            raise AudioError("options", str(error)) from None


NO_CHOICES = Choices()


@dataclass(frozen=True)
class SessionTranscript:
    """A transcript as stored in a visitor's session."""

    source: str
    """Path of the upload, which has been deleted."""
    text: str
    audio_s: float
    elapsed_s: float
    """Wall-clock time from the file to the text."""
    recording: Waveform | None
    """Held in memory until the visitor consents or leaves; None if it is too long."""
    feedback: tuple[str, str, bool] | None = None
    """The last feedback: flag, correction, whether the recording was saved."""
    segments: tuple[Segment, ...] = ()
    """Segments with times and confidences."""
    gaps: tuple[Gap, ...] = ()
    """Parts of the recording that cannot be read."""
    choices: Choices = NO_CHOICES

    @property
    def plain_text(self) -> str:
        """The text without names of speakers."""
        return without_speakers(self.text, self.segments)


class TurnQueue:
    """A first-in, first-out queue for the model."""

    def __init__(self) -> None:
        self._tickets: deque[object] = deque()
        self._changed = threading.Condition()

    def enter(self, timeout_s: float) -> object | None:
        """Return a ticket once all earlier ones have left, or None after `timeout_s`."""
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
        return ticket if self._wait_for_turn(ticket, timeout_s) else None

    def yield_turn(self, ticket: object, timeout_s: float) -> bool:
        """Let every waiting ticket go first once; return whether the turn came back in time."""
        with self._changed:
            if len(self._tickets) == 1:
                return True
            self._tickets.rotate(-1)
            self._changed.notify_all()
        return self._wait_for_turn(ticket, timeout_s)

    def leave(self, ticket: object) -> None:
        """Remove a ticket, if it is still in the queue."""
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._tickets)

    def _wait_for_turn(self, ticket: object, timeout_s: float) -> bool:
        with self._changed:
            is_first = self._changed.wait_for(lambda: self._tickets[0] is ticket, timeout_s)
        if not is_first:
            self.leave(ticket)
        return is_first


class Service:
    """A transcriber and a feedback log. Its methods are thread-safe."""

    def __init__(self, transcriber: Transcriber, log: Path, load_base: Callable[[], Transcriber] | None = None):
        """`load_base` loads the model before fine-tuning; it is called at the first comparison."""
        self.transcriber, self.log = transcriber, log
        self._load_base, self._base = load_base, None
        self._loading = threading.Lock()
        self.queue = TurnQueue()

    @property
    def can_compare(self) -> bool:
        """Return whether there is a model before fine-tuning."""
        return self._load_base is not None or self._base is not None or self._loading.locked()

    def transcribe(
        self,
        path: str | None,
        previous: SessionTranscript | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
        choices: Choices = NO_CHOICES,
        labels: ChannelLabels = (*LEFT_RIGHT, NUMBERED),
    ) -> SessionTranscript:
        """Transcribe the file at `path`; return `previous` if it is of the same upload with the same choices.

        With other choices the recording of `previous` is used, since its file has been deleted. `labels` name split
        channels. `on_progress` receives the completed share, 0 to 1. Raises AudioError with reason `no_recording`,
        `missing`, `empty`, `unreadable`, `damaged` (without any sound), `not_finite`, `silent`, `too_long`, `options`,
        `busy` or `too_slow`.
        """
        from pipelines.speech import audio

        if path is None:
            raise audio.AudioError("no_recording", "nothing was recorded or chosen")
        again = previous if previous is not None and previous.source == path else None
        if again and again.choices == choices:
            return again
        transcriber, started = choices.configure(self.transcriber), time.monotonic()
        if again and again.recording and not choices.split_channels:
            waveform, gaps = again.recording, again.gaps
        else:
            waveform, gaps = _read(path, _deadline(started + TIMEOUT_S))
        with self.turn() as yield_turn:
            callbacks = _callbacks(waveform.duration_s, started + TIMEOUT_S, yield_turn, on_progress)
            if choices.split_channels:

                def on_audio(seconds: float) -> None:
                    callbacks["on_audio"](seconds)
                    on_progress(min(seconds / waveform.duration_s, 1.0))

                transcript = _transcribe_channels(transcriber, path, labels, on_audio)
            else:
                transcript = transcriber.transcribe(waveform, **callbacks)
        retained = waveform if waveform.duration_s <= MAX_RETAINED_S else None
        return SessionTranscript(
            path,
            transcript.text,
            waveform.duration_s,
            time.monotonic() - started,
            retained,
            segments=transcript.segments,
            gaps=gaps,
            choices=choices,
        )

    def transcribe_with_base(self, transcript: SessionTranscript) -> tuple[str, Transcript]:
        """Return the title of the model before fine-tuning and its transcript of the same recording.

        Raises AudioError with reason `no_recording`, `busy` or `too_slow`; LabError if the model cannot be loaded.
        """
        from pipelines.speech import audio

        if transcript.recording is None or not self.can_compare:
            raise audio.AudioError("no_recording", "there is no recording in memory to compare")
        base = transcript.choices.configure(self._get_base())
        with self.turn() as yield_turn:
            callbacks = _callbacks(transcript.audio_s, time.monotonic() + TIMEOUT_S, yield_turn)
            return model_title(base.ref), base.transcribe(transcript.recording, **callbacks)

    def _get_base(self) -> Transcriber:
        """Return the model before fine-tuning, loading it at the first call without blocking the queue.

        A failed load is not repeated.
        """
        from pipelines.speech import audio

        if not self._loading.acquire(blocking=False):
            raise audio.AudioError("busy", "the model before fine-tuning is being loaded")
        try:
            if self._base is None:
                load, self._load_base = self._load_base, None
                if load is None:
                    raise LabError("the model before fine-tuning could not be loaded")
                self._base = load()
            return self._base
        finally:
            self._loading.release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[[float], bool]]:
        """Give the caller exclusive use of the model.

        Yields a function that lets waiting callers go first and returns whether the turn came back within the given
        number of seconds. Raises AudioError `busy` after MAX_WAIT_S.
        """
        from pipelines.speech import audio

        ticket = self.queue.enter(MAX_WAIT_S)
        if ticket is None:
            raise audio.AudioError("busy", f"the model was not free for {MAX_WAIT_S:g} s")
        try:
            yield lambda timeout_s: self.queue.yield_turn(ticket, timeout_s)
        finally:
            self.queue.leave(ticket)

    def add_feedback(
        self,
        transcript: SessionTranscript,
        flag: str,
        correction: str = "",
        username: str = "",
        *,
        save_recording: bool = False,
    ) -> SessionTranscript:
        """Append feedback with `flag` (right or wrong) to the log; repeated identical feedback is one row.

        A correction equal to the transcript counts as none. `save_recording` is the speaker's consent.
        """
        from pipelines.inference import feedback

        correction = "" if flag == "right" or correction.strip() == transcript.text.strip() else correction
        new = (flag, correction, save_recording and transcript.recording is not None)
        if new != transcript.feedback:
            given = feedback.Feedback(
                output=transcript.plain_text,
                flag=flag,
                model=model_title(self.transcriber.ref),
                reference=without_speakers(correction, transcript.segments),
                username=username,
                recording=transcript.recording if save_recording else None,
            )
            feedback.append(self.log, given)
        return replace(transcript, feedback=new)


def _transcribe_channels(
    transcriber: Transcriber, path: str, channels: ChannelLabels, on_audio: Callable[[float], None]
) -> Transcript:
    """Return the transcript of each channel of what can be read."""
    from pipelines.inference.transcript import DamagedRecording

    *left_right, numbered = channels
    try:
        return ChannelTranscriber(transcriber, (), tuple(left_right), numbered).transcribe(path, on_audio=on_audio)
    except DamagedRecording as damage:
        return damage.transcript


def _read(path: str, check_deadline: Callable[[], float]) -> tuple[Waveform, tuple[Gap, ...]]:
    """Read the recording block by block: ten minutes at 16 kHz are 38 MB, independent of the file's format.

    Also returns its parts that cannot be read.
    """
    import numpy as np

    from pipelines.speech import audio

    blocks, gaps = [], ()
    try:
        for block in audio.blocks(path, MAX_DURATION_S):
            blocks.append(block)
            check_deadline()
    except audio.DamagedAudio as error:
        if not blocks:
            raise
        gaps = error.gaps
    samples = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
    if not samples.size:
        raise audio.AudioError("empty", f"less than one sample at {audio.SAMPLE_RATE_HZ} Hz")
    if np.abs(samples).max() < MIN_PEAK:
        raise audio.AudioError("silent", f"no sample reaches {MIN_PEAK:g} of full scale")
    return audio.Waveform(samples), gaps


def _deadline(ends_s: float) -> Callable[[], float]:
    """Return a function that returns the seconds until `ends_s` (monotonic clock) and raises `too_slow` after it."""
    from pipelines.speech import audio

    def remaining_s() -> float:
        remaining = ends_s - time.monotonic()
        if remaining <= 0:
            raise audio.AudioError("too_slow", f"not done after {TIMEOUT_S:g} s")
        return remaining

    return remaining_s


def _callbacks(
    audio_s: float,
    ends_s: float,
    yield_turn: Callable[[float], bool],
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Return the callbacks of `Transcriber.transcribe`: yield the turn, report progress, raise after the deadline."""
    check_deadline = _deadline(ends_s)

    def on_audio(seconds: float) -> None:
        yield_turn(check_deadline())
        check_deadline()

    def on_segment(segment: Segment) -> None:
        on_audio(segment.end_s)
        on_progress(min(segment.end_s / audio_s, 1.0))

    return {"on_audio": on_audio, "on_segment": on_segment}
