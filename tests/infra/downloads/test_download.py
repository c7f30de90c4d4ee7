"""Downloads: public addresses only, limits in bytes and seconds, and one line without secrets for every failure."""

from __future__ import annotations

import io
import socket

import pytest
from servers.loopback import Answer
from servers.recordings import Recordings, treated_as_public

from pipelines.infra.downloads import addresses, download
from pipelines.infra.downloads.download import Limits
from pipelines.infra.downloads.urls import DownloadError, Url

SECRETS = ("hemligt", "s3cret", "anna")


@pytest.fixture
def server(monkeypatch):
    server = Recordings()
    with treated_as_public(monkeypatch):
        yield server
    server.close()


@pytest.fixture
def get(server):
    """`get("/talk.wav", max_mb=1)`: the bytes at a path of the server, or the DownloadError."""

    def fetch(path: str, **limits):
        text = path if "://" in path else server.url(path)
        options = {"more_ports": (server.port,), "timeout_s": 5.0, **limits}
        try:
            download.fetch(Url(text), file := io.BytesIO(), Limits(**options))
        except DownloadError as error:
            line = str(error)
            assert "\n" not in line and not any(secret in line for secret in SECRETS), line
            return error
        return file.getvalue()

    return fetch


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "192.88.99.1", "192.0.0.8"),
        *("::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "2002:7f00:1::", "2001::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "::7f00:1"),
        *("3fff::1", "100::1", "5f00::1", "fe80::1%eth0", "0:0:0:0:0:ffff:0a00:0001"),
    ],
)
def test_special_address_is_not_public(address: str):
    assert not addresses.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "100.128.0.1"])
def test_ordinary_address_is_public(address: str):
    assert addresses.is_public(address)


def test_file_is_downloaded(server, get):
    server.files["/a b/å.wav"] = b"sound"
    assert get("/a b/å.wav") == b"sound"
    server.redirect("/there", "/a%20b/%C3%A5.wav")
    assert get("/there") == b"sound"
    assert server.received[-1].headers["host"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("path", "reason", "words"),
    [
        ("/none?token=hemligt", "status", "no such file"),
        ("/page", "html", "a web page"),
        ("/page-without-type", "html", "a web page"),
        ("/zip", "broken", "compresses"),
        ("/short", "broken", "after 9 of 1000 bytes"),
        ("/noise", "broken", "as HTTP requires"),
        ("/nothing", "broken", "is empty"),
        ("/loop", "status", "more than 5 times"),
        ("/nowhere", "status", "without an address"),
        ("/to-file", "address", "http or https"),
        ("/to-private", "address", "public internet"),
        ("/to-port", "address", "only the ports"),
        ("/fails", "status", "the server fails (503)"),
    ],
)
def test_failure_is_one_line(server, get, path: str, reason: str, words: str):
    html = b"<!DOCTYPE html><title>x</title>"
    server.files |= {"/page-without-type": b"\n" + html, "/nothing": b""}
    server.files["/page"] = lambda request: raise_(Answer(200, b"<p>x", {"Content-Type": "text/html; charset=utf-8"}))
    server.files["/fails"] = lambda request: raise_(Answer(503))
    server.redirect("/loop", "/loop")
    server.redirect("/nowhere", "")
    server.redirect("/to-file", "file:///etc/passwd")
    server.redirect("/to-private", f"http://anna:s3cret@127.0.0.2:{server.port}/?token=hemligt")
    server.redirect("/to-port", "http://127.0.0.1:22/")
    error = get(path)
    assert (error.reason, words in str(error)) == (reason, True), error


@pytest.mark.parametrize("path", ["/drip", "/slow-head", "/mute"])
def test_slow_server_ends_at_the_time_limit(get, path: str):
    error = get(path, timeout_s=0.3)
    assert (error.reason, str(error).endswith("within 0.3 s")) == ("too_slow", True)


def test_body_ends_at_the_size_limit(server, get):
    server.files["/large"] = bytes(2_000_000)
    assert get("/endless", max_mb=0.5).reason == "too_large"
    assert get("/large", max_mb=1).reason == "too_large"
    assert len(get("/large", max_mb=2)) == 2_000_000


def raise_(answer: Answer):
    raise answer


def test_broken_download_continues_if_server_can(server, get):
    content = bytes(range(256)) * 40
    parts = []

    def in_parts(request):
        start = int(request.headers.get("range", "bytes=0-")[6:-1])
        parts.append((start, request.headers.get("if-range")))
        headers = {"ETag": '"v1"', "Content-Length": str(len(content) - start)}
        headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        raise Answer(206 if start else 200, content[start : start + 6_000], headers)

    server.files["/long.wav"] = in_parts
    server.fault("GET /long.wav", "truncate", times=1)
    assert get("/long.wav") == content
    assert parts == [(0, None), (3_000, '"v1"'), (9_000, '"v1"')]


def test_changed_file_is_downloaded_from_its_start(server, get):
    versions = [b"first", b"second"]  # of the first, the last of six bytes does not arrive

    def changing(request):
        content = versions.pop(0)
        raise Answer(200, content, {"ETag": f'"{content.decode()}"', "Content-Length": "6"})

    server.files["/a.wav"] = changing
    assert get("/a.wav") == b"second"


def test_name_is_resolved_once_and_every_address_checked(monkeypatch, server, get):
    calls = []

    def rebinding(host, port, *args, **options):
        calls.append(host)
        targets = {
            "both.test": ["127.0.0.1", "10.0.0.1"],
            "later.test": ["127.0.0.1" if len(calls) == 1 else "127.0.0.2"],
        }
        if host not in targets:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (target, port)) for target in targets[host]]

    server.files["/a.wav"] = b"sound"
    monkeypatch.setattr(addresses.socket, "getaddrinfo", rebinding)
    assert get(server.url("/a.wav", "later.test")) == b"sound"
    assert calls == ["later.test"]
    assert server.received[-1].headers["host"] == f"later.test:{server.port}"
    assert get(server.url("/a.wav", "later.test")).reason == "address"
    assert get(server.url("/a.wav", "both.test")).reason == "address"
    assert get(server.url("/a.wav", "absent.test")).reason == "unreachable"


@pytest.mark.parametrize("host", ["127.0.0.2", "2130706434", "0x7f000002", "127.2", "[::1]", "[::ffff:127.0.0.2]"])
def test_private_address_in_any_notation_is_refused(server, get, host: str):
    assert get(f"http://{host}:{server.port}/a.wav").reason in ("address", "unreachable")
    assert server.requests == []


def test_private_address_is_fetched_if_allowed(server, get):
    server.files["/a.wav"] = b"sound"
    assert get(server.url("/a.wav", "localhost"), allow_private=True) == b"sound"


def test_credentials_go_to_their_server_only(server, get):
    server.files["/a.wav"] = b"sound"
    server.redirect("/same", "/a.wav")
    server.redirect("/other", server.url("/a.wav", "localhost"))
    login = f"http://anna:s3cret@127.0.0.1:{server.port}"
    assert get(f"{login}/same") == b"sound"
    assert server.received[-1].headers["authorization"] == "Basic YW5uYTpzM2NyZXQ="
    assert get(f"{login}/other", allow_private=True) == b"sound"
    assert "authorization" not in server.received[-1].headers


def test_unknown_certificate_is_named(certificate, monkeypatch):
    server = Recordings(certificate)
    with treated_as_public(monkeypatch), pytest.raises(DownloadError, match="certificate of 127.0.0.1 is not trusted"):
        download.fetch(Url(server.url("/a.wav")), io.BytesIO(), Limits(more_ports=(server.port,)))
    server.close()


def test_proxies_of_the_environment_are_not_used(server, get, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    server.files["/a.wav"] = b"sound"
    assert get("/a.wav") == b"sound"


def test_exception_of_the_caller_stops_the_download(server):
    server.files["/a.wav"] = bytes(10)

    def stop(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.fetch(Url(server.url("/a.wav")), io.BytesIO(), Limits(more_ports=(server.port,)), stop)
