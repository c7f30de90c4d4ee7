"""The proxy of docs/nginx.md, run by nginx before the app and the API."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from servers.loopback import free_port
from servers.stores import self_signed

ROOT = Path(__file__).resolve().parents[3]
HOST, TOKEN = "speech.example.org", "a-token"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]


@contextlib.contextmanager
def process(words: list[str], ready: str, **variables: str):
    """Run a program until the end of the block; yield the first group of `ready` in a line of its output."""
    running = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    try:
        found = next((match for line in running.stdout if (match := re.search(ready, line))), None)
        assert found, f"{words[:3]} did not start"
        yield found[1]
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(60)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory, toy_model):
    """The port of nginx with the configuration of the page; only ports, paths and the times of heads are replaced."""
    folder = tmp_path_factory.mktemp("nginx")
    certificate, key = self_signed(folder)
    port = free_port()
    app = [sys.executable, "app.py", "--model", str(toy_model), "--engine", "transformers"]
    app += ["--port", str(free_port()), "--log", str(folder / "log.csv"), "--trusted-proxy", "127.0.0.1"]
    serve = [sys.executable, "-m", "pipelines", "serve", "--port", "0", "--json", "--model", str(toy_model)]
    serve += ["--engine", "transformers", "--trusted-proxy", "127.0.0.1"]
    with (
        process(app, r"^page: http://127\.0\.0\.1:(\d+)", GRADIO_ROOT_PATH="/lab", TMPDIR=str(folder)) as app_port,
        process(serve, r'"url": "http://127\.0\.0\.1:(\d+)"', LAB_API_TOKEN=TOKEN) as api_port,
    ):
        (site,) = re.findall(r"```nginx\n(.+?)```", (ROOT / "docs/nginx.md").read_text("utf-8"), re.DOTALL)
        for documented, here in {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "/etc/ssl/speech.example.org.pem": certificate,
            "/etc/ssl/speech.example.org.key": key,
            "127.0.0.1:7860": f"127.0.0.1:{app_port}",
            "127.0.0.1:8000": f"127.0.0.1:{api_port}",
            "client_header_timeout 10s": "client_header_timeout 1s",
        }.items():
            assert documented in site
            site = site.replace(documented, here)
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers may not write to the folder
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"{user}daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{temporary}{site}}}\n",
            "utf-8",
        )
        running = subprocess.Popen(["nginx", "-p", folder, "-c", configuration])
        try:
            wait_until_listening(port)
            yield port
        finally:
            running.terminate()
            running.wait(30)


def wait_until_listening(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    pytest.fail("nginx does not listen")


def request(port: int, method: str, path: str, body=None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, head and body of a request over HTTPS, without checking the certificate."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=120, context=ssl._create_unverified_context())
    try:
        connection.request(method, path, body, {"Host": f"{HOST}:{port}", **headers})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def form(content: bytes, **fields: str) -> tuple[bytes, str]:
    """Return the body and the type of a form with a file."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    name = "file" if fields else "files"
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    return "".join([*parts, head]).encode() + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def test_page_names_its_own_address_and_its_files_exist(proxy):
    status, _, page = request(proxy, "GET", "/lab/")
    assert status == 200
    address = f"https://{HOST}:{proxy}/lab"
    config = json.loads(request(proxy, "GET", "/lab/config")[2])
    assert config["root"] == address
    scripts = re.findall(r'(?:src|href)="(?:\./)?(assets/[^"]+\.(?:js|css))"', page.decode())
    scripts += re.findall(rf'(?:src|href)="{address}/(assets/[^"]+\.(?:js|css))"', page.decode())
    assert scripts
    assert {request(proxy, "GET", f"/lab/{script}")[0] for script in scripts} == {200}
    status, head, _ = request(proxy, "GET", "/lab")
    assert (status, head["Location"]) == (301, f"{address}/")
    assert request(proxy, "GET", "/gradio_api/info")[0] == 404, "outside the prefix"


def test_upload_is_transcribed_through_the_proxy(proxy, encoded, speech):
    body, kind = form(encoded(speech(32_000)))
    status, _, answer = request(proxy, "POST", "/lab/gradio_api/upload", body, **{"Content-Type": kind})
    assert status == 200
    call = json.dumps({"data": [{"path": json.loads(answer)[0], "meta": {"_type": "gradio.FileData"}}]})
    path = "/lab/gradio_api/call/transcribe"
    status, _, answer = request(proxy, "POST", path, call, **{"Content-Type": "application/json"})
    assert status == 200, answer
    status, _, events = request(proxy, "GET", f"{path}/{json.loads(answer)['event_id']}")
    assert status == 200 and b"event: complete" in events, events


def test_live_microphone_speaks_through_the_proxy(proxy, speech):
    samples = (np.asarray(speech(16_000)) * 32_767).astype("<i2").tobytes()
    chunk = {"talk": "a" * 20, "start": 0, "rate": 16_000, "samples": base64.b64encode(samples).decode(), "last": True}
    headers = {"Content-Type": "application/json", "Origin": f"https://{HOST}:{proxy}", "Sec-Fetch-Site": "same-origin"}
    status, _, answer = request(proxy, "POST", "/lab/live", json.dumps(chunk), **headers)
    assert (status, json.loads(answer)["taken"]) == (200, 16_000), answer
    assert (
        request(proxy, "POST", "/lab/live", json.dumps(chunk), **{**headers, "Sec-Fetch-Site": "cross-site"})[0] == 403
    )


def test_api_needs_its_key_and_answers(proxy, encoded, speech):
    body, kind = form(encoded(speech(32_000)), model="whisper-1")
    path = "/v1/audio/transcriptions"
    assert request(proxy, "POST", path, body, **{"Content-Type": kind})[0] == 401
    status, _, answer = request(proxy, "POST", path, body, **{"Content-Type": kind, "Authorization": f"Bearer {TOKEN}"})
    assert status == 200 and "text" in json.loads(answer)
    assert request(proxy, "GET", "/predict")[0] == 404


def test_websocket_of_the_api_is_opened_through_the_proxy(proxy):
    with ssl._create_unverified_context().wrap_socket(socket.create_connection(("127.0.0.1", proxy), 60)) as visitor:
        visitor.sendall(
            f"GET /v1/realtime?intent=transcription HTTP/1.1\r\nHost: {HOST}:{proxy}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nAuthorization: Bearer {TOKEN}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n\r\n".encode()
        )
        assert visitor.recv(100).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize(("path", "megabytes"), [("/lab/gradio_api/upload", 28), ("/v1/audio/transcriptions", 106)])
def test_too_large_body_is_refused_before_it_is_sent(proxy, path, megabytes):
    with ssl._create_unverified_context().wrap_socket(socket.create_connection(("127.0.0.1", proxy), 30)) as sender:
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {megabytes << 20}\r\n\r\n"
        sender.sendall(head.encode() + bytes(1_000))
        assert sender.recv(100).startswith(b"HTTP/1.1 413 ")


def test_slow_and_large_heads_are_refused(proxy):
    context = ssl._create_unverified_context()
    started = time.monotonic()
    with context.wrap_socket(socket.create_connection(("127.0.0.1", proxy), 30)) as slow:
        slow.sendall(b"GET /lab/ HTTP/1.1\r\nHost: ")
        assert slow.recv(100)[9:12] in (b"", b"408"), "closed, or 408"
    assert time.monotonic() - started < 20
    assert request(proxy, "GET", "/lab/", **{"X-Long": "a" * 60_000})[0] in (400, 431)
    assert request(proxy, "GET", "/lab/")[0] == 200


def test_connections_of_one_address_are_limited(proxy):
    context = ssl._create_unverified_context()
    with contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(24):
            one = stack.enter_context(context.wrap_socket(socket.create_connection(("127.0.0.1", proxy), 30)))
            one.sendall(f"POST /lab/live HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 99999\r\n\r\n".encode())
            one.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                statuses.append(one.recv(100)[9:12])
        assert statuses.count(b"503") >= 4 and request(proxy, "GET", "/lab/")[0] == 503
    time.sleep(0.5)
    assert request(proxy, "GET", "/lab/")[0] == 200
