"""Connect to public addresses only.

A name is resolved once, all of its addresses are checked, and the connection is made to a checked address itself. So a
name that resolves to another address a moment later (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import queue
import socket
import threading
import time
from typing import Any

from pipelines.infra.downloads.urls import DownloadError, Request

CONNECT_S = 15.0
"""Time limit of a connection to one address."""
IDLE_S = 30.0
"""Time limit of a server that sends nothing."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15"),
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        ),
    )
)
"""Ranges that not every Python version knows as special: carriers' NAT, benchmarks, tunnels, documentation."""


class Deadline:
    """The end of a download."""

    def __init__(self, timeout_s: float):
        self.timeout_s, self._ends_s = timeout_s, time.monotonic() + timeout_s

    def remaining_s(self, at_most_s: float = float("inf")) -> float:
        """Return the seconds that are left, at most `at_most_s`. Raises TimeoutError if there are none."""
        remaining = self._ends_s - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return min(remaining, at_most_s)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._ends_s


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet, also an IPv4 address inside an IPv6 address."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        if ip not in _GLOBAL_UNICAST:
            return False
    is_special = any(ip in network for network in _SPECIAL if network.version == ip.version)
    return ip.is_global and not (is_special or ip.is_multicast or ip.is_reserved)


def connect(request: Request, deadline: Deadline, allow_private: bool = False) -> socket.socket:
    """Return a connection to the host of a request, encrypted if its scheme is https.

    Raises DownloadError, and TimeoutError after the deadline.
    """
    addresses = _resolve(request, deadline)
    if not allow_private and not all(is_public(address[4][0]) for address in addresses):
        raise refusal(request)
    error: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(deadline.remaining_s(CONNECT_S))
            connection.connect(address)
            return _encrypt(connection, request) if request.scheme == "https" else connection
        except OSError as failure:
            connection.close()
            error = failure
            deadline.remaining_s()
        except BaseException:
            connection.close()
            raise
    raise _unreachable(request, error)


def refusal(request: Request) -> DownloadError:
    """Return the error of a host that is not public; it does not tell to which address the name resolves."""
    return DownloadError(
        "address", f"{request.url} is not fetched: {request.host} is not an address of the public internet"
    )


def _resolve(request: Request, deadline: Deadline) -> list[Any]:
    """Return the addresses of the host as getaddrinfo does, which itself has no time limit."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            results.put(socket.getaddrinfo(request.host, request.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            results.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        addresses = results.get(timeout=deadline.remaining_s(IDLE_S))
    except queue.Empty:
        deadline.remaining_s()
        addresses = TimeoutError()
    if isinstance(addresses, Exception) or not addresses:
        raise DownloadError(
            "unreachable", f"{request.url} cannot be fetched: the name {request.host} is unknown. Check its spelling"
        )
    return addresses


def _encrypt(connection: socket.socket, request: Request) -> socket.socket:
    import ssl

    try:
        return ssl.create_default_context().wrap_socket(connection, server_hostname=request.host)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise DownloadError(
            "unreachable",
            f"{request.url} cannot be fetched: the certificate of {request.host} is not trusted "
            f"({error.verify_message}). Trust its authority with SSL_CERT_FILE, or download the file in another way",
        ) from None
    except ssl.SSLError as error:
        connection.close()
        raise DownloadError(
            "unreachable",
            f"{request.url} cannot be fetched: no encrypted connection to {request.host} ({error.reason or 'broken'})",
        ) from None


def _unreachable(request: Request, error: OSError | None) -> DownloadError:
    from urllib.request import getproxies

    reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or "no connection"
    hint = ""
    with contextlib.suppress(OSError):
        if {"http", "https", "all"} & getproxies().keys():
            hint = ". Proxies are not used, since they may reach private addresses: download the file in another way"
    return DownloadError("unreachable", f"{request.url} cannot be reached ({reason}){hint}")
