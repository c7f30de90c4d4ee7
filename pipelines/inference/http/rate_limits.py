"""Limits per client's address: requests, and seconds of audio that were processed, per minute.

Each address has two budgets that refill evenly and hold at most a minute's worth. A request is refused while its
address has no request or no audio left. The duration of a recording is not known before it is decoded, so audio is
charged as it is processed: a budget may go below zero, and the next request waits until it is above.
"""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.inference.http.guard import Refusal
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from starlette.types import Scope

REQUESTS_PER_MINUTE, AUDIO_S_PER_MINUTE = 60.0, 600.0
"""Limits of a server that anyone can use, if its operator states none."""
PRIVATE_NETWORKS = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1", "fc00::/7")
MAX_ADDRESSES = 10_000
"""Addresses that are remembered; the one that was used longest ago is forgotten first."""
_IPV6_PREFIX = 64
"""Bits of an IPv6 address that count: a subscriber usually has all addresses of such a network."""

BUDGET = "lab.budget"
"""Key of a request's scope: the ClientBudget of its client."""


class TooManyRequests(Refusal):
    """A request above the limits of its address (429); `retry_s` is the time until one is accepted."""

    def __init__(self, what: str, retry_s: int):
        message = f"too many {what} from your address in a minute: try again in {retry_s} s"
        super().__init__(429, message, "rate_limit_exceeded", headers={"Retry-After": str(retry_s)})
        self.retry_s = retry_s


@dataclass
class _Budget:
    requests: float
    audio_s: float
    updated_s: float


class RateLimiter:
    """Budgets of addresses. Thread-safe. A limit of 0 is none."""

    def __init__(
        self, requests_per_minute: float, audio_s_per_minute: float, clock: Callable[[], float] = time.monotonic
    ):
        self.requests_per_minute, self.audio_s_per_minute, self._clock = requests_per_minute, audio_s_per_minute, clock
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, address: str) -> ClientBudget:
        """Count a request of `address` (an `address_key`) and return its budget of audio. Raises TooManyRequests."""
        self.check(address)
        with self._lock:
            self._refill(address).requests -= 1
        return ClientBudget(self, address)

    def check(self, address: str) -> None:
        """Raise TooManyRequests if an address may not send another request now."""
        self.check_audio(address)
        with self._lock:
            requests = self._refill(address).requests
        if self.requests_per_minute and requests < 1:
            raise TooManyRequests("requests", _wait_s(1 - requests, self.requests_per_minute))

    def check_audio(self, address: str) -> None:
        """Raise TooManyRequests if the audio of an address is used up."""
        with self._lock:
            audio_s = self._refill(address).audio_s
        if self.audio_s_per_minute and audio_s <= 0:
            raise TooManyRequests("seconds of audio", _wait_s(1 - audio_s, self.audio_s_per_minute))

    def charge_audio(self, address: str, seconds: float) -> None:
        """Take seconds of audio from the budget of an address."""
        with self._lock:
            self._refill(address).audio_s -= seconds

    def _refill(self, address: str) -> _Budget:
        """Return the current budget of an address; the lock must be held."""
        now_s = self._clock()
        most = max(self.requests_per_minute, 1)
        budget = self._budgets.pop(address, None) or _Budget(most, self.audio_s_per_minute, now_s)
        minutes = (now_s - budget.updated_s) / 60
        budget.requests = min(budget.requests + minutes * self.requests_per_minute, most)
        budget.audio_s = min(budget.audio_s + minutes * self.audio_s_per_minute, self.audio_s_per_minute)
        budget.updated_s = now_s
        self._budgets[address] = budget
        if len(self._budgets) > MAX_ADDRESSES:
            self._budgets.popitem(last=False)
        return budget


@dataclass(frozen=True)
class ClientBudget:
    """The budget of audio of one address."""

    limiter: RateLimiter
    address: str

    def check(self) -> None:
        """Raise TooManyRequests if it is used up."""
        self.limiter.check_audio(self.address)

    def charge(self, seconds: float) -> None:
        """Take seconds of audio from it."""
        self.limiter.charge_audio(self.address, seconds)


def address_key(host: str | None) -> str:
    """Return what a client's address counts as: IPv4 as it is, IPv6 by its first 64 bits."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return (host or "")[:64]
    if address.version == 6 and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))


def client_key(scope: Scope) -> str:
    """Return the `address_key` of the client of a request."""
    return address_key((scope.get("client") or ("",))[0])


def parse_proxies(given: list[str]) -> list[str]:
    """Return addresses and networks of proxies whose X-Forwarded-For is believed. Raises LabError."""
    proxies = [item for text in given for item in text.replace(",", " ").split()]
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            expected = "an address such as 10.0.0.1 or a network such as 10.0.0.0/8"
            raise LabError(f"a trusted proxy is {expected}, got {proxy!r}: {error}") from None
    return proxies


def default_limits(is_open: bool) -> tuple[float, float]:
    """Return the default limits: none unless the server `is_open` to other machines without a token."""
    return (REQUESTS_PER_MINUTE, AUDIO_S_PER_MINUTE) if is_open else (0.0, 0.0)


def _wait_s(missing: float, per_minute: float) -> int:
    return max(math.ceil(missing / per_minute * 60), 1)
