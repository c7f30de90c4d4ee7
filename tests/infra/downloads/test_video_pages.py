"""Video pages by yt-dlp, here with a module that stands for it; with yt-dlp itself if it is installed."""

from __future__ import annotations

import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest
from servers.recordings import Recordings, treated_as_public

from pipelines.infra.downloads import video_pages
from pipelines.infra.downloads.download import Limits
from pipelines.infra.downloads.urls import DownloadError, Url

PAGE = Url("https://videos.test/watch?v=1&token=hemligt")


@pytest.fixture
def fake(monkeypatch):
    """A yt_dlp whose `extract` the test sets; it receives the downloader."""
    module = ModuleType("yt_dlp")
    module.utils = SimpleNamespace(YoutubeDLError=type("YoutubeDLError", (Exception,), {}))

    class YoutubeDL:
        def __init__(self, options):
            self.options = options

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def extract_info(self, text, download):
            module.extract(self, text)

    module.YoutubeDL = YoutubeDL
    monkeypatch.setitem(sys.modules, "yt_dlp", module)
    return module


def test_sound_of_a_page_is_one_file(fake, tmp_path):
    def extract(downloader, text):
        assert (text, downloader.options["format"], downloader.options["proxy"]) == (PAGE.text, "bestaudio/best", "")
        downloader.options["progress_hooks"][0]({"downloaded_bytes": 5})
        (tmp_path / "1.m4a").write_bytes(b"sound")

    fake.extract, seen = extract, []
    assert video_pages.fetch(PAGE, tmp_path, Limits(), seen.append) == tmp_path / "1.m4a"
    assert seen == [5]


def test_names_resolve_to_public_addresses_only(fake, tmp_path):
    before = socket.getaddrinfo

    def extract(downloader, text):
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(socket.gaierror, match="public internet"):
                socket.getaddrinfo(host, 80)
        (tmp_path / "a").touch()

    fake.extract = extract
    video_pages.fetch(PAGE, tmp_path, Limits())
    assert socket.getaddrinfo is before


@pytest.mark.parametrize(
    ("progress", "limits", "reason"),
    [
        ({"downloaded_bytes": 2_000_000}, Limits(max_mb=1), "too_large"),
        ({"total_bytes": 2_000_000}, Limits(max_mb=1), "too_large"),
        ({}, Limits(timeout_s=0), "too_slow"),
        (None, Limits(), "broken"),
    ],
)
def test_failure_is_one_line_without_secrets(fake, tmp_path, progress, limits, reason: str):
    def extract(downloader, text):
        if progress is not None:
            downloader.options["progress_hooks"][0](progress)
        raise fake.utils.YoutubeDLError(f"\x1b[0;31mERROR:\x1b[0m no video at {text}\nmore")

    fake.extract = extract
    with pytest.raises(DownloadError) as error:
        video_pages.fetch(PAGE, tmp_path, limits)
    assert (error.value.reason, "hemligt" in str(error.value), "\n" in str(error.value)) == (reason, False, False)


@pytest.mark.slow
def test_yt_dlp_reads_a_page_of_a_loopback_server(tmp_path, monkeypatch, encoded, speech):
    pytest.importorskip("yt_dlp")
    from servers.loopback import Answer

    server, sound = Recordings(), encoded(speech(8_000))
    html = b'<html><title>A talk</title><video src="/talk.wav?token=1"></video></html>'

    def page(request):
        raise Answer(200, html, {"Content-Type": "text/html"})

    server.files |= {"/page": page, "/talk.wav": sound}
    with pytest.raises(DownloadError, match="public internet"):
        video_pages.fetch(Url(server.url("/page")), tmp_path, Limits())
    with treated_as_public(monkeypatch):
        assert video_pages.fetch(Url(server.url("/page")), tmp_path, Limits()).read_bytes() == sound
        with pytest.raises(DownloadError, match="too large"):
            video_pages.fetch(Url(server.url("/page")), tmp_path / "b", Limits(max_mb=0.001))
        with pytest.raises(DownloadError, match="has no recording"):
            video_pages.fetch(Url(server.url("/none?token=hemligt")), tmp_path / "c", Limits())
    server.close()
