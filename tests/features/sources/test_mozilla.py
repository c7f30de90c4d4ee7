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
    """A release of three clips, large enough to be cut."""
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
    """The one line of the refusal. Neither key nor signature is in it, nor on any output."""
    with pytest.raises(LabError) as error:
        download(dataset)
    said = str(error.value)
    assert "\n" not in said
    everything = "".join((said, *capfd.readouterr()))
    assert SECRET not in everything
    assert SIGNATURE not in everything
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return said


def cache(tmp_path) -> Path:
    return tmp_path / "lab" / "mozilla" / DATASET


# --- it works ---------------------------------------------------------------------------------------------------------


def test_a_download_is_verified_and_read(server, archive, tmp_path, capsys):
    told = record_log()
    source = MozillaSource(DATASET)
    examples = list(source.examples())
    assert [(e.id, e.split, e.text) for e in examples] == [
        ("0", "validation", "Mening 0."), ("1", "test", "Mening 1."), ("2", "train", "Mening 2.")
    ]  # fmt: skip
    kept = cache(tmp_path) / NAME
    assert kept.read_bytes() == archive
    assert source.identity() == CommonVoiceSource(str(kept)).identity()
    assert source.identity()["release"] == "26.0-2026-06-12"
    assert told == ["Common Voice 26.0-2026-06-12 sv-SE, pool 'train': 1 train, 1 validation, 1 test"]
    assert sorted(e.id for e in source.outline()) == ["0", "1", "2"]
    assert sorted(path.name for path in cache(tmp_path).iterdir() if path.name != ".lock") == [NAME, "download.json"]
    assert capsys.readouterr().out == ""  # standard output is for results


def test_what_was_verified_needs_neither_key_nor_network(server, tmp_path, monkeypatch):
    path = download(DATASET)
    asked = len(server.requests)
    monkeypatch.delenv("MDC_API_KEY")
    assert download(DATASET) == path
    assert len(server.requests) == asked


def test_a_copy_with_another_time_is_the_same_file(server):
    path = download(DATASET)
    asked = len(server.requests)
    os.utime(path, (1, 1))
    assert download(DATASET) == path
    assert len(server.requests) == asked


@pytest.mark.parametrize("change", [lambda content: content + b"x", lambda content: content[:-1] + b"x"])
def test_a_file_that_was_changed_is_fetched_again(server, archive, change):
    path = download(DATASET)
    path.write_bytes(change(archive))
    with pytest.raises(LabError, match="removed"):
        download(DATASET)
    assert download(DATASET).read_bytes() == archive


def test_an_archive_put_there_by_hand_is_verified_and_kept(server, archive, tmp_path):
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / NAME).write_bytes(archive)
    assert download(DATASET).read_bytes() == archive
    assert ("GET", "/file", "") not in server.requests


def test_the_cache_of_a_download_is_that_of_its_archive(server, toy_settings, tmp_path):
    from pipelines.features import identity
    from pipelines.whisper import model as whisper_model

    def cache_folder(**told) -> Path:
        settings = toy_settings(
            {"source.dataset": DATASET, **{f"source.{name}": value for name, value in told.items()}}
        )
        source = open_source(settings.source, settings.language)
        return identity.cache_folder(
            tmp_path, identity.cache_identity(settings, source.identity(), whisper_model.processor(settings))
        )

    downloaded = cache_folder(kind="mozilla")
    assert downloaded.name.startswith("common_voice-")
    assert cache_folder(kind="common_voice", path=str(download(DATASET))) == downloaded
    assert cache_folder(kind="mozilla", pool="train+validation") != downloaded


def test_a_recipe_opens_it():
    loaded = recipes.load("tour", {"source.kind": "mozilla", "source.dataset": DATASET, "source.pool": "validated"})
    assert open_source(loaded.source, loaded.language) == MozillaSource(DATASET, "sv", "validated", 7)
    with pytest.raises(LabError, match=r"source\.dataset"):
        recipes.load("tour", {"source.kind": "mozilla"})


def test_importing_the_room_loads_no_client():
    code = (
        "import sys, pipelines.features.sources.common_voice.mozilla; "
        "sys.exit('datacollective' in sys.modules or 'requests' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- cut off ----------------------------------------------------------------------------------------------------------


def test_a_cut_download_goes_on_where_it_was(server, archive, tmp_path, capfd):
    server.faults["cut after"] = 100_000
    said = refusal(capfd)
    assert "was interrupted at 64.0 KB" in said  # the client writes whole blocks of 64 KiB
    assert "to resume it" in said
    assert (cache(tmp_path) / f"{NAME}.part").stat().st_size == 65_536
    assert not (cache(tmp_path) / NAME).exists()
    server.faults.clear()
    assert download(DATASET).read_bytes() == archive
    assert server.requests[-1] == ("GET", "/file", "bytes=65536-")


def test_a_download_that_ends_early_without_a_word_goes_on_too(server, archive, capfd):
    """Without a length the client takes the end of the connection for the end of the file."""
    server.faults |= {"no length": True, "cut after": 50_000}
    assert f"was interrupted at 50000 of {len(archive)} bytes" in refusal(capfd)
    server.faults.clear()
    assert download(DATASET).read_bytes() == archive
    assert server.requests[-1] == ("GET", "/file", "bytes=50000-")


def test_a_part_that_is_complete_needs_only_its_name(server, archive, tmp_path):
    """Killed between the last byte and the renaming: the client would ask for nothing, and fail for ever."""
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / f"{NAME}.part").write_bytes(archive)
    assert download(DATASET).read_bytes() == archive
    assert ("GET", "/file", "") not in server.requests


def test_a_part_of_another_version_is_not_continued(server, archive, tmp_path):
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / f"{NAME}.part").write_bytes(b"old")
    (cache(tmp_path) / f"{NAME}.checksum").write_text("another")
    assert download(DATASET).read_bytes() == archive


def test_without_a_checksum_a_cut_download_starts_over(server, archive, capfd):
    server.details["checksum"] = None
    server.faults["cut after"] = 50_000
    assert "to start over" in refusal(capfd)
    server.faults.clear()
    assert download(DATASET).read_bytes() == archive
    assert json.loads(download(DATASET).with_name("download.json").read_text())["checksum_compared"] is False


def test_a_stop_by_the_keyboard_is_one(server, monkeypatch):
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
def test_no_key(server, monkeypatch, capfd, key):
    monkeypatch.setenv("MDC_API_KEY", key) if key is not None else monkeypatch.delenv("MDC_API_KEY")
    said = refusal(capfd)
    assert "MDC_API_KEY" in said
    assert "Colab" in said
    assert server.requests == []


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"  {SECRET}"])
def test_blanks_around_a_key_are_not_its_own(server, monkeypatch, key):
    monkeypatch.setenv("MDC_API_KEY", key)
    assert download(DATASET)
    assert mozilla.os.environ["MDC_API_KEY"] == key


@pytest.mark.parametrize("key", [f"{SECRET} x", f"{SECRET}\nX-Evil: 1", "nyckelå"])
def test_a_key_that_is_none_is_not_shown(server, monkeypatch, capfd, key):
    monkeypatch.setenv("MDC_API_KEY", key)
    said = refusal(capfd)
    assert "one word" in said
    assert key not in said


def test_a_wrong_key(server, monkeypatch, capfd):
    monkeypatch.setenv("MDC_API_KEY", "wr0ng-key")
    said = refusal(capfd)
    assert "401" in said
    assert "wr0ng-key" not in said


def test_terms_that_were_not_agreed_to(server, capfd):
    body = {"message": f"Agree to the terms of {SECRET} at https://x.example/?{SIGNATURE}"}
    server.faults["POST", f"/api/datasets/{DATASET}/download"] = (403, body)
    said = refusal(capfd)
    assert f"agree to its terms at https://mozilladatacollective.com/datasets/{DATASET}" in said
    assert "(reason: Agree to the terms of … at …)" in said


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
def test_what_a_server_may_say(server, capfd, where, status, body, words):
    server.faults[where] = (status, body)
    assert words in refusal(capfd)
    server.faults.clear()
    assert download(DATASET)


@pytest.mark.parametrize(
    "name", ["../evil.tar.gz", "/tmp/evil.tar.gz", "..", ".hidden", "a/b", "download.json", "a\nb", ""]
)
def test_an_archive_name_that_leads_elsewhere_is_refused(server, tmp_path, capfd, name):
    server.details["filename"] = name
    assert "must name an archive" in refusal(capfd)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("dataset", ["", "../x", "a/b", "a?b", "-x", "a" * 200, "å"])
def test_a_data_set_that_is_no_id_is_refused(server, capfd, dataset):
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


def test_nobody_answers(server, capfd, monkeypatch):
    server.close()
    assert "ConnectionError: check the network" in refusal(capfd)


def test_a_slow_server(server, capfd, monkeypatch):
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


def test_a_disk_too_small_is_told_beforehand(server, monkeypatch, capfd):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(mozilla.shutil, "disk_usage", lambda path: usage)
    said = refusal(capfd)
    assert "LAB_CACHE" in said
    assert FILE + ("",) not in server.requests


def test_a_disk_that_fills_up(server, monkeypatch, capfd):
    import requests

    original = requests.Response.iter_content

    def full(self, *args, **kwargs):
        yield from itertools.islice(original(self, *args, **kwargs), 1)
        if "/file" in self.url:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(requests.Response, "iter_content", full)
    said = refusal(capfd)
    assert "(at 64.0 KB" in said
    assert "is full" in said
    assert "run the same command again" in said


def test_a_cache_folder_that_cannot_be_written(server, tmp_path, capfd):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mozilla").write_text("a file where a folder should be")
    assert "LAB_CACHE" in refusal(capfd)


def test_two_at_once(server, tmp_path, capfd):
    import filelock

    cache(tmp_path).mkdir(parents=True)
    with filelock.FileLock(cache(tmp_path) / ".lock"):
        assert "another process" in refusal(capfd)


def test_a_package_that_is_not_there(server, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "datacollective", None)
    assert "pip install 'datacollective>=0.6.4'" in refusal(capfd)


# --- Colab ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def colab(monkeypatch):
    """`colab(get)`: this is Colab, and `userdata.get` is `get`."""

    def make(get):
        google, module = types.ModuleType("google"), types.ModuleType("google.colab")
        module.userdata = types.SimpleNamespace(get=get)
        google.colab = module
        monkeypatch.setitem(sys.modules, "google", google)
        monkeypatch.setitem(sys.modules, "google.colab", module)
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
        monkeypatch.delenv("MDC_API_KEY")

    return make


def test_a_secret_of_colab_is_the_key_for_as_long_as_it_is_needed(server, colab, tmp_path):
    colab({"MDC_API_KEY": SECRET}.__getitem__)
    assert download(DATASET)
    assert "MDC_API_KEY" not in mozilla.os.environ
    written = [path.read_bytes() for path in cache(tmp_path).iterdir()]
    assert not any(SECRET.encode() in content for content in written)


def test_a_secret_that_colab_does_not_give(server, colab, capfd):
    def refuse(name):
        raise RuntimeError("the notebook has no access")

    colab(refuse)
    assert "needs an API key" in refusal(capfd)
