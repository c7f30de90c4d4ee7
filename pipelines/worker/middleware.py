"""ASGI middleware of the worker: host, origin, token and size of requests, and headers of responses."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from pipelines.inference.http.guard import (
    Refusal,
    check_fetch_site,
    check_host,
    check_origin,
    check_token,
    limit_body,
)

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


_HEADERS = {
    b"cache-control": b"no-store",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}
"""Headers of every response."""


class Guard:
    """ASGI middleware around the app. The page is open to all: it contains no data of the worker."""

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        max_mb: float,
        hosts: Collection[str],
        refused: Callable[[Refusal], Response],
    ):
        self.app, self.token, self.max_mb, self.refused = app, token.strip(), max_mb, refused
        self.hosts = {"localhost", socket.gethostname().lower(), *map(str.lower, hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                existing = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in _HEADERS.items() if n not in existing)]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, limit_body(scope, receive, int(self.max_mb * 1e6)), send_with_headers)
        except Refusal as refusal:
            await self.refused(refusal)(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        if not self.token:
            check_host(scope, self.hosts)
        if (scope["method"], scope["path"]) in (("GET", "/"), ("HEAD", "/")):
            return
        check_fetch_site(scope)
        if self.token:
            check_token(scope, self.token)
        else:
            check_origin(scope)
