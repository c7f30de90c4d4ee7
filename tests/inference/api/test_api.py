"""The HTTP API, asked over a socket: by OpenAI's own client, by schemathesis, and by those who mean no good."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import hypothesis
import numpy as np
import pytest
import soundfile
from hypothesis import strategies

from pipelines.cli import serving
from pipelines.inference import subtitles as written
from pipelines.inference.api import api
from pipelines.inference.api.forms import SubtitleForm
from pipelines.inference.api.middleware import Access
from pipelines.inference.api.queue import Limits
from pipelines.inference.http import protocol
from pipelines.inference.http import server as api_server
from pipelines.inference.http.guard import Refusal
from pipelines.infra.errors import LabError
from pipelines.whisper import export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.tokens import read_spelling
from tests.inference.api.running_server import LIMITS, SCORE, TOKEN, Held, refusal, running, until

openai = pytest.importorskip("openai")
schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]
TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"


@pytest.fixture(scope="module")
def url(toy):
    with running(toy) as address:
        yield address


# ---- OpenAI's own client


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_openai_client_gets_every_format(client, toy, wav):
    heard = toy.transcribe(wav)
    assert heard.text

    def ask(**fields):
        return client.audio.transcriptions.create(file=("a.wav", wav), model="whisper-1", **fields)

    assert ask().text == ask(response_format="json", language="sv", prompt="", temperature=0).text == heard.text
    assert ask(response_format="text") == heard.text + "\n"
    assert ask(response_format="srt") == written.srt(heard)
    assert ask(response_format="vtt") == written.vtt(heard)
    verbose = ask(response_format="verbose_json", timestamp_granularities=["segment"])
    assert (verbose.text, verbose.language, verbose.duration) == (heard.text, "swedish", 2.0)
    (segment,), (told,) = verbose.segments, heard.segments
    assert (segment.id, segment.start, segment.end, segment.text) == (0, told.start_s, told.end_s, f" {told.text}")
    assert segment.avg_logprob == pytest.approx(told.logprob, abs=1e-4)
    assert segment.confidence == pytest.approx(told.confidence, abs=1e-4)
    assert segment.compression_ratio > 0 and segment.seek == 0
    assert read_spelling(toy.ref.folder).text(segment.tokens) == told.text
    assert (segment.temperature, segment.no_speech_prob) == (told.temperature, pytest.approx(told.no_speech, abs=1e-4))
    assert verbose.words is None


class Timing:
    """An engine that says when words begin, one each quarter of a second, or that cannot."""

    def __init__(self, engine, can_align=True):
        self._engine, self.can_align = engine, can_align

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def word_starts(self, windows, frames, texts):
        return [[0.25 * n for n in range(len(text.split()))] for text in texts]


def test_openai_client_gets_word_times(toy, wav):
    timing = copy.copy(toy)
    timing.loaded = Timing(toy.loaded)
    with running(timing) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked = {"file": ("a.wav", wav), "model": "whisper-1", "timestamp_granularities": ["word", "segment"]}
        told = client.audio.transcriptions.create(response_format="verbose_json", **asked)
        assert [word.word for word in told.words] == told.text.split()
        starts = [0.25 * n for n in range(len(told.words))]
        assert [word.start for word in told.words] == starts
        assert [word.end for word in told.words] == [*starts[1:], 2.0]
        with pytest.raises(openai.BadRequestError, match="in verbose_json only") as caught:
            client.audio.transcriptions.create(response_format="json", **asked)
        assert caught.value.param == "timestamp_granularities[]"


def test_highlighted_words_need_word_times():
    with pytest.raises(Refusal, match="does not support word times"):
        SubtitleForm(highlight_words=True).parse("srt", times_words=False)


def test_subtitles_of_channels_are_styled(toy, encoded, speech):
    timing = copy.copy(toy)
    timing.loaded = Timing(toy.loaded)
    stereo = encoded(np.stack([speech(16_000), speech(16_000, 1)], axis=1))
    with running(timing) as url:

        def ask(**fields: str) -> httpx.Response:
            fields |= {"channels": "split"}
            return httpx.post(url + TRANSCRIPTIONS, files={"file": stereo}, data=fields, timeout=60)

        named = {"channel_names": "Anna,Erik"}
        verbose = ask(response_format="verbose_json", **named).json()
        assert [segment["speaker"] for segment in verbose["segments"]] == ["Anna", "Erik"]
        assert ask().json()["text"] == verbose["text"].replace("Anna:", "Left:").replace("Erik:", "Right:")
        style = {"max_line_width": "20", "max_line_count": "1", "highlight_words": "true"}
        cues = ask(response_format="vtt", **named, **style).text
        assert "<v Anna>Anna: " in cues and "<u>" in cues
        lines = [re.sub("<[^>]*>", "", line) for line in cues.splitlines() if "-->" not in line]
        assert max(map(len, lines)) <= 20
        refusal(ask(channel_names="A,B,C"), 400, param="channel_names")


def test_openai_client_without_word_times_gets_400(toy, wav):
    untimed = copy.copy(toy)
    untimed.loaded = Timing(toy.loaded, can_align=False)
    asked = {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
    with running(untimed) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="does not support word times") as caught:
            client.audio.transcriptions.create(file=("a.wav", wav), model="whisper-1", **asked)
    assert caught.value.param == "timestamp_granularities[]"


def test_openai_client_lists_the_model_and_uses_its_name(client, wav):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.created) == ("toy-whisper", "model", 1795167000)
    assert client.audio.transcriptions.create(file=("a.wav", wav), model=model.id).text
    assert client.models.retrieve(model.id) == client.models.retrieve("whisper-1") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("openai/whisper-tiny")
    assert caught.value.code == "model_not_found"


def test_model_name_with_a_slash_is_found(toy):
    named = copy.copy(toy)
    named.ref = dataclasses.replace(toy.ref, name="openai/whisper-tiny")
    with running(named) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list().data
        assert model.id == "openai/whisper-tiny"
        assert client.models.retrieve(model.id) == model


def test_openai_client_understands_a_refusal(client, wav):
    with pytest.raises(openai.NotFoundError) as caught:
        client.audio.transcriptions.create(file=("a.wav", wav), model="gpt-4o-transcribe-diarize")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"channels": "both"}, "channels", 400),
        ({"channel_names": "Anna,Erik"}, "channel_names", 400),
        ({"channels": "split", "channel_names": "Anna,"}, "channel_names", 400),
        ({"max_line_width": "30"}, "max_line_width", 400),
        ({"max_line_width": "3", "response_format": "srt"}, "max_line_width", 400),
        ({"max_line_count": "0", "response_format": "vtt"}, "max_line_count", 400),
        ({"highlight_words": "true"}, "highlight_words", 400),
        ({"language": "Svedish"}, "language", 400),
        ({"chunking_strategy": '{"type": "server_vad"}'}, "chunking_strategy", 400),
        ({"ordföljd": "1"}, "ordföljd", 400),
        ({"language": ["sv", "en"]}, "language", 400),
        ({"model": "other"}, "model", 404),
        ({"stream": "true", "response_format": "srt"}, "stream", 400),
        ({"stream": "true", "response_format": "vtt"}, "stream", 400),
        ({"stream": "true", "response_format": "verbose_json"}, "stream", 400),
        ({"stream": "perhaps"}, "stream", 400),
        ({"temperature": "3"}, "temperature", 400),
        ({"temperature": "nan"}, "temperature", 400),
        ({"response_format": "diarized_json"}, "response_format", 400),
        ({"timestamp_granularities[]": "letter"}, "timestamp_granularities[]", 400),
        ({"file": "no file"}, "file", 400),
    ],
)
def test_error_names_the_wrong_field(url, wav, fields, param, status):
    files = {} if "file" in fields else {"file": ("a.wav", wav)}
    refusal(httpx.post(url + TRANSCRIPTIONS, data=fields, files=files), status, param=param)


def test_ignored_fields_of_clients_are_accepted(url, wav):
    fields = {
        "stream": "false",
        "chunking_strategy": "auto",
        "task": "transcribe",
        "temperature": "0.0",
        "hotwords": "",
    }
    assert httpx.post(url + TRANSCRIPTIONS, data=fields, files={"file": wav}).status_code == 200


@pytest.mark.parametrize("language", ["", " ", "auto", "SV", "sv-SE", "Swedish", "swe"])
def test_served_language_is_accepted_in_any_notation(url, wav, language):
    answer = httpx.post(url + TRANSCRIPTIONS, data={"language": language}, files={"file": wav})
    assert answer.status_code == 200, answer.text


def test_query_second_file_and_second_part_are_refused(url, wav):
    for path in (TRANSCRIPTIONS, "/predict"):
        files = [("file", ("a.wav", wav)), ("file", ("b.wav", wav))]
        refusal(httpx.post(url + path, files=files), 400)
        refusal(httpx.post(url + path, files={"file": wav, "other": wav}), 400)
        refusal(httpx.post(f"{url}{path}?language=sv", files={"file": wav}), 400, param="language")


@pytest.mark.parametrize("form", ["--x", "--x\r\nContent-Type: audio/wav"])
def test_file_part_without_a_name_is_read(url, wav, form):
    large = wav + bytes(1_200_000)  # more than Starlette takes for a field
    for path, content in itertools.product((TRANSCRIPTIONS, "/predict"), (wav, large)):
        head = f'{form}\r\nContent-Disposition: form-data; name="file"\r\n\r\n'.encode()
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = httpx.post(url + path, content=head + content + b"\r\n--x--\r\n", headers=kind, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timestamp_granularities[]", ["word", "segment"]),
        ("timestamp_granularities", ["word"]),
        ("timestamp_granularities", ["segment,word"]),
        ("timestamp_granularities[0]", ["word"]),
        ("timestamp_granularities", ['["word"]']),
    ],
)
def test_granularities_with_and_without_brackets_agree(url, wav, name, value):
    fields = {"response_format": "verbose_json", name: value}
    answer = httpx.post(url + TRANSCRIPTIONS, data=fields, files={"file": wav})
    assert answer.json()["words"]
    fields[name] = ["segment"]
    assert "words" not in httpx.post(url + TRANSCRIPTIONS, data=fields, files={"file": wav}).json()


def test_head_and_trailing_slash_are_accepted(url, wav):
    for path in ("/health", "/v1/models", "/v1/models/whisper-1", "/docs", "/openapi.json"):
        whole, head = httpx.get(url + path), httpx.head(f"{url}{path}/")
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    for path in (TRANSCRIPTIONS, "/predict"):
        assert httpx.post(f"{url}{path}/", files={"file": wav}).json()["text"]
        assert httpx.head(url + path).status_code == 405


PREFLIGHT = {"Origin": "https://my.page", "Access-Control-Request-Method": "POST"}


def test_pages_of_allowed_origins_may_call(toy, wav):
    asked = {**PREFLIGHT, "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    with running(toy, access=Access(token=TOKEN, origins=["https://my.page"])) as url:
        answer = httpx.options(url + TRANSCRIPTIONS, headers=asked)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://my.page")
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert httpx.options(url + TRANSCRIPTIONS, headers=asked | {"Origin": "https://other.page"}).status_code == 400
        refused = httpx.post(url + TRANSCRIPTIONS, files={"file": wav}, headers={"Origin": "https://my.page"})
        assert refused.headers["access-control-allow-origin"] == "https://my.page", "a page can read why"
        refusal(refused, 401)
        other = httpx.get(url + "/health", headers={"Origin": "https://other.page"})
        assert "access-control-allow-origin" not in other.headers


def test_no_page_may_read_without_allowed_origins(url):
    assert httpx.options(url + TRANSCRIPTIONS, headers=PREFLIGHT).status_code == 400
    assert "access-control-allow-origin" not in httpx.get(url + "/health", headers=PREFLIGHT).headers


def test_origins_are_all_with_a_token_and_none_without():
    assert [serving._parse_origins([], token) for token in ("", TOKEN)] == [[], ["*"]]
    assert serving._parse_origins(["https://my.page/", "http://127.0.0.1:3000"], "") == [
        "https://my.page", "http://127.0.0.1:3000"
    ]  # fmt: skip
    for wrong in ("my.page", "https://my.page/app", ""):
        with pytest.raises(LabError, match="--allow-origin takes an address"):
            serving._parse_origins([wrong], "")


def test_half_sent_heads_do_not_block_others(toy, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(protocol, "MAX_WAITING", 20)
    with running(toy) as url, contextlib.ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        clients = [stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(60)]
        for client in clients:
            with contextlib.suppress(OSError):  # the first ones are closed already
                client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nX-A: ")
        assert httpx.get(url + "/health", timeout=5).status_code == 200
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""


def test_too_large_head_is_400(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 70_000)
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "invalid_audio"), (b"<html>" * 99, "invalid_audio"), (b"RIFF\xff\xff\xff\xffWAVEfmt ", "invalid_audio")],
)
@pytest.mark.parametrize("path", [TRANSCRIPTIONS, "/predict"])
def test_file_that_is_not_audio_is_refused(url, path, content, code):
    said = refusal(httpx.post(url + path, files={"file": ("a.wav", content)}), 400, code=code, param="file")
    assert "libsndfile" not in said and "ffmpeg" not in said


def test_nan_samples_are_refused(url, encoded):
    sound = encoded(np.full(16_000, np.nan, np.float32), subtype="FLOAT")
    assert "NaN" in refusal(httpx.post(url + "/predict", content=sound), 400, code="invalid_audio")


def test_damage_is_in_the_header_and_in_json(url, encoded, speech):
    content = bytearray(encoded(speech(40 * 16_000), format="FLAC"))
    at = int(0.9 * len(content))
    content[at : at + 20_000] = bytes(20_000)
    for path, form in ((TRANSCRIPTIONS, "json"), (TRANSCRIPTIONS, "verbose_json"), ("/predict", "")):
        data = {"response_format": form} if form else {}
        response = httpx.post(url + path, files={"file": ("a.flac", bytes(content))}, data=data, timeout=60)
        assert response.status_code == 200
        assert re.match(r"it cannot be read (from|after) 3\d\.\d ", response.json()["damage"])
        assert response.json()["text"]
        if form:
            assert response.headers["x-audio-damage"] == response.json()["damage"]
    srt = {"response_format": "srt"}
    response = httpx.post(url + TRANSCRIPTIONS, files={"file": bytes(content)}, data=srt, timeout=60)
    assert "x-audio-damage" in response.headers


def test_cut_recording_without_sound_is_refused(url, encoded, speech):
    content = encoded(speech(16_000), format="MP3")[:120]
    response = httpx.post(url + TRANSCRIPTIONS, files={"file": ("a.mp3", content)})
    assert refusal(response, 400, code="invalid_audio", param="file")


def test_track_that_is_not_there_is_refused(url, wav):
    response = httpx.post(url + TRANSCRIPTIONS, files={"file": ("a.wav", wav)}, data={"track": "2"})
    assert "no audio track 2" in refusal(response, 400, code="invalid_audio", param="track")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "a\0.wav", "/dev/stdin", "å\n.wav", "%2e%2e%2f", "~"])
def test_any_file_name_is_accepted(url, wav, name):
    assert httpx.post(url + TRANSCRIPTIONS, files={"file": (name, wav)}).json()["text"]


def test_endless_file_name_is_refused(url, wav):
    refusal(httpx.post(url + TRANSCRIPTIONS, files={"file": ("x" * 50_000, wav)}), 400)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"--x--", "multipart/form-data"),
        (b"{}", "application/json"),
        (b"", "multipart/form-data; boundary=x"),
    ],
)
def test_invalid_form_is_refused(url, content, kind):
    for path in (TRANSCRIPTIONS, "/predict") if kind.startswith("multipart") else (TRANSCRIPTIONS,):
        refusal(httpx.post(url + path, content=content, headers={"Content-Type": kind}), 400)


def test_unknown_routes_return_openai_errors(url):
    refusal(httpx.get(url + "/nowhere"), 404)
    refused = httpx.get(url + TRANSCRIPTIONS)
    refusal(refused, 405)
    assert refused.headers["allow"] == "POST"


def test_server_error_hides_its_cause_from_the_client(toy, wav, capfd):
    class Broken(Held):
        def transcribe(self, *args, **kwargs):
            raise RuntimeError(f"no such place: {ROOT}/secret.bin")

    with running(Broken(toy)) as url:
        refusal(httpx.post(url + "/predict", content=wav), 500)
        assert httpx.get(url + "/health").json()["waiting"] == 0
    assert "secret.bin" in capfd.readouterr().err  # for the operator


# ---- sizes


def half_megabytes(n: int, given: list[int]):
    for _ in range(n):
        given.append(500_000)
        yield bytes(500_000)


@pytest.mark.parametrize("form", [False, True], ids=["body", "form"])
def test_too_large_chunked_body_is_refused_early(url, form):
    """A chunked body has no length: what counts is what came."""
    given: list[int] = []
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' if form else b""

    def body():
        yield head
        yield from half_megabytes(400, given)

    kind = {"Content-Type": "multipart/form-data; boundary=x" if form else "audio/wav"}
    try:
        told = httpx.post(url + (TRANSCRIPTIONS if form else "/predict"), content=body(), headers=kind)
    except httpx.WriteError:
        pytest.skip("the connection was closed before the answer could be read")
    assert "at most 4 MB" in refusal(told, 413, code="file_too_large")


def test_too_large_content_length_is_refused_at_once(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 4000001\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_long_silence_in_a_small_file_is_too_long(url, encoded):
    """As a header tells it, as it turns out, and as a header that tells a whole day has it."""
    ogg, flac = io.BytesIO(), bytearray(encoded(np.zeros(70 * 8_000, np.float32), 8_000, "FLAC"))
    with soundfile.SoundFile(ogg, "w", 8_000, 1, "VORBIS", format="OGG") as file:
        for _ in range(600):  # the encoder does not bear them at once
            file.write(np.zeros(8_000, np.float32))
    assert ogg.tell() < 50_000
    assert "600.0 s" in refusal(httpx.post(url + "/predict", content=ogg.getvalue()), 413, code="audio_too_long")
    assert refusal(httpx.post(url + "/predict", content=bytes(flac)), 413, code="audio_too_long")
    total = 86_400 * 8_000  # the last 36 bits of the stream's header, after the marker and 13 bytes
    flac[21] = flac[21] & 0xF0 | total >> 32
    flac[22:26] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    assert "70.0 s" in refusal(httpx.post(url + "/predict", content=bytes(flac)), 413, code="audio_too_long")


def test_temporary_folder_stays_empty(toy, wav, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    large = encoded(np.zeros(16_000 * 61, np.float32), subtype="FLOAT")  # goes to the disk, and is too long
    seen: set[str] = set()
    slow = Held(toy)
    with running(slow, LIMITS) as url, ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, url + TRANSCRIPTIONS, files={"file": large}, timeout=60)
        slow.begun.acquire()
        seen.update(os.listdir(tmp_path))
        slow.let_go.set()
        assert asked.result().status_code == 200
    with running(toy) as url:
        for path in (TRANSCRIPTIONS, "/predict"):
            refusal(httpx.post(url + path, files={"file": large}, timeout=60), 413)
        refusal(httpx.post(url + "/predict", content=large + b"junk", timeout=60), 413)
    assert seen | set(os.listdir(tmp_path)) == set()


# ---- one at a time, a few in a queue, nobody for ever


def test_full_queue_refuses_with_retry_after(toy, wav):
    slow = Held(toy)
    with running(slow, dataclasses.replace(LIMITS, queue=2)) as url, ThreadPoolExecutor() as pool:
        asked = [pool.submit(httpx.post, url + "/predict", content=wav, timeout=60) for _ in range(3)]
        until(lambda: httpx.get(url + "/health").json()["waiting"] == 3)
        busy = httpx.post(url + "/predict", content=wav)
        assert "busy" in refusal(busy, 503, code="busy")
        assert 1 <= int(busy.headers["retry-after"]) <= 60
        assert httpx.get(url + "/v1/models").status_code == 200
        slow.let_go.set()
        assert [one.result().json()["text"] for one in asked] == ["hej"] * 3
        assert httpx.get(url + "/health").json()["waiting"] == 0
    assert (slow.most_at_once, slow.abandoned) == (1, 0)


def test_openai_client_retries_when_busy(toy, wav):
    slow = Held(toy)
    with running(slow, dataclasses.replace(LIMITS, queue=0)) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(httpx.post, url + "/predict", content=wav, timeout=60)
        slow.begun.acquire()
        threading.Timer(0.3, slow.let_go.set).start()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5) as client:
            assert client.audio.transcriptions.create(file=("a.wav", wav), model="whisper-1").text == "hej"
        assert first.result().status_code == 200


def test_timeout_is_504_and_stops_decoding(toy, wav):
    slow = Held(toy)
    with running(slow, dataclasses.replace(LIMITS, timeout_s=2)) as url:
        late = httpx.post(url + TRANSCRIPTIONS, files={"file": wav}, timeout=60)
        assert "within 2 s" in refusal(late, 504, code="timeout")
        assert late.headers["x-should-retry"] == "false"
        until(lambda: slow.abandoned == 1)
        slow.let_go.set()
        assert httpx.post(url + "/predict", content=wav).json()["text"] == "hej"


def test_timeout_while_waiting_is_504(toy, wav):
    slow = Held(toy)
    with running(slow, dataclasses.replace(LIMITS, timeout_s=0.5)) as url, ThreadPoolExecutor() as pool:
        asked = [pool.submit(httpx.post, url + "/predict", content=wav, timeout=60) for _ in range(4)]
        assert {one.result().status_code for one in asked} == {504}
        until(lambda: slow.at_once == 0)
        assert httpx.get(url + "/health").json()["waiting"] == 0
    assert slow.most_at_once == 1 <= slow.abandoned


def test_timeout_while_sending_frees_the_slot(toy, wav):
    with running(toy, dataclasses.replace(LIMITS, timeout_s=3, queue=0)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nslow")
            until(lambda: httpx.get(url + "/health").json()["waiting"] == 1)
            assert client.recv(4096).startswith(b"HTTP/1.1 504 ")
        assert httpx.get(url + "/health").json()["waiting"] == 0


def sent_slowly(url: str, drops: int, of_bytes: int, every_s: float) -> bytes:
    """The head of the answer to a request whose body comes drop by drop."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {drops * of_bytes}\r\n\r\n"
        client.sendall(head.encode())
        for _ in range(drops):
            client.sendall(bytes(of_bytes))
            if select.select([client], [], [], every_s)[0]:  # the answer comes before the end
                break
        return client.recv(4096)


def test_very_slow_sender_gets_408_and_frees_the_slot(toy, wav):
    """Long before the time of a request is up: else a few such senders would shut everybody out for as long."""
    with running(toy, dataclasses.replace(LIMITS, sending_s=0.3, queue=0)) as url, ThreadPoolExecutor() as pool:
        answer = pool.submit(sent_slowly, url, 100, 10, 0.05)
        until(lambda: httpx.get(url + "/health").json()["waiting"] == 1)
        head, _, body = answer.result().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ") and b"x-should-retry: false" in head.lower()
        assert json.loads(body)["error"]["code"] == "timeout"
        assert httpx.post(url + "/predict", content=wav).status_code == 200


def test_large_upload_over_a_slow_line_is_accepted(toy):
    with running(toy, dataclasses.replace(LIMITS, sending_s=0.3)) as url:
        assert sent_slowly(url, 20, 4_000, 0.05).startswith(b"HTTP/1.1 400 "), "zeros are no audio, but all came"


def test_disconnect_stops_decoding(toy, wav):
    slow = Held(toy)
    with running(slow, dataclasses.replace(LIMITS, queue=0)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(wav) + wav)
            slow.begun.acquire()
        until(lambda: slow.abandoned == 1)
        until(lambda: httpx.get(url + "/health").json()["waiting"] == 0)


# ---- the token


def test_token_protects_all_but_health_and_docs(toy, wav):
    with running(toy, access=Access(token=TOKEN)) as url:
        for wrong in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": TOKEN.encode()},
            {"Authorization": b"Basic " + TOKEN.encode()},
            {"Authorization": "Bearer"},
        ):
            for path in (TRANSCRIPTIONS, "/predict", "/nowhere"):
                told = httpx.post(url + path, content=wav, headers=wrong)
                refusal(told, 401, code="invalid_api_key")
                assert told.headers["www-authenticate"] == "Bearer"
                assert "hemlig" not in told.text
            refusal(httpx.get(url + "/v1/models", headers=wrong), 401)
        for path in ("/health", "/openapi.json", "/docs"):
            assert httpx.get(url + path).status_code == 200
        right = {"Authorization": b"Bearer " + TOKEN.encode()}
        assert httpx.post(url + "/predict", content=wav, headers=right).json()["duration_s"] == 2.0
        schema = httpx.get(url + "/openapi.json").json()
        guarded = {path for path, methods in schema["paths"].items() for told in methods.values() if "security" in told}
        assert guarded == {TRANSCRIPTIONS, TRANSLATIONS, "/predict", "/v1/models", "/v1/models/{model}"}


def test_missing_token_is_refused_before_the_body(toy):
    with running(toy, access=Access(token=TOKEN)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 401 ")


# ---- what is told of the model, and of the API


def test_predict_accepts_a_body_or_a_form(url, toy, wav):
    heard = toy.transcribe(wav)
    of_body = httpx.post(url + "/predict", content=wav, headers={"Content-Type": "audio/wav"}).json()
    for kind in (
        "application/x-www-form-urlencoded",
        "multipart/mixed",
        "",
        "text/plain; charset=utf-8",
    ):  # curl's is first
        assert httpx.post(url + "/predict", content=wav, headers={"Content-Type": kind}).status_code == 200, kind
    content = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + wav + b"\r\n--x--\r\n"
    odd_case = {"Content-Type": "Multipart/Form-Data; boundary=x"}
    assert httpx.post(url + "/predict", content=content, headers=odd_case).status_code == 200
    of_form = httpx.post(url + "/predict", files={"file": ("a.wav", wav)}).json()
    assert of_body.pop("elapsed_s") > 0 and of_form.pop("elapsed_s") > 0
    assert of_body == of_form == {
        "text": heard.text, "confidence": round(heard.confidence, 4), "duration_s": 2.0
    }  # fmt: skip
    refusal(httpx.post(url + "/predict", files={"other": wav}), 400, param="file")
    refusal(httpx.post(url + "/predict", data={"file": "words"}, files={"a": b""}), 400)


def test_health_has_model_and_scores_but_no_path(url, toy):
    told = httpx.get(url + "/health").json()
    assert told["status"] == "ok"
    assert told["model"] == {
        "name": "toy-whisper",
        "revision": toy.ref.revision,
        "base": "openai/whisper-tiny @ 7ebd0e69e781",
        "engine": "transformers cpu float32",
        "language": "sv",
        "made": "2026-11-20T09:30:00+00:00",
    }
    assert told["scores"] == {name: value for name, value in SCORE.items() if name != "read_from"}
    assert (told["waiting"], told["places"]) == (0, 9)
    assert str(toy.ref.folder.parent) not in json.dumps(told)


def test_docs_page_loads_nothing(url):
    page = httpx.get(url + "/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<script|<link|<img|src=|https?://", page.text)
    for said in (TRANSCRIPTIONS, "/predict", "/health", "response_format", "timestamp_granularities[]", "413"):
        assert said in page.text
    assert httpx.get(url + "/redoc").status_code == 404


@pytest.fixture(scope="module")
def schema(url):
    accepted = [200, 400, 401, 404, 408, 413, 503]  # no schema can say of a binary string that it is to be speech
    checks = {"positive_data_acceptance": {"expected-statuses": [str(status) for status in accepted]}}
    config = schemathesis.Config.from_dict({"checks": checks})
    return schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)


OF_ANSWERS = [
    "not_a_server_error",
    *(f"{what}_conformance" for what in ("status_code", "content_type", "response_schema")),
]


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *itertools.product(["POST"], [TRANSCRIPTIONS, "/predict"], ["positive", "negative"]),
        ("POST", TRANSLATIONS, "positive"),
        *itertools.product(["GET"], ["/v1/models", "/v1/models/{model}", "/health"], ["positive"]),
    ],
)
def test_responses_conform_to_the_schema(schema, wav, method, path, mode):
    """Statuses, types and shapes of all answers: to what fits the schema, to what does not, and to speech."""
    cases = schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    for_answers = schemathesis.checks.CHECKS.get_by_names(OF_ANSWERS)
    quiet = list(hypothesis.HealthCheck)

    @hypothesis.settings(max_examples=12, deadline=None, database=None, suppress_health_check=quiet)
    @hypothesis.seed(7)
    @hypothesis.given(case=cases, speech=strategies.booleans())
    def hold(case, speech):
        if speech and mode == "positive" and method == "POST":
            # the schema knows strings of bytes, not speech
            case.body = {**case.body, "file": wav} if isinstance(case.body, dict) else wav
            case.call_and_validate(timeout=60, checks=for_answers)
        else:
            case.call_and_validate(timeout=60)

    hold()


def test_schema_lists_every_route(schema):
    told = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    facts = {"/v1/models", "/v1/models/{model}", "/health"}
    assert told == {
        ("POST", TRANSCRIPTIONS),
        ("POST", TRANSLATIONS),
        ("POST", "/predict"),
        *itertools.product(["GET"], facts),
    }
    assert not re.search("422|ValidationError", json.dumps(schema.raw_schema)), "errors are 400, in OpenAI's shape"


# ---- the command


BLOCKED = """
import importlib.machinery, importlib.metadata, re, runpy, sys

def closure(names):
    known, todo = set(), [*names]
    while todo:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\\w.-]+", todo.pop())[0]).lower()
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in known:
            known.add(name)
            todo += [one for one in wanted if "extra ==" not in one]
    return known

allowed = closure(sys.argv[1].split(",")) | {"silero-vad"}  # without what it asks for
owners = importlib.metadata.packages_distributions()
norm = lambda name: re.sub(r"[-_.]+", "-", name).lower()

class Allowed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in owners and not {norm(one) for one in owners[name]} & allowed:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Allowed
sys.argv = ["pipelines", *sys.argv[2:]]
runpy.run_module("pipelines", run_name="__main__", alter_sys=True)
"""
"""Runs a command as if only some requirements, and what they require, were installed."""


def requirements(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


@pytest.mark.slow
def test_command_serves_an_export_and_stops_cleanly(toy_model, wav, tmp_path):
    pytest.importorskip("ctranslate2")
    served = export.convert(whisper_model.resolve(str(toy_model)), "ctranslate2-int8", to=tmp_path / "served")
    names = ",".join(
        re.match(r"[\w.-]+", line)[0] for line in requirements(ROOT / "pipelines/inference/api/requirements.txt")
    )
    options = ["serve", "--model", str(served), "--port", "0", "--max-duration-s", "60", "--json"]
    environment = {**os.environ, "LAB_API_TOKEN": TOKEN, "TMPDIR": str(tmp_path), "LAB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BLOCKED, names, *options]
    with (tmp_path / "err").open("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline()
            assert line, (tmp_path / "err").read_text()
            told = json.loads(line)
            assert told.keys() == {"url", "model", "engine", "token"} and told["token"] is True
            assert told["engine"].startswith("ctranslate2")
            headers = {"Authorization": b"Bearer " + TOKEN.encode()}
            heard = httpx.post(told["url"] + "/predict", content=wav, headers=headers, timeout=60)
            assert heard.json()["duration_s"] == 2.0, heard.text
            process.send_signal(signal.SIGTERM)
            rest, _ = process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = line + rest + errors.read()
    assert "hemlig" not in said and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} <= {"err", "cache", "served"}


@pytest.mark.slow
def test_model_that_needs_torch_is_refused_without_it(toy_model, tmp_path):
    names = ",".join(requirements(ROOT / "pipelines/inference/api/requirements.txt"))
    command = [sys.executable, "-c", BLOCKED, names, "serve", "--model", str(toy_model), "--port", "0"]
    environment = {**os.environ, "LAB_CACHE": str(tmp_path)}
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 1
    assert "making an export" in told.stderr and "needs the package torch" in told.stderr
    assert "Traceback" not in told.stderr


def test_taken_port_is_one_line():
    with api_server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LabError, match=f"cannot listen on 127.0.0.1 port {port}: .*Give another --host or --port"):
            api_server.listen("127.0.0.1", port)
    with pytest.raises(LabError, match="cannot listen on nowhere.invalid"):
        api_server.listen("nowhere.invalid", 80)


def test_address_of_all_interfaces_is_loopback():
    with api_server.listen("0.0.0.0", 0) as everywhere:
        assert api_server.address(everywhere) == f"http://127.0.0.1:{everywhere.getsockname()[1]}"
    if socket.has_ipv6:
        with contextlib.suppress(LabError), api_server.listen("::1", 0) as six:
            assert api_server.address(six) == f"http://[::1]:{six.getsockname()[1]}"


def test_dry_run_serves_nothing_and_hides_the_token(monkeypatch, capsys, toy_model):
    from pipelines import __main__ as cli

    monkeypatch.setenv("LAB_API_TOKEN", TOKEN)
    monkeypatch.setattr(api_server, "listen", lambda *args: pytest.fail("listened"))
    monkeypatch.setattr(sys, "argv", ["pipelines", "serve", "--model", str(toy_model), "--dry-run"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    told = capsys.readouterr()
    assert not done.value.code
    assert told.out.splitlines()[-1] == "nothing was done" and "with a token" in told.out
    assert "hemlig" not in told.out + told.err


def test_command_line_limits_reach_the_server(toy_model, monkeypatch):
    from pipelines import __main__ as cli

    seen = []
    monkeypatch.setattr(api, "make_app", lambda transcriber, *given: seen.append(given))
    monkeypatch.setattr(api_server, "serve", lambda app, listening, proxies: listening.close() or seen.append(proxies))
    told = {"--max-mb": "3", "--max-duration-s": "44", "--timeout-s": "55", "--queue": "66", "--live-sessions": "2"}
    told |= {"--requests-per-minute": "5", "--root-path": "tal/", "--alias": "min-modell"}
    monkeypatch.setenv("LAB_TRUSTED_PROXIES", "10.0.0.0/8 ::1")
    options = [word for pair in told.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["pipelines", "serve", "--model", str(toy_model), "--port", "0", *options])
    with contextlib.suppress(SystemExit):
        cli.main()
    (limits, access, aliases), proxies = seen
    assert limits == Limits(max_mb=3.0, max_duration_s=44.0, timeout_s=55.0, queue=66, live_sessions=2)
    assert (access.requests_per_minute, access.audio_s_per_minute, access.root_path) == (5.0, 0.0, "/tal")
    assert (aliases, proxies) == (("min-modell",), ["10.0.0.0/8", "::1"])
