"""Streamed transcripts: by OpenAI's client, and by clients that leave, do not read or wait too long."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket
import threading

import httpx
import numpy as np
import pages
import pytest

from pipelines.inference.api import event_stream
from pipelines.speech.audio import DAMAGED, AudioError
from tests.inference.api.running_server import LIMITS, Held, Parts, refusal, running, until

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("one_thread")

PATH = "/v1/audio/transcriptions"
STREAM = {"stream": "true"}


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


class HeldEngine:
    """An engine that decodes its second batch only after `let_go`."""

    def __init__(self, engine):
        self._engine, self.let_go, self.n_batches = engine, threading.Event(), 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def decode(self, features, *args, **options):
        self.n_batches += 1
        assert self.n_batches == 1 or self.let_go.wait(30)
        return self._engine.decode(features, *args, **options)


def test_first_delta_arrives_before_the_rest_is_decoded(toy, encoded, speech):
    pause = np.zeros(16_000, np.float32)
    recording = encoded(np.concatenate([part for n in range(5) for part in (speech(5 * 16_000, seed=n), pause)]))
    held = copy.copy(toy)
    held.loaded = HeldEngine(toy.loaded)
    with running(held) as url, client_of(url) as client:
        stream = client.audio.transcriptions.create(file=("a.wav", recording), model="whisper-1", stream=True)
        first = next(iter(stream))
        assert first.type == "transcript.text.delta" and first.delta
        assert held.loaded.n_batches <= 2 and not held.loaded.let_go.is_set()
        held.loaded.let_go.set()
        *deltas, done = stream
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert done.text == "".join([first.delta, *(event.delta for event in deltas)])
    assert done.text == toy.window_by_window().transcribe(recording).text and len(deltas) > 1
    assert done.usage.type == "tokens" and done.usage.input_tokens == 30 * 50
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > done.usage.input_tokens


@pytest.mark.parametrize("form", ["json", "text"])
def test_stream_is_events_in_both_formats(toy, wav, form):
    with running(toy) as url:
        answer = httpx.post(url + PATH, data={**STREAM, "response_format": form}, files={"file": wav})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache" and "content-length" not in answer.headers
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert [event["type"] for event in events] == ["transcript.text.delta", "transcript.text.done"]
    assert events[0]["delta"] == events[1]["text"]


def test_silent_recording_streams_an_empty_text(toy, encoded):
    with running(toy) as url, client_of(url) as client:
        silence = ("a.wav", encoded(np.zeros(16_000, np.float32)))
        (done,) = client.audio.transcriptions.create(file=silence, model="whisper-1", stream=True)
    assert (done.type, done.text) == ("transcript.text.done", "")


def test_error_before_the_first_segment_has_its_status(toy, encoded):
    with running(toy) as url:
        refusal(httpx.post(url + PATH, data=STREAM, files={"file": b"no audio"}), 400, code="invalid_audio")
        long = encoded(np.zeros(61 * 8_000, np.float32), 8_000)
        refusal(httpx.post(url + PATH, data=STREAM, files={"file": long}), 413, code="audio_too_long")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RuntimeError("/srv/secret"), None, "something went wrong on the server"),
        (AudioError(DAMAGED, "it cannot be read after 3.0 s"), "invalid_audio", "is damaged"),
        (None, "timeout", "not done within 1 s"),
    ],
)
def test_error_after_the_first_segment_is_raised_by_the_client(toy, wav, error, code, text):
    parts = Parts(toy)
    parts.error = error
    with running(parts, dataclasses.replace(LIMITS, timeout_s=30 if error else 1)) as url, client_of(url) as client:
        stream = client.audio.transcriptions.create(file=("a.wav", wav), model="whisper-1", stream=True)
        assert next(iter(stream)).delta == "Hej"
        if error:
            parts.let_go.set()
        with pytest.raises(openai.APIError, match=text) as caught:
            next(iter(stream))
        assert caught.value.body["code"] == code and "secret" not in str(caught.value.body)
        until(lambda: httpx.get(url + "/health").json()["waiting"] == 0)
    assert parts.at_once == 0


def test_disconnect_stops_the_decoding_of_a_stream(toy, wav):
    parts = Parts(toy)
    with running(parts) as url, client_of(url) as client:
        with client.audio.transcriptions.create(file=("a.wav", wav), model="whisper-1", stream=True) as stream:
            assert next(iter(stream)).delta == "Hej"
        until(lambda: parts.abandoned == 1)
        until(lambda: httpx.get(url + "/health").json()["waiting"] == 0)


def test_stream_waits_in_the_queue_like_other_requests(toy, wav):
    held = Held(toy)
    with running(held, dataclasses.replace(LIMITS, queue=0)) as url:
        first = threading.Thread(target=httpx.post, args=(url + PATH,), kwargs={"files": {"file": wav}, "timeout": 60})
        first.start()
        held.begun.acquire()
        busy = httpx.post(url + PATH, data=STREAM, files={"file": wav})
        assert "busy" in refusal(busy, 503, code="busy") and busy.headers["retry-after"]
        held.let_go.set()
        first.join(20)


def test_client_that_does_not_read_is_disconnected(toy, wav, monkeypatch):
    monkeypatch.setattr(event_stream, "SENDING_S", 0.3)
    parts = Parts(toy)
    parts.texts = ("a" * 20_000_000, "b")  # more than the sockets' buffers hold
    parts.let_go.set()
    with running(parts) as url:
        host, port = url.removeprefix("http://").split(":")
        request = httpx.Request("POST", url + PATH, data=STREAM, files={"file": wav})
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            until(lambda: parts.begun.acquire(blocking=False))
            until(lambda: httpx.get(url + "/health").json()["waiting"] == 0)


def test_comment_is_sent_while_nothing_is_decoded(toy, wav, monkeypatch):
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.05)
    parts = Parts(toy)
    with running(parts) as url:
        with httpx.stream("POST", url + PATH, data=STREAM, files={"file": wav}, timeout=60) as answer:
            lines = []
            for line in answer.iter_lines():
                lines.append(line)
                if line == ": keep-alive":
                    parts.let_go.set()
        assert "transcript.text.done" in lines[-2]
        parts.let_go.clear()
        with client_of(url) as client:
            stream = client.audio.transcriptions.create(file=("a.wav", wav), model="whisper-1", stream=True)
            threading.Timer(0.3, parts.let_go.set).start()
            assert [event.type for event in stream][-1] == "transcript.text.done"


@pytest.mark.parametrize("number", [0, 1], ids=["stream", "live"])
def test_example_of_the_page_prints_the_text(toy, wav, tmp_path, monkeypatch, capsys, number):
    (tmp_path / "talk.wav").write_bytes(wav)
    monkeypatch.chdir(tmp_path)
    code = pages.blocks((pages.ROOT / "docs/api.md").read_text("utf-8"), "python")[number]
    with running(toy) as url:
        exec(code.replace("http://127.0.0.1:8000", url), {})
    assert capsys.readouterr().out.strip() == toy.transcribe(wav).text
