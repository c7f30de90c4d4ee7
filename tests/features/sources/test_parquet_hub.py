"""Data sets on the Hub: the real client against a faulty server on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from log_recorder import record_log

from pipelines import recipes
from pipelines.features.build import BuildOptions, build
from pipelines.features.cache import FeatureCache
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.sources.parquet import hub
from pipelines.features.sources.parquet.hub import HubFiles, RangeFile
from pipelines.features.sources.parquet.layout import LayoutSettings
from pipelines.features.sources.parquet.source import ParquetSource
from pipelines.features.sources.registry import open_source
from pipelines.infra.errors import LabError

COMMIT = "c0ffee" * 6 + "abcd"
CONVERTED = "beef" * 10
TOKEN = "hf_" + "secretsecretsecret"
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(n: int, start: int = 0, **columns) -> bytes:
    rows = range(start, start + n)
    content = {
        "audio": pa.array([{"bytes": b"sound %d" % i * 50, "path": f"{i}.wav"} for i in rows], AUDIO),
        "text": pa.array([f"mening {i}" for i in rows]),
        **columns,
    }
    file = io.BytesIO()
    pq.write_table(pa.table(content), file, row_group_size=4)
    return file.getvalue()


class Hub:
    """Data sets by name, each revision name to (commit, files); matching requests receive the faults in turn."""

    def __init__(self):
        self.sets: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = {}
        self.faults: list[tuple[str, Callable]] = []
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()

    def fail(self, where: str, fault: Callable, times: int = 1) -> None:
        """Let `fault(handler, content)` answer the next `times` requests whose path holds `where`."""
        self.faults += [(where, fault)] * times

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((path, handler.headers.get("Range", "")))
        self.tokens.add(handler.headers.get("Authorization", ""))
        content = self._content(path)
        for fault in self.faults:
            if fault[0] in path:
                self.faults.remove(fault)
                return fault[1](handler, self._cut(handler, content or b""))
        if content is None:
            return refuse(404, "RepoNotFound" if "/api/" in path else "EntryNotFound")(handler, b"")
        if content == b"no revision":
            return refuse(404, "RevisionNotFound")(handler, b"")
        return send(handler, self._cut(handler, content), 206 if handler.headers.get("Range") else 200)

    def _content(self, path: str) -> bytes | None:
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            revisions = self.sets.get(match[1])
            if revisions is None:
                return None
            if (match[2] or "main") not in revisions:
                return b"no revision"
            commit, files = revisions[match[2] or "main"]
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            info = {"id": match[1], "sha": commit, "siblings": siblings}
            if head := re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL):
                info["cardData"] = yaml.safe_load(head[1])
            return json.dumps(info).encode()
        match = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        matches = [files for commit, files in self.sets[match[1]].values() if commit == match[2]]
        return matches[0].get(match[3])

    @staticmethod
    def _cut(handler: BaseHTTPRequestHandler, content: bytes) -> bytes:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        return content[int(match[1]) : int(match[2]) + 1] if match else content


def send(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, promised: int = -1, **headers) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content) if promised < 0 else promised))
    handler.end_headers()
    handler.wfile.write(content)


def refuse(status: int, code: str = "", **headers) -> Callable:
    """Return an error response of a Hub that repeats the token of the request."""

    def fault(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        body = json.dumps({"error": f"no: {handler.headers.get('Authorization')}"}).encode()
        send(handler, body, status, **({"X_Error_Code": code} if code else {}), X_Error_Message=TOKEN, **headers)

    return fault


def cut_in_the_middle(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, content[: len(content) // 2], 206, promised=len(content))
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def too_short(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, content[: len(content) // 2], 206)


def slow(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    time.sleep(0.6)
    send(handler, content, 206)


def drop(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch):
    """A Hub on loopback for the lab and its client, with waits of milliseconds."""
    import huggingface_hub
    from huggingface_hub.utils import close_session

    hub_server = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

        def do_GET(self):
            hub_server.answer(self)

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "WAIT_S", 0.01)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    close_session()
    hub_server.sets["jzju/nst"] = {
        "main": (
            COMMIT,
            {
                "README.md": b"hej",
                "data/train-00000-of-00002.parquet": parquet(10),
                "data/train-00001-of-00002.parquet": parquet(5, 10),
                "data/test-00000-of-00001.parquet": parquet(2, 100),
            },
        )
    }
    yield hub_server
    http.shutdown()
    http.server_close()
    thread.join()
    close_session()


@pytest.fixture
def lines(capfd):
    """Log lines. Neither they nor the output may contain a token."""
    lines = record_log()
    yield lines
    output = "\n".join([*lines, *capfd.readouterr()])
    assert TOKEN not in output


def nst(revision: str = "") -> ParquetSource:
    return ParquetSource(HubFiles("jzju/nst", revision))


def everything(source: ParquetSource) -> list[tuple[str, str, bytes]]:
    return [(e.split, e.text, e.audio) for e in source.examples()]


ROWS = [
    (split, f"mening {i}", b"sound %d" % i * 50)
    for split, numbers in (("train", range(15)), ("test", (100, 101)))
    for i in numbers
]


def refusal(source: ParquetSource) -> str:
    with pytest.raises(LabError) as error:
        everything(source)
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)
    return str(error.value)


def test_rows_are_in_order_and_identity_has_commit(server, lines):
    source = nst()
    assert everything(source) == ROWS
    assert (source.identity()["dataset"], source.identity()["commit"]) == ("jzju/nst", COMMIT)
    assert f"hub://jzju/nst: revision main is commit {COMMIT}" in lines
    assert any("train = train, test = test" in line for line in lines)
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert all(COMMIT in path for path, _ in server.requests if "/resolve/" in path)


def test_only_accessed_ranges_are_fetched(server, lines):
    rows = list(nst().examples(("test",)))
    files = [path for path, _ in server.requests if "/resolve/" in path]
    assert all(byte_range.startswith("bytes=") for path, byte_range in server.requests if "/resolve/" in path)
    before = len(files)
    assert rows[1].audio == b"sound 101" * 50
    assert rows[0].audio == b"sound 100" * 50
    assert len([path for path, _ in server.requests if "/resolve/" in path]) > before
    assert not any("train-00001" in path for path in files)


def test_revision_stays_pinned_when_branch_moves(server, lines):
    source, revisions = nst(), server.sets["jzju/nst"]
    examples = source.examples()
    revisions["moved"], revisions["main"] = revisions["main"], ("f00d" * 10, {"train.parquet": parquet(1, 500)})
    assert [(e.split, e.text, e.audio) for e in examples] == ROWS
    assert nst().identity()["commit"] == "f00d" * 10 != source.identity()["commit"]


@pytest.mark.parametrize("name", ["jzju/nst@old", "hub://jzju/nst@old"])
def test_revision_can_be_named(server, lines, name):
    server.sets["jzju/nst"]["old"] = (CONVERTED, {"train.parquet": parquet(1, 7)})
    source = ParquetSource(HubFiles(name, ""))
    assert [text for _, text, _ in everything(source)] == ["mening 7"]
    assert source.identity()["commit"] == CONVERTED
    assert nst("old").identity() == source.identity()


def test_recipe_opens_fleurs(server, lines):
    both = {"raw_transcription": pa.array(["Mening, ett."]), "transcription": pa.array(["mening ett"])}
    files = {
        f"{language}/{split}/0000.parquet": parquet(1, **both, text=pa.nulls(1))
        for language in ("da_dk", "sv_se")
        for split in ("train", "validation", "test")
    }
    server.sets["google/fleurs"] = {
        "main": (COMMIT, {"fleurs.py": b"import datasets", "data/sv_se/train.tsv": b""}),
        "refs/convert/parquet": (CONVERTED, files),
    }
    settings = recipes.load("tour", {"source.kind": "hub", "source.path": "google/fleurs"}).source
    source = open_source(settings)
    assert [(e.split, e.text) for e in source.examples()] == [
        (split, "Mening, ett.") for split in ("train", "validation", "test")
    ]
    assert any("no Parquet on main: reading refs/convert/parquet" in line for line in lines)
    assert source.identity() | {"commit": CONVERTED, "config": "sv_se"} == source.identity()


CARD = b"""---
license: cc0-1.0
configs:
- config_name: default
  data_files:
  - split: train
    path: "a/*.parquet"
  - split: dev
    path:
    - ./b/**/x.parquet
    - b/none.parquet
- config_name: noisy
  data_files: c/?.parquet
- config_name: elsewhere
  data_files: d/*.csv
- 7
---
"""


def test_card_declares_configs_and_splits(server, lines):
    numbered = ("a/one.parquet", "a/two.parquet", "b/1/x.parquet", "c/1.parquet", "a/deep/left_out.parquet")
    files = {name: parquet(1, start) for start, name in enumerate(numbered)}
    server.sets["them/odd"] = {"main": (COMMIT, {**files, "README.md": CARD})}

    def read(config: str) -> tuple[str, list]:
        source = ParquetSource(HubFiles("them/odd"), LayoutSettings(config))
        return source.identity()["config"], [(split, text) for split, text, _ in everything(source)]

    mains = [("train", "mening 0"), ("train", "mening 1"), ("validation", "mening 2")]
    assert read("default") == ("", mains)
    assert read("noisy") == ("noisy", [("train", "mening 3")])
    with pytest.raises(LabError, match="holds the configurations 'default', 'noisy', got no source.config"):
        read("")
    del server.sets["them/odd"]["main"][1]["README.md"]
    with pytest.raises(LabError, match="holds the configurations"):
        read("default")


def test_redundant_card_does_not_change_identity(server, lines):
    before = nst().identity()
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += b"".join(b"  - split: %s\n    path: data/%s-*\n" % (split, split) for split in (b"train", b"test"))
    server.sets["jzju/nst"]["main"][1]["README.md"] = card + b"---\n"
    assert nst().identity() == before
    assert everything(nst()) == ROWS


@pytest.mark.parametrize(
    "configs", ["{}", "7", "[{config_name: x}]", "[{data_files: [[1], {path: 3}, null]}]", "[{data_files: {a: [b]}}]"]
)
def test_malformed_card_is_ignored(server, lines, configs):
    server.sets["jzju/nst"]["main"][1]["README.md"] = f"---\nconfigs: {configs}\n---\n".encode()
    assert everything(nst()) == ROWS


def test_data_set_with_script_only_raises(server, lines):
    server.sets["kb/old"] = {"main": (COMMIT, {"old.py": b"import datasets"})}
    message = refusal(ParquetSource(HubFiles("kb/old")))
    assert "the loading script old.py, which is not run" in message and "refs/convert/parquet" in message


def test_data_set_without_parquet_raises(server, lines):
    server.sets["kb/empty"] = {"main": (COMMIT, {"README.md": b""})}
    message = refusal(ParquetSource(HubFiles("kb/empty")))
    assert "holds no Parquet at main, nor at refs/convert/parquet" in message and "script" not in message
    server.sets["kb/empty"]["v1"] = server.sets["kb/empty"]["main"]
    message = refusal(ParquetSource(HubFiles("kb/empty@v1")))
    assert "at v1: try source.revision = 'refs/convert/parquet'" in message


@pytest.mark.parametrize("name", ["nst", "a/b/c", "jzju/nst ?", "https://huggingface.co/x/y", ""])
def test_invalid_data_set_name_raises(lines, name):
    assert "owner/name" in refusal(ParquetSource(HubFiles(name)))


def test_two_revisions_raise(lines):
    assert "keep one" in refusal(ParquetSource(HubFiles("a/b@x", "y")))


def test_absent_data_set_or_revision_raises(server, lines):
    absent = ParquetSource(HubFiles("jzju/nts"))
    assert "does not exist, or is private" in refusal(absent)
    assert "no revision 'v9': correct source.revision" in refusal(nst("v9"))


@pytest.mark.parametrize(
    ("where", "status", "code", "line"),
    [
        ("/resolve/", 403, "GatedRepo", "is gated: accept its terms"),
        ("/api/", 401, "GatedRepo", "is gated: accept its terms"),
        ("/api/", 401, "", "Set HF_TOKEN"),
        ("/resolve/", 401, "", "Set HF_TOKEN"),
        ("/api/", 403, "", "(403)"),
        ("/resolve/", 403, "", "(403)"),
        ("/resolve/", 404, "EntryNotFound", "lost the file data/train-00000-of-00002.parquet"),
        ("/api/", 400, "", "(400)"),
    ],
)
def test_permanent_error_raises_without_retry(server, lines, where, status, code, line):
    server.fail(where, refuse(status, code), times=50)
    assert line in refusal(nst())
    assert len(server.faults) == 49


PASSING = {
    "429": refuse(429),
    "429 with a time": refuse(429, Retry_After="0"),
    "500": refuse(500),
    "503": refuse(503),
    "cut in the middle": cut_in_the_middle,
    "too short": too_short,
    "slow": slow,
    "dropped": drop,
}


HALF_A_LISTING = ("/api/", too_short)
"""Not JSON: see test_invalid_listing_raises."""
REQUESTS = ("/api/", "train-00000", "train-00001")


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        pytest.param(where, fault, id=f"{name} at {where}")
        for where in REQUESTS
        for name, fault in PASSING.items()
        if (where, fault) != HALF_A_LISTING
    ],
)
def test_temporary_errors_are_retried(server, lines, where, fault):
    server.fail(where, fault, times=2)
    assert everything(nst()) == ROWS
    assert server.faults == []
    assert len([line for line in lines if "trying again" in line]) == 2


def test_invalid_listing_raises(server, lines):
    server.fail("/api/", lambda handler, content: send(handler, b"<html>log in</html>"))
    assert "HF_ENDPOINT" in refusal(nst())
    server.fail("/api/", too_short)
    assert "HF_ENDPOINT" in refusal(nst())


@pytest.mark.parametrize("fault", [refuse(500), too_short, drop], ids=["500", "too short", "dropped"])
def test_exhausted_retries_raise_after_earlier_rows(server, lines, monkeypatch, fault):
    monkeypatch.setattr(hub, "TRIES", 3)
    server.fail("train-00001", fault, times=3)
    got = []
    with pytest.raises(LabError, match=r"train-00001-of-00002.parquet could not be read .* in 3 tries") as error:
        got.extend(example.text for example in nst().examples())
    assert len(got) == 10 and TOKEN not in str(error.value)
    assert server.faults == []
    assert everything(nst()) == ROWS


def test_resumed_build_fetches_no_finished_audio(server, lines, tmp_path, encoded, speech):
    wavs = [encoded(speech(16_000, seed)) for seed in range(12)]
    sounds = pa.array([{"bytes": wav, "path": ""} for wav in wavs], AUDIO)
    files = {f"train-0000{n}.parquet": parquet(12, 12 * n, audio=sounds) for n in range(3)}
    server.sets["jzju/nst"]["main"] = (COMMIT, files)
    clip_filter = ClipFilter(lambda text: [1], 80, 0.1, 30.0, 1e-3)
    identity = {"features.dtype": "float32", "features.n_mels": 80}

    def build_cache() -> FeatureCache:
        return build(tmp_path / "c", nst().examples(), clip_filter.create_clip, identity, BuildOptions(shard_clips=4))

    server.fail("train-00002", refuse(403))
    with pytest.raises(LabError, match=r"\(403\)"):
        build_cache()
    server.requests.clear()
    cache = build_cache()
    assert "resuming an unfinished cache: 6 shard(s) are already there" in lines
    assert list(cache.rows["text"]) == [f"mening {i}" for i in range(36)]
    assert cache.counts == {"train": 36, "rejected": 0}
    fetched = {file: sum(size for path, size in fetched_bytes(server) if file in path) for file in files}
    first, second, third = fetched.values()
    assert max(first, second) < 3 * 2**16, "only the footer and the text"
    assert third > 12 * 0.7 * len(wavs[0]) > 3 * 2**16


def fetched_bytes(server: Hub) -> list[tuple[str, int]]:
    ranges = [(path, re.fullmatch(r"bytes=(\d+)-(\d+)", byte_range)) for path, byte_range in server.requests]
    return [(path, int(match[2]) - int(match[1]) + 1) for path, match in ranges if match]


def test_server_without_ranges_is_read(server, lines):
    full = server.sets["jzju/nst"]["main"][1]["data/train-00001-of-00002.parquet"]
    server.fail("train-00001", lambda handler, content: send(handler, full, 200), times=50)
    assert everything(nst()) == ROWS


def test_missing_response_raises(server, lines, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "could not be read from 127.0.0.1 in 6 tries, the last ended with ConnectError" in refusal(nst())


def test_offline_mode_raises(server, lines, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(nst())


def test_program_errors_are_not_converted(server, lines, monkeypatch):
    monkeypatch.setattr(hub, "_hub", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nst().identity()


def test_retry_after_is_respected_within_bounds():
    def waits(**headers: str) -> float:
        error = Exception()
        error.response = type("Answer", (), {"headers": {k.replace("_", "-"): v for k, v in headers.items()}})
        return hub._wait_s(error, 3)

    assert (waits(Retry_After="7"), waits(Retry_After="9000"), waits(RateLimit='"api";r=0;t=55')) == (7, 60, 55)
    assert waits(Retry_After="soon") == waits() == 4
    assert hub._wait_s(Exception(), 1) == hub.WAIT_S


def test_range_file_seeks_and_reads():
    content = bytes(range(200))
    requests = []
    file = RangeFile(lambda start, stop: requests.append((start, stop)) or content[start:stop], len(content))
    assert file.seek(-8, io.SEEK_END) == 192 and file.read() == content[192:] and file.tell() == 200
    assert file.read(5) == b"" and file.seek(3) == 3 and file.seek(2, io.SEEK_CUR) == 5
    assert file.read(4) == content[5:9] and file.read(0) == b""
    assert requests == [(192, 200), (5, 9)]
    assert file.readable() and file.seekable() and not file.writable()


SHA256 = 64 * "a"


@pytest.mark.parametrize(
    ("headers", "redirected", "fault"),
    [
        ({"Content-Range": "bytes 0-9/100", "ETag": f'"{SHA256}"'}, {}, ""),
        ({"Content-Range": "bytes 0-9/101"}, {}, "101 bytes instead of 100"),
        ({"ETag": f'"{64 * "b"}"'}, {}, "another digest"),
        ({"ETag": f'"{64 * "b"}"'}, {"X-Linked-Etag": f'"{SHA256}"'}, ""),  # the storage's own digest
        ({"ETag": f'"{SHA256}"'}, {"X-Linked-Etag": f'"{64 * "b"}"'}, "another digest"),
        ({"ETag": '"of another kind"'}, {}, ""),
    ],
)
def test_response_of_another_file_is_noticed(headers, redirected, fault):
    history = [SimpleNamespace(headers=redirected)] if redirected else []
    response = SimpleNamespace(status_code=206, headers=headers, history=history)
    with pytest.raises(hub._TooShort, match=fault) if fault else contextlib.nullcontext():
        hub._check_file(response, 100, SHA256)
