"""What stands before Gradio: limits on what a visitor may send, and the microphone's own way in.

Gradio alone fetches any address that is named as a file, takes any number of files at once, keeps the same file of two
visitors in one place, so that one would delete the other's, and reloads the page where a connection breaks, with all
that was said into a microphone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference.app import html, live
from pipelines.inference.app.i18n import WORDS, preferred
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError

if TYPE_CHECKING:
    from pipelines.inference.app.i18n import Words


if TYPE_CHECKING:
    from pipelines.page.words import Words

    Scope = dict[str, Any]
    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_UPLOAD = 25_000_000
"""Bytes of a file."""
MAX_BODY = MAX_UPLOAD + 1_000_000
"""Bytes of a request: one file, and what is written around it."""
MAX_PIECE = 2_000_000
"""Bytes of a piece of an open microphone: the page's longest (look.SCRIPT) has 1.3 million."""
MAX_CALL = 250_000
"""Bytes of any other request: Gradio parses it where all visitors wait for it."""
BODY_S = 60.0
"""A request other than an upload that has not come by then is given up."""
MAX_FOLDER = 1_000_000_000
"""Bytes that uploads may take up on the disk before the page is told to be busy."""
MAX_WAITING = 20
"""Pieces of open microphones that may wait for the model at once."""
LIVE = "/live"
"""Where the page sends them."""

_OWN = "lab-upload-"
_ASIDE = 50_000  # bytes of JSON above which a thread looks through it: some 20 ms

_LOG = logging.getLogger("app")


class _Refused(Exception):
    """Answered with a status and a line of Words["refused"]."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Door:
    """ASGI middleware before Gradio's app."""

    def __init__(self, app: Any, talks: live.Talks, uploads: Path, kept_s: float):
        """`uploads`: Gradio's folder of uploads, which are kept for `kept_s` seconds at most."""
        import anyio

        self.app, self.talks, self.uploads, self.kept_s = app, talks, uploads, kept_s
        self._waiting = anyio.CapacityLimiter(MAX_WAITING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        words, place = WORDS[_language(scope)], _place(scope)
        passing = _Passing(receive, send)
        try:
            if place == LIVE:
                await self._live(scope, passing)
            elif place.endswith("/upload"):
                await self._upload(scope, passing)
            else:
                await self._call(scope, passing)
        except _Refused as error:
            _LOG.info("refused a request: %s", error.reason)
            if not passing.answered:
                refusal = _refusal(error.reason, words)
                # the page shows the bare text of an upload's answer
                await _answer(send, error.status, refusal["detail"] if place.endswith("/upload") else refusal)

    async def _call(self, scope: Scope, passing: _Passing) -> None:
        """Anything else that is sent to Gradio."""
        import anyio

        if not _header(scope, b"content-type").startswith(b"multipart/"):
            body = await passing.body(MAX_CALL)
            large = len(body) > _ASIDE
            if await anyio.to_thread.run_sync(names_an_address, body) if large else names_an_address(body):
                raise _Refused(400, "address")
        await self.app(scope, passing.receive, passing.send)

    async def _live(self, scope: Scope, passing: _Passing) -> None:
        """A piece of an open microphone, as JSON (live.piece_of); the answer is what has been heard, and how much."""
        import anyio

        if _header(scope, b"sec-fetch-site") == b"cross-site":
            raise _Refused(403, "cross_site")
        if _header(scope, b"content-type").partition(b";")[0].strip().lower() != b"application/json":
            raise _Refused(415, "unreadable")  # other kinds a browser sends for any page, and does not ask first
        self._place_is_free()
        body = await passing.body(MAX_PIECE)
        self._place_is_free()
        _lend_to(scope)
        gone = threading.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(passing.watch, gone)
            heard = self._heard, body, _language(scope), gone.is_set
            status, answer = await anyio.to_thread.run_sync(*heard, limiter=self._waiting)
            tasks.cancel_scope.cancel()
        await _answer(passing.out, status, answer)

    def _place_is_free(self) -> None:
        if self._waiting.available_tokens < 1:
            raise _Refused(503, "busy")

    def _heard(self, body: bytes, language: str, gone: Callable[[], bool]) -> tuple[int, dict[str, Any]]:
        told = _flat(body)
        asked = told.get("language") if isinstance(told, dict) else None
        words = WORDS[asked if asked in WORDS else language]
        try:
            partial, taken, ended = self.talks.take(live.piece_of(told), gone)
        except AudioError as error:
            _LOG.info("refused a piece: %s", error)
            return 503 if error.reason == "busy" else 400, _refusal(error.reason, words)
        except Exception as error:
            _LOG.log(logging.WARNING if isinstance(error, LabError) else logging.ERROR, "a piece failed", exc_info=True)
            return 500, {"reason": "failed", "detail": words["failed"]}
        return 200, {"told": html.live(partial, words), "taken": taken, "ended": ended}

    async def _upload(self, scope: Scope, passing: _Passing) -> None:
        """Gradio stores the files; each is then moved to a place of its own, which is the answer."""
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > MAX_BODY:
            raise _Refused(413, "too_large")
        if swept(self.uploads, self.kept_s) > MAX_FOLDER:
            raise _Refused(503, "busy")
        passing.boundary, passing.holding = _boundary(scope), True
        await self.app(scope, passing.receive, passing.send)
        if passing.status == 200:
            paths = [_moved(Path(path), self.uploads) for path in json.loads(passing.held)]
            scope["app"].get_blocks().upload_file_set.update(paths)  # Gradio deletes what is in it and old
            return await _answer(passing.out, 200, paths)
        await passing.let_go()


class _Passing:
    """A request on its way: its body is counted, and its answer can be held back.

    Where `boundary` is set, no more than one part may lie between two of it: Gradio takes a thousand files at once, and
    those of a request that it refuses or that breaks off would lie in its folder until they are old.
    """

    def __init__(self, receive: Receive, send: Send):
        self._in, self.out = receive, send
        self._read, self._seen, self._limit = b"", 0, MAX_BODY
        self.boundary, self._boundaries, self._end = b"", 0, b""
        self._replayed = True
        self.answered = self.holding = False
        self.status, self.held, self._start = 0, b"", {}

    async def receive(self) -> dict[str, Any]:
        if not self._replayed:
            self._replayed = True
            return {"type": "http.request", "body": self._read, "more_body": False}
        message = await self._in()
        part = message.get("body", b"")
        self._seen += len(part)
        if self._seen > self._limit:
            raise _Refused(413, "too_large")
        if self.boundary:
            seen = self._end + part
            self._boundaries += seen.count(self.boundary)
            self._end = seen[-len(self.boundary) + 1 :]  # where half of one may stand
            if self._boundaries > 2:
                raise _Refused(400, "several")
        return message

    async def body(self, limit: int) -> bytes:
        """All of it, at most `limit` bytes; `receive` gives it once more."""
        import anyio

        self._limit = limit
        parts, more = [], True
        try:
            with anyio.fail_after(BODY_S):
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise _Refused(400, "unreadable")  # which nobody hears
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            raise _Refused(408, "busy") from None
        self._read, self._replayed = b"".join(parts), False
        return self._read

    async def watch(self, gone: threading.Event) -> None:
        """Set `gone` when whoever asks is there no longer."""
        while (await self._in())["type"] != "http.disconnect":
            pass
        gone.set()

    async def send(self, message: dict[str, Any]) -> None:
        if not self.holding:
            self.answered = True
            await self.out(message)
        elif message["type"] == "http.response.start":
            self._start, self.status = message, message["status"]
        else:
            self.held += message.get("body", b"")

    async def let_go(self) -> None:
        self.answered = True
        await self.out(self._start)
        await self.out({"type": "http.response.body", "body": self.held})


def names_an_address(body: bytes) -> bool:
    """Whether a body of JSON names an address where Gradio expects the path of an uploaded file."""
    try:
        todo = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # which Gradio, reading it in the same way, refuses
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if str(value.get("path")).strip().lower().startswith(("http:", "https:")):
                return True
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return False


def _flat(body: bytes) -> Any:
    """What a body of JSON says; None where it is none, or nests more than a piece does: that takes long to read."""
    if body.count(b"[") + body.count(b"{") > 10:
        return None
    try:
        return json.loads(body)
    except ValueError:
        return None


def swept(folder: Path, kept_s: float) -> int:
    """Delete uploads that are older than `kept_s` seconds, those that broke off among them; the bytes that are left.

    A small file counts as a megabyte, since so many would be a burden of their own. Whatever else lies in the folder,
    which the pages of a notebook share, is another's.
    """
    left, since = 0, time.time() - kept_s
    for path in [*folder.glob(f"{_OWN}*/*"), *folder.glob("tmp*"), *folder.glob(f"{_OWN}*")]:
        with contextlib.suppress(FileNotFoundError):  # somebody was faster
            told, is_file = path.stat(), path.is_file()
            if told.st_ctime >= since:
                left += max(told.st_size, 1_000_000) if is_file else 0
            elif is_file:
                path.unlink()
            elif path.name.startswith(_OWN):
                with contextlib.suppress(OSError):  # something lies in it
                    path.rmdir()
    return left


def _moved(path: Path, folder: Path) -> str:
    """Where an upload lies from now on: in a folder of its own."""
    own = folder / f"{_OWN}{secrets.token_hex(16)}" / path.name
    own.parent.mkdir()
    try:
        os.rename(path, own)
    except FileNotFoundError:  # named twice in one request
        return str(path)
    with contextlib.suppress(OSError):  # another one lies in it
        path.parent.rmdir()
    return str(own)


def _language(scope: Scope) -> str:
    return preferred(_header(scope, b"accept-language").decode("latin-1"))


def _place(scope: Scope) -> str:
    """The path below the root path, which a proxy may have cut off."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")).rstrip("/")


def _boundary(scope: Scope) -> bytes:
    """What stands before and after every part of a form, read as Gradio reads it."""
    from python_multipart.multipart import parse_options_header

    _, options = parse_options_header(_header(scope, b"content-type"))
    return b"--" + options.get(b"boundary", b"")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _refusal(reason: str, words: Words) -> dict[str, str]:
    line = words["refused"].get(reason, words["refused"]["unreadable"])
    return {"reason": reason, "detail": line, "error": line}  # both names are Gradio's


def _lend_to(scope: Scope) -> None:
    """ZeroGPU looks there for the visitor to whom it lends."""
    from gradio.context import LocalContext
    from starlette.requests import Request

    LocalContext.request.set(Request(scope))


async def _answer(send: Send, status: int, told: Any) -> None:
    """JSON, or plain text for a str."""
    body, kind = json.dumps(told).encode(), b"application/json"
    if isinstance(told, str):
        body, kind = told.encode(), b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
