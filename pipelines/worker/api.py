"""The addresses: tasks at / and /task, what a page needs at /status, /tasks and /events, and the page itself at /."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pipelines.inference.api.queue import Limits
from pipelines.inference.http_guard import Refusal
from pipelines.infra.errors import LabError
from pipelines.worker.interface import ASYNCHRONOUS, TASKS, Ignored
from pipelines.worker.jobs import Cancelled, Failed, Job, Jobs
from pipelines.worker.middleware import Guard

_PAGE = Path(__file__).with_name("page.html")
_NAMES = [*TASKS, "status", "cancel"]
_DEEPEST = 32
_BODY_S = 60.0
"""The body of a request has so long to arrive."""
_AT_ONCE, _STREAMS = 16, 16
"""Requests with a body, and streams of events, that are answered at the same time."""
_LOOK_S, _BEAT_S = 0.25, 15.0
"""Streams look for news so often, and show that they live so often."""
_SECRET = (401, 403)
"""Answers to those who may not know the state."""


def make_app(jobs: Jobs, limits: Limits | None = None, token: str = "", hosts: Collection[str] = ()) -> Starlette:
    """The service around `jobs`, which it closes at its end. With a `token` all but the page itself wants it as bearer;
    without one, `hosts` are the names by which the server is known besides its addresses and localhost."""
    limits, desk = limits or Limits(), _Desk(jobs)

    @contextlib.asynccontextmanager
    async def open_until_the_end(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(jobs.close)

    async def task(request: Request) -> Response:
        with desk.place():
            name, params = await _asked(request)
            return await desk.answer(name, params, limits.timeout_s)

    async def status(request: Request) -> Response:
        return desk.told(200, status={})

    async def tasks(request: Request) -> Response:
        offered = jobs.implementation.parameters()
        told = [{"task": name, "parameters": [asdict(one) for one in offered.get(name, [])]} for name in TASKS]
        return desk.told(200, tasks=told)

    async def events(request: Request) -> Response:
        return desk.stream(request)

    async def page(request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text("utf-8"), headers={"Content-Security-Policy": _policy()})

    async def refuse(request: Request, error: HTTPException) -> Response:
        return desk.refused(error)

    async def refuse_all(request: Request, error: Exception) -> Response:
        return desk.refused(HTTPException(500, "something went wrong on the server; its output tells what"))

    return Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Route("/", task, methods=["POST"]),
            Route("/task", task, methods=["POST"]),
            Route("/status", status),
            Route("/tasks", tasks),
            Route("/events", events),
        ],
        middleware=[Middleware(Guard, token=token, max_mb=limits.max_mb, hosts=hosts, refused=desk.refused)],
        exception_handlers={HTTPException: refuse, Exception: refuse_all},
        lifespan=open_until_the_end,
    )


class _Desk:
    """What is answered."""

    def __init__(self, jobs: Jobs):
        self.jobs, self.requests, self.streams = jobs, 0, 0

    def told(self, code: int, *, status: dict[str, Any] | None = None, **told: Any) -> JSONResponse:
        """An answer: the internal state first, then whatever else there is to tell; with `status`, the parameters of
        such a request, what the implementation tells of itself."""
        state = {"internal_state": self.jobs.state}
        return JSONResponse(state | told | ({} if status is None else {"status": self.jobs.status(status)}), code)

    def ignored(self, code: int, reason: object) -> JSONResponse:
        return self.told(code, ignored=True, reason=str(reason))

    def refused(self, error: HTTPException) -> Response:
        """The answer to a request that cannot be taken: why, and the state for those who may know it."""
        told = {"ignored": True, "reason": str(error.detail)}
        state = {} if error.status_code in _SECRET else {"internal_state": self.jobs.state}
        return JSONResponse(state | told, error.status_code, error.headers)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for the length of a request: what comes in its body is held in memory."""
        if self.requests >= _AT_ONCE:
            raise Refusal(503, "too many requests at once: try again", headers={"Retry-After": "1"})
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def answer(self, task: str, params: dict[str, Any], patience_s: float) -> Response:
        """Do what was asked, or begin it, or say why not."""
        if task == "status":
            return self.told(200, status=params)
        try:
            if task == "cancel":
                return self.told(200, cancelled=await run_in_threadpool(self.jobs.cancel))
            job = await run_in_threadpool(self.jobs.begin, task, params)
        except Ignored as reason:
            return self.ignored(409, reason)
        except LabError as reason:
            return self.ignored(400, reason)
        if task in ASYNCHRONOUS:
            return self.told(202, started=task)
        return await self._result(job, patience_s)

    async def _result(self, job: Job, patience_s: float) -> Response:
        try:
            return self.told(200, result=await asyncio.wait_for(_settled(job), patience_s))
        except TimeoutError:
            if job.task != "test":
                return self.told(202, started=job.task)
            with contextlib.suppress(Ignored):  # it ended just now
                await run_in_threadpool(self.jobs.cancel, job)
            return self.told(504, ignored=True, reason=f"test was not done within {patience_s:g} s")
        except Cancelled as reason:
            return self.ignored(409, reason)
        except Failed as reason:
            return self.told(422, reason=str(reason))

    def stream(self, request: Request) -> Response:
        """Server-sent events: `line` for each line that jobs tell, after the last that the client knows; `status`."""
        if self.streams >= _STREAMS:
            raise Refusal(503, "too many streams of events at once: try again", headers={"Retry-After": "5"})
        known = request.headers.get("last-event-id") or request.query_params.get("after", "0")
        first = int(known) if known.isdecimal() and len(known) < 16 else 0
        self.streams += 1
        return _Stream(self._news(request, first), self._left)

    def _left(self) -> None:
        self.streams -= 1

    async def _news(self, request: Request, number: int) -> AsyncIterator[str]:
        shown, waited_s = "", 0.0
        if number > self.jobs.events.last:  # of another log: this one was begun anew
            number = 0
        yield "retry: 2000\n\n"
        server = getattr(request.app.state, "server", None)
        while True:
            news = []
            for line in self.jobs.events.after(number):
                number = line["id"]
                news.append(f"id: {number}\nevent: line\ndata: {json.dumps(line)}\n\n")
            status = self.told(200, status={}).body.decode()
            if status != shown:
                shown = status
                news.append(f"event: status\ndata: {status}\n\n")
            waited_s = 0.0 if news else waited_s + _LOOK_S
            if waited_s >= _BEAT_S:
                waited_s, news = 0.0, [": still here\n\n"]
            if news:
                yield "".join(news)
            if server and server.should_exit:
                return
            await asyncio.sleep(_LOOK_S)


class _Stream(StreamingResponse):
    """A stream of events that tells when it is left."""

    def __init__(self, news: AsyncIterator[str], left: Callable[[], None]):
        super().__init__(news, media_type="text/event-stream")
        self._left = left

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self._left()


async def _settled(job: Job) -> Any:
    done = asyncio.wrap_future(job.done)
    done.add_done_callback(lambda done: done.cancelled() or done.exception())  # also where nobody waits any more
    return await asyncio.shield(done)


async def _asked(request: Request) -> tuple[str, dict[str, Any]]:
    """The task of a request and its parameters. Raises Refusal."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_BODY_S):
            if kind == "application/json":
                return _parsed(await request.body())
            if kind == "multipart/form-data":
                return await _form(request)
    except TimeoutError:
        raise Refusal(408, f"the request did not arrive within {_BODY_S:g} s") from None
    except ClientDisconnect:
        raise Refusal(400, "the client left") from None  # which nobody hears
    # forms and plain text can be sent by a page of any site, without asking
    raise Refusal(415, "send application/json, or for the task test multipart/form-data")


def _parsed(body: bytes) -> tuple[str, dict[str, Any]]:
    asked = _object(body, "the request")
    if unknown := sorted(asked.keys() - {"task", "parameters"}):
        raise Refusal(400, f"a request has task and parameters, and not {unknown[0][:40]!r}")
    return _task(asked.get("task")), _parameters(asked.get("parameters"))


async def _form(request: Request) -> tuple[str, dict[str, Any]]:
    """A form: task, parameters as text, and files, each a parameter of its own."""
    async with request.form(max_files=4, max_fields=8) as form:
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        files = {name: await value.read() for name, value in form.items() if not isinstance(value, str)}
    if (task := _task(fields.get("task"))) != "test":
        raise Refusal(415, "a form is taken for the task test alone: send application/json")
    return task, _parameters(fields.get("parameters")) | files


def _task(name: Any) -> str:
    if name not in _NAMES:
        raise Refusal(400, f"task must be one of {', '.join(_NAMES)}")
    return name


def _parameters(given: Any) -> dict[str, Any]:
    """A JSON object, or the same as a string; none where nothing is given."""
    if given in (None, ""):
        return {}
    return dict(given) if isinstance(given, dict) else _object(given, "parameters")


def _object(text: Any, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # Python reads more than is JSON
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict) or _is_deep(found):
        raise Refusal(400, f"{what} must be a JSON object, and at most {_DEEPEST} deep")
    return found


def _is_deep(value: Any, left: int = _DEEPEST) -> bool:
    """Whether lists and objects are nested deeper than can be written and sent on."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_is_deep(one, left - 1) for one in inner)


@cache
def _policy() -> str:
    """What the page may do: run its own script, ask its own server, and nothing else; nor be shown within another."""
    page = _PAGE.read_text("utf-8")
    script, style = (_digest(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(page: str, tag: str) -> str:
    """What a policy calls the only element of this kind in a page."""
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
