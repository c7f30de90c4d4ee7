"""HTTP routes of the worker: tasks at / and /task; /status, /tasks and /events for the page, which is at /."""

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
from pipelines.inference.http.guard import Refusal
from pipelines.infra.errors import LabError
from pipelines.worker.interface import ASYNCHRONOUS, TASKS, Ignored
from pipelines.worker.jobs import Cancelled, Failed, Job, Jobs
from pipelines.worker.middleware import Guard

_PAGE = Path(__file__).with_name("page.html")
_NAMES = [*TASKS, "status", "cancel"]
_MAX_DEPTH = 32
_BODY_S = 60.0
"""Time in seconds in which the body of a request must arrive."""
_MAX_REQUESTS, _MAX_STREAMS = 16, 16
"""Concurrent requests with a body, and concurrent event streams."""
_POLL_S, _HEARTBEAT_S = 0.25, 15.0
"""Intervals in seconds at which streams check for events, and at which they send a comment if there are none."""
_WITHOUT_STATE = (401, 403)
"""Status codes of responses to clients that may not see the state."""


def make_app(jobs: Jobs, limits: Limits | None = None, token: str = "", hosts: Collection[str] = ()) -> Starlette:
    """Return the app around `jobs`, which it closes at its end.

    With a `token`, every route but the page requires it as bearer token. Without one, `hosts` are the allowed host
    names beside addresses and localhost.
    """
    limits, responder = limits or Limits(), _Responder(jobs)

    @contextlib.asynccontextmanager
    async def open_until_the_end(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(jobs.close)

    async def task(request: Request) -> Response:
        with responder.request_slot():
            name, params = await _parse(request)
            return await responder.answer(name, params, limits.timeout_s)

    async def status(request: Request) -> Response:
        return responder.respond(200, status={})

    async def tasks(request: Request) -> Response:
        parameters = jobs.implementation.parameters()
        fields = {name: [asdict(parameter) for parameter in parameters.get(name, [])] for name in TASKS}
        return responder.respond(200, tasks=[{"task": name, "parameters": fields[name]} for name in TASKS])

    async def events(request: Request) -> Response:
        return responder.stream(request)

    async def page(request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text("utf-8"), headers={"Content-Security-Policy": _policy()})

    async def refuse(request: Request, error: HTTPException) -> Response:
        return responder.refused(error)

    async def refuse_all(request: Request, error: Exception) -> Response:
        return responder.refused(HTTPException(500, "something went wrong on the server; see its output"))

    return Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Route("/", task, methods=["POST"]),
            Route("/task", task, methods=["POST"]),
            Route("/status", status),
            Route("/tasks", tasks),
            Route("/events", events),
        ],
        middleware=[Middleware(Guard, token=token, max_mb=limits.max_mb, hosts=hosts, refused=responder.refused)],
        exception_handlers={HTTPException: refuse, Exception: refuse_all},
        lifespan=open_until_the_end,
    )


class _Responder:
    """Responses of the routes, which all contain the internal state."""

    def __init__(self, jobs: Jobs):
        self.jobs, self.requests, self.streams = jobs, 0, 0

    def respond(self, code: int, *, status: dict[str, Any] | None = None, **fields: Any) -> JSONResponse:
        """Return a response with the internal state and `fields`.

        With `status`, the parameters of a status request, it also has the implementation's status.
        """
        state = {"internal_state": self.jobs.state}
        return JSONResponse(state | fields | ({} if status is None else {"status": self.jobs.status(status)}), code)

    def ignored(self, code: int, reason: object) -> JSONResponse:
        return self.respond(code, ignored=True, reason=str(reason))

    def refused(self, error: HTTPException) -> Response:
        """Return the response to a refused request, with the state only for clients that may see it."""
        fields = {"ignored": True, "reason": str(error.detail)}
        state = {} if error.status_code in _WITHOUT_STATE else {"internal_state": self.jobs.state}
        return JSONResponse(state | fields, error.status_code, error.headers)

    @contextlib.contextmanager
    def request_slot(self) -> Iterator[None]:
        """Count a request while it is handled, as its body is in memory; raise Refusal if there are too many."""
        if self.requests >= _MAX_REQUESTS:
            raise Refusal(503, "too many requests at once: try again", headers={"Retry-After": "1"})
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def answer(self, task: str, params: dict[str, Any], timeout_s: float) -> Response:
        """Run or start a task and return the response."""
        if task == "status":
            return self.respond(200, status=params)
        try:
            if task == "cancel":
                return self.respond(200, cancelled=await run_in_threadpool(self.jobs.cancel))
            job = await run_in_threadpool(self.jobs.start, task, params)
        except Ignored as reason:
            return self.ignored(409, reason)
        except LabError as reason:
            return self.ignored(400, reason)
        if task in ASYNCHRONOUS:
            return self.respond(202, started=task)
        return await self._result(job, timeout_s)

    async def _result(self, job: Job, timeout_s: float) -> Response:
        try:
            return self.respond(200, result=await asyncio.wait_for(_wait_for(job), timeout_s))
        except TimeoutError:
            if job.task != "test":
                return self.respond(202, started=job.task)
            with contextlib.suppress(Ignored):  # it has just ended
                await run_in_threadpool(self.jobs.cancel, job)
            return self.respond(504, ignored=True, reason=f"test was not done within {timeout_s:g} s")
        except Cancelled as reason:
            return self.ignored(409, reason)
        except Failed as reason:
            return self.respond(422, reason=str(reason))

    def stream(self, request: Request) -> Response:
        """Return server-sent events: `line` for each new line of jobs, `status` for each change of the status."""
        if self.streams >= _MAX_STREAMS:
            raise Refusal(503, "too many streams of events at once: try again", headers={"Retry-After": "5"})
        last = request.headers.get("last-event-id") or request.query_params.get("after", "0")
        first = int(last) if last.isdecimal() and len(last) < 16 else 0
        self.streams += 1
        return _EventStream(self._events(request, first), self._stream_closed)

    def _stream_closed(self) -> None:
        self.streams -= 1

    async def _events(self, request: Request, number: int) -> AsyncIterator[str]:
        sent, waited_s = "", 0.0
        if number > self.jobs.events.last:  # the client read another log before
            number = 0
        yield "retry: 2000\n\n"
        server = getattr(request.app.state, "server", None)
        while True:
            events = []
            for line in self.jobs.events.after(number):
                number = line["id"]
                events.append(f"id: {number}\nevent: line\ndata: {json.dumps(line)}\n\n")
            status = self.respond(200, status={}).body.decode()
            if status != sent:
                sent = status
                events.append(f"event: status\ndata: {status}\n\n")
            waited_s = 0.0 if events else waited_s + _POLL_S
            if waited_s >= _HEARTBEAT_S:
                waited_s, events = 0.0, [": still here\n\n"]
            if events:
                yield "".join(events)
            if server and server.should_exit:
                return
            await asyncio.sleep(_POLL_S)


class _EventStream(StreamingResponse):
    """A stream of events that calls `closed` at its end."""

    def __init__(self, events: AsyncIterator[str], closed: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self._closed = closed

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self._closed()


async def _wait_for(job: Job) -> Any:
    """Return the result of a job, which continues if the caller is cancelled."""
    done = asyncio.wrap_future(job.done)
    done.add_done_callback(
        lambda done: done.cancelled() or done.exception()
    )  # marks the exception as retrieved, also if no client waits
    return await asyncio.shield(done)


async def _parse(request: Request) -> tuple[str, dict[str, Any]]:
    """Return the task and the parameters of a request. Raises Refusal."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_BODY_S):
            if kind == "application/json":
                return _parse_json(await request.body())
            if kind == "multipart/form-data":
                return await _parse_form(request)
    except TimeoutError:
        raise Refusal(408, f"the request did not arrive within {_BODY_S:g} s") from None
    except ClientDisconnect:
        raise Refusal(400, "the client left") from None
    # a page of any site can send forms and plain text without a CORS preflight
    raise Refusal(415, "send application/json, or for the task test multipart/form-data")


def _parse_json(body: bytes) -> tuple[str, dict[str, Any]]:
    message = _parse_object(body, "the request")
    if unknown := sorted(message.keys() - {"task", "parameters"}):
        raise Refusal(400, f"a request has task and parameters, and not {unknown[0][:40]!r}")
    return _check_task(message.get("task")), _parse_parameters(message.get("parameters"))


async def _parse_form(request: Request) -> tuple[str, dict[str, Any]]:
    """Parse a form: the task, the parameters as JSON text, and each file as a further parameter."""
    async with request.form(max_files=4, max_fields=8) as form:
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        files = {name: await value.read() for name, value in form.items() if not isinstance(value, str)}
    if (task := _check_task(fields.get("task"))) != "test":
        raise Refusal(415, "a form is taken for the task test alone: send application/json")
    return task, _parse_parameters(fields.get("parameters")) | files


def _check_task(name: Any) -> str:
    if name not in _NAMES:
        raise Refusal(400, f"task must be one of {', '.join(_NAMES)}")
    return name


def _parse_parameters(value: Any) -> dict[str, Any]:
    """Return parameters that are a JSON object or its text; empty if there are none."""
    if value in (None, ""):
        return {}
    return dict(value) if isinstance(value, dict) else _parse_object(value, "parameters")


def _parse_object(text: Any, what: str) -> dict[str, Any]:
    """Return a JSON object; raise Refusal if the text is none or is nested too deeply."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # Python also reads NaN, which is not JSON
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict) or _too_deep(value):
        raise Refusal(400, f"{what} must be a JSON object, and at most {_MAX_DEPTH} deep")
    return value


def _too_deep(value: Any, left: int = _MAX_DEPTH) -> bool:
    """Return True if lists and objects are nested deeper than _MAX_DEPTH."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_too_deep(item, left - 1) for item in inner)


@cache
def _policy() -> str:
    """Return the Content-Security-Policy: only the page's script, style and server; no framing."""
    page = _PAGE.read_text("utf-8")
    script, style = (_digest(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(page: str, tag: str) -> str:
    """Return the policy's digest of the page's only element with this tag."""
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
