"""ASGI middleware before Gradio: which routes exist, limits on requests, and the route of the live microphone.

Gradio by itself downloads any URL that is named as a file, accepts any number of files per request, stores identical
files of two visitors at one path, and reloads the page when a connection breaks, which would lose a live recording.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference.app import html, live, routes
from pipelines.inference.app.i18n import TEXTS, choose_language
from pipelines.inference.app.routes import LIVE_PATH, TRANSCRIBE_PATH, UPLOAD_PATH
from pipelines.inference.app.uploads import delete_old_uploads, store_upload
from pipelines.inference.http.guard import (
    Refusal,
    check_fetch_site,
    header,
    limit_body,
    read_body,
    wait_for_disconnect,
)
from pipelines.inference.http.rate_limits import RateLimiter, TooManyRequests, client_key
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from pipelines.inference.app.components.localized import Texts

MAX_UPLOAD_BYTES = 25_000_000
"""Maximum size of a file."""
MAX_UPLOAD_REQUEST_BYTES = MAX_UPLOAD_BYTES + 1_000_000
"""Maximum size of an upload request: one file and its form."""
MAX_CHUNK_BYTES = 2_000_000
"""Maximum size of a live chunk; the largest of the page's (static/microphone.js) has 1.3 million bytes."""
MAX_CALL_BYTES = 250_000
"""Maximum size of any other request: Gradio parses it in the event loop, which all visitors share."""
BODY_TIMEOUT_S = 60.0
"""Time for the body of a request other than an upload to arrive."""
MAX_UPLOADS_BYTES = 1_000_000_000
"""Total size of all uploads above which new ones are refused."""
MAX_WAITING_CHUNKS = 20
"""Live chunks that may wait for the model at the same time."""

_MAX_INLINE_BYTES = 50_000
"""Larger JSON is checked in a thread; this much takes about 20 ms."""
_MAX_BRACKETS = 5_000
"""Most brackets in a live chunk: a prompt and hotwords may consist of them."""
_REASONS = {403: "cross_site", 408: "busy", 413: "too_large", 429: "too_many"}
"""HTTP status of a Refusal to the key of its text in Texts["refused"]; others are `unreadable`."""

logger = logging.getLogger("app")  # outside the lab's loggers: refusals of visitors are not printed


class _Refused(Exception):
    """A refused request: an HTTP status, the key of a text in Texts["refused"] and the time until a retry, if known.

    Not an HTTPException, which Gradio's app would answer in its own format.
    """

    def __init__(self, status: int, reason: str, retry_s: int | None = None):
        super().__init__(reason)
        self.status, self.reason, self.retry_s = status, reason, retry_s


class AppMiddleware:
    """ASGI middleware around Gradio's app."""

    def __init__(
        self,
        app: ASGIApp,
        live_sessions: live.LiveSessions | None,
        limiter: RateLimiter,
        uploads: Path,
        max_age_s: float,
    ):
        """`uploads` is Gradio's folder of uploads, which are deleted after `max_age_s`.

        Without `live_sessions` there is no route of the live microphone.
        """
        import anyio

        self.app, self.live_sessions, self.limiter = app, live_sessions, limiter
        self.uploads, self.max_age_s = uploads, max_age_s
        self._n_arriving = 0
        """Uploads that are arriving: each is counted at its maximum size."""
        self._limiter = anyio.CapacityLimiter(MAX_WAITING_CHUNKS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        path, has_started = _path(scope), False
        is_absent = path == LIVE_PATH and self.live_sessions is None
        if is_absent or not routes.is_used(scope["method"], path, self.uploads):
            return await _respond(send, 404, {"detail": "Not Found"})
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)

        async def send_and_record(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        handlers = {LIVE_PATH: self._handle_chunk, UPLOAD_PATH: self._handle_upload}
        handle = handlers.get(path, self._handle_call)
        try:
            if path in (UPLOAD_PATH, TRANSCRIBE_PATH):
                self.limiter.check(client_key(scope))
            await handle(scope, receive, send_and_record)
        except (_Refused, Refusal) as error:
            error = _as_refused(error)
            logger.info("refused a request: %s", error.reason)
            if not has_started:
                response = _refusal(error, TEXTS[_language(scope)])
                # the page shows the response to an upload as plain text
                content = response["detail"] if path == UPLOAD_PATH else response
                await _respond(send, error.status, content, error.retry_s)

    async def _handle_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to Gradio, unless it is too large or names a URL as a file."""
        import anyio

        body = await read_body(limit_body(scope, receive, MAX_CALL_BYTES), BODY_TIMEOUT_S)
        is_large = len(body) > _MAX_INLINE_BYTES
        if await anyio.to_thread.run_sync(contains_url, body) if is_large else contains_url(body):
            raise _Refused(400, "address")
        await self.app(scope, _replay(body, receive), send)

    async def _handle_chunk(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a live chunk (live.parse_chunk) with the partial transcript and the number of samples received."""
        import anyio

        check_fetch_site(scope, ("same-origin", "same-site", "none"))
        if header(scope, "content-type").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "unreadable")  # browsers send other types across sites without asking the server
        self._check_capacity()
        body = await read_body(limit_body(scope, receive, MAX_CHUNK_BYTES), BODY_TIMEOUT_S)
        self._check_capacity()
        _set_gradio_request(scope)
        disconnected = threading.Event()

        async def watch_connection() -> None:
            await wait_for_disconnect(receive)
            disconnected.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_connection)
            status, response, retry_s = await anyio.to_thread.run_sync(
                self._receive_chunk, body, scope, disconnected.is_set, limiter=self._limiter
            )
            tasks.cancel_scope.cancel()
        await _respond(send, status, response, retry_s)

    def _check_capacity(self) -> None:
        if self._limiter.available_tokens < 1:
            raise _Refused(503, "busy")

    def _receive_chunk(
        self, body: bytes, scope: Scope, is_disconnected: Callable[[], bool]
    ) -> tuple[int, dict[str, Any], int | None]:
        """Return status, content and Retry-After of the response. A recording counts as one request."""
        message, client = _parse_flat_json(body), client_key(scope)
        requested = message.get("language") if isinstance(message, dict) else None
        texts = TEXTS[requested if isinstance(requested, str) and requested in TEXTS else _language(scope)]
        try:
            chunk = live.parse_chunk(message)
            self.limiter.check_audio(client)
            if chunk.offset == 0:
                self.limiter.admit(client)
            partial, n_received, is_complete = self.live_sessions.receive(chunk, is_disconnected)
        except TooManyRequests as error:
            return 429, _refusal(_as_refused(error), texts), error.retry_s
        except AudioError as error:
            logger.info("refused a chunk: %s", error)
            refused = _Refused(503 if error.reason == "busy" else 400, error.reason)
            return refused.status, _refusal(refused, texts), None
        except Exception as error:
            level = logging.WARNING if isinstance(error, LabError) else logging.ERROR
            logger.log(level, "a chunk failed", exc_info=True)
            return 500, {"reason": "failed", "detail": texts["failed"]}, None
        self.limiter.charge_audio(client, len(chunk.samples) / chunk.rate_hz)
        transcript = html.live_transcript(partial, texts, self.live_sessions.service.transcriber.language)
        return 200, {"told": transcript, "taken": n_received, "ended": is_complete}, None

    async def _handle_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let Gradio store the file, move it to its own folder and respond with the new path."""
        limited = limit_body(scope, receive, MAX_UPLOAD_REQUEST_BYTES, BODY_TIMEOUT_S)
        arriving = self._n_arriving * MAX_UPLOAD_BYTES
        if delete_old_uploads(self.uploads, self.max_age_s) + arriving > MAX_UPLOADS_BYTES:
            raise _Refused(503, "busy")
        response = _BufferedResponse()
        self._n_arriving += 1
        try:
            await self.app(scope, _allow_one_file(_convert_refusals(limited), _boundary(scope)), response.add)
        finally:
            self._n_arriving -= 1
        if response.start.get("status") == 200:
            paths = [store_upload(Path(path), self.uploads) for path in json.loads(response.body)]
            scope["app"].get_blocks().upload_file_set.update(paths)  # Gradio deletes old files in this set
            return await _respond(send, 200, paths)
        await send(response.start)
        await send({"type": "http.response.body", "body": response.body})


class _BufferedResponse:
    """A response that is not sent yet."""

    def __init__(self) -> None:
        self.start: Message = {}
        self.body = b""

    async def add(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        else:
            self.body += message.get("body", b"")


def _as_refused(error: _Refused | Refusal) -> _Refused:
    if isinstance(error, _Refused):
        return error
    retry_s = error.retry_s if isinstance(error, TooManyRequests) else None
    return _Refused(error.status_code, _REASONS.get(error.status_code, "unreadable"), retry_s)


def _convert_refusals(receive: Receive) -> Receive:
    """Return a `receive` that raises _Refused instead of Refusal, for use inside Gradio's app."""

    async def converted() -> Message:
        try:
            return await receive()
        except Refusal as error:
            raise _as_refused(error) from None

    return converted


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns the body, which has been read, and then continues with `receive`."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _allow_one_file(receive: Receive, boundary: bytes) -> Receive:
    """Return a `receive` that raises _Refused (400) as soon as a form contains a second part.

    Gradio accepts a thousand files at once and leaves those of a refused or incomplete request in its folder.
    """
    n_boundaries, tail = 0, b""

    async def checked() -> Message:
        nonlocal n_boundaries, tail
        message = await receive()
        data = tail + message.get("body", b"")
        n_boundaries += data.count(boundary)
        tail = data[-len(boundary) + 1 :]  # may contain the beginning of a boundary
        if n_boundaries > 2:
            raise _Refused(400, "several")
        return message

    return checked


def contains_url(body: bytes) -> bool:
    """Return whether a JSON body names a URL where Gradio expects the path of an uploaded file."""
    try:
        remaining = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio parses it in the same way and refuses it
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            if str(value.get("path")).strip().lower().startswith(("http:", "https:")):
                return True
            remaining += value.values()
        elif isinstance(value, list):
            remaining += value
    return False


def _parse_flat_json(body: bytes) -> Any:
    """Parse a JSON body; return None if it is invalid, or has so many brackets that it would take long to parse."""
    if body.count(b"[") + body.count(b"{") > _MAX_BRACKETS:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _language(scope: Scope) -> str:
    return choose_language(header(scope, "accept-language"))


def _path(scope: Scope) -> str:
    """Return the path below the root path, which a proxy may already have removed."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")).rstrip("/")


def _boundary(scope: Scope) -> bytes:
    """Return the boundary of a form, parsed as Gradio parses it."""
    from python_multipart.multipart import parse_options_header

    _, options = parse_options_header(header(scope, "content-type").encode("latin-1"))
    return b"--" + options.get(b"boundary", b"")


def _refusal(refused: _Refused, texts: Texts) -> dict[str, str]:
    line = texts["refused"].get(refused.reason, texts["refused"]["unreadable"]).format(seconds=refused.retry_s)
    return {"reason": refused.reason, "detail": line, "error": line}  # Gradio uses both names


def _set_gradio_request(scope: Scope) -> None:
    """Store the request where ZeroGPU looks up the visitor to whom it assigns a GPU."""
    from gradio.context import LocalContext
    from starlette.requests import Request

    LocalContext.request.set(Request(scope))


async def _respond(send: Send, status: int, content: Any, retry_s: int | None = None) -> None:
    """Send `content` as JSON, or a str as plain text; `retry_s` is the header Retry-After."""
    body, kind = json.dumps(content).encode(), b"application/json"
    if isinstance(content, str):
        body, kind = content.encode(), b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", str(retry_s).encode())] if retry_s else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
