"""Base of the loopback servers: threads, a free port, recorded requests, and faults on request."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import socket
import ssl
import threading
import time
import urllib.parse
from dataclasses import dataclass, field


@dataclass
class Fault:
    """A fault of the requests whose `METHOD path` matches."""

    request: re.Pattern
    kind: str
    """A status ("500"), `cut upload`, `truncate`, `corrupt` or `slow`."""
    times: int | None
    """Number of requests; None is all."""
    done: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """A request that has arrived."""

    method: str
    path: str
    """Unquoted, without the query."""
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Answer(Exception):
    """A response, raised by the method that computes it."""

    def __init__(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = headers or {}


class Loopback:
    """An HTTP server on a free port of this machine; subclasses answer requests in `answer`, which raises Answer."""

    def __init__(self, certificate: tuple[str, str] | None = None):
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        loopback = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body go at once: else every answer waits 40 ms
            wbufsize = 1 << 16

            def serve(self):
                loopback.serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self.server.server_port
        self.endpoint = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        # the default poll interval makes closing take half a second
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def fault(self, request: str, kind: str, times: int | None = 1, **headers: str) -> None:
        """Let `times` requests fail whose `METHOD path` matches the pattern `request`."""
        self.faults.append(Fault(re.compile(request), kind, times, headers=headers))

    def answer(self, request: Request) -> None:
        raise NotImplementedError

    def serve(self, handler) -> None:
        parts = urllib.parse.urlsplit(handler.path)
        path = urllib.parse.unquote(parts.path)
        fault = self._fault_of(f"{handler.command} {path}")
        kind = fault.kind if fault else ""
        if kind == "cut upload":
            handler.rfile.read(int(handler.headers.get("Content-Length") or 0) // 2)
            return self._hang_up(handler)
        if kind == "slow":
            time.sleep(0.3)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = self._body(handler, headers)
        request = Request(handler.command, path, urllib.parse.parse_qs(parts.query), headers, body)
        with self.lock:
            self.requests.append(path)
            try:
                if kind.isdigit():
                    # some servers repeat the request in the error: the client must not print the token
                    body = {"error": f"refused {headers.get('authorization', '')}", "errorMsg": "refused"}
                    raise Answer(int(kind), {**body, "usrMsg": headers.get("authorization", "")}, fault.headers)
                self.answer(request)
                raise Answer(404, {"error": f"{request.method} {path} is not known here"})
            except Answer as answer:
                result = answer
        return self._send(handler, result, kind)

    def _fault_of(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.request.search(request) and (fault.times is None or fault.done < fault.times):
                    fault.done += 1
                    return fault
        return None

    def _body(self, handler, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return handler.rfile.read(int(headers.get("content-length") or 0))
        body = b""
        while size := int(handler.rfile.readline(), 16):
            body += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return body

    def _send(self, handler, answer: Answer, kind: str) -> None:
        body = answer.body
        if kind == "corrupt" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        handler.send_response(answer.status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **answer.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        handler.wfile.write(body[: len(body) // 2] if kind == "truncate" else body)
        if kind == "truncate":
            self._hang_up(handler)

    def _hang_up(self, handler) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.flush()
        with contextlib.suppress(OSError):
            handler.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def free_port() -> int:
    """Return a TCP port of the loopback interface on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
