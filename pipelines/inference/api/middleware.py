"""ASGI middleware of the API: token, free slot, size and time of a request, checked before its body is read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pipelines.inference.api.queue import TranscriptionQueue
from pipelines.inference.http.guard import NO_RETRY, Refusal, check_token, limit_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PUBLIC_PATHS = {"/health", "/openapi.json", "/docs"}
"""Paths that need no token."""


class ApiMiddleware:
    """Refuse requests without the token, and limit those to `queued_paths`, which take a slot of the queue."""

    def __init__(self, app: ASGIApp, queue: TranscriptionQueue, token: str, queued_paths: set[str]):
        self.app, self.queue, self.token, self.queued_paths = app, queue, token, queued_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # a slash at the end and HEAD are as good as none and GET; the server itself leaves out the body for HEAD
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "path": scope["path"].rstrip("/") or "/", "method": method}
        try:
            if scope["path"] not in PUBLIC_PATHS:
                check_token(scope, self.token)
            if scope["path"] in self.queued_paths and scope["method"] == "POST":
                await self._call_in_slot(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)

    async def _call_in_slot(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits, has_started = self.queue.limits, False

        async def send_and_record(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        with self.queue.slot():
            try:
                async with asyncio.timeout(limits.timeout_s):
                    receive = limit_body(scope, receive, int(limits.max_mb * 1e6), limits.sending_s)
                    await self.app(scope, receive, send_and_record)
            except TimeoutError:
                if has_started:
                    raise
                message = f"not done within {limits.timeout_s:g} s: send a shorter recording"
                raise Refusal(504, message, "timeout", headers=NO_RETRY) from None
