"""A fake transcriber, chunks of a live microphone, and checks of refusals."""

import base64
from pathlib import Path

import numpy as np
import pytest

from pipelines.inference.app import live
from pipelines.inference.transcript import Segment, Transcript
from pipelines.infra import feedback_log
from pipelines.speech.audio import AudioError
from pipelines.speech.recordings.segmentation import Window
from pipelines.whisper.model import ModelRef

gr = pytest.importorskip("gradio")


class FakeTranscriber:
    """Returns the same transcript for every recording and counts its calls."""

    def __init__(self, folder, text="Hej på dig.", **facts):
        self.ref = ModelRef(str(folder), Path(folder), "folder", "abc123", facts.pop("quantisation", None), facts=facts)
        self.text, self.calls, self.language = text, 0, "sv"
        self.changes: list[dict] = []
        """Options that were requested."""

    longest_s = 30.0

    def with_options(self, **changes):
        self.changes.append(changes)
        return self

    def transcribe(self, recording, on_audio, on_segment):
        self.calls += 1
        if isinstance(self.text, Exception):
            raise self.text
        on_audio(recording.duration_s)
        for segment in self.decode_windows([Window(recording.samples, 0.0)]):
            on_segment(segment)
        return Transcript(self.text, recording.duration_s, 0.1)

    def decode_windows(self, windows):
        return [Segment(w.start_s, w.end_s, self.text) for w in windows]


def expect_refusal(action, *arguments):
    """Return the one line of the gr.Error that `action` raises."""
    with pytest.raises(gr.Error) as caught:
        action(*arguments)
    line = caught.value.message
    assert "\n" not in line
    assert "/" not in line
    assert "Traceback" not in line
    assert not caught.value.print_exception
    return line


SESSION_ID = "a-random-session-id"


def create_chunk(samples, start=0, rate_hz=16_000, last=False, session_id=SESSION_ID):
    """Return samples as a message of the page."""
    values = np.round(np.asarray(samples) * 32_768).clip(-32_768, 32_767).astype("<i2")
    encoded = base64.b64encode(values.tobytes()).decode()
    return {"talk": session_id, "start": start, "rate": rate_hz, "samples": encoded, "last": last}


def create_chunks(samples, rate_hz=16_000, every_s=0.5, session_id=SESSION_ID):
    """Yield a whole recording as messages of the page."""
    step = int(every_s * rate_hz)
    for at in range(0, len(samples), step):
        yield create_chunk(samples[at : at + step], at, rate_hz, at + step >= len(samples), session_id)


def send_chunk(handlers, chunk):
    return handlers.live_sessions.receive(live.parse_chunk(chunk))


def refusal_reason(handlers, chunk):
    with pytest.raises(AudioError) as caught:
        send_chunk(handlers, chunk)
    return caught.value.reason


def feedback_rows(handlers):
    return feedback_log.read(handlers.service.log)
