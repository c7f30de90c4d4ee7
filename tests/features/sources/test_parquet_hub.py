"""Data sets on the Hub, by the real client against a server on loopback that fails in every way we could think of."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    """Data sets by name, each revision name to (commit, files); faults are taken in turn by requests that match."""

    def __init__(self):
        self.sets: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = {}
        self.faults: list[tuple[str, Callable]] = []
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()

    def fail(self, where: str, fault: Callable, times: int = 1) -> None:
        """Let `fault(handler, content)` answer the next `times` requests whose path holds `where`."""
        self.faults += [(where, fault)] * times

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.asked.append((path, handler.headers.get("Range", "")))
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
            told = {"id": match[1], "sha": commit, "siblings": siblings}
            if head := re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL):
                told["cardData"] = yaml.safe_load(head[1])
            return json.dumps(told).encode()
        match = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        found = [files for commit, files in self.sets[match[1]].values() if commit == match[2]]
        return found[0].get(match[3])

    @staticmethod
    def _cut(handler: BaseHTTPRequestHandler, content: bytes) -> bytes:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        return content[int(asked[1]) : int(asked[2]) + 1] if asked else content


def send(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, promised: int = -1, **headers) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content) if promised < 0 else promised))
    handler.end_headers()
    handler.wfile.write(content)


def refuse(status: int, code: str = "", **headers) -> Callable:
    """An error of the Hub, which repeats the token that came: what a server says is not to be trusted."""

    def fault(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        said = json.dumps({"error": f"no: {handler.headers.get('Authorization')}"}).encode()
        send(handler, said, status, **({"X_Error_Code": code} if code else {}), X_Error_Message=TOKEN, **headers)

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
    """A Hub on loopback that the lab and the client talk to, with waits of milliseconds."""
    import huggingface_hub
    from huggingface_hub.utils import close_session

    answers = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

        def do_GET(self):
            answers.answer(self)

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
    answers.sets["jzju/nst"] = {
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
    yield answers
    http.shutdown()
    http.server_close()
    thread.join()
    close_session()


@pytest.fixture
def told(capfd):
    """The lines that a source told. No token may be among them, nor on the screen."""
    lines = record_log()
    yield lines
    shown = "\n".join([*lines, *capfd.readouterr()])
    assert TOKEN not in shown


def nst(told: list[str], revision: str = "") -> ParquetSource:
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


def test_every_row_in_order_and_the_commit_in_the_identity(server, told):
    source = nst(told)
    assert everything(source) == ROWS
    assert (source.identity()["dataset"], source.identity()["commit"]) == ("jzju/nst", COMMIT)
    assert f"hub://jzju/nst: revision main is commit {COMMIT}" in told
    assert any("train = train, test = test" in line for line in told)
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert all(COMMIT in path for path, _ in server.asked if "/resolve/" in path)


def test_only_ranges_are_fetched_and_no_sound_that_is_not_asked_for(server, told):
    rows = list(nst(told).examples(("test",)))
    files = [path for path, _ in server.asked if "/resolve/" in path]
    assert all(asked.startswith("bytes=") for path, asked in server.asked if "/resolve/" in path)
    before = len(files)
    assert rows[1].audio == b"sound 101" * 50
    assert rows[0].audio == b"sound 100" * 50
    assert len([path for path, _ in server.asked if "/resolve/" in path]) > before
    assert not any("train-00001" in path for path in files)


def test_a_revision_is_pinned_while_the_branch_moves_on(server, told):
    source, revisions = nst(told), server.sets["jzju/nst"]
    examples = source.examples()
    revisions["moved"], revisions["main"] = revisions["main"], ("f00d" * 10, {"train.parquet": parquet(1, 500)})
    assert [(e.split, e.text, e.audio) for e in examples] == ROWS
    assert nst(told).identity()["commit"] == "f00d" * 10 != source.identity()["commit"]


@pytest.mark.parametrize("name", ["jzju/nst@old", "hub://jzju/nst@old"])
def test_a_revision_by_name(server, told, name):
    server.sets["jzju/nst"]["old"] = (CONVERTED, {"train.parquet": parquet(1, 7)})
    source = ParquetSource(HubFiles(name, ""))
    assert [text for _, text, _ in everything(source)] == ["mening 7"]
    assert source.identity()["commit"] == CONVERTED
    assert nst(told, "old").identity() == source.identity()


def test_fleurs_by_a_recipe(server, told):
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
    assert any("no Parquet on main: reading refs/convert/parquet" in line for line in told)
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


def test_the_card_says_which_file_is_which(server, told):
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


def test_a_card_that_says_what_the_names_say_changes_no_identity(server, told):
    before = nst(told).identity()
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += b"".join(b"  - split: %s\n    path: data/%s-*\n" % (split, split) for split in (b"train", b"test"))
    server.sets["jzju/nst"]["main"][1]["README.md"] = card + b"---\n"
    assert nst(told).identity() == before
    assert everything(nst(told)) == ROWS


@pytest.mark.parametrize(
    "configs", ["{}", "7", "[{config_name: x}]", "[{data_files: [[1], {path: 3}, null]}]", "[{data_files: {a: [b]}}]"]
)
def test_a_card_that_makes_no_sense_is_as_good_as_none(server, told, configs):
    server.sets["jzju/nst"]["main"][1]["README.md"] = f"---\nconfigs: {configs}\n---\n".encode()
    assert everything(nst(told)) == ROWS


def test_a_set_that_needs_its_script(server, told):
    server.sets["kb/old"] = {"main": (COMMIT, {"old.py": b"import datasets"})}
    message = refusal(ParquetSource(HubFiles("kb/old")))
    assert "the loading script old.py, which is not run" in message and "refs/convert/parquet" in message


def test_a_set_without_parquet(server, told):
    server.sets["kb/empty"] = {"main": (COMMIT, {"README.md": b""})}
    message = refusal(ParquetSource(HubFiles("kb/empty")))
    assert "holds no Parquet at main, nor at refs/convert/parquet" in message and "script" not in message
    server.sets["kb/empty"]["v1"] = server.sets["kb/empty"]["main"]
    message = refusal(ParquetSource(HubFiles("kb/empty@v1")))
    assert "at v1: try source.revision = 'refs/convert/parquet'" in message


@pytest.mark.parametrize("name", ["nst", "a/b/c", "jzju/nst ?", "https://huggingface.co/x/y", ""])
def test_a_name_that_is_none(told, name):
    assert "owner/name" in refusal(ParquetSource(HubFiles(name)))


def test_two_revisions_at_once(told):
    assert "keep one" in refusal(ParquetSource(HubFiles("a/b@x", "y")))


def test_a_set_and_a_revision_that_do_not_exist(server, told):
    absent = ParquetSource(HubFiles("jzju/nts"))
    assert "does not exist, or is private" in refusal(absent)
    assert "no revision 'v9': correct source.revision" in refusal(nst(told, "v9"))


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
def test_what_another_try_would_not_mend_is_one_line_at_once(server, told, where, status, code, line):
    server.fail(where, refuse(status, code), times=50)
    assert line in refusal(nst(told))
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
"""Is no JSON: see test_an_answer_that_is_no_listing."""
PLACES = ("/api/", "train-00000", "train-00001")


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        pytest.param(where, fault, id=f"{name} at {where}")
        for where in PLACES
        for name, fault in PASSING.items()
        if (where, fault) != HALF_A_LISTING
    ],
)
def test_what_passes_costs_a_try_and_no_row(server, told, where, fault):
    server.fail(where, fault, times=2)
    assert everything(nst(told)) == ROWS
    assert server.faults == []
    assert len([line for line in told if "trying again" in line]) == 2


def test_an_answer_that_is_no_listing(server, told):
    server.fail("/api/", lambda handler, content: send(handler, b"<html>log in</html>"))
    assert "HF_ENDPOINT" in refusal(nst(told))
    server.fail("/api/", too_short)
    assert "HF_ENDPOINT" in refusal(nst(told))


@pytest.mark.parametrize("fault", [refuse(500), too_short, drop], ids=["500", "too short", "dropped"])
def test_what_does_not_pass_is_one_line_after_the_rows_that_came(server, told, monkeypatch, fault):
    monkeypatch.setattr(hub, "TRIES", 3)
    server.fail("train-00001", fault, times=3)
    got = []
    with pytest.raises(LabError, match=r"train-00001-of-00002.parquet could not be read .* in 3 tries") as error:
        got.extend(example.text for example in nst(told).examples())
    assert len(got) == 10 and TOKEN not in str(error.value)
    assert server.faults == []
    assert everything(nst(told)) == ROWS


def test_a_cache_that_was_cut_off_fetches_no_finished_sound_again(server, told, tmp_path, encoded, speech):
    wavs = [encoded(speech(16_000, seed)) for seed in range(12)]
    sounds = pa.array([{"bytes": wav, "path": ""} for wav in wavs], AUDIO)
    files = {f"train-0000{n}.parquet": parquet(12, 12 * n, audio=sounds) for n in range(3)}
    server.sets["jzju/nst"]["main"] = (COMMIT, files)
    clip_filter = ClipFilter(lambda text: [1], 80, 0.1, 30.0, 1e-3)
    identity = {"features.dtype": "float32", "features.n_mels": 80}

    def build_cache() -> FeatureCache:
        return build(
            tmp_path / "c", nst(told).examples(), clip_filter.create_clip, identity, BuildOptions(shard_clips=4)
        )

    server.fail("train-00002", refuse(403))
    with pytest.raises(LabError, match=r"\(403\)"):
        build_cache()
    server.asked.clear()
    cache = build_cache()
    assert "resuming an unfinished cache: 6 shard(s) are already there" in told
    assert list(cache.rows["text"]) == [f"mening {i}" for i in range(36)]
    assert cache.counts == {"train": 36, "rejected": 0}
    fetched = {file: sum(size for path, size in fetched_bytes(server) if file in path) for file in files}
    first, second, third = fetched.values()
    assert max(first, second) < 3 * 2**16, "no more than the end of the file, which tells what is in it, and the text"
    assert third > 12 * 0.7 * len(wavs[0]) > 3 * 2**16


def fetched_bytes(server: Hub) -> list[tuple[str, int]]:
    ranges = [(path, re.fullmatch(r"bytes=(\d+)-(\d+)", asked)) for path, asked in server.asked]
    return [(path, int(asked[2]) - int(asked[1]) + 1) for path, asked in ranges if asked]


def test_a_server_that_knows_no_ranges(server, told):
    whole = server.sets["jzju/nst"]["main"][1]["data/train-00001-of-00002.parquet"]
    server.fail("train-00001", lambda handler, content: send(handler, whole, 200), times=50)
    assert everything(nst(told)) == ROWS


def test_nobody_answers(server, told, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "could not be read from 127.0.0.1 in 6 tries, the last ended with ConnectError" in refusal(nst(told))


def test_the_hub_is_switched_off(server, told, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(nst(told))


def test_an_error_of_ours_is_not_dressed_up(server, told, monkeypatch):
    monkeypatch.setattr(hub, "_hub", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nst(told).identity()


def test_retry_after_is_obeyed_within_bounds():
    def waits(**headers: str) -> float:
        error = Exception()
        error.response = type("Answer", (), {"headers": {k.replace("_", "-"): v for k, v in headers.items()}})
        return hub._wait_s(error, 3)

    assert (waits(Retry_After="7"), waits(Retry_After="9000"), waits(RateLimit='"api";r=0;t=55')) == (7, 60, 55)
    assert waits(Retry_After="soon") == waits() == 4
    assert hub._wait_s(Exception(), 1) == hub.WAIT_S


def test_a_range_file_is_a_file():
    content = bytes(range(200))
    asked = []
    file = RangeFile(lambda start, stop: asked.append((start, stop)) or content[start:stop], len(content))
    assert file.seek(-8, io.SEEK_END) == 192 and file.read() == content[192:] and file.tell() == 200
    assert file.read(5) == b"" and file.seek(3) == 3 and file.seek(2, io.SEEK_CUR) == 5
    assert file.read(4) == content[5:9] and file.read(0) == b""
    assert asked == [(192, 200), (5, 9)]
    assert file.readable() and file.seekable() and not file.writable()
