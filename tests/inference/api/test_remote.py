"""A recording by its address in the API: off by default, public addresses only, one line without secrets."""

from __future__ import annotations

import dataclasses

import httpx
import pytest
from servers.loopback import Answer
from servers.recordings import Recordings, treated_as_public

from pipelines.infra.downloads import download
from tests.inference.api.running_server import LIMITS, running

pytestmark = pytest.mark.usefixtures("one_thread")
TRANSCRIPTIONS = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def recordings(wav):
    server = Recordings()
    server.files["/a.wav"] = wav
    server.redirect("/private", f"http://127.0.0.2:{server.port}/a.wav?token=hemligt")
    server.files["/page"] = lambda request: (_ for _ in ()).throw(Answer(200, b"<html>"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def address(toy, recordings):
    """A server that fetches addresses, also from the port of `recordings`."""
    downloads = download.Limits(max_mb=0.2, timeout_s=0.5, more_ports=(recordings.port,))
    with running(toy, dataclasses.replace(LIMITS, downloads=downloads)) as address:
        yield address


def send(address: str, url: str, **fields) -> httpx.Response:
    parts = {name: (None, value) for name, value in {"url": url, **fields}.items()}
    return httpx.post(address + TRANSCRIPTIONS, files=parts, timeout=60)


def test_address_gives_the_transcript_of_its_recording(address, recordings, toy, wav, monkeypatch):
    expected = toy.transcribe(wav).text
    with treated_as_public(monkeypatch):
        assert send(address, recordings.url("/a.wav")).json()["text"] == expected
        streamed = send(address, recordings.url("/a.wav"), stream="true")
    assert streamed.headers["content-type"].startswith("text/event-stream") and "transcript.text.done" in streamed.text


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/none?key=hemligt", 400, "no such file"),
        ("/private", 400, "public internet"),
        ("/page", 400, "a web page"),
        ("/slow-head", 400, "within 0.5 s"),
        ("/endless", 413, "at most 0.2 MB"),
    ],
)
def test_failed_download_is_one_line(address, recordings, monkeypatch, path: str, status: int, words: str):
    with treated_as_public(monkeypatch):
        response = send(address, recordings.url(path))
    error = response.json()["error"]
    assert (response.status_code, error["param"], words in error["message"]) == (status, "url", True), error
    assert "hemligt" not in response.text and "\n" not in error["message"]


def test_private_address_is_refused_before_a_connection(address, recordings):
    before = len(recordings.requests)
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433"):
        assert send(address, recordings.url("/a.wav", host)).status_code == 400
    assert len(recordings.requests) == before


def test_addresses_are_off_by_default(toy, recordings, wav):
    with running(toy) as plain:
        response = send(plain, recordings.url("/a.wav"))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "url")
        assert "fetches no addresses" in response.json()["error"]["message"]
        missing = httpx.post(plain + TRANSCRIPTIONS, files={"model": (None, "whisper-1")})
        assert missing.json()["error"]["message"] == "file: Field required"
        both = httpx.post(plain + TRANSCRIPTIONS, files={"file": ("a.wav", wav), "url": (None, "https://a.test/b")})
        assert "one of them" in both.json()["error"]["message"]
        assert httpx.post(plain + TRANSCRIPTIONS, data={"url": "https://a.test/b"}).status_code == 400
