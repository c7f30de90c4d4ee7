"""A socket, uvicorn on it, and a clean end."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette


_GRACE_S = 8
"""Requests that are being answered when the server is asked to end have so long; Docker kills after 10 s."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises LabError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LabError(f"cannot listen on {host} port {port}: {reason}. Give another --host or --port") from None


def address(listening: socket.socket) -> str:
    """The address of a listening socket as a URL; what listens everywhere is reached on the loopback, too."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_of(app: Starlette) -> uvicorn.Server:
    """The server, not yet running; it ends where `should_exit` is set. The app finds it as `app.state.server`: an
    answer that has no end of its own is to end with it."""
    import uvicorn

    app.state.server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    return app.state.server


def serve(app: Starlette, listening: socket.socket) -> None:
    """Answer requests until SIGTERM or SIGINT; what is being answered then is brought to its end, for some seconds.

    Call it in the main thread.
    """
    server, signals = server_of(app), (signal.SIGINT, signal.SIGTERM)
    # uvicorn raises the signal that ended it once more: without a handler that would be a death, not an end
    before = {sent: signal.signal(sent, server.handle_exit) for sent in signals}
    try:
        server.run(sockets=[listening])
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
