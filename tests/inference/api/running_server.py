"""Start the API in a thread of this process, with a transcriber that waits, and check refusals."""

from __future__ import annotations

import contextlib
import re
import threading
import time

import httpx

from pipelines.inference.api import api
from pipelines.inference.api.middleware import Access
from pipelines.inference.api.queue import Limits
from pipelines.inference.http import server as api_server
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import Segment, Transcript

TOKEN = "hemlig-å"
SCORE = {"wer": 0.25, "ci95": [0.2, 0.3], "n": 160, "speakers": 12, "normalised": True, "read_from": "/srv/secret"}
LIMITS = Limits(max_mb=4, max_duration_s=60, timeout_s=30, queue=8)


@contextlib.contextmanager
def running(transcriber, limits: Limits = LIMITS, access: Access | None = None, aliases=(), proxies=()):
    """Yield the address of a server."""
    listening = api_server.listen("127.0.0.1", 0)
    server = api_server.create_server(api.make_app(transcriber, limits, access, aliases), proxies)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    url = api_server.address(listening)
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Held:
    """A transcriber that returns nothing until `let_go`; it calls `on_audio` every 10 ms, as between two batches."""

    def __init__(self, like: Transcriber):
        self.ref, self.language, self.loaded, self.times_words = like.ref, like.language, like.loaded, False
        self.options = like.options
        self.let_go, self.begun = threading.Event(), threading.Semaphore(0)
        self.at_once = self.most_at_once = self.abandoned = 0

    def with_options(self, **changes):
        return self

    def window_by_window(self):
        return self

    def transcribe(self, recording, max_duration_s, *, on_audio, on_segment, **options):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.begun.release()
        try:
            return self.decode(on_audio, on_segment)
        except BaseException:
            self.abandoned += 1
            raise
        finally:
            self.at_once -= 1

    def decode(self, on_audio, on_segment) -> Transcript:
        self.wait(on_audio)
        return Transcript("hej", 1.0, 0.1)

    def wait(self, on_audio) -> None:
        while not self.let_go.wait(0.01):
            on_audio(0.0)


class Parts(Held):
    """A transcriber whose first segment comes at once and whose second one after `let_go`."""

    texts = ("Hej", "då")
    error: Exception | None = None

    def decode(self, on_audio, on_segment) -> Transcript:
        first, second = (Segment(float(n), n + 1.0, text) for n, text in enumerate(self.texts))
        on_segment(first)
        self.wait(on_audio)
        if self.error:
            raise self.error
        on_segment(second)
        return Transcript(" ".join(self.texts), 2.0, 0.1, (first, second))


def refusal(response: httpx.Response, status: int, **fields) -> str:
    """Return the one line of an error in OpenAI's format; it names nothing of this machine."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert fields.items() <= error.items()
    assert "\n" not in error["message"]
    assert not re.search(r"Traceback|Error\b|\.py|(?<![\w.])/(?!v1/models)\w", error["message"]), error["message"]
    return error["message"]


def until(condition, within_s: float = 20.0) -> None:
    """Wait for a condition."""
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
