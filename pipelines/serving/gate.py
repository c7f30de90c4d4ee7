"""What is asked of a request before its body is believed: a token, a free place, a size, a time."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

from pipelines.serving.desk import Desk
from pipelines.serving.shapes import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = {"/health", "/openapi.json", "/docs"}
"""Addresses that answer without a token."""


class Gate:
    """ASGI middleware around the app. `heavy` are the addresses whose requests take a place at the desk."""

    def __init__(self, app: ASGIApp, desk: Desk, token: str, heavy: set[str]):
        self.app, self.desk, self.token, self.heavy = app, desk, token, heavy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            if scope["path"] not in OPEN:
                check_token(scope, self.token)
            if scope["path"] in self.heavy and scope["method"] == "POST":
                await self._in_turn(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeout_s, answering = self.desk.limits.timeout_s, False

        async def told(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        with self.desk.place():
            try:
                async with asyncio.timeout(timeout_s):
                    await self.app(scope, measured(scope, receive, self.desk.limits.max_mb), told)
            except TimeoutError:
                if answering:
                    raise
                # OpenAI's clients would otherwise ask for the same once more
                headers = {"x-should-retry": "false"}
                raise Refusal(
                    504, f"not done within {timeout_s:g} s: send a shorter recording", "timeout", headers=headers
                ) from None


def check_token(scope: Scope, token: str) -> None:
    """Raises Refusal (401) where `token` is not empty and the request does not send it as bearer."""
    wanted = token.strip().encode()
    if not wanted:
        return
    told = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, sent = told.partition(b" ")
    if not hmac.compare_digest(sent.strip(), wanted) or scheme.lower() != b"bearer":
        raise Refusal(
            401,
            "this server wants its token: send the header Authorization: Bearer TOKEN",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def measured(scope: Scope, receive: Receive, max_mb: float) -> Receive:
    """`receive` that raises Refusal (413) as soon as more has come than may; what a header says is not believed."""
    most, come = int(max_mb * 1e6), 0
    too_large = Refusal(413, f"the request is too large: at most {max_mb:g} MB", "file_too_large", param="file")
    if _content_length(scope) > most:
        raise too_large

    async def counted() -> Message:
        nonlocal come
        message = await receive()
        come += len(message.get("body", b""))
        if come > most:
            raise too_large
        return message

    return counted


def _content_length(scope: Scope) -> int:
    told = dict(scope["headers"]).get(b"content-length", b"0")
    return int(told) if told.isdigit() else 0
