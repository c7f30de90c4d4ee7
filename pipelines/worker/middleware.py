"""What is asked of a request before it is believed: where it comes from, a token, a size.

Whoever opens a page of the web lets its scripts send requests to this machine, too. They cannot read the answers, but a
job would be begun all the same. So what a browser tells of where a request comes from is looked at: `Sec-Fetch-Site`;
and without a token also `Origin`, which has to be this very server, and `Host`, since a name that the page's owner
points to 127.0.0.1 makes his page a page of this server (DNS rebinding). Programs send none of these but `Host`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipelines.inference.api.middleware import check_token, measured
from pipelines.inference.api.schemas import Refusal

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
"""Of every answer."""


class Guard:
    """ASGI middleware around the app. The page itself is open to all: it holds nothing of the worker's."""

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

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in _HEADERS.items() if n not in own)]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, measured(scope, receive, self.max_mb), told)
        except Refusal as refusal:
            await self.refused(refusal)(scope, receive, told)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self.token:
            self._check_host(headers.get(b"host", ""))
        if (scope["method"], scope["path"]) in (("GET", "/"), ("HEAD", "/")):
            return
        if headers.get(b"sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refusal(403, "a page of another site may not use this worker")
        if self.token:
            return check_token(scope, self.token)
        origin, host = headers.get(b"origin"), headers.get(b"host", "")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            raise Refusal(403, "a page of another site may not use this worker")

    def _check_host(self, host: str) -> None:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name in self.hosts or name.endswith(".localhost") or _is_address(name):
            return
        raise Refusal(403, "this worker is not known by that name: its operator may give it with --allow-host")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
