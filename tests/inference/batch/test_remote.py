"""Addresses beside files: downloaded, transcribed and deleted; nothing that is written contains their secrets."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from servers.loopback import Answer
from servers.recordings import Recordings, treated_as_public

from pipelines import __main__ as cli
from pipelines.inference import transcriber as transcriber_module
from pipelines.inference.batch import job as batch_job
from pipelines.inference.batch import run as batch_run
from pipelines.inference.batch.subtitle_files import subtitle_paths
from pipelines.inference.transcript import Segment, Transcript, Word
from pipelines.infra.downloads.download import Limits
from pipelines.infra.downloads.urls import DownloadError
from pipelines.speech import audio
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.model import ModelRef

SECRET = "hemligt"


class FakeTranscriber:
    """Returns the duration of a recording in tenths of a second, as `ljud 12`."""

    times_words = False
    ref, loaded, language = ModelRef("fake", Path(), "folder", "r1"), SimpleNamespace(name="stub cpu"), "sv"
    options = DecodingOptions()

    def with_options(self, **changes):
        return self

    def transcribe(self, recording, on_audio=lambda seconds: None):
        duration_s = audio.decode(recording).duration_s
        text = f"ljud {round(10 * duration_s)}"
        words = tuple(Word(word, 0.75) for word in text.split())
        return Transcript(text, duration_s, 0.01, (Segment(0.0, duration_s, text, words),))


@pytest.fixture
def server(monkeypatch, encoded, tmp_path):
    """A server of recordings of 0.1 and 0.2 s; downloads are in tmp_path/temporary."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    server = Recordings()
    for n in (1, 2):
        server.files[f"/{n}/talk.wav"] = encoded(np.full(1600 * n, 0.1, dtype=np.float32))
    with treated_as_public(monkeypatch):
        yield server
    server.close()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.fixture
def transcribe(server, monkeypatch, capsys, tmp_path):
    """`transcribe(input, ..., option, ...)`: exit code and result of the command, with a transcriber that is fake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transcriber_module, "Transcriber", lambda *args: FakeTranscriber())
    monkeypatch.setattr("pipelines.whisper.model.resolve", lambda uri: uri)

    def call(*arguments: str) -> tuple[int, dict]:
        port = ["--allow-port", str(server.port)]
        monkeypatch.setattr(sys, "argv", ["p", "transcribe", *map(str, arguments), *port, "--model", "fake", "--json"])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        return code, json.loads(printed.out) if printed.out else {"error": printed.err}

    return call


def test_addresses_and_files_are_transcribed_in_order(server, transcribe, tmp_path, encoded):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/a.wav").write_bytes(encoded(np.full(4800, 0.1, dtype=np.float32)))
    signed = server.url(f"/2/talk.wav?token={SECRET}").replace("://", f"://anna:{SECRET}@")
    code, result = transcribe(server.url("/1/talk.wav"), tmp_path / "local", signed, "--format", "txt")
    texts = [one["text"] for one in result["transcripts"]]
    assert (code, texts) == (0, ["ljud 1", "ljud 3", "ljud 2"])
    assert result["transcripts"][2]["file"] == server.url("/2/talk.wav?…")
    written = {path.name: path.read_text() for path in tmp_path.rglob("*.txt")}
    assert written == {"talk.txt": "ljud 1\n", "talk.wav.txt": "ljud 2\n", "a.txt": "ljud 3\n"}


def test_failure_is_a_row_with_an_error_without_secrets(server, transcribe, tmp_path):
    server.files["/page"] = lambda request: (_ for _ in ()).throw(Answer(200, b"<html>", {"Content-Type": "text/html"}))
    addresses = [server.url(f"/{path}?key={SECRET}") for path in ("1/talk.wav", "none.wav", "page")]
    code, _ = transcribe(*addresses, "--out", tmp_path / "out")
    assert code == 1
    with open(tmp_path / "out/transcribed.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["transcript"] for row in rows] == ["ljud 1", "", ""]
    assert ("no such file (404)" in rows[1]["error"], "yt-dlp" in rows[2]["error"]) == (True, True)
    assert not any(SECRET in path.read_text("utf-8") for path in (tmp_path / "out").iterdir())
    server.files["/none.wav"] = server.files["/2/talk.wav"]
    renewed = [address.replace(SECRET, "nytt") for address in addresses]
    assert transcribe(*renewed, "--out", tmp_path / "out", "--retry-errors")[1]["errors"] == 1
    assert server.requests.count("/1/talk.wav") == 1, "a row that is done is not downloaded again"


def test_private_address_needs_its_option(server, transcribe):
    address = server.url("/1/talk.wav", "localhost").replace("localhost", "127.0.0.2")
    code, result = transcribe(address)
    assert (code, "public internet" in result["transcripts"][0]["error"]) == (1, True)
    address = server.url("/1/talk.wav")
    assert transcribe(address, "--allow-private-addresses")[0] == 0


def test_address_of_another_kind_is_refused(transcribe):
    code, result = transcribe(f"ftp://anna:{SECRET}@host/a.wav")
    assert (code, "http or https" in result["error"]) == (1, True)


def test_table_may_hold_addresses(server, transcribe, tmp_path):
    address = server.url("/2/talk.wav")
    (tmp_path / "talks.csv").write_text(f"audio,start,end\n{address},0,0.1\n{address},,\n")
    assert transcribe(tmp_path / "talks.csv")[0] == 0
    with open(tmp_path / "talks.transcribed.csv", encoding="utf-8") as file:
        assert [row["transcript"] for row in csv.DictReader(file)] == ["ljud 1", "ljud 2"]


def test_recordings_of_one_name_get_different_files(tmp_path):
    names = ["https://a.test/x.mp3", "https://b.test/x.mp3", "https://c.test/y/x.mp3?id=2", "https://a.test/x.mp3"]
    sources = [*names, Path("/one/x.mp3"), Path("/two/x.mp3")]
    paths = subtitle_paths(batch_job.plan(sources, str(tmp_path), formats=["txt"]))
    assert [path.name for path in paths] == ["x", "x.mp3", "x-2.mp3", "x", "x-3.mp3", "x-4.mp3"]


def test_video_page_is_fetched_by_yt_dlp_if_installed(server, monkeypatch, encoded):
    from pipelines.infra.downloads import video_pages

    def fetch(url, folder, limits, on_bytes):
        (folder / "a.wav").write_bytes(server.files["/1/talk.wav"])
        return folder / "a.wav"

    server.files["/page"] = b"<!doctype html>"
    job = batch_job.plan([server.url("/page")])
    job = replace(job, downloads=Limits(more_ports=(server.port,)))
    monkeypatch.setattr(video_pages, "is_installed", lambda: True)
    monkeypatch.setattr(video_pages, "fetch", fetch)
    assert batch_run.run(job, FakeTranscriber()).results[0].transcript == "ljud 1"


def test_invalid_address_is_refused_before_the_model_is_loaded():
    with pytest.raises(DownloadError, match="not a valid address"):
        batch_job.plan(["https:///talk.wav"])
