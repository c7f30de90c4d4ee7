"""ASGI middleware of the API: token, rate, free slot, size and time of a request, checked before its body is read."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.inference.api.event_stream import DEADLINE, EventStream
from pipelines.inference.api.queue import TranscriptionQueue
from pipelines.inference.http.guard import NO_RETRY, Refusal, check_page, check_token, limit_body
from pipelines.inference.http.rate_limits import BUDGET, RateLimiter, client_key

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PUBLIC_PATHS = {"/health", "/openapi.json", "/docs"}
"""Paths that need no token."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use the server, and how much."""

    token: str = ""
    """Required as a bearer token, if it is not empty."""
    origins: Collection[str] = ()
    """Origins whose pages may call the API from a browser, such as `https://my.page`; `*` for all."""
    root_path: str = ""
    """Prefix under which a proxy serves the API, such as `/speech`; the proxy may have removed it or not."""
    requests_per_minute: float = 0.0
    """Of one address (rate_limits.address_key); 0 is no limit."""
    audio_s_per_minute: float = 0.0
    """Seconds of audio per minute of one address; 0 is no limit."""


class ApiMiddleware:
    """Refuse requests without the token or above the rate limits, and let those to `queued_paths` take a slot."""

    def __init__(self, app: ASGIApp, queue: TranscriptionQueue, access: Access, queued_paths: set[str]):
        self.app, self.queue, self.access, self.queued_paths = app, queue, access, queued_paths
        self._limiter = RateLimiter(access.requests_per_minute, access.audio_s_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        scope = {**scope, "path": self._route_path(scope["path"])}
        try:
            if scope["path"] not in PUBLIC_PATHS:
                check_token(scope, self.access.token)
            if scope["type"] == "websocket":
                check_page(scope, self.access.origins)
                await self.app(self._admit(scope), receive, send)
            elif scope["path"] in self.queued_paths and scope["method"] == "POST":
                await self._call_in_slot(self._admit(scope), receive, send)
            else:  # HEAD is as good as GET; the server itself leaves out its body
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                await self.app({**scope, "method": method}, receive, send)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)

    def _route_path(self, path: str) -> str:
        """Return a path without the prefix of a proxy and without a slash at its end."""
        prefix = self.access.root_path
        if prefix and (path + "/").startswith(prefix + "/"):
            path = path[len(prefix) :]
        return path.rstrip("/") or "/"

    def _admit(self, scope: Scope) -> Scope:
        """Count a request, and add the budget of its client to its scope."""
        return {**scope, BUDGET: self._limiter.admit(client_key(scope))}

    async def _call_in_slot(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits, has_started = self.queue.limits, False

        async def send_and_record(message: Message) -> None:
            nonlocal has_started
            if not has_started and dict(message.get("headers", ())).get(b"content-type", b"").startswith(_EVENTS):
                timeout.reschedule(None)  # it ends in time itself, with an event that says so
            has_started = True
            await send(message)

        with self.queue.slot():
            try:
                async with asyncio.timeout(limits.timeout_s) as timeout:
                    scope[DEADLINE] = timeout.when()
                    receive = limit_body(scope, receive, int(limits.max_mb * 1e6), limits.sending_s)
                    await self.app(scope, receive, send_and_record)
            except TimeoutError:
                if has_started:
                    raise
                message = f"not done within {limits.timeout_s:g} s: send a shorter recording"
                raise Refusal(504, message, "timeout", headers=NO_RETRY) from None


_EVENTS = EventStream.media_type.encode()
