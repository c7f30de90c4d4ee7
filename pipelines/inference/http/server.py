"""Serve an ASGI app with uvicorn: socket, address and shutdown. Used by the API and the worker."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

_SHUTDOWN_S = 8
"""Seconds that requests in progress get on shutdown; Docker kills a container after 10 s."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at `host` and `port` (0: any free one). Raises LabError if that fails."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LabError(f"cannot listen on {host} port {port}: {reason}. Give another --host or --port") from None


def address(listening: socket.socket) -> str:
    """Return the URL of a listening socket; for one that listens on every interface, the loopback URL."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def create_server(app: Starlette, trusted_proxies: Sequence[str] = ()) -> uvicorn.Server:
    """Return a server that is not running yet; setting its `should_exit` stops it.

    The client of a request that comes from one of `trusted_proxies` (rate_limits.parse_proxies) is the last address in
    X-Forwarded-For that is not one of them. The server is also stored as `app.state.server`, so that endless responses
    can stop with it.
    """
    import uvicorn

    from pipelines.inference.http.protocol import LimitedProtocol

    app.state.server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=list(trusted_proxies),
            lifespan="on",
            http=LimitedProtocol,
            ws="auto",
            ws_ping_timeout=None,  # a client whose messages wait to be read is not gone
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )
    return app.state.server


def serve(app: Starlette, listening: socket.socket, trusted_proxies: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or SIGINT, then let requests in progress finish for some seconds.

    Call it in the main thread.
    """
    server, signals = create_server(app, trusted_proxies), (signal.SIGINT, signal.SIGTERM)
    # uvicorn raises the signal again after its shutdown: without our handler it would kill the process
    previous = {number: signal.signal(number, server.handle_exit) for number in signals}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
