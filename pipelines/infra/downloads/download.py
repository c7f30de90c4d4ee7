"""Download a recording with limits, following redirects, into a temporary file.

Proxies of the environment are not used: they resolve names themselves, so that addresses could not be checked.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipelines.infra.downloads import addresses
from pipelines.infra.downloads.addresses import IDLE_S, Deadline
from pipelines.infra.downloads.urls import DownloadError, Request, Url, parse

PORTS = (80, 443)
MAX_REDIRECTS = 5
ATTEMPTS = 3
"""Connections for one file; after one that broke off, the next continues the download if the server supports it."""
_BLOCK_BYTES = 1 << 16
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body|title|script)\b", re.I)
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_REDIRECTS = (301, 302, 303, 307, 308)
_STATUS = {
    401: "it requires a login (401)",
    403: "access is not allowed (403)",
    404: "there is no such file (404)",
    410: "the file was removed (410)",
    429: "the server asks to wait (429): try again later",
}

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Limits:
    """What may be fetched."""

    max_mb: float = 2_000.0
    """Size of a file, in millions of bytes."""
    timeout_s: float = 3_600.0
    """Time of a download, from the name's resolution to the last byte."""
    more_ports: tuple[int, ...] = ()
    """Allowed beside PORTS."""
    allow_private: bool = False
    """Also fetch from addresses of this machine and its networks."""


def fetch(url: Url, file: BinaryIO, limits: Limits, on_bytes: OnBytes = lambda n_bytes: None) -> None:
    """Write the content of `url` to an open file. Raises DownloadError, with one line for the user.

    `on_bytes` receives the number of bytes so far; an exception in it stops the download.
    """
    request, deadline = parse(url), Deadline(limits.timeout_s)
    download = _Download(file, limits, deadline, on_bytes)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _following_redirects(request, limits, deadline, download.range_headers()) as response:
                download.receive(url, response)
            return
        except TimeoutError:
            if deadline.is_over:
                raise DownloadError("too_slow", f"{url} was not received within {limits.timeout_s:g} s") from None
            if attempt == ATTEMPTS:
                raise DownloadError("too_slow", f"{url}: the server sent nothing for {IDLE_S:g} s") from None
        except (http.client.HTTPException, OSError) as error:
            if attempt == ATTEMPTS:
                raise DownloadError("broken", f"{url}: {_describe(error)}. Try again later") from None


class _Broken(http.client.HTTPException):
    """The connection ended before the file."""


class _Download:
    """The part of a file that has been received."""

    def __init__(self, file: BinaryIO, limits: Limits, deadline: Deadline, on_bytes: OnBytes):
        self.file, self.limits, self.deadline, self.on_bytes = file, limits, deadline, on_bytes
        self.n_bytes = 0
        self._validator = ""
        """ETag or date that identifies the version of the file; empty: a download cannot be continued."""

    def range_headers(self) -> dict[str, str]:
        """Return the headers that ask for the rest of the same version of the file."""
        if not (self.n_bytes and self._validator):
            return {}
        return {"Range": f"bytes={self.n_bytes}-", "If-Range": self._validator}

    def receive(self, url: Url, response: http.client.HTTPResponse) -> None:
        """Write the body of a response to the file."""
        self._start(url, response)
        expected = _content_length(response)
        max_bytes = int(self.limits.max_mb * 1e6)
        too_large = DownloadError("too_large", f"{url} is too large: at most {self.limits.max_mb:g} MB")
        if expected is not None and self.n_bytes + expected > max_bytes:
            raise too_large
        before = self.n_bytes
        while block := response.read1(_BLOCK_BYTES):
            if not self.n_bytes:
                _refuse_html(url, response, block)
            self.n_bytes += len(block)
            if self.n_bytes > max_bytes:
                raise too_large
            self._write(block)
            self.on_bytes(self.n_bytes)
        if expected is not None and self.n_bytes - before < expected:
            raise _Broken(f"the connection ended after {self.n_bytes} of {before + expected} bytes")
        if not self.n_bytes:
            raise DownloadError("broken", f"{url} is empty: the server sent no bytes")

    def _start(self, url: Url, response: http.client.HTTPResponse) -> None:
        """Check the head of a response, and go back to the start of the file unless it continues."""
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise DownloadError(
                "broken", f"{url}: the server compresses what it sends ({encoding[:20]}), which was not asked for"
            )
        if response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {self.n_bytes}-"):
            return
        if response.status == 206:
            raise DownloadError("broken", f"{url}: the server sent another part than the one that was asked for")
        self.n_bytes = 0
        self.file.seek(0)
        self.file.truncate()
        etag = response.headers.get("ETag", "")
        self._validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")

    def _write(self, block: bytes) -> None:
        try:
            self.file.write(block)
        except OSError as error:
            raise DownloadError(
                "broken", f"the download cannot be stored ({error.strerror}): free some space in the folder TMPDIR"
            ) from None


@contextlib.contextmanager
def _following_redirects(
    request: Request, limits: Limits, deadline: Deadline, headers: dict[str, str]
) -> Iterator[http.client.HTTPResponse]:
    """Yield the response with the file. Each address on the way is checked."""
    url = request.url
    for _ in range(MAX_REDIRECTS + 1):
        with contextlib.closing(_open(request, limits, deadline)) as connection:
            connection.request("GET", request.target, headers=_headers(request) | headers)
            response = connection.getresponse()
            if response.status not in _REDIRECTS:
                if response.status not in (200, 206):
                    raise _refused(url, response.status)
                yield response
                return
            location = response.headers.get("Location", "")
        if not location:
            raise DownloadError("status", f"{url}: the server redirects ({response.status}) without an address")
        request = request.follow(location)
    raise DownloadError("status", f"{url} is redirected more than {MAX_REDIRECTS} times")


def _open(request: Request, limits: Limits, deadline: Deadline) -> http.client.HTTPConnection:
    """Return a connection to a checked address, whose reads end at the deadline."""
    if request.port not in (ports := (*PORTS, *limits.more_ports)):
        allowed = ", ".join(map(str, ports))
        raise DownloadError("address", f"{request.url} is not fetched: only the ports {allowed} are allowed")
    connection = http.client.HTTPConnection(request.host, request.port)
    connection.default_port = {"http": 80, "https": 443}[request.scheme]
    connection.sock = addresses.connect(request, deadline, limits.allow_private)
    connection.sock.settimeout(deadline.remaining_s(IDLE_S))
    connection.response_class = functools.partial(_Response, deadline=deadline)
    return connection


def _headers(request: Request) -> dict[str, str]:
    headers = {"User-Agent": "swedish-whisper-lab", "Accept": "*/*", "Accept-Encoding": "identity"}
    return {**headers, "Connection": "close", **({"Authorization": request.credentials} if request.credentials else {})}


class _Response(http.client.HTTPResponse):
    """A response of which each read, of the head too, ends at the deadline."""

    def __init__(self, connection: Any, *arguments: Any, deadline: Deadline, **options: Any):
        super().__init__(connection, *arguments, **options)
        self.fp = io.BufferedReader(_TimedReader(self.fp, connection, deadline))


class _TimedReader(io.RawIOBase):
    def __init__(self, file: Any, connection: Any, deadline: Deadline):
        super().__init__()
        self._file, self._connection, self._deadline = file, connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(self._deadline.remaining_s(IDLE_S))
        return self._file.raw.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _content_length(response: http.client.HTTPResponse) -> int | None:
    """Return the number of bytes that the body should have, None if the server does not say."""
    return None if response.chunked else response.length


def _refuse_html(url: Url, response: http.client.HTTPResponse, start: bytes) -> None:
    is_declared = response.headers.get_content_type() in _HTML_TYPES and start.lstrip().startswith(b"<")
    if is_declared or _HTML.match(start):
        raise DownloadError("html", f"{url} is a web page, not a recording: give the address of the audio file itself")


def _refused(url: Url, status: int) -> DownloadError:
    failing = f"the server fails ({status}): try again later" if status >= 500 else f"the server refuses it ({status})"
    return DownloadError("status", f"{url} cannot be fetched: {_STATUS.get(status, failing)}")


def _describe(error: Exception) -> str:
    if isinstance(error, _Broken):
        return str(error)
    if isinstance(error, http.client.IncompleteRead | ConnectionError):
        return "the connection broke off"
    return "the server does not answer as HTTP requires"
