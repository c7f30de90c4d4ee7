"""Limits per client address."""

from __future__ import annotations

import httpx
import pytest

from pipelines.inference.api.middleware import Access
from pipelines.inference.http import rate_limits
from pipelines.inference.http.rate_limits import RateLimiter, TooManyRequests, address_key, parse_proxies
from pipelines.infra.errors import LabError
from tests.inference.api.conftest import toy, wav  # noqa: F401  fixtures
from tests.inference.api.running_server import refusal, running

PATH = "/v1/audio/transcriptions"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_above_the_limit_wait_for_the_refill(clock):
    limiter = RateLimiter(6, 0, clock)
    for _ in range(6):
        limiter.admit("a")
    with pytest.raises(TooManyRequests, match="too many requests .* try again in 10 s") as caught:
        limiter.admit("a")
    assert caught.value.headers == {"Retry-After": "10"}
    limiter.admit("b")
    clock.now_s = 10.0
    limiter.admit("a")
    with pytest.raises(TooManyRequests):
        limiter.admit("a")


def test_audio_is_charged_afterwards_and_can_be_owed(clock):
    limiter = RateLimiter(0, 60, clock)
    budget = limiter.admit("a")
    budget.charge(120.0)
    with pytest.raises(TooManyRequests, match="seconds of audio from your address in a minute: try again in 61 s"):
        limiter.admit("a")
    with pytest.raises(TooManyRequests):
        budget.check()
    clock.now_s = 61.0
    limiter.admit("a")


def test_limit_of_zero_is_none(clock):
    limiter = RateLimiter(0, 0, clock)
    for _ in range(1000):
        limiter.admit("a").charge(1e6)


def test_limit_below_one_request_a_minute_admits_one(clock):
    limiter = RateLimiter(0.5, 0, clock)
    limiter.admit("a")
    with pytest.raises(TooManyRequests, match="in 120 s"):
        limiter.admit("a")


def test_number_of_remembered_addresses_is_bounded(clock, monkeypatch):
    monkeypatch.setattr(rate_limits, "MAX_ADDRESSES", 3)
    limiter = RateLimiter(1, 0, clock)
    for name in "abcd":
        limiter.admit(name)
    assert list(limiter._budgets) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("x" * 999, "x" * 64),
        ("", ""),
        (None, ""),
    ],
)
def test_address_counts_by_its_network(host, key):
    assert address_key(host) == key


def test_proxies_are_addresses_and_networks():
    assert parse_proxies(["10.0.0.0/8, ::1", "192.168.1.1"]) == ["10.0.0.0/8", "::1", "192.168.1.1"]
    for wrong in ("*", "proxy.local", "10.0.0.1/8", "10.0.0.0/40"):
        with pytest.raises(LabError, match="a trusted proxy is an address"):
            parse_proxies([wrong])


def test_default_limits_apply_to_open_servers_only():
    assert rate_limits.default_limits(is_open=False) == (0.0, 0.0)
    assert all(limit > 0 for limit in rate_limits.default_limits(is_open=True))


# ---- in the API


def post(url: str, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(url + PATH, files={"file": content}, headers=headers, timeout=60)


def test_api_refuses_requests_above_the_limit(toy, wav):  # noqa: F811
    with running(toy, access=Access(requests_per_minute=2)) as url:
        assert [post(url, wav).status_code for _ in range(2)] == [200, 200]
        late = post(url, wav)
        assert "your address" in refusal(late, 429, code="rate_limit_exceeded")
        assert 1 <= int(late.headers["retry-after"]) <= 60
        assert post(url, wav, **{"X-Forwarded-For": "1.2.3.4"}).status_code == 429, "anyone can send this header"
        assert httpx.get(url + "/v1/models").status_code == httpx.get(url + "/health").status_code == 200


def test_api_charges_audio_also_of_streams(toy, wav):  # noqa: F811
    for data in ({}, {"stream": "true"}):
        with running(toy, access=Access(audio_s_per_minute=1.5)) as url:
            assert httpx.post(url + PATH, files={"file": wav}, data=data, timeout=60).status_code == 200
            assert "seconds of audio" in refusal(post(url, wav), 429)
            assert "seconds of audio" in refusal(httpx.post(url + "/predict", content=wav), 429)


def test_trusted_proxy_names_the_client(toy, wav):  # noqa: F811
    with running(toy, access=Access(requests_per_minute=1), proxies=["127.0.0.1"]) as url:
        first, second = {"X-Forwarded-For": "6.6.6.6, 1.2.3.4"}, {"X-Forwarded-For": "1.2.3.4"}
        assert post(url, wav, **first).status_code == 200
        assert post(url, wav, **second).status_code == 429, "what the client itself sent is left of it"
        assert post(url, wav, **{"X-Forwarded-For": "6.6.6.6"}).status_code == 200
