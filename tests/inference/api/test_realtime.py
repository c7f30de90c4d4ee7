"""Live transcription over a WebSocket: by OpenAI's client and by clients that send anything else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import json
import threading

import httpx
import numpy as np
import pytest

from pipelines.inference.api import realtime
from pipelines.inference.api.middleware import Access
from tests.inference.api.running_server import LIMITS, running, until

openai = pytest.importorskip("openai")
client = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")
pytestmark = pytest.mark.usefixtures("one_thread")

TRANSCRIPTION = "conversation.item.input_audio_transcription"


@pytest.fixture(scope="module")
def url(toy):
    with running(toy) as address:
        yield address


def pcm(*parts_s: float, rate_hz: int = 24_000) -> bytes:
    """Return noise and silence in turn, as 16-bit PCM."""
    noise = np.random.default_rng(0).normal(0, 9_000, 10 * rate_hz).clip(-32_768, 32_767)
    parts = [noise[: int(s * rate_hz)] * (n % 2 == 0) for n, s in enumerate(parts_s)]
    return np.concatenate(parts).astype("<i2").tobytes()


class Peer:
    """A client that sends and receives JSON."""

    def __init__(self, socket):
        self.socket = socket

    def send(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def append(self, content: bytes, step: int = 9_600) -> None:
        for at in range(0, len(content), step):
            self.send("input_audio_buffer.append", audio=base64.b64encode(content[at : at + step]).decode())

    def receive(self) -> dict:
        return json.loads(self.socket.recv(timeout=30))

    def until(self, kind: str) -> list[dict]:
        """Return the events up to one of this kind."""
        events = [self.receive()]
        while events[-1]["type"] != kind:
            events.append(self.receive())
        return events

    def error(self) -> dict:
        event = self.receive()
        assert event["type"] == "error" and "\n" not in event["error"]["message"], event
        return event["error"]


@contextlib.contextmanager
def connected(url: str, query: str = "intent=transcription", **options):
    address = url.replace("http", "ws", 1) + f"/v1/realtime?{query}"
    with client.connect(address, proxy=None, compression=None, **options) as socket:
        peer = Peer(socket)
        peer.first = peer.receive()
        yield peer


def refused(url: str, query: str = "intent=transcription", **options) -> tuple[int, dict]:
    """Return status and error of a connection that is refused."""
    with pytest.raises(exceptions.InvalidStatus) as caught, connected(url, query, **options):
        pass
    return caught.value.response.status_code, json.loads(caught.value.response.body)["error"]


# ---- OpenAI's client


def test_openai_client_gets_the_events_of_its_turns(url):
    async def talk() -> tuple[list, list]:
        api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        async with api.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            setup = [await connection.recv()]
            turns = {"type": "server_vad", "silence_duration_ms": 400}
            inputs = {"format": {"type": "audio/pcm", "rate": 24_000}, "transcription": {"model": "whisper-1"}}
            session = {"type": "transcription", "audio": {"input": {**inputs, "turn_detection": turns}}}
            await connection.session.update(session=session)
            setup.append(await connection.recv())
            content = pcm(2.0, 1.0, 1.0, 1.0)
            for at in range(0, len(content), 9_600):
                await connection.input_audio_buffer.append(audio=base64.b64encode(content[at : at + 9_600]).decode())
            events = []
            while sum(event.type == f"{TRANSCRIPTION}.completed" for event in events) < 2:
                events.append(await connection.recv())
            return setup, events

    (created, updated), events = asyncio.run(talk())
    assert (created.type, updated.type) == ("session.created", "session.updated")
    assert updated.session.type == "transcription" and updated.session.audio.input.format.rate == 24_000
    assert updated.session.audio.input.turn_detection.silence_duration_ms == 400
    items = list(dict.fromkeys(event.item_id for event in events if event.type.endswith("speech_started")))
    assert len(items) == 2
    texts = []
    for number, item in enumerate(items):
        of_item = [event for event in events if getattr(event, "item_id", None) == item]
        kinds = [event.type for event in of_item if event.type != f"{TRANSCRIPTION}.delta"]
        assert kinds == [
            "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "input_audio_buffer.committed",
            f"{TRANSCRIPTION}.completed",
        ]  # fmt: skip
        started, stopped, committed, completed = (event for event in of_item if event.type in kinds)
        assert started.audio_start_ms == pytest.approx(3_000 * number, abs=340)
        assert stopped.audio_end_ms == pytest.approx((2_300, 4_300)[number], abs=60)
        assert committed.previous_item_id == (items[number - 1] if number else None)
        deltas = [event.delta for event in of_item if event.type == f"{TRANSCRIPTION}.delta"]
        assert completed.transcript == "".join(deltas)
        texts.append(completed.transcript)
        assert completed.usage.type == "duration" and completed.usage.seconds == pytest.approx(
            2.0 - 0.4 * number, abs=0.4
        )
    assert any(texts)
    added = [event for event in events if event.type == "conversation.item.added"]
    assert [event.item.id for event in added] == items and added[0].item.role == "user"


def test_openai_client_of_the_beta_gets_its_own_events(url):
    async def talk() -> list:
        api = openai.AsyncOpenAI(
            base_url=f"{url}/v1", websocket_base_url=f"{url.replace('http', 'ws', 1)}/v1", api_key="none"
        )
        connecting = api.beta.realtime.connect(model="gpt-4o-transcribe", extra_query={"intent": "transcription"})
        async with connecting as connection:
            events = [await connection.recv()]
            settings = {"input_audio_format": "pcm16", "turn_detection": None}
            await connection.transcription_session.update(session=settings)
            await connection.input_audio_buffer.append(audio=base64.b64encode(pcm(1.0)).decode())
            await connection.input_audio_buffer.commit()
            while events[-1].type != f"{TRANSCRIPTION}.completed":
                events.append(await connection.recv())
            return events

    if not hasattr(openai.AsyncOpenAI(api_key="none").beta, "realtime"):
        pytest.skip("this openai has no beta.realtime")
    events = asyncio.run(talk())
    assert [event.type for event in events[:4]] == [
        "transcription_session.created", "transcription_session.updated", "input_audio_buffer.committed",
        "conversation.item.created",
    ]  # fmt: skip
    assert events[-1].transcript


# ---- audio


def test_commit_gives_the_transcript_of_the_whole_audio(url, toy):
    with connected(url) as peer:
        audio = {"input": {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}}
        peer.send("session.update", session={"type": "transcription", "audio": audio})
        assert peer.receive()["session"]["audio"]["input"]["turn_detection"] is None
        content = pcm(1.0, 0.5, 1.0, rate_hz=16_000)
        for _ in range(2):
            peer.append(content)
            peer.send("input_audio_buffer.commit")
            *_, completed = peer.until(f"{TRANSCRIPTION}.completed")
            samples = np.frombuffer(content, "<i2").astype(np.float32) / 32_768
            assert completed["transcript"] == toy.transcribe(realtime.Waveform(samples)).text != ""
            assert completed["usage"] == {"type": "duration", "seconds": 2.5}
        peer.send("input_audio_buffer.commit", event_id="mine")
        error = peer.error()
        assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "mine")


def test_clear_and_commit_of_an_open_turn(url):
    with connected(url) as peer:
        peer.append(pcm(1.0))
        (started,) = peer.until("input_audio_buffer.speech_started")
        peer.send("input_audio_buffer.clear")
        peer.until("input_audio_buffer.cleared")
        peer.append(pcm(1.0))
        *_, second = peer.until("input_audio_buffer.speech_started")
        assert second["item_id"] != started["item_id"] and second["audio_start_ms"] == pytest.approx(1_000, abs=40)
        peer.send("input_audio_buffer.commit")
        *_, completed = peer.until(f"{TRANSCRIPTION}.completed")
        assert completed["item_id"] == second["item_id"] and completed["transcript"]
        peer.send("input_audio_buffer.commit")
        assert peer.error()["code"] == "input_audio_buffer_commit_empty"


def test_change_of_the_format_ends_the_turn(url):
    with connected(url) as peer:
        peer.append(pcm(1.0))
        peer.until("input_audio_buffer.speech_started")
        peer.send("session.update", session={"audio": {"input": {"format": {"type": "audio/pcmu"}}}})
        kinds = {event["type"] for event in peer.until(f"{TRANSCRIPTION}.completed")}
        assert {"input_audio_buffer.committed", "session.updated"} <= kinds
        peer.send("session.update", session={"audio": {"input": {"format": {"type": "audio/pcm"}}}})
        peer.append(pcm(1.0))
        *_, started = peer.until("input_audio_buffer.speech_started")
        assert started["audio_start_ms"] == pytest.approx(1_000, abs=60)


def test_failed_transcription_is_an_event_and_the_session_goes_on(toy):
    broken = copy.copy(toy)
    broken.decode_windows = lambda *args, **options: 1 / 0
    with running(broken) as url, connected(url) as peer:
        for _ in range(2):
            peer.append(pcm(0.8, 0.8))
            *_, failed = peer.until(f"{TRANSCRIPTION}.failed")
            assert failed["error"]["code"] == "transcription_failed" and "division" not in str(failed)


# ---- messages


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("no json", "invalid_json", None),
        ("[" * 100_000, "invalid_json", None),
        ("[]", "invalid_event", "type"),
        ("{}", "invalid_event", "type"),
        ('{"type": 1}', "invalid_event", "type"),
        (b"\xff\xfe", "invalid_json", None),
        (r'{"type": "none", "event_id": "\ud800"}', "invalid_json", None),
        (
            r'{"type": "session.update", "session": {"input_audio_transcription": {"prompt": "\udc00"}}}',
            "invalid_json",
            None,
        ),
        ('{"type": "response.create"}', "unknown_event", None),
        ('{"type": "input_audio_buffer.append"}', "invalid_value", "audio"),
        ('{"type": "input_audio_buffer.append", "audio": "AA=="}', "invalid_value", "audio"),
        ('{"type": "input_audio_buffer.append", "audio": "å"}', "invalid_value", "audio"),
        ('{"type": "session.update"}', "invalid_value", "session"),
        ("x" * 4_000_001, "message_too_large", None),
    ],
)
def test_bad_message_gets_an_error_event(url, message, code, param):
    with connected(url) as peer:
        peer.socket.send(message)
        error = peer.error()
        assert (error["code"], error["param"]) == (code, param)
        peer.send("input_audio_buffer.clear")
        assert peer.receive()["type"] == "input_audio_buffer.cleared"


INPUT = "session.audio.input"


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"type": "realtime"}, "session.type"),
        ({"voice": "alloy"}, "session.voice"),
        ({"audio": {"output": {}}}, "session.audio.output"),
        ({"audio": {"input": {"noise_reduction": {"type": "near_field"}}}}, f"{INPUT}.noise_reduction"),
        ({"audio": {"input": {"format": {"type": "audio/opus"}}}}, f"{INPUT}.format.type"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 1}}}}, f"{INPUT}.format.rate"),
        ({"audio": {"input": {"format": {"type": "audio/pcmu", "rate": 16_000}}}}, f"{INPUT}.format.rate"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": True}}}}, f"{INPUT}.format.rate"),
        ({"audio": {"input": {"transcription": None}}}, f"{INPUT}.transcription"),
        ({"audio": {"input": {"transcription": {"model": "gpt-5"}}}}, f"{INPUT}.transcription.model"),
        ({"audio": {"input": {"transcription": {"model": ["a"]}}}}, f"{INPUT}.transcription.model"),
        ({"audio": {"input": {"transcription": {"language": "Svedish"}}}}, f"{INPUT}.transcription.language"),
        ({"audio": {"input": {"transcription": {"prompt": 1}}}}, f"{INPUT}.transcription.prompt"),
        ({"audio": {"input": {"transcription": {"keywords": "Åsa"}}}}, f"{INPUT}.transcription.keywords"),
        ({"audio": {"input": {"transcription": {"keywords": [" "]}}}}, f"{INPUT}.transcription.keywords"),
        ({"include": ["item.other"]}, "session.include"),
        ({"audio": {"input": {"transcription": {"delay": "low"}}}}, f"{INPUT}.transcription.delay"),
        ({"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}, f"{INPUT}.turn_detection.type"),
        ({"audio": {"input": {"turn_detection": {"threshold": 2}}}}, f"{INPUT}.turn_detection.threshold"),
        ({"audio": {"input": {"turn_detection": {"silence_duration_ms": "9"}}}},
         f"{INPUT}.turn_detection.silence_duration_ms"),
        ({"audio": {"input": {"turn_detection": {"idle_timeout_ms": 5000}}}},
         f"{INPUT}.turn_detection.idle_timeout_ms"),
        ({"input_audio_format": "mp3"}, "session.input_audio_format"),
        ({"input_audio_format": ["pcm16"]}, "session.input_audio_format"),
        ({"input_audio_noise_reduction": {"type": "far_field"}}, "session.input_audio_noise_reduction"),
        ("nothing", "session"),
    ],
)  # fmt: skip
def test_setting_that_would_be_ignored_is_refused(url, session, param):
    with connected(url) as peer:
        peer.send("session.update", session=session)
        assert peer.error()["param"] == param


def test_update_changes_only_what_is_present(url):
    with connected(url) as peer:
        peer.send("session.update", session={"turn_detection": {"threshold": 0.7}})
        peer.receive()
        inputs = {"transcription": {"language": "Swedish"}, "noise_reduction": None}
        peer.send("session.update", session={"audio": {"input": inputs}})
        settings = peer.receive()["session"]["audio"]["input"]
        assert settings["turn_detection"]["threshold"] == 0.7
        assert settings["transcription"]["language"] == "Swedish"


# ---- access


def test_token_is_a_header_or_a_sub_protocol(toy):
    with running(toy, access=Access(token="k-1", origins=["*"])) as url:
        status, error = refused(url)
        assert (status, error["code"]) == (401, "invalid_api_key")
        assert refused(url, subprotocols=["realtime", "openai-insecure-api-key.k-2"])[0] == 401
        with connected(url, additional_headers={"Authorization": "Bearer k-1"}) as peer:
            assert peer.first["type"] == "session.created"
        with connected(url, subprotocols=["realtime", "openai-insecure-api-key.k-1"]) as peer:
            assert peer.socket.subprotocol == "realtime"
        old = ["realtime", "openai-insecure-api-key.k-1", "openai-beta.realtime-v1"]
        with connected(url, subprotocols=old) as peer:
            assert peer.first["type"] == "transcription_session.created"


def test_page_of_another_origin_is_refused(toy, url):
    assert refused(url, origin="https://evil.page")[0] == 403
    assert refused(url, origin="null")[0] == 403
    with connected(url, origin=url):
        pass
    with running(toy, access=Access(origins=["https://my.page"])) as other:
        assert refused(other, origin="https://evil.page")[0] == 403
        with connected(other, origin="https://my.page"):
            pass


def test_query_that_asks_for_something_else_is_refused(url):
    assert refused(url, "intent=conversation")[1]["param"] == "intent"
    assert refused(url, "intent=transcription&model=gpt-realtime")[1]["code"] == "model_not_found"
    with connected(url, "model=gpt-4o-mini-transcribe"):
        pass
    assert httpx.get(url + "/v1/realtime").status_code == 404


def test_number_of_sessions_is_limited(toy):
    with running(toy, dataclasses.replace(LIMITS, live_sessions=1)) as url:
        with connected(url):
            assert refused(url)[0] == 503
        until(lambda: not fails(url))


def fails(url: str) -> bool:
    try:
        with connected(url):
            return False
    except exceptions.InvalidStatus:
        return True


def test_audio_above_the_rate_limit_ends_the_session(toy):
    with running(toy, access=Access(audio_s_per_minute=1)) as url, connected(url) as peer:
        peer.append(pcm(3.0), step=48_000)
        error = next(event for event in iter(peer.receive, None) if event["type"] == "error")["error"]
        assert error["code"] == "rate_limit_exceeded"
        with pytest.raises(exceptions.ConnectionClosed):
            peer.until("never")
        assert peer.socket.close_code == 1013
        assert refused(url)[0] == 429


@pytest.mark.parametrize(("limit", "code"), [("IDLE_S", "idle_timeout"), ("SESSION_S", "session_expired")])
def test_session_ends_after_its_time(url, monkeypatch, limit, code):
    monkeypatch.setattr(realtime, limit, 0.2)
    with connected(url) as peer:
        assert peer.error()["code"] == code
        with pytest.raises(exceptions.ConnectionClosedOK):
            peer.receive()


def test_buffer_of_a_client_that_never_commits_is_limited(url, monkeypatch):
    monkeypatch.setattr(realtime, "MAX_BUFFER_S", 1.0)
    with connected(url) as peer:
        peer.send("session.update", session={"turn_detection": None})
        peer.receive()
        peer.append(pcm(1.5), step=48_000)
        assert peer.error()["code"] == "input_audio_buffer_full"
        peer.send("input_audio_buffer.commit")
        *_, completed = peer.until(f"{TRANSCRIPTION}.completed")
        assert completed["usage"]["seconds"] == pytest.approx(1.0, abs=0.02)


def test_disconnect_stops_the_work_of_a_session(toy):
    let_go, calls = threading.Event(), []
    slow = copy.copy(toy)

    def decode_windows(windows, before_batch=lambda: None, *args, **options):
        calls.append("begun")
        while not let_go.wait(0.01):
            try:
                before_batch()
            except BaseException:
                calls.append("abandoned")
                raise
        return []

    slow.decode_windows = decode_windows
    with running(slow) as url:
        with connected(url) as peer:
            peer.append(pcm(0.8, 0.8))
            until(lambda: calls == ["begun"])
        until(lambda: calls == ["begun", "abandoned"])


def test_live_session_does_not_wait_for_recordings(toy, wav):
    from tests.inference.api.running_server import Parts

    parts = Parts(toy)
    parts.longest_s, parts.decode_windows = toy.longest_s, toy.decode_windows
    with running(parts) as url:
        sending = threading.Thread(target=httpx.post, args=(url + "/predict",), kwargs={"content": wav, "timeout": 60})
        sending.start()
        parts.begun.acquire()
        with connected(url) as peer:
            peer.append(pcm(0.8, 0.8))
            assert peer.until(f"{TRANSCRIPTION}.completed")
        parts.let_go.set()
        sending.join(20)


def test_settings_reach_the_decoder_and_logprobs_the_client(toy):
    seen, recorder = [], copy.copy(toy)
    recorder.with_options = lambda **changes: (
        seen.append(toy.with_options(**changes).options) or toy.with_options(**changes)
    )
    with running(recorder) as url, connected(url) as peer:
        transcription = {"language": "English", "prompt": "Boats", "keywords": ["Åsa"]}
        include = ["item.input_audio_transcription.logprobs"]
        peer.send("session.update", session={"audio": {"input": {"transcription": transcription}}, "include": include})
        assert peer.receive()["session"]["include"] == include
        peer.append(pcm(2.0, 1.0))
        *events, completed = peer.until(f"{TRANSCRIPTION}.completed")
    expected = {"language": "en", "prompt": "Boats", "hotwords": ("Åsa",)}
    assert seen == [toy.options.changed(**expected)] * len(seen) and seen
    deltas = [event for event in events if event["type"] == f"{TRANSCRIPTION}.delta"]
    assert completed["logprobs"] == [entry for delta in deltas for entry in delta["logprobs"]]
    assert "".join(entry["token"] for entry in completed["logprobs"]).strip() == completed["transcript"]
