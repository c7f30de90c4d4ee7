"""Checks of HTTP requests before their bodies are used: token, origin, size and sending time.

Shared by the middleware of the API, the app and the worker.

A web page that somebody opens can send requests to servers on the same machine. It cannot read the responses, but a
request would still have an effect. `check_fetch_site`, `check_origin` and `check_host` refuse such requests by the
headers that browsers add.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from pipelines.infra.errors import shortened

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

MIN_BYTES_PER_S = 10_000
"""Slowest accepted upload, that of a poor mobile connection."""
NO_RETRY = {"x-should-retry": "false"}
"""Response header that stops OpenAI's clients from sending the same request again."""
KEY_PROTOCOL = "openai-insecure-api-key."
"""Prefix of the WebSocket sub-protocol in which a page sends its token: browsers let it send no headers."""


class Refusal(HTTPException):
    """A refused request: HTTP status, one line of text, an error code and the field at fault, if there is one."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, shortened(message), headers)
        self.code, self.param = code, shortened(param) if param else param

    def as_dict(self) -> dict[str, str | None]:
        """Return OpenAI's error object."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"message": self.detail, "type": kind, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """Return the response in the format of OpenAI's API; it also refuses the handshake of a WebSocket."""
        return JSONResponse({"error": self.as_dict()}, self.status_code, self.headers)


def header(scope: Scope, name: str, default: str = "") -> str:
    """Return the value of a request header (lower-case `name`), or `default` if it is absent."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name.encode()), default)


def check_token(scope: Scope, token: str) -> None:
    """Raise Refusal (401) if `token` is not empty and the request does not send it as a bearer token.

    A WebSocket may send it in a sub-protocol (KEY_PROTOCOL) instead.
    """
    expected = token.strip().encode()
    if not expected:
        return
    scheme, _, credentials = header(scope, "authorization").encode("latin-1").partition(b" ")
    keys = [name.removeprefix(KEY_PROTOCOL) for name in scope.get("subprotocols", ()) if name.startswith(KEY_PROTOCOL)]
    if keys and not scheme:
        scheme, credentials = b"bearer", keys[0].encode()
    if not hmac.compare_digest(credentials.strip(), expected) or scheme.lower() != b"bearer":
        raise Refusal(
            401,
            "this server requires its token: send the header Authorization: Bearer TOKEN",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_fetch_site(scope: Scope, allowed: Collection[str] = ("same-origin", "none")) -> None:
    """Raise Refusal (403) if a browser reports by Sec-Fetch-Site that a page of another site sent the request."""
    if header(scope, "sec-fetch-site", "none") not in allowed:
        raise _from_another_site()


def check_origin(scope: Scope) -> None:
    """Raise Refusal (403) if the Origin header names another server than the Host header."""
    host = header(scope, "host").lower()
    if header(scope, "origin", f"http://{host}").lower().partition("://")[2] != host:
        raise _from_another_site()


def check_page(scope: Scope, allowed: Collection[str]) -> None:
    """Raise Refusal (403) for a WebSocket of a page that is not of this server and not of the origins `allowed`.

    Browsers let every page open WebSockets to every server, and add its origin. Other clients send none.
    """
    if "*" not in allowed and header(scope, "origin") not in ("", *allowed):
        check_origin(scope)


def check_host(scope: Scope, allowed: Collection[str]) -> None:
    """Raise Refusal (403) unless the Host header is an IP address, a *.localhost name or one of `allowed`.

    This prevents DNS rebinding: a site whose name points to 127.0.0.1 would otherwise be of the same origin.
    """
    try:
        name = urlsplit(f"//{header(scope, 'host')}").hostname or ""
    except ValueError:
        name = ""
    if name not in allowed and not name.endswith(".localhost") and not _is_ip_address(name):
        raise Refusal(403, "the Host header names an unknown host: the server's operator can add it with --allow-host")


def limit_body(scope: Scope, receive: Receive, max_bytes: int, sending_s: float | None = None) -> Receive:
    """Return a `receive` that raises Refusal (413) as soon as more than `max_bytes` have arrived.

    A larger Content-Length is refused at once. With `sending_s`, the body may take that long to arrive plus one second
    per MIN_BYTES_PER_S; otherwise Refusal (408) is raised.
    """
    n_bytes, is_incomplete = 0, sending_s is not None
    loop = asyncio.get_running_loop()
    started = loop.time()
    too_large = Refusal(
        413, f"the request is too large: at most {max_bytes / 1e6:g} MB", "file_too_large", param="file"
    )
    length = header(scope, "content-length")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large

    async def limited() -> Message:
        nonlocal n_bytes, is_incomplete
        deadline = started + sending_s + n_bytes / MIN_BYTES_PER_S if is_incomplete else None
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise Refusal(408, "the request arrived too slowly", "timeout", headers=NO_RETRY) from None
        n_bytes += len(message.get("body", b""))
        is_incomplete = is_incomplete and message.get("more_body", False)
        if n_bytes > max_bytes:
            raise too_large
        return message

    return limited


async def read_body(receive: Receive, timeout_s: float) -> bytes:
    """Return the whole body. Raises Refusal: 408 after `timeout_s`, 400 if the client disconnects."""
    parts, is_incomplete = [], True
    try:
        async with asyncio.timeout(timeout_s):
            while is_incomplete:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "the client disconnected")
                parts.append(message.get("body", b""))
                is_incomplete = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(408, f"the request did not arrive within {timeout_s:g} s", "timeout") from None
    return b"".join(parts)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _from_another_site() -> Refusal:
    return Refusal(403, "a page of another site may not use this server", "cross_site")


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
