"""What is asked of a request before its body is believed: a token, a free place, a size, a time."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

from pipelines.inference.api.queue import SLOWEST_BYTES_PER_S, Desk
from pipelines.inference.api.schemas import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


_NOT_AGAIN = {"x-should-retry": "false"}
"""OpenAI's clients would otherwise ask for the same once more."""
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
        limits, answering = self.desk.limits, False

        async def told(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        with self.desk.place():
            try:
                async with asyncio.timeout(limits.timeout_s):
                    await self.app(scope, measured(scope, receive, limits.max_mb, limits.sending_s), told)
            except TimeoutError:
                if answering:
                    raise
                said = f"not done within {limits.timeout_s:g} s: send a shorter recording"
                raise Refusal(504, said, "timeout", headers=_NOT_AGAIN) from None


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


def measured(scope: Scope, receive: Receive, max_mb: float, sending_s: float | None = None) -> Receive:
    """`receive` that raises Refusal (413) as soon as more has come than may; what a header says is not believed.

    With `sending_s` also (408) where less has come than must by now (desk.Limits).
    """
    most, come, coming = int(max_mb * 1e6), 0, sending_s is not None
    loop = asyncio.get_running_loop()
    begun = loop.time()
    too_large = Refusal(413, f"the request is too large: at most {max_mb:g} MB", "file_too_large", param="file")
    if _content_length(scope) > most:
        raise too_large

    async def counted() -> Message:
        nonlocal come, coming
        ends = begun + sending_s + come / SLOWEST_BYTES_PER_S if coming else None
        try:
            async with asyncio.timeout_at(ends):
                message = await receive()
        except TimeoutError:
            raise Refusal(408, "the request came too slowly", "timeout", headers=_NOT_AGAIN) from None
        come += len(message.get("body", b""))
        coming = coming and message.get("more_body", False)
        if come > most:
            raise too_large
        return message

    return counted


def _content_length(scope: Scope) -> int:
    told = dict(scope["headers"]).get(b"content-length", b"0")
    return int(told) if told.isdigit() else 0
