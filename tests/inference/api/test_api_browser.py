"""The API from a page: Debian's Chromium, its WebSocket and its fetch, on a toy model."""

from __future__ import annotations

import base64
import http.server
import threading

import pytest

from pipelines.inference.api.middleware import Access
from tests.inference.api.running_server import running
from tests.inference.api.test_realtime import TRANSCRIPTION, pcm
from tests.inference.app.test_app_browser import FLAGS, chromium  # noqa: F401  a fixture

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("one_thread")]
LIVE = """([address, protocols, audio]) => new Promise((resolve, reject) => {
  const socket = new WebSocket(address, protocols), events = []
  const done = () => resolve({ protocol: socket.protocol, events, closed: true })
  socket.onclose = done
  socket.onmessage = message => {
    const event = JSON.parse(message.data)
    events.push(event)
    if (event.type === "session.created")
      for (let at = 0; at < audio.length; at += 12800)
        socket.send(JSON.stringify({ type: "input_audio_buffer.append", audio: audio.slice(at, at + 12800) }))
    if (event.type.endsWith(".completed")) {
      socket.onclose = null
      socket.close()
      resolve({ protocol: socket.protocol, events, closed: false })
    }
  }
})"""
STREAM = """async ([address, audio]) => {
  const form = new FormData()
  form.append("file", new Blob([Uint8Array.from(atob(audio), c => c.charCodeAt(0))]), "a.wav")
  form.append("stream", "true")
  const headers = { Authorization: "Bearer k-1" }
  const response = await fetch(address, { method: "POST", body: form, headers })
  return [response.headers.get("content-type"), await response.text()]
}"""


class EmptyPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def origin():
    """The origin of an empty page on another port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def page(chromium, origin):  # noqa: F811
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(origin)
        yield page
        browser.close()


def test_page_of_an_allowed_origin_transcribes_live_and_by_stream(page, origin, toy, wav):
    with running(toy, access=Access(token="k-1", origins=[origin])) as url:
        address, audio = url.replace("http", "ws", 1) + "/v1/realtime?intent=transcription", pcm(1.0, 1.0)
        protocols = ["realtime", "openai-insecure-api-key.k-1"]
        result = page.evaluate(LIVE, [address, protocols, base64.b64encode(audio).decode()])
        assert result["protocol"] == "realtime" and not result["closed"]
        kinds = [event["type"] for event in result["events"]]
        assert "input_audio_buffer.speech_started" in kinds and kinds[-1] == f"{TRANSCRIPTION}.completed"
        assert result["events"][-1]["transcript"]
        wrong = page.evaluate(LIVE, [address, ["realtime", "openai-insecure-api-key.no"], ""])
        assert wrong["closed"] and wrong["events"] == []
        kind, text = page.evaluate(STREAM, [f"{url}/v1/audio/transcriptions", base64.b64encode(wav).decode()])
        assert kind.startswith("text/event-stream") and "transcript.text.done" in text


def test_page_of_another_origin_cannot_open_a_session(page, toy):
    with running(toy, access=Access(origins=["https://my.page"])) as url:
        address = url.replace("http", "ws", 1) + "/v1/realtime"
        result = page.evaluate(LIVE, [address, ["realtime"], ""])
        assert result["closed"] and result["events"] == []
