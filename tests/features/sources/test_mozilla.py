"""Mozilla Data Collective, offline: the real client (datacollective) against a server on this machine."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import tarfile
import threading
import types
from pathlib import Path

import pytest
from log_recorder import record_log
from servers.mozilla import SECRET, SIGNATURE, Collective

from pipelines import recipes
from pipelines.features.sources.common_voice import mozilla
from pipelines.features.sources.common_voice.mozilla import MozillaSource, download
from pipelines.features.sources.common_voice.release import CommonVoiceSource
from pipelines.features.sources.registry import open_source
from pipelines.infra.errors import LabError

pytest.importorskip("datacollective")
DATASET = "cmtoy0000swedish"
NAME = "cv-corpus-26.0-2026-06-12-sv-SE.tar.gz"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    """A release of three clips, large enough to interrupt its download."""
    import io

    columns, path = "client_id\tpath\tsentence\tlocale", tmp_path_factory.mktemp("made") / NAME
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        files = {f"clips/{n}.mp3": os.urandom(40_000) for n in range(3)}
        for n, name in enumerate(("dev", "test", "train")):
            files[f"{name}.tsv"] = f"{columns}\ns{n}\t{n}.mp3\tMening {n}.\tsv-SE\n".encode()
        for name, content in files.items():
            info = tarfile.TarInfo(f"cv-corpus-26.0-2026-06-12/sv-SE/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def server(archive, tmp_path, monkeypatch):
    collective = Collective(archive, DATASET, NAME)
    monkeypatch.setenv("MDC_API_URL", f"{collective.address}/api")
    monkeypatch.setenv("MDC_API_KEY", SECRET)
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "lab"))
    monkeypatch.setenv("NO_PROXY", "*")
    yield collective
    collective.close()


def refusal(capfd, dataset: str = DATASET) -> str:
    """Return the one-line error; neither it nor the output contains the key or a signature."""
    with pytest.raises(LabError) as error:
        download(dataset)
    message = str(error.value)
    assert "\n" not in message
    everything = "".join((message, *capfd.readouterr()))
    assert SECRET not in everything
    assert SIGNATURE not in everything
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return message


def cache(tmp_path) -> Path:
    return tmp_path / "lab" / "mozilla" / DATASET


# --- it works ---------------------------------------------------------------------------------------------------------


def test_download_is_verified_and_read(server, archive, tmp_path, capsys):
    lines = record_log()
    source = MozillaSource(DATASET)
    examples = list(source.examples())
    assert [(e.id, e.split, e.text) for e in examples] == [
        ("0", "validation", "Mening 0."), ("1", "test", "Mening 1."), ("2", "train", "Mening 2.")
    ]  # fmt: skip
    archive_path = cache(tmp_path) / NAME
    assert archive_path.read_bytes() == archive
    assert source.identity() == CommonVoiceSource(str(archive_path)).identity()
    assert source.identity()["release"] == "26.0-2026-06-12"
    assert lines == ["Common Voice 26.0-2026-06-12 sv-SE, pool 'train': 1 train, 1 validation, 1 test"]
    assert sorted(e.id for e in source.outline()) == ["0", "1", "2"]
    assert sorted(path.name for path in cache(tmp_path).iterdir() if path.name != ".lock") == [NAME, "download.json"]
    assert capsys.readouterr().out == ""  # standard output is for results


def test_verified_archive_needs_no_key_and_no_network(server, tmp_path, monkeypatch):
    path = download(DATASET)
    asked = len(server.requests)
    monkeypatch.delenv("MDC_API_KEY")
    assert download(DATASET) == path
    assert len(server.requests) == asked


def test_copy_with_other_time_is_accepted(server):
    path = download(DATASET)
    asked = len(server.requests)
    os.utime(path, (1, 1))
    assert download(DATASET) == path
    assert len(server.requests) == asked


@pytest.mark.parametrize("change", [lambda content: content + b"x", lambda content: content[:-1] + b"x"])
def test_changed_file_is_downloaded_again(server, archive, change):
    path = download(DATASET)
    path.write_bytes(change(archive))
    with pytest.raises(LabError, match="removed"):
        download(DATASET)
    assert download(DATASET).read_bytes() == archive


def test_archive_placed_by_hand_is_verified(server, archive, tmp_path):
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / NAME).write_bytes(archive)
    assert download(DATASET).read_bytes() == archive
    assert ("GET", "/file", "") not in server.requests


def test_download_and_archive_share_a_cache(server, toy_settings, tmp_path):
    from pipelines.features import identity
    from pipelines.whisper import model as whisper_model

    def cache_folder(**settings) -> Path:
        settings = toy_settings(
            {"source.dataset": DATASET, **{f"source.{name}": value for name, value in settings.items()}}
        )
        source = open_source(settings.source, settings.language)
        return identity.cache_folder(
            tmp_path, identity.cache_identity(settings, source.identity(), whisper_model.processor(settings))
        )

    downloaded = cache_folder(kind="mozilla")
    assert downloaded.name.startswith("common_voice-")
    assert cache_folder(kind="common_voice", path=str(download(DATASET))) == downloaded
    assert cache_folder(kind="mozilla", pool="train+validation") != downloaded


def test_recipe_opens_the_source():
    loaded = recipes.load("tour", {"source.kind": "mozilla", "source.dataset": DATASET, "source.pool": "validated"})
    assert open_source(loaded.source, loaded.language) == MozillaSource(DATASET, "sv", "validated", 7)
    with pytest.raises(LabError, match=r"source\.dataset"):
        recipes.load("tour", {"source.kind": "mozilla"})


@pytest.mark.slow
def test_import_loads_no_client():
    code = (
        "import sys, pipelines.features.sources.common_voice.mozilla; "
        "sys.exit('datacollective' in sys.modules or 'requests' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- cut off ----------------------------------------------------------------------------------------------------------


def test_interrupted_download_resumes(server, archive, tmp_path, capfd):
    server.faults["cut after"] = 100_000
    message = refusal(capfd)
    assert "was interrupted at 64.0 KB" in message  # the client writes whole blocks of 64 KiB
    assert "to resume it" in message
    assert (cache(tmp_path) / f"{NAME}.part").stat().st_size == 65_536
    assert not (cache(tmp_path) / NAME).exists()
    server.faults.clear()
    assert download(DATASET).read_bytes() == archive
    assert server.requests[-1] == ("GET", "/file", "bytes=65536-")


def test_download_closed_early_resumes(server, archive, capfd):
    """Without a length the client takes the end of the connection for the end of the file."""
    server.faults |= {"no length": True, "cut after": 50_000}
    assert f"was interrupted at 50000 of {len(archive)} bytes" in refusal(capfd)
    server.faults.clear()
    assert download(DATASET).read_bytes() == archive
    assert server.requests[-1] == ("GET", "/file", "bytes=50000-")


def test_complete_part_is_only_renamed(server, archive, tmp_path):
    """After a kill between the last byte and the renaming the client would fail every time."""
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / f"{NAME}.part").write_bytes(archive)
    assert download(DATASET).read_bytes() == archive
    assert ("GET", "/file", "") not in server.requests


def test_part_of_another_version_is_not_resumed(server, archive, tmp_path):
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / f"{NAME}.part").write_bytes(b"old")
    (cache(tmp_path) / f"{NAME}.checksum").write_text("another")
    assert download(DATASET).read_bytes() == archive


def test_interrupted_download_without_checksum_restarts(server, archive, capfd):
    server.details["checksum"] = None
    server.faults["cut after"] = 50_000
    assert "to start over" in refusal(capfd)
    server.faults.clear()
    assert download(DATASET).read_bytes() == archive
    assert json.loads(download(DATASET).with_name("download.json").read_text())["checksum_compared"] is False


def test_keyboard_interrupt_is_raised(server, monkeypatch):
    import requests

    original = requests.Response.iter_content

    def stopped(self, *args, **kwargs):
        if "/file" in self.url:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(requests.Response, "iter_content", stopped)
    with pytest.raises(KeyboardInterrupt):
        download(DATASET)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "  "])
def test_missing_key_raises(server, monkeypatch, capfd, key):
    monkeypatch.setenv("MDC_API_KEY", key) if key is not None else monkeypatch.delenv("MDC_API_KEY")
    message = refusal(capfd)
    assert "MDC_API_KEY" in message
    assert "Colab" in message
    assert server.requests == []


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"  {SECRET}"])
def test_blanks_around_a_key_are_stripped(server, monkeypatch, key):
    monkeypatch.setenv("MDC_API_KEY", key)
    assert download(DATASET)
    assert mozilla.os.environ["MDC_API_KEY"] == key


@pytest.mark.parametrize("key", [f"{SECRET} x", f"{SECRET}\nX-Evil: 1", "nyckelå"])
def test_malformed_key_is_not_quoted(server, monkeypatch, capfd, key):
    monkeypatch.setenv("MDC_API_KEY", key)
    message = refusal(capfd)
    assert "one word" in message
    assert key not in message


def test_wrong_key_raises(server, monkeypatch, capfd):
    monkeypatch.setenv("MDC_API_KEY", "wr0ng-key")
    message = refusal(capfd)
    assert "401" in message
    assert "wr0ng-key" not in message


def test_terms_not_agreed_to_raise(server, capfd):
    body = {"message": f"Agree to the terms of {SECRET} at https://x.example/?{SIGNATURE}"}
    server.faults["POST", f"/api/datasets/{DATASET}/download"] = (403, body)
    message = refusal(capfd)
    assert f"agree to its terms at https://mozilladatacollective.com/datasets/{DATASET}" in message
    assert "(reason: Agree to the terms of … at …)" in message


POST, GET, FILE = ("POST", f"/api/datasets/{DATASET}/download"), ("GET", f"/api/datasets/{DATASET}"), ("GET", "/file")


@pytest.mark.parametrize(
    ("where", "status", "body", "words"),
    [
        (GET, 404, {"message": "gone"}, "source.dataset"),
        (GET, 410, {}, "source.dataset"),
        (GET, 500, {}, "HTTP 500"),
        (GET, 200, b"<html>", "must respond, got JSONDecodeError"),
        (GET, 200, {}, "pip install -U datacollective"),
        (GET, 200, [], "pip install -U datacollective"),
        (GET, 200, {"id": DATASET, "filename": None}, "must name an archive"),
        (POST, 429, {}, "too many requests"),
        (POST, 402, {"message": "pay"}, "bought"),
        (POST, 503, b"", "HTTP 503"),
        (POST, 200, {"downloadUrl": f"http://x.example/?{SIGNATURE}"}, "pip install -U datacollective"),
        (POST, 200, b"[]", "pip install -U datacollective"),
        (FILE, 403, b"<Error/>", "interrupted at 0.0 B"),
        (FILE, 500, b"", "interrupted at 0.0 B"),
    ],
)
def test_server_errors_are_one_line(server, capfd, where, status, body, words):
    server.faults[where] = (status, body)
    assert words in refusal(capfd)
    server.faults.clear()
    assert download(DATASET)


@pytest.mark.parametrize(
    "name", ["../evil.tar.gz", "/tmp/evil.tar.gz", "..", ".hidden", "a/b", "download.json", "a\nb", ""]
)
def test_archive_name_with_a_path_raises(server, tmp_path, capfd, name):
    server.details["filename"] = name
    assert "must name an archive" in refusal(capfd)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("dataset", ["", "../x", "a/b", "a?b", "-x", "a" * 200, "å"])
def test_invalid_data_set_id_raises(server, capfd, dataset):
    assert "source.dataset" in refusal(capfd, dataset)
    assert server.requests == []


@pytest.mark.parametrize(
    ("field", "value"), [("checksum", "0" * 64), ("sizeBytes", 100), ("checksum", "SHA256:" + "0" * 64)]
)
def test_size_and_checksum_are_compared(server, tmp_path, capfd, field, value):
    server.details[field] = value
    assert "it was removed" in refusal(capfd)
    assert not (cache(tmp_path) / NAME).exists()
    assert not (cache(tmp_path) / "download.json").exists()


def test_missing_response_raises(server, capfd, monkeypatch):
    server.close()
    assert "ConnectionError: check the network" in refusal(capfd)


def test_slow_server_raises(server, capfd, monkeypatch):
    import datacollective.download

    def slow(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(server.archive)))
        request.end_headers()
        request.wfile.write(server.archive[:1000])
        release.wait(5)

    release = threading.Event()
    monkeypatch.setattr(datacollective.download, "HTTP_TIMEOUT", (0.3, 0.3))
    monkeypatch.setattr(server, "send_archive", slow)
    assert "run the same command again" in refusal(capfd)
    release.set()


# --- the machine ------------------------------------------------------------------------------------------------------


def test_full_disk_raises_before_download(server, monkeypatch, capfd):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(mozilla.shutil, "disk_usage", lambda path: usage)
    message = refusal(capfd)
    assert "LAB_CACHE" in message
    assert FILE + ("",) not in server.requests


def test_disk_that_fills_up_raises(server, monkeypatch, capfd):
    import requests

    original = requests.Response.iter_content

    def full(self, *args, **kwargs):
        yield from itertools.islice(original(self, *args, **kwargs), 1)
        if "/file" in self.url:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(requests.Response, "iter_content", full)
    message = refusal(capfd)
    assert "(at 64.0 KB" in message
    assert "is full" in message
    assert "run the same command again" in message


def test_read_only_cache_folder_raises(server, tmp_path, capfd):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mozilla").write_text("a file where a folder should be")
    assert "LAB_CACHE" in refusal(capfd)


def test_concurrent_download_raises(server, tmp_path, capfd):
    import filelock

    cache(tmp_path).mkdir(parents=True)
    with filelock.FileLock(cache(tmp_path) / ".lock"):
        assert "another process" in refusal(capfd)


def test_missing_client_package_raises(server, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "datacollective", None)
    assert "pip install 'datacollective>=0.6.4'" in refusal(capfd)


# --- Colab ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def colab(monkeypatch):
    """`colab(get)` simulates Colab with `userdata.get = get`."""

    def make(get):
        google, module = types.ModuleType("google"), types.ModuleType("google.colab")
        module.userdata = types.SimpleNamespace(get=get)
        google.colab = module
        monkeypatch.setitem(sys.modules, "google", google)
        monkeypatch.setitem(sys.modules, "google.colab", module)
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
        monkeypatch.delenv("MDC_API_KEY")

    return make


def test_colab_secret_is_set_during_download_only(server, colab, tmp_path):
    colab({"MDC_API_KEY": SECRET}.__getitem__)
    assert download(DATASET)
    assert "MDC_API_KEY" not in mozilla.os.environ
    written = [path.read_bytes() for path in cache(tmp_path).iterdir()]
    assert not any(SECRET.encode() in content for content in written)


def test_absent_colab_secret_raises(server, colab, capfd):
    def refuse(name):
        raise RuntimeError("the notebook has no access")

    colab(refuse)
    assert "needs an API key" in refusal(capfd)
