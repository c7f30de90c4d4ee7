"""Connections of uvicorn with limits on the head of a request. Used by the API, the worker and the app.

uvicorn itself gives a head any amount of time, so a few hundred half-sent ones would use up the process's files.
"""

from __future__ import annotations

import itertools

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0
"""Time for the head of a request (request line and headers) to arrive."""
MAX_WAITING = 100
"""Connections that may wait for a head at the same time; a further one closes the one that waited longest."""

_order = itertools.count()


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 with limits on heads: their time, their number and, by h11, their size (16 KiB)."""

    _waiting_number: int | None = None
    """Place in the order of waiting; a time is not enough, because uvloop's clock stands still while it accepts."""
    _timer = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait_for_head()
        waiting = [one for one in self.connections if getattr(one, "_waiting_number", None) is not None]
        if len(waiting) > MAX_WAITING:
            first = min(waiting, key=lambda one: one._waiting_number)
            first._stop_waiting()  # its `connection_lost` comes later than the next connections
            first.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting_number is None:  # the next request of this connection
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._waiting_number = next(_order)
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._waiting_number = None
        if self._timer is not None:
            self._timer.cancel()
