"""Addresses of recordings: what is printed has no secret, and names of files are safe."""

from __future__ import annotations

import pytest

from pipelines.infra.downloads.urls import DownloadError, Url, is_url, parse


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("https://host/talk.mp3", "https://host/talk.mp3"),
        ("HTTPS://anna:hemligt@Host:443/talk.mp3#t=hemligt", "https://Host:443/talk.mp3"),
        ("https://host/a?X-Amz-Signature=hemligt&v=dQw4w9WgXcQ", "https://host/a?v=dQw4w9WgXcQ&…"),
        ("https://host/a?sig=hemligt", "https://host/a?…"),
        ("https://host/a;jsessionid=hemligt/b", "https://host/a;jsessionid=…/b"),
        ("https://anna:hem/ligt@host/", "(an invalid address)"),
        ("anna:hemligt@host/a", "(an invalid address)"),
        ("https://[::1/hemligt", "(an invalid address)"),
        ("https://host/a\x1b[31m", "https://host/a?[31m"),
    ],
)
def test_printed_address_has_no_secret(text: str, printed: str):
    url = Url(text)
    assert (str(url), repr(url)) == (printed, printed)
    assert url.has_secrets == (text.partition("#")[0] != printed)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("https://host/x/talk.mp3?token=a", "talk.mp3"),
        ("https://host/%2e%2e%2f..%2fetc%2fpasswd", "_.._etc_passwd"),
        ("https://host/..", "host"),
        ("https://host/", "host"),
        ("https://host/a%00b%0a.wav", "a_b_.wav"),
        ("https://host/C%3A%5Cx.wav", "C_x.wav"),
        ("https://host/CON.wav", "_CON.wav"),
        ("https://host/.bashrc", "bashrc"),
        ("https://host/intervju%20%C3%A5.wav", "intervju å.wav"),
        ("https://[::1/", "recording"),
        ("https://host/" + "x" * 500 + ".mp3", "x" * 116 + ".mp3"),
    ],
)
def test_name_of_file_is_safe(text: str, name: str):
    assert Url(text).file_name == name


@pytest.mark.parametrize(
    "text",
    [
        *("ftp://host/a", "file:///etc/passwd", "gopher://host/", "https://", "https:///a", "https://host:99999/a"),
        *("https://host:x/", "https://good.test\\@evil.test/", "https://host/a\r\nX: y", "https://fe80::1%25eth0/"),
        *("https://host:0/", "https://" + "a" * 64 + ".test/", "javascript://x", "https://host/" + "a" * 9_000),
    ],
)
def test_other_addresses_are_refused(text: str):
    with pytest.raises(DownloadError) as error:
        parse(Url(text))
    assert error.value.reason == "address"


def test_address_is_encoded_for_the_request():
    request = parse(Url(" https://Bücher.test/å ä?q=ö&x=%20#top "))
    assert (request.host, request.target) == ("xn--bcher-kva.test", "/%C3%A5%20%C3%A4?q=%C3%B6&x=%20")


def test_new_signature_is_the_same_recording():
    signed = [Url(f"https://host/a?id=1&X-Amz-Signature={n}&Expires={n}") for n in (1, 2)]
    assert signed[0].identity == signed[1].identity != Url("https://host/a?id=2").identity


@pytest.mark.parametrize(
    ("text", "expected"), [("a/b.wav", False), ("C:\\a", False), ("c://a", False), ("S3://b", True)]
)
def test_address_is_distinguished_from_path(text: str, expected: bool):
    assert is_url(text) == expected
