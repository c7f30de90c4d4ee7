"""The middleware before Gradio, by HTTP and alone."""

import contextlib
import json
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from servers.loopback import free_port

from pipelines.inference.app import launch, middleware, routes, uploads
from pipelines.inference.app import service as app_service
from pipelines.inference.app.i18n import ENGLISH, SWEDISH
from pipelines.inference.app.launch import build
from pipelines.inference.http import protocol
from pipelines.inference.http.rate_limits import RateLimiter
from pipelines.speech.audio import AudioError
from tests.inference.app.app_fakes import (
    SESSION_ID,
    FakeTranscriber,
    create_chunk,
)

gr = pytest.importorskip("gradio")
REFUSALS = ENGLISH["refused"]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The served page around a fake transcriber; `page.uploads` is its folder of uploads."""
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    demo = build(FakeTranscriber(tmp_path / "x"), tmp_path / "log.csv")
    address = launch.launch(demo, port=free_port())
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        yield SimpleNamespace(demo=demo, client=client, uploads=tmp_path / "uploads", address=address)
    demo.close(verbose=False)


JSON = {"content-type": "application/json"}


def upload(page, content, name="spoken.wav", **headers):
    return page.client.post("/gradio_api/upload", files={"files": (name, content)}, headers=headers)


def uploaded_files(page):
    return [path for path in page.uploads.rglob("*") if path.is_file()]


def call_transcribe(page, path):
    """Return the response of the public endpoint for a file at `path`."""
    call = "/gradio_api/call/transcribe"
    response = page.client.post(call, json={"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]})
    return page.client.get(f"{call}/{response.json()['event_id']}").text if response.status_code == 200 else response


def test_address_above_its_limit_gets_429_in_its_language(page, spoken, speech, all_is_speech):
    content, swedish = Path(spoken).read_bytes(), {"accept-language": "sv"}
    page.demo.rate_limiter.requests_per_minute = 1
    (path,) = upload(page, content).json()
    assert "Hej p" in call_transcribe(page, path)
    spoofed = {"x-forwarded-for": "1.2.3.4", **swedish}
    responses = [upload(page, content, **spoofed), page.client.post("/live", json=create_chunk(speech(8_000)))]
    responses.append(page.client.post("/gradio_api/call/transcribe", json={"data": []}))
    for response in responses:
        assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 60
    assert responses[0].text.startswith("Din adress har skickat mycket")
    assert responses[1].json()["reason"] == "too_many" and "Your address" in responses[1].json()["detail"]


def test_live_audio_is_charged_to_the_address(page, speech, all_is_speech):
    page.demo.rate_limiter.requests_per_minute, page.demo.rate_limiter.audio_s_per_minute = 0, 0.4
    chunks = [create_chunk(speech(8_000)), create_chunk(speech(8_000), start=8_000)]
    assert [page.client.post("/live", json=chunk).status_code for chunk in chunks] == [200, 429]


def test_identical_uploads_are_separate_files(page, spoken):
    content = Path(spoken).read_bytes()
    (one,), (other,) = (upload(page, content).json() for _ in range(2))
    assert one != other
    assert Path(one).name == Path(other).name == "spoken.wav"
    assert page.demo.upload_file_set >= {one, other}, "Gradio deletes them after half an hour"
    responses = []
    both = [
        threading.Thread(target=lambda path=path: responses.append(call_transcribe(page, path)))
        for path in (one, other)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(30)
    assert [("event: complete" in response, "Hej p" in response) for response in responses] == [(True, True)] * 2, (
        responses
    )
    assert uploaded_files(page) == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/a.wav", "https://127.0.0.1:{port}/a.wav"])
def test_url_instead_of_a_file_is_never_fetched(page, monkeypatch, address):
    from gradio import processing_utils

    fetched = []

    async def fetch(url, cache_dir):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        path = address.format(port=listening.getsockname()[1])
        response = call_transcribe(page, path)
        assert response.status_code == 400
        assert response.json()["detail"] == REFUSALS["address"]
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        for n, fn in page.demo.fns.items():  # those that only the page calls, too
            body = {"fn_index": n, "data": data * len(fn.inputs), "session_hash": "x", "trigger_id": None}
            for route in ("queue/join", "run/predict"):
                if fn.inputs:
                    answer = page.client.post(f"/gradio_api/{route}", json=body, headers={"accept-language": "sv"})
                    assert (answer.status_code, answer.json()["error"]) == (400, SWEDISH["refused"]["address"])
        with pytest.raises(TimeoutError):
            listening.accept()
    assert fetched == []


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ('[{"a": [{"path": "http://x/a.wav"}]}]', True),
        ('{"p\\u0061th": "\\u0068ttp://x/a.wav"}', True),
        ('{"path": " HTTPS://x"}', True),
        ('{"path": "/tmp/http/a.wav"}', False),
        ('{"other": "http://x"}', False),
        ('{"path": 3}', False),
        ("http://", False),
        ("[" * 100_000, False),
    ],
)
def test_contains_url_in_any_notation(body, names):
    assert middleware.contains_url(body.encode()) is names


def test_too_large_upload_is_refused_while_it_arrives(page, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_UPLOAD_REQUEST_BYTES", 300_000)
    assert upload(page, b"a" * 200_000).status_code == 200
    response = upload(page, b"a" * 400_000)
    assert (response.status_code, response.text) == (413, REFUSALS["too_large"])
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=x", "accept-language": "sv"}
    parts = (part for part in (head, *[b"a" * 100_000] * 5))
    response = page.client.post("/gradio_api/upload", content=parts, headers=kind)  # in chunks: no length is response
    assert (response.status_code, response.text) == (413, SWEDISH["refused"]["too_large"])
    response = page.client.post("/gradio_api/queue/join", content=b"[" + b" " * 400_000 + b"]")
    assert (response.status_code, response.json()["detail"]) == (413, REFUSALS["too_large"])


def test_total_size_of_uploads_is_limited(page, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_UPLOADS_BYTES", 2_500_000)
    response = [upload(page, b"few").status_code for _ in range(4)]
    assert response == [200, 200, 200, 503], "a small file counts as a megabyte"
    assert upload(page, b"few", **{"accept-language": "sv"}).text == SWEDISH["refused"]["busy"]
    (page.uploads / "tmpbrokenoff").write_bytes(b"few")
    (page.uploads / "another").mkdir()
    (page.uploads / "another" / "page.wav").write_bytes(b"few")
    assert uploads.delete_old_uploads(page.uploads, 60) == 4_000_000
    assert uploads.delete_old_uploads(page.uploads, -60) == 0
    assert [path.name for path in uploaded_files(page)] == ["page.wav"], "uploads of other pages remain"
    assert upload(page, b"few").status_code == 200


def test_live_route_returns_text_and_errors_as_json(page, speech, monkeypatch):
    samples = speech(16_000)
    response = page.client.post("/live", json=create_chunk(samples)).json()
    assert (response["taken"], response["ended"]) == (16_000, False)
    assert response["told"].startswith('<p lang="sv">')
    response = page.client.post("/live", json=create_chunk([], 16_000, last=True)).json()
    assert response["ended"]
    assert page.demo.live_sessions.collect(SESSION_ID).audio_s == pytest.approx(1.0, abs=0.01)
    for language in ([], {}, 3, None, "xx", "x" * 9_000):
        response = page.client.post("/live", json=create_chunk([]) | {"language": language})
        assert response.status_code == 200, "a wrong language of the page is as good as none"
    for nonsense in (b"", b"[" * 100_000, b"{}", b"7", b"\xff"):
        response = page.client.post("/live", content=nonsense, headers={**JSON, "accept-language": "sv"})
        assert (response.status_code, response.json()["detail"]) == (400, SWEDISH["refused"]["unreadable"])
    monkeypatch.setattr(app_service, "MAX_WAIT_S", 0.01)
    with page.demo.live_sessions.service.turn():
        response = page.client.post("/live", json={**create_chunk(samples), "language": "sv"})
    assert (response.status_code, response.json()["reason"]) == (503, "busy")
    assert response.json()["detail"] == SWEDISH["refused"]["busy"]
    monkeypatch.setattr(page.demo.live_sessions, "receive", lambda chunk, is_disconnected: 1 / 0)
    response = page.client.post("/live", json=create_chunk(samples))
    assert (response.status_code, response.json()["detail"]) == (500, ENGLISH["failed"])


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/live", {"content-type": "application/json; charset=utf-8", "sec-fetch-site": "same-origin"}, 200),
        ("/live", {**JSON, "sec-fetch-site": "cross-site"}, 403),
        ("/live", {"content-type": "text/plain"}, 415),  # which a browser sends for any page, and does not ask first
        ("/live", {}, 415),
        ("/elsewhere/live", JSON, 404),
        ("/gradio_api/live", JSON, 404),
    ],
)
def test_live_route_accepts_json_of_the_same_site_only(page, speech, path, headers, status):
    content = json.dumps(create_chunk(speech(8_000))).encode()
    assert page.client.post(path, content=content, headers=headers).status_code == status
    assert (SESSION_ID in page.demo.live_sessions._sessions) == (status == 200)


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/live", "", "/live"),
        ("/live/", "/", "/live"),
        ("/app/live", "/app", "/live"),
        ("/live", "/app/", "/live"),
        ("/live", "https://x.example/app", "/live"),
        ("/other/live", "/app", "/other/live"),
    ],
)
def test_path_with_and_without_the_proxys_root_path(path, root, expected):
    assert middleware._path({"path": path, "root_path": root}) == expected


UPLOADS = Path("/tmp/uploads")


@pytest.mark.parametrize(
    ("method", "path", "is_used"),
    [
        ("GET", "", True),
        ("HEAD", "", True),
        ("GET", "/assets/index-1a.js", True),
        ("GET", "/gradio_api/queue/data", True),
        ("GET", "/gradio_api/heartbeat/1a2b", True),
        ("GET", "/gradio_api/app_id", True),
        ("GET", "/gradio_api/file=/tmp/uploads/1a/spoken.wav", True),
        ("POST", "/gradio_api/upload", True),
        ("POST", "/gradio_api/call/transcribe", True),
        ("POST", "/live", True),
        ("GET", "/live", False),
        ("PUT", "/gradio_api/upload", False),
        ("OPTIONS", "/gradio_api/queue/join", False),
        ("GET", "/gradio_api/file=http://127.0.0.1/a.wav", False),
        ("GET", "/gradio_api/file= https://example.org/a.wav", False),
        ("GET", "/gradio_api/file=/tmp/uploads/../secret", False),
        ("GET", "/gradio_api/file=/etc/passwd", False),
        ("GET", "/gradio_api/file/tmp/uploads/a.wav", False),
        ("GET", "/gradio_api/proxy=https://x.hf.space/a", False),
        ("POST", "/gradio_api/process_recording", False),
        ("POST", "/other/upload", False),
        ("POST", "/gradio_api/run/transcribe", False),
        ("POST", "/gradio_api/api/transcribe", False),
        ("POST", "/gradio_api/component_server", False),
        ("POST", "/gradio_api/stream/1a", False),
        ("POST", "/gradio_api/cancel", False),
        ("POST", "/gradio_api/vibe-edit", False),
        ("POST", "/gradio_api/upload\n", False),
        ("GET", "/monitoring", False),
        ("GET", "/gradio_api/deep_link", False),
    ],
)
def test_only_routes_of_the_page_are_used(method, path, is_used):
    assert routes.is_used(method, path, UPLOADS) is is_used


def test_unused_routes_are_404_and_store_nothing(page, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    large = {"file": ("a.webm", b"a" * 2_000_000)}
    for route in ("process_recording", "component_server", "stream/1", "run/x", "reset"):
        assert page.client.post(f"/gradio_api/{route}", files=large).status_code == 404
    for route in ("queue/join", "run/predict", "call/transcribe"):  # used, but not for files
        assert page.client.post(f"/gradio_api/{route}", files=large).status_code == 413
    for route in ("file=http://127.0.0.1:1/a", "file=https://example.org", "proxy=https://a.hf.space/b", "monitoring"):
        assert page.client.get(f"/gradio_api/{route}").status_code == 404
    assert page.client.request("TRACE", "/").status_code == 404
    assert uploaded_files(page) == list((tmp_path / "elsewhere").iterdir()) == []
    assert page.client.get("/").status_code == page.client.head("/").status_code == 200


def test_uploads_that_are_arriving_count_as_full(page, spoken, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_UPLOADS_BYTES", middleware.MAX_UPLOAD_BYTES - 1)
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 2.0)
    host, port = page.address.split("//")[1].strip("/").split(":")
    with socket.create_connection((host, int(port))) as client:
        kind = "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000"
        client.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\n{kind}\r\n\r\n--x".encode())
        time.sleep(0.3)
        assert upload(page, b"few").status_code == 503
        client.settimeout(20)
        assert client.recv(100).startswith(b"HTTP/1.1 408 "), "a slow one does not keep its place"
    assert upload(page, b"few").status_code == 200


def test_half_sent_heads_do_not_block_the_page(page, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_WAITING", 5)
    host, port = page.address.split("//")[1].strip("/").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            client = stack.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(OSError):  # closed already
                client.sendall(b"POST /live HTTP/1.1\r\nHost: x\r\nX-A: ")
        assert page.client.get("/config").status_code == 200
        first = stack.enter_context(socket.create_connection((host, int(port))))
        first.sendall(b"GET /config HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 70_000)
        first.settimeout(20)
        assert first.recv(100).startswith(b"HTTP/1.1 400 ")


def create_form(count, content=b"few"):
    """Return `count` files of one form."""
    return [("files", (f"{n}.wav", content)) for n in range(count)]


def test_second_file_of_a_request_is_refused(page):
    for count in (2, 1_000, 1_001):  # Gradio itself refuses more than a thousand, but leaves them in its folder
        response = page.client.post(
            "/gradio_api/upload", files=create_form(count, b""), headers={"accept-language": "sv"}
        )
        assert (response.status_code, response.text) == (400, SWEDISH["refused"]["unreadable"])
    whole = page.client.build_request("POST", "/gradio_api/upload", files=create_form(100))
    content, kind = whole.read(), {"content-type": whole.headers["content-type"]}
    for size in (7, 1_000, len(content)):
        parts = (content[at : at + size] for at in range(0, len(content), size))
        assert page.client.post("/gradio_api/upload", content=parts, headers=kind).status_code == 400
    assert len(uploaded_files(page)) <= 6 * 2, "those that arrived before the second part"
    assert upload(page, b"--" * 1_000 + b"\r\n--").status_code == 200


def test_other_requests_have_smaller_limits(page, speech, monkeypatch):
    nested = b"[" + b"[]," * 100_000 + b"[]]"
    response = page.client.post("/gradio_api/queue/join", content=nested, headers=JSON)
    assert (response.status_code, response.json()["detail"]) == (413, REFUSALS["too_large"])
    longest = create_chunk(np.zeros(480_000), rate_hz=48_000)
    assert page.client.post("/live", json=longest).json()["taken"] == 480_000, "the largest chunk of the page"
    response = page.client.post("/live", json=longest | {"more": "a" * middleware.MAX_CHUNK_BYTES})
    assert (response.status_code, response.json()["reason"]) == (413, "too_large")
    assert middleware._parse_flat_json(nested) is middleware._parse_flat_json(b"[" * 4_000) is None
    brackets = create_chunk(np.zeros(8_000), session_id="b" * 20) | {"options": ["[" * 2_000, "{" * 2_000, 0]}
    assert page.client.post("/live", json=brackets).json()["taken"] == 8_000
    assert middleware._parse_flat_json(json.dumps(longest).encode()) == longest
    call = {"data": [{"path": "http://x/a.wav"}, "a" * 2 * middleware._MAX_INLINE_BYTES]}  # looked through by a thread
    response = page.client.post("/gradio_api/queue/join", json=call)
    assert (response.status_code, response.json()["detail"]) == (400, REFUSALS["address"])


def call_middleware(messages, talks, headers=JSON, path="/live"):
    """Return status and body of the middleware's response to these ASGI messages, after which nothing arrives."""
    import anyio

    out, rest = [], iter(messages)

    async def receive():
        for message in rest:
            return message
        await anyio.sleep_forever()

    async def send(message):
        out.append(message)

    async def call():
        guard = middleware.AppMiddleware(None, talks, RateLimiter(0, 0), Path("nowhere"), 60.0)
        response = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": response, "query_string": b""}
        with anyio.fail_after(30):
            await guard(scope, receive, send)

    anyio.run(call)
    return out[0]["status"], json.loads(out[1]["body"])


def test_incomplete_request_times_out(monkeypatch):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.05)
    incomplete = [{"type": "http.request", "body": b"{", "more_body": True}]
    for path in ("/live", "/gradio_api/queue/join"):
        status, response = call_middleware(incomplete, object(), path=path)
        assert (status, response["reason"]) == (408, "busy")


def test_page_without_live_sessions_has_no_live_route():
    assert call_middleware([], None, path="/live") == (404, {"detail": "Not Found"})


def test_chunk_is_not_read_if_too_many_wait(monkeypatch):
    monkeypatch.setattr(middleware, "MAX_WAITING_CHUNKS", 0)
    status, response = call_middleware([], object())
    assert (status, response["reason"]) == (503, "busy")


def test_disconnect_cancels_a_waiting_chunk(speech):
    class Patient:
        def receive(self, chunk, is_disconnected):
            until = time.monotonic() + 10
            while not is_disconnected():
                assert time.monotonic() < until
                time.sleep(0.01)
            raise AudioError("busy", "disconnected")

    body = json.dumps(create_chunk(speech(8_000))).encode()
    status, response = call_middleware([{"type": "http.request", "body": body}, {"type": "http.disconnect"}], Patient())
    assert (status, response["reason"]) == (503, "busy")
