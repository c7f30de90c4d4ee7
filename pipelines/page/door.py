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
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.audio import AudioError
from pipelines.errors import LabError
from pipelines.page import live, shown
from pipelines.page.words import WORDS, preferred

if TYPE_CHECKING:
    from pipelines.page.words import Words

    Scope = dict[str, Any]
    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_UPLOAD = 25_000_000
"""Bytes of a file."""
MAX_BODY = MAX_UPLOAD + 1_000_000
"""Bytes of a request: one file, and what is written around it."""
MAX_FOLDER = 1_000_000_000
"""Bytes that uploads may take up on the disk before the page is told to be busy."""
MAX_WAITING = 20
"""Pieces of open microphones that may wait for the model at once."""
LIVE = "/live"
"""Where the page sends them."""

_OWN = "lab-upload-"

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
        words, place = WORDS[_language(scope)], scope["path"].rstrip("/")
        passing = _Passing(receive, send)
        try:
            if place.endswith(LIVE):
                await self._live(scope, await passing.body(), send)
            elif place.endswith("/upload"):
                await self._upload(scope, passing)
            else:
                body = b"" if _header(scope, b"content-type").startswith(b"multipart/") else await passing.body()
                if names_an_address(body):
                    raise _Refused(400, "address")
                await self.app(scope, passing.receive, passing.send)
        except _Refused as error:
            _LOG.info("refused a request: %s", error.reason)
            if not passing.answered:
                refusal = _refusal(error.reason, words)
                # the page shows the bare text of an upload's answer
                await _answer(send, error.status, refusal["detail"] if place.endswith("/upload") else refusal)

    async def _live(self, scope: Scope, body: bytes, send: Send) -> None:
        """A piece of an open microphone, as JSON (live.piece_of); the answer is what has been heard, and how much."""
        import anyio

        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        language = told.get("language") if isinstance(told, dict) else None
        words = WORDS[language if language in WORDS else _language(scope)]
        if self._waiting.available_tokens < 1:
            return await _answer(send, 503, _refusal("busy", words))
        _lend_to(scope)
        status, answer = await anyio.to_thread.run_sync(self._heard, told, words, limiter=self._waiting)
        await _answer(send, status, answer)

    def _heard(self, told: Any, words: Words) -> tuple[int, dict[str, Any]]:
        try:
            partial, taken, ended = self.talks.take(live.piece_of(told))
        except AudioError as error:
            _LOG.info("refused a piece: %s", error)
            return 503 if error.reason == "busy" else 400, _refusal(error.reason, words)
        except Exception as error:
            _LOG.log(logging.WARNING if isinstance(error, LabError) else logging.ERROR, "a piece failed", exc_info=True)
            return 500, {"reason": "failed", "detail": words["failed"]}
        return 200, {"told": shown.live(partial, words), "taken": taken, "ended": ended}

    async def _upload(self, scope: Scope, passing: _Passing) -> None:
        """Gradio stores the files; each is then moved to a place of its own, which is the answer."""
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > MAX_BODY:
            raise _Refused(413, "too_large")
        if swept(self.uploads, self.kept_s) > MAX_FOLDER:
            raise _Refused(503, "busy")
        passing.holding = True
        await self.app(scope, passing.receive, passing.send)
        if passing.status == 200:
            paths = [_moved(Path(path), self.uploads) for path in json.loads(passing.held)]
            scope["app"].get_blocks().upload_file_set.update(paths)  # Gradio deletes what is in it and old
            return await _answer(passing.out, 200, paths)
        await passing.let_go()


class _Passing:
    """A request on its way: its body is counted, and its answer can be held back."""

    def __init__(self, receive: Receive, send: Send):
        self._in, self.out = receive, send
        self._read, self._seen = b"", 0
        self._replayed = True
        self.answered = self.holding = False
        self.status, self.held, self._start = 0, b"", {}

    async def receive(self) -> dict[str, Any]:
        if not self._replayed:
            self._replayed = True
            return {"type": "http.request", "body": self._read, "more_body": False}
        message = await self._in()
        self._seen += len(message.get("body", b""))
        if self._seen > MAX_BODY:
            raise _Refused(413, "too_large")
        return message

    async def body(self) -> bytes:
        """All of it; `receive` gives it once more."""
        parts, more = [], True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise _Refused(400, "unreadable")  # which nobody hears
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        self._read, self._replayed = b"".join(parts), False
        return self._read

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
