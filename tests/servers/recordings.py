"""A loopback server of recordings with the faults of servers; a seam lets downloads treat 127.0.0.1 as public."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Callable, Iterator

from pipelines.infra.downloads import addresses
from servers.loopback import Answer, Loopback, Request


class Recordings(Loopback):
    """`files`: path to bytes, or a function of the request that raises Answer."""

    def __init__(self, certificate: tuple[str, str] | None = None):
        super().__init__(certificate)
        self.files: dict[str, bytes | Callable[[Request], None]] = {}
        self.received: list[Request] = []
        self.stopped = threading.Event()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.endpoint.replace('127.0.0.1', host)}{path}"

    def answer(self, request: Request) -> None:
        self.received.append(request)
        content = self.files.get(request.path)
        if callable(content):
            content(request)
        elif content is not None:
            raise Answer(200, content, {"Content-Type": "audio/wav"})

    def redirect(self, path: str, location: str, status: int = 302) -> None:
        self.files[path] = lambda request: _raise(Answer(status, b"", {"Location": location}))

    def serve(self, handler) -> None:
        """Answer the paths of `raw` with a function that writes to the connection itself."""
        raw = {"/drip": self._drip, "/slow-head": self._slow_head, "/endless": self._endless, "/zip": self._zip}
        raw |= {"/short": self._short, "/mute": lambda handler: self.stopped.wait(5), "/noise": self._noise}
        path = handler.path.partition("?")[0]
        if path not in raw:
            return super().serve(handler)
        with contextlib.suppress(OSError):
            raw[path](handler)
        handler.close_connection = True

    def _drip(self, handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not self.stopped.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    def _slow_head(self, handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.stopped.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    def _endless(self, handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        block = b"x" * 65_536
        while not self.stopped.is_set():
            handler.wfile.write(b"10000\r\n" + block + b"\r\n")

    def _zip(self, handler) -> None:
        body = gzip.compress(bytes(1_000_000))
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
        handler.wfile.write(head.encode() + body)

    def _short(self, handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")

    def _noise(self, handler) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")

    def close(self) -> None:
        self.stopped.set()
        super().close()


def _raise(answer: Answer) -> None:
    raise answer


@contextlib.contextmanager
def treated_as_public(monkeypatch) -> Iterator[None]:
    """Let downloads treat 127.0.0.1, and no other address of this machine, as public."""
    is_public = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    yield
