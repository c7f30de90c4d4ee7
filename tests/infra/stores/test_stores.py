"""One contract for all stores. Hub and Hopsworks run with their real clients against loopback servers (servers/)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
import shutil
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from log_recorder import record_log
from servers.stores import Bench, contents

from pipelines import __main__ as cli
from pipelines.features import pipeline as feature_pipeline
from pipelines.infra import manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.stores import drive, hopsworks, hub, local, transfer
from pipelines.infra.stores import errors as store_errors
from pipelines.recipes import runs as recipe_runs
from pipelines.whisper import model as whisper_model

FILES = {
    "shard-00000.bin": bytes(range(256)) * 40,
    "shard-00001.bin": b"\r\n--x\0" * 1500,
    "shard-00000.json": b'{"rows": []}',
    "rejected.csv": b"id,split,reason,detail\n",
    "notes/deep.bin": b"d" * 3000,
    "empty.txt": b"",
}


@pytest.fixture(autouse=True)
def lab_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "lab-cache"))
    return tmp_path / "lab-cache"


@pytest.fixture(params=["local", "drive", "hub", "hopsworks"])
def bench(request) -> Bench:
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture(params=["hub", "hopsworks"])
def served(request) -> Bench:
    """The stores that are servers."""
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture
def artefact(tmp_path) -> Path:
    return make_artefact(tmp_path / "made" / "tour")


def make_artefact(folder: Path, files: dict[str, bytes] = FILES, **facts) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.seal(folder, **{"kind": "cache", "digest": "d1", **facts})
    return folder


def one_line(caught, *words: str) -> str:
    """The message of a LabError, looked at: one line with these words, and nothing of its cause in a traceback."""
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    for word in words:
        assert re.search(word, message), message
    return message


# ---- what every store does


def test_a_round_trip_is_byte_identical(bench, artefact):
    assert not bench.exists("tour")
    published = bench.publish(artefact, "tour")
    assert bench.exists("tour")
    fetched = bench.fetch("tour")
    assert contents(fetched) == contents(artefact) == bench.files("tour")
    assert contents(bench.store.fetch(published)) == contents(artefact)


def test_the_list_names_what_is_finished_and_nothing_else(bench, artefact):
    bench.publish(artefact, "b")
    bench.publish(artefact, "a")
    bench.publish(artefact, "c")
    bench.write("c", "manifest.json", None)
    assert bench.store.list(bench.parent) == [bench.uri("a"), bench.uri("b")]


def test_what_is_absent_is_one_clear_line(bench):
    assert bench.store.list(bench.parent) == []
    with pytest.raises(LabError) as caught:
        bench.fetch("nothing")
    one_line(caught, "nothing", "absent|nothing finished", "Check")


def test_an_unfinished_folder_is_not_published(bench, artefact):
    (artefact / "manifest.json").unlink()
    with pytest.raises(LabError) as caught:
        bench.publish(artefact, "tour")
    one_line(caught, "unfinished .it has no manifest.")
    assert bench.files("tour") == {}


@pytest.mark.parametrize("lost", ["manifest.json", "shard-00001.bin", "empty.txt"])
def test_an_unfinished_remote_is_not_taken_for_whole(bench, artefact, lost):
    bench.publish(artefact, "tour")
    bench.write("tour", lost, None)
    assert not bench.exists("tour")
    with pytest.raises(LabError):
        bench.fetch("tour")
    assert finished(bench) == []


def finished(bench: Bench) -> list[Path]:
    """Folders in the lab's cache that look finished."""
    import os

    return [path.parent for path in Path(os.environ["LAB_CACHE"]).rglob("manifest.json") if ".partial" not in str(path)]


def test_a_size_that_differs_is_not_taken_for_whole(bench, artefact):
    bench.publish(artefact, "tour")
    bench.write("tour", "shard-00000.bin", b"short")
    assert not bench.exists("tour")


def test_a_damaged_byte_is_found_and_publishing_again_mends_that_file_alone(bench, artefact):
    bench.publish(artefact, "tour")
    bench.write("tour", "shard-00001.bin", b"!" + FILES["shard-00001.bin"][1:])
    with pytest.raises(LabError) as caught:
        bench.fetch("tour")
    one_line(caught, "shard-00001.bin", "damaged")
    assert finished(bench) == []
    before = bench.uploads()
    bench.publish(artefact, "tour")
    assert bench.uploads() - before <= 2  # the file, and the manifest that was taken away for the time
    assert contents(bench.fetch("tour")) == contents(artefact)


def test_publishing_the_same_again_sends_nothing(bench, artefact):
    bench.publish(artefact, "tour")
    before, told = bench.uploads(), []
    record_log(told)
    bench.publish(artefact, "tour")
    assert bench.uploads() == before
    assert "whole and the same" in told[0]


def test_a_changed_artefact_replaces_the_old_one_and_sends_what_changed(bench, artefact, tmp_path):
    bench.publish(artefact, "tour")
    fetched = bench.fetch("tour")
    old = contents(fetched)
    changed = {**FILES, "shard-00001.bin": b"new" * 900}
    del changed["notes/deep.bin"]
    other = make_artefact(tmp_path / "other", changed, digest="d2")
    before = bench.uploads()
    bench.publish(other, "tour")
    assert bench.uploads() - before == 2  # the shard and the manifest
    assert bench.files("tour") == contents(other)
    assert contents(bench.fetch("tour")) == contents(other)
    assert bench.name == "local" or contents(fetched) == old  # who still reads the old one is not disturbed


def test_new_facts_in_the_manifest_send_the_manifest_alone(bench, artefact):
    bench.publish(artefact, "tour")
    before = bench.uploads()
    manifest.amend(artefact, test={"wer": 0.25})
    bench.publish(artefact, "tour")
    assert bench.uploads() - before == 1
    assert manifest.read(bench.fetch("tour"))["test"] == {"wer": 0.25}


def test_the_manifest_goes_last(bench, artefact, monkeypatch):
    order = []
    for place in (local.LocalFolder, drive.DriveFolder, hub.HubFolder, hopsworks.HopsworksFolder):
        put = place.put
        monkeypatch.setattr(
            place, "put", lambda self, folder, names, put=put: (order.append(list(names)), put(self, folder, names))[1]
        )
    bench.publish(artefact, "tour")
    names = list(dict.fromkeys(name for block in order for name in block))
    assert set(names) == {*FILES, "manifest.json"}
    assert names[-1] == "manifest.json"
    assert ["manifest.json"] in order


def test_a_manifest_that_names_files_outside_its_folder_is_refused(bench, artefact, tmp_path):
    bench.publish(artefact, "tour")
    told = json.loads((artefact / "manifest.json").read_text())
    for evil in ("../../evil", "/etc/evil", "a/../../evil", "..\\evil"):
        entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
        bench.write("tour", "manifest.json", json.dumps({**told, "files": {evil: entry}}).encode())
        if bench.name != "local":  # there nothing is written anywhere
            with pytest.raises(LabError, match="names files outside its folder"):
                bench.fetch("tour")
        assert not bench.exists("tour")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"a": {}}}', b"\xff\xfe"])
def test_a_damaged_manifest_is_no_artefact(bench, artefact, content):
    bench.publish(artefact, "tour")
    bench.write("tour", "manifest.json", content)
    assert not bench.exists("tour")
    with pytest.raises(LabError):
        bench.fetch("tour")


def test_what_is_at_hand_is_not_fetched_again_and_repaired_if_damaged(bench, artefact):
    bench.publish(artefact, "tour")
    fetched = bench.fetch("tour")
    told = record_log()
    assert bench.fetch("tour") == fetched
    assert told == []
    if bench.name == "local":
        return
    (fetched / "rejected.csv").write_bytes(b"ID,split,reason,detail\n")
    assert bench.fetch("tour") == fetched
    assert told == [f"fetching 1 of 6 files (0.0 MB) from {bench.uri('tour')}"]
    assert contents(fetched) == contents(artefact)


def test_facts_are_told_without_the_files(bench, artefact):
    assert bench.store.metadata(bench.uri("tour")) is None
    bench.publish(artefact, "tour")
    assert bench.store.metadata(bench.uri("tour")) == manifest.read(artefact)
    bench.write("tour", "shard-00000.bin", b"short")
    assert bench.store.metadata(bench.uri("tour")) is None


def test_what_is_fetched_into_a_folder_is_a_copy_in_it(bench, artefact, tmp_path):
    bench.publish(artefact, "tour")
    copy = bench.store.fetch(bench.uri("tour"), into=tmp_path / "into")
    assert copy.parent == tmp_path / "into"
    assert contents(copy) == contents(artefact)
    bench.write("tour", "shard-00001.bin", b"!" + FILES["shard-00001.bin"][1:])
    shutil.rmtree(copy)
    with pytest.raises(transfer.Damaged, match=r"shard-00001.bin of .*tour arrived damaged"):
        bench.store.fetch(bench.uri("tour"), into=tmp_path / "into")


def test_artefacts_lie_below_one_another_and_do_not_disturb_each_other(bench, artefact, tmp_path):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}"}
    below = make_artefact(tmp_path / "below", files, digest="b")
    bench.publish(below, "tour/b/deep")
    bench.publish(below, "tour/a")
    bench.write("tour/half", "model.safetensors", b"half")
    bench.publish(artefact, "tour")
    names = [uri.removeprefix(bench.uri("tour/")) for uri in bench.store.list_folders(bench.uri("tour"))]
    assert {"a", "b", "half"} <= {*names}
    assert names == sorted(names)
    assert bench.store.list(bench.uri("tour")) == [bench.uri("tour/a")]
    assert bench.store.list(bench.uri("tour/b")) == [bench.uri("tour/b/deep")]
    other = make_artefact(tmp_path / "other", {"shard-00000.bin": b"new" * 900}, digest="d2")
    bench.publish(other, "tour")
    assert contents(other).items() <= contents(bench.fetch("tour")).items()
    assert "notes/deep.bin" not in bench.files("tour")
    for name in ("tour/a", "tour/b/deep"):
        assert contents(bench.fetch(name)) == contents(below)


def test_what_is_removed_is_gone_and_the_rest_is_not(bench, artefact):
    bench.publish(artefact, "tour/a")
    bench.publish(artefact, "tour/b")
    bench.write("tour/half", "model.safetensors", b"half")
    for name in ("tour/a", "tour/half", "tour/never"):
        bench.store.remove(bench.uri(name))
        assert bench.files(name) == {}
    assert bench.store.list_folders(bench.uri("tour")) == [bench.uri("tour/b")]
    assert contents(bench.fetch("tour/b")) == contents(artefact)


def test_a_folder_that_holds_other_things_keeps_them(bench, artefact):
    bench.write("tour", "thesis.txt", b"years of work")
    bench.publish(artefact, "tour")
    bench.publish(artefact, "tour")
    assert bench.files("tour")["thesis.txt"] == b"years of work"


# ---- faults of servers

UPLOADS = {
    "hub": "PUT /lfs/|POST .*/commit/",
    "hopsworks": "POST .*/dataset/upload/",
}
DOWNLOADS = {"hub": "GET .*/resolve/.*shard-00001.bin", "hopsworks": "GET .*/with_auth/.*shard-00001.bin"}
SAID = {
    "401": "does not accept the token",
    "403": "does not allow this token",
    "409": "at the same time .409.",
    "429": "slow down .429..*Wait",
    "500": "failed .500.",
    "cut upload": "broke off",
}


@pytest.mark.parametrize("kind", SAID)
def test_an_upload_that_fails_is_one_line_and_a_second_try_finishes_the_rest(served, artefact, kind):
    first = "PUT /lfs/" if served.name == "hub" else UPLOADS["hopsworks"]
    served.server.fault(first, "slow", times=2)  # two files pass
    served.server.fault(UPLOADS[served.name], kind, times=None)
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    one_line(caught, SAID[kind])
    assert not served.exists("tour")
    assert "manifest.json" not in served.files("tour")
    passed = served.uploads()
    assert passed == 2
    served.server.faults.clear()
    served.publish(artefact, "tour")
    assert contents(served.fetch("tour")) == contents(artefact)
    # an empty file is never sent apart from its commit, everything else once
    assert served.uploads() == len(FILES) + 1


def test_a_failure_of_every_commit_does_not_look_like_success(hub_bench, artefact):
    hub_bench.server.fault("POST .*/commit/", "500", times=None)
    with pytest.raises(LabError) as caught:
        hub_bench.publish(artefact, "tour")
    one_line(caught, "the Hub failed .500.", "not finished", "Run this again")
    assert not hub_bench.exists("tour")
    hub_bench.server.faults.clear()
    large = sum(len(content) >= 1000 for content in FILES.values())
    assert hub_bench.uploads() == large
    hub_bench.publish(artefact, "tour")
    assert hub_bench.uploads() == len(FILES) + 1


@pytest.mark.parametrize("kind", ["401", "403", "429", "500"])
@pytest.mark.parametrize("doing", ["fetch", "exists", "publish", "list"])
def test_a_refusal_of_everything_is_one_line(served, artefact, kind, doing):
    served.publish(artefact, "tour")
    served.server.fault(r".", kind, times=None)
    acts = {
        "fetch": lambda: served.fetch("tour"),
        "exists": lambda: served.exists("tour"),
        "publish": lambda: served.publish(artefact, "tour"),
        "list": lambda: served.store.list(served.parent),
    }
    with pytest.raises(LabError) as caught:
        acts[doing]()
    one_line(caught, SAID[kind])


@pytest.mark.parametrize("kind", ["truncate", "500", "403"])
def test_a_download_that_fails_leaves_nothing_that_looks_whole_and_the_rest_is_fetched(served, artefact, kind):
    served.publish(artefact, "tour")
    served.server.fault(DOWNLOADS[served.name], kind, times=None)
    with pytest.raises(LabError) as caught:
        served.fetch("tour")
    one_line(caught, SAID.get(kind, "broke off|damaged"))
    assert finished(served) == []
    served.server.faults.clear()
    told = record_log()
    assert contents(served.fetch("tour")) == contents(artefact)
    assert not re.search("fetching 6 of 6", told[0])


def test_a_byte_that_changes_on_the_way_is_found(served, artefact):
    served.publish(artefact, "tour")
    served.server.fault(DOWNLOADS[served.name], "corrupt")
    with pytest.raises(LabError) as caught:
        served.fetch("tour")
    one_line(caught, "shard-00001.bin of .* arrived damaged", "Run this again")
    assert finished(served) == []
    assert contents(served.fetch("tour")) == contents(artefact)


def test_what_does_not_read_back_does_not_count_as_published(served, artefact):
    flag = "corrupt_commits" if served.name == "hub" else "corrupt_uploads"
    setattr(served.server, flag, True)
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    one_line(caught, "does not read back")
    assert not served.exists("tour")
    setattr(served.server, flag, False)
    if served.name == "hub":
        served.server.objects.clear()
    served.publish(artefact, "tour")
    assert contents(served.fetch("tour")) == contents(artefact)


def test_a_change_that_breaks_off_leaves_the_old_one_or_none_and_never_a_mixture(served, artefact, tmp_path):
    served.publish(artefact, "tour")
    same_sizes = {name: content[::-1] for name, content in FILES.items()}
    other = make_artefact(tmp_path / "other", same_sizes, digest="d2")
    served.server.fault("DELETE|POST .*/commit/", "slow")  # the old manifest goes
    served.server.fault("POST .*/commit/|upload/.*", "slow")  # a file, or all of them
    served.server.fault(UPLOADS[served.name], "500", times=None)
    with pytest.raises(LabError, match="failed .500."):
        served.publish(other, "tour")
    assert not served.exists("tour")
    served.server.faults.clear()
    served.publish(other, "tour")
    assert contents(served.fetch("tour")) == contents(other)


def test_a_server_that_falls_silent_is_not_waited_for_for_ever(hopsworks_bench, monkeypatch):
    monkeypatch.setattr(hopsworks, "_TIMEOUT_S", (10, 0.1))
    hopsworks_bench.server.fault("GET .*/dataset/", "slow", times=None)
    with pytest.raises(LabError) as caught:
        hopsworks_bench.exists("tour")
    one_line(caught, "broke off", "(?i)timed out")


def test_a_manifest_that_does_not_read_back_does_not_count_as_published(served, artefact):
    served.server.fault("GET .*/(resolve|with_auth)/.*manifest.json", "corrupt")
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    one_line(caught, "does not read back", "manifest.json differs")
    served.publish(artefact, "tour")


def test_a_slow_server_is_waited_for(served, artefact):
    served.server.fault(UPLOADS[served.name], "slow", times=3)
    served.publish(artefact, "tour")
    served.server.fault(DOWNLOADS[served.name], "slow")
    assert contents(served.fetch("tour")) == contents(artefact)


def test_a_short_failure_is_ridden_out(hub_bench, artefact):
    hub_bench.server.fault("PUT /lfs/", "500", times=2)
    hub_bench.server.fault("PUT /lfs/", "429", times=1, **{"Retry-After": "1"})
    hub_bench.publish(artefact, "tour")
    assert hub_bench.exists("tour")


def test_nobody_there_is_one_line(served, artefact):
    served.server.close()
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    one_line(caught, "broke off|did not answer")


# ---- secrets


@pytest.mark.parametrize("kind", ["401", "500", "429", "cut upload"])
def test_no_token_reaches_a_log_a_message_or_a_file(served, artefact, kind, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "hopsworks_common", "hsml", "urllib3"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = True
    told = record_log()
    served.server.fault(UPLOADS[served.name], kind, times=None)
    with pytest.raises(LabError) as caught:
        served.publish(artefact, "tour")
    served.server.faults.clear()
    served.publish(artefact, "tour")
    fetched = served.fetch("tour")
    shown = capfd.readouterr()
    everything = [str(caught.value), caplog.text, shown.out, shown.err, *told]
    assert not [text for text in everything if served.secret in text or "Signature=5" in text]
    assert served.server.requests
    on_disk = [path for path in tmp_path.rglob("*") if path.is_file()] + [
        path for path in fetched.rglob("*") if path.is_file()
    ]
    assert not [path for path in on_disk if served.secret.encode() in path.read_bytes()]
    assert not [name for name, content in served.files("tour").items() if served.secret.encode() in content]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Invalid token Bearer abcdef", "Invalid token Bearer ***"),
        ("ApiKey abc.def!", "ApiKey ***"),
        ("https://u:p@host/x", "https://***@host/x"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?token=abc", "https://h/x?token=***"),
        ("hf_" + "abcdefgh is bad", "*** is bad"),
        ("my own-key here", "my *** here"),
        ("nothing to hide: 12 files", "nothing to hide: 12 files"),
    ],
)
def test_secrets_are_taken_out_of_text(monkeypatch, text, left):
    monkeypatch.setenv("HOPSWORKS_API_KEY", "own-key")
    assert store_errors.redact_secrets(text) == left


def test_a_missing_key_is_asked_for_by_name_and_nobody_is_prompted(cluster, monkeypatch):
    monkeypatch.delenv("HOPSWORKS_API_KEY")
    with pytest.raises(LabError, match="needs an API key: set HOPSWORKS_API_KEY"):
        stores.open_store("hopsworks://demo/x").exists("hopsworks://demo/Resources/x")
    assert cluster.requests == []


def test_the_clusters_certificate_is_verified(hopsworks_bench, monkeypatch):
    monkeypatch.delenv("HOPSWORKS_TRUST_STORE_PATH")
    with pytest.raises(LabError, match=r"(?i)certificate"):
        hopsworks_bench.exists("tour")
    assert hopsworks_bench.server.requests == []


def test_no_certificate_or_key_is_left_on_the_disk(hopsworks_bench, artefact, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    before = contents(tmp_path)
    hopsworks_bench.publish(artefact, "tour")
    assert contents(tmp_path) == before


# ---- the Hub


def test_repositories_are_private_and_of_the_kind_of_what_they_hold(hub_bench, artefact, tmp_path):
    model = make_artefact(tmp_path / "model", {"model.safetensors": b"w" * 5000, "config.json": b"{}"}, kind="model")
    hub_bench.publish(artefact, "tour")
    hub_bench.publish(model, "whisper-sv")
    repos = hub_bench.server.repos
    assert {key: repo.private for key, repo in repos.items()} == {
        ("dataset", "lab/tour"): True,
        ("model", "lab/whisper-sv"): True,
    }
    assert contents(hub_bench.fetch("whisper-sv")) == contents(model)
    assert hub_bench.store.list("hub://lab") == ["hub://lab/tour", "hub://lab/whisper-sv"]
    hub_bench.server.fault("GET /api/models/lab/whisper-sv/tree", "403")  # gated: listed, not to be read
    assert hub_bench.store.list("hub://lab") == ["hub://lab/tour"]


def test_a_public_data_set_is_refused_unless_it_is_said_aloud(hub_bench, artefact, monkeypatch):
    hub_bench.publish(artefact, "tour")
    hub_bench.server.repos["dataset", "lab/tour"].private = False
    before = hub_bench.uploads()
    with pytest.raises(LabError, match=r"public data set.*LAB_HUB_PUBLIC=1"):
        hub_bench.publish(artefact, "tour")
    assert hub_bench.uploads() == before
    monkeypatch.setenv("LAB_HUB_PUBLIC", "1")
    hub_bench.publish(artefact, "tour")


def test_a_commit_stays_what_it_was(hub_bench, artefact, tmp_path):
    first = hub_bench.publish(artefact, "tour")
    assert re.fullmatch(r"hub://lab/tour@[0-9a-f]{40}", first)
    other = make_artefact(tmp_path / "other", {"shard-00000.bin": b"o" * 2000}, digest="d2")
    second = hub_bench.publish(other, "tour")
    assert second != first
    assert contents(hub_bench.store.fetch(first)) == contents(artefact)
    assert contents(hub_bench.store.fetch(second)) == contents(other)
    with pytest.raises(LabError, match="no such repository .or revision"):
        hub_bench.store.fetch("hub://lab/tour@nowhere")
    with pytest.raises(LabError, match="leave out @revision"):
        hub_bench.store.publish(artefact, "hub://lab/tour@main")


def test_without_a_token_a_private_repository_is_not_there_and_the_line_says_so(hub_bench, artefact, monkeypatch):
    hub_bench.publish(artefact, "tour")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(LabError, match=r"it is private. .*set HF_TOKEN"):
        hub_bench.fetch("tour")
    with pytest.raises(LabError, match=r"does not accept the token.*HF_TOKEN"):
        hub_bench.publish(artefact, "tour")


def test_a_wrong_token_is_not_taken_for_an_absent_repository(hub_bench, artefact, monkeypatch):
    hub_bench.publish(artefact, "tour")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    with pytest.raises(LabError) as caught:
        hub_bench.exists("tour")
    assert "wrong" not in one_line(caught, "does not accept the token")
    hub_bench.server.fault("GET /api/", "401", times=None, **{"X-Error-Code": "RepoNotFound"})
    with pytest.raises(LabError, match="does not accept the token"):
        hub_bench.exists("tour")


def test_the_room_of_what_is_removed_is_given_back(hub_bench, artefact, tmp_path):
    """The Hub's history keeps large files, and counts them, until they are deleted one by one."""
    both = {"shared.bin": b"s" * 4000}
    first = make_artefact(tmp_path / "a", {**both, "own.bin": b"a" * 4000}, kind="checkpoint")
    second = make_artefact(tmp_path / "b", {**both, "own.bin": b"b" * 4000}, kind="checkpoint")
    hub_bench.publish(first, "run/checkpoint-1")
    hub_bench.publish(second, "run/checkpoint-2")
    assert ("model", "lab/run") in hub_bench.server.repos
    before = {*hub_bench.server.objects}
    hub_bench.store.remove(hub_bench.uri("run/checkpoint-1"))
    assert (
        before - {*hub_bench.server.objects}
        == {hashlib.sha256(b"a" * 4000).hexdigest()} | {manifest.sha256(first / "manifest.json")} & before
    )
    assert contents(hub_bench.fetch("run/checkpoint-2")) == contents(second)


def test_a_repository_is_not_removed(hub_bench, artefact):
    hub_bench.publish(artefact, "tour")
    with pytest.raises(LabError, match="only hub://owner/name/path can be removed"):
        hub_bench.store.remove(hub_bench.uri("tour"))


def test_many_files_are_committed_in_blocks(hub_bench, artefact, monkeypatch):
    monkeypatch.setattr(hub, "_COMMIT_FILES", 2)
    hub_bench.server.fault("POST .*/commit/", "slow", times=2)
    hub_bench.server.fault("POST .*/commit/", "500", times=1)
    with pytest.raises(LabError, match="failed .500."):
        hub_bench.publish(artefact, "tour")
    assert len(hub_bench.files("tour")) == 4
    hub_bench.publish(artefact, "tour")
    assert contents(hub_bench.fetch("tour")) == contents(artefact)
    assert hub_bench.uploads() == len(FILES) + 1


# ---- Hopsworks


def test_a_model_goes_to_the_registry_and_stays_where_it_was(hopsworks_bench, tmp_path, capsys):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}", "empty": b""}
    model = make_artefact(tmp_path / "model", files, kind="model", test={"wer": 0.25, "n": 3})
    uri = "hopsworks://demo/Models/whisper_sv"
    first = hopsworks_bench.store.publish(model, uri)
    assert first == f"{uri}/1"
    assert contents(model).keys() == {*files, "manifest.json"}
    server = hopsworks_bench.server
    assert server.models["whisper_sv_1"]["metrics"] == {"test_wer": 0.25}
    assert capsys.readouterr().out == ""
    assert hopsworks_bench.store.publish(model, uri) == first
    manifest.amend(model, test={"wer": 0.2})
    assert hopsworks_bench.store.publish(model, uri) == f"{uri}/2"
    assert manifest.read(hopsworks_bench.store.fetch(first))["test"]["wer"] == 0.25
    assert manifest.read(hopsworks_bench.store.fetch(uri))["test"]["wer"] == 0.2
    assert hopsworks_bench.store.exists(uri)


def test_a_registration_that_fails_leaves_no_version(hopsworks_bench, tmp_path):
    model = make_artefact(tmp_path / "model", {"model.safetensors": b"w" * 5000}, kind="model")
    uri = "hopsworks://demo/Models/whisper_sv"
    hopsworks_bench.server.fault("PUT .*/modelregistries/", "500")
    with pytest.raises(LabError, match="Hopsworks failed .500."):
        hopsworks_bench.store.publish(model, uri)
    assert not hopsworks_bench.store.exists(uri)
    assert hopsworks_bench.store.publish(model, uri) == f"{uri}/1"


def test_the_registry_takes_models_alone(hopsworks_bench, artefact):
    with pytest.raises(LabError, match=r"takes models: .* such as hopsworks://demo/Resources/run"):
        hopsworks_bench.store.publish(artefact, "hopsworks://demo/Models/run/checkpoint-4")
    assert hopsworks_bench.server.models == {}


def test_the_client_is_muted_in_its_own_thread_alone(capsys):
    import threading

    with hopsworks._muted_client():
        print("of the client")
        beside = threading.Thread(target=lambda: print("of the training"))
        beside.start()
        beside.join()
    assert capsys.readouterr().out == "of the training\n"


def test_a_row_per_clip_goes_to_the_feature_group(monkeypatch):
    """With a stand-in for the project: a real feature group needs Kafka."""
    import pandas as pd

    taken = {}

    class Group:
        def insert(self, rows):
            taken["rows"] = rows

    class Features:
        def get_or_create_feature_group(self, **told):
            taken.update(told)
            return Group()

    project = types.SimpleNamespace(get_feature_store=Features)
    monkeypatch.setattr(hopsworks, "_open_project", lambda uri: contextlib.nullcontext((project, "x")))
    rows = pd.DataFrame({"id": ["a"], "split": ["train"], "text": ["hej"], "duration_s": [1.5], "labels": [[1, 2]]})
    hopsworks.add_rows("hopsworks://demo/Resources/x", rows, "clips")
    assert taken["name"] == "clips"
    assert taken["rows"].to_dict("records") == [
        {"id": "a", "split": "train", "duration_s": 1.5, "transcript": "hej", "path": "hopsworks://demo/Resources/x"}
    ]


@pytest.mark.parametrize("uri", ["hopsworks://demo", "hopsworks://demo/", "hopsworks://demo/Resources/../x"])
def test_a_uri_without_a_path_is_one_line(cluster, uri):
    with pytest.raises(LabError, match="expected hopsworks://project/path"):
        stores.open_store(uri).exists(uri)


# ---- through the lab


def test_a_cache_is_published_and_another_machine_trains_on_it(hub_bench, toy_settings, toy_cache, tmp_path, lab_cache):
    recipe, uri, told = toy_settings(), "hub://lab/toy-cache", []
    record_log(told)
    here, there = tmp_path / "here", tmp_path / "there"
    made = feature_pipeline.run(recipe, runs=here, cache_uri=str(toy_cache.folder), publish=uri)
    assert made.folder == toy_cache.folder
    assert recipe_runs.read_stages(recipe, here)["features"]["cache_uri"] == made.uri
    published = recipe_runs.read_stages(recipe, here)["publication"]["cache_uri"]
    assert re.fullmatch(rf"{uri}@[0-9a-f]{{40}}", published)
    assert told[-1] == f"published as {published}"
    assert hub_bench.server.repos["dataset", "lab/toy-cache"].private

    for named in (uri, published):
        opened = feature_pipeline.open_cache(recipe, named, runs=there)
        assert opened.folder.is_relative_to(lab_cache)
        assert opened.digest == made.digest
        assert contents(opened.folder) == contents(made.folder)
    again = feature_pipeline.run(recipe, runs=there, cache_uri=uri)
    assert again.folder == opened.folder
    other = toy_settings({"features.dtype": "float16" if recipe.features.dtype == "float32" else "float32"})
    with pytest.raises(LabError, match="features.dtype"):
        feature_pipeline.open_cache(other, uri, runs=there)


def test_a_published_cache_has_a_card_that_is_no_part_of_it(hub_bench, toy_cache):
    hub_bench.publish(toy_cache.folder, "toy")
    card = hub_bench.files("toy")["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["language"]) == ("apache-2.0", ["sv"])
    assert f"Digest {toy_cache.digest}" in card
    assert "| espeak" not in card and "| source.espeak |" in card
    assert all(f"| {name} | " in card for name in ("id", "pad_value", "labels", *toy_cache.identity))
    assert "48 train, 8 validation, 12 test, 0 rejected" in card
    assert hub_bench.server.repos["dataset", "lab/toy"].private
    assert "README.md" not in manifest.read(toy_cache.folder)["files"]
    assert contents(hub_bench.fetch("toy")) == contents(toy_cache.folder)
    before = hub_bench.uploads()
    hub_bench.publish(toy_cache.folder, "toy")
    assert hub_bench.uploads() == before


def test_a_card_is_brought_up_to_date_unless_a_person_wrote_it(hub_bench, toy_cache, tmp_path):
    hub_bench.publish(toy_cache.folder, "toy")
    changed = shutil.copytree(toy_cache.folder, tmp_path / "changed")
    manifest.amend(changed, digest="0123456789ab")
    hub_bench.publish(changed, "toy")
    assert b"Digest 0123456789ab" in hub_bench.files("toy")["README.md"]
    hub_bench.write("toy", "README.md", b"my own words")
    hub_bench.publish(toy_cache.folder, "toy")
    assert hub_bench.files("toy")["README.md"] == b"my own words"


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ({"kind": "common_voice"}, "cc0-1.0"),
        ({"kind": "folder"}, "unknown"),
        ({"kind": "hub", "dataset": "them/speech", "commit": "c1"}, "cc-by-4.0"),
        ({"kind": "hub", "dataset": "them/gone", "commit": "c1"}, "unknown"),
        ({"kind": "mix", "parts": "a b", "a.kind": "common_voice", "b.kind": "common_voice"}, "cc0-1.0"),
        ({"kind": "mix", "parts": "a b", "a.kind": "common_voice", "b.kind": "tour"}, "unknown"),
    ],
)
def test_the_licence_is_that_of_the_source_where_it_is_known(hub_bench, tmp_path, source, licence):
    (tmp_path / "them").mkdir()
    hub_bench.server.add("dataset", "them/speech", tmp_path / "them", commit="c1")
    hub_bench.server.repos["dataset", "them/speech"].card_data = {"license": "cc-by-4.0"}
    identity = {"language": "sv", "features.dtype": "float32", "features.n_mels": 80, "note": "a | b\nc"}
    identity |= {f"source.{name}": value for name, value in source.items()}
    hub_bench.publish(make_artefact(tmp_path / "made", identity=identity, counts={"train": 1}), "cache")
    card = hub_bench.files("cache")["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == licence
    assert ("may not be re-hosted" in card) == ("common_voice" in source.values())
    assert "| note | `a \\| b c` |" in card


def test_a_model_gets_no_card_of_a_cache(hub_bench, tmp_path):
    files = {"model.safetensors": b"w" * 5000}
    hub_bench.publish(make_artefact(tmp_path / "model", files, kind="model", identity={}, counts={}), "model")
    assert "README.md" not in hub_bench.server.files("model", "lab/model")


def test_a_cache_on_a_drive_is_trained_on_from_this_machines_disk(drive_bench, toy_settings, toy_cache, lab_cache):
    drive_bench.publish(toy_cache.folder, "toy")
    opened = feature_pipeline.open_cache(toy_settings(), drive_bench.uri("toy"))
    assert opened.folder.is_relative_to(lab_cache)
    made = feature_pipeline.run(toy_settings(), cache_uri=drive_bench.uri("toy"), runs=lab_cache / "runs")
    assert made.uri == drive_bench.uri("toy")  # stage 01 builds and opens where it is told to


def test_rows_go_to_the_feature_group_that_is_named(hopsworks_bench, toy_cache, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(hopsworks, "add_rows", lambda uri, rows, group: taken.append((uri, len(rows), group)))
    feature_pipeline.publish_cache(toy_cache, hopsworks_bench.uri("toy"))
    monkeypatch.setenv("LAB_FEATURE_GROUP", "clips")
    feature_pipeline.publish_cache(toy_cache, hopsworks_bench.uri("toy"))
    assert taken == [(hopsworks_bench.uri("toy"), len(toy_cache.rows), "clips")]


def test_a_model_in_the_registry_is_a_model_uri(hopsworks_bench, tmp_path):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}"}
    model = make_artefact(tmp_path / "model", files, kind="model", name="tuned-d1", context="clip")
    uri = hopsworks_bench.store.publish(model, "hopsworks://demo/Models/tuned")
    ref = whisper_model.resolve(uri)
    assert (ref.name, ref.revision, ref.context) == ("tuned-d1", "d1", "clip")
    assert contents(ref.folder) == contents(model)


def test_a_model_in_a_folder_of_a_repository_is_a_model_uri(hub_bench, tmp_path):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}"}
    model = make_artefact(tmp_path / "model", files, kind="model", name="tuned-d1", context="clip")
    published = hub_bench.publish(model, "runs/tuned/model")
    assert re.fullmatch(r"hub://lab/runs/tuned/model@[0-9a-f]{40}", published)
    assert contents(whisper_model.resolve(published).folder) == contents(model)


def test_publish_and_fetch_are_commands(hub_bench, artefact, monkeypatch, capfd):
    def call(*arguments: object) -> dict:
        monkeypatch.setattr("sys.argv", ["pipelines", *map(str, arguments), "--json"])
        with contextlib.suppress(SystemExit):
            cli.main()
        return json.loads(capfd.readouterr().out)

    assert call("publish", artefact, "hub://lab/tour", "--dry-run")["writes"] == "hub://lab/tour"
    assert hub_bench.server.requests == []
    uri = call("publish", artefact, "hub://lab/tour")["uri"]
    assert contents(Path(call("fetch", uri)["folder"])) == contents(artefact)


# ---- a mounted drive


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_drive_is_one_line_and_the_rest_follows_when_there_is_room(drive_bench, artefact, monkeypatch, number):
    fill_after(monkeypatch, 2, OSError(number, "No space left"))
    with pytest.raises(LabError) as caught:
        drive_bench.publish(artefact, "tour")
    one_line(caught, "the drive is full", "empty the bin", "what has arrived is kept")
    assert not drive_bench.exists("tour")
    assert drive_bench.uploads() == 2
    fill_after(monkeypatch, 99, OSError(number, "No space left"))
    drive_bench.publish(artefact, "tour")
    assert drive_bench.uploads() == len(FILES) + 1
    assert contents(drive_bench.fetch("tour")) == contents(artefact)


def fill_after(monkeypatch, n: int, error: OSError, then: Callable[[], None] = lambda: None) -> None:
    """From the n-th copy on, copying writes half a file, and then `error`."""
    copied = []

    def copyfile(source, target):
        copied.append(target)
        if len(copied) > n:
            then()
            with contextlib.suppress(OSError):
                Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise error
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(local.shutil, "copyfile", copyfile)


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.ENOENT])
def test_a_drive_that_goes_away_in_the_middle_is_one_line(drive_bench, artefact, tmp_path, monkeypatch, number):
    mount, aside = tmp_path / "mount" / "MyDrive", tmp_path / "unmounted"
    fill_after(monkeypatch, 2, OSError(number, "gone"), lambda: mount.rename(aside))
    with pytest.raises(LabError) as caught:
        drive_bench.publish(artefact, "tour")
    one_line(caught, "not mounted .any more.", "drive.mount", "what has arrived is kept")
    monkeypatch.undo()
    monkeypatch.setenv("LAB_DRIVE", str(tmp_path / "mount"))
    with pytest.raises(LabError, match="not mounted"):
        drive_bench.exists("tour")
    assert list((tmp_path / "mount").iterdir()) == []  # nothing is written where the drive would be
    aside.rename(mount)
    assert not drive_bench.exists("tour")
    drive_bench.publish(artefact, "tour")
    assert drive_bench.exists("tour")


def test_a_listing_that_lags_behind_is_looked_at_again(drive_bench, artefact, monkeypatch):
    """For a while the mount neither lists a new file nor tells its size."""
    waited = []
    size = drive.DriveFolder._size
    monkeypatch.setattr(drive.time, "sleep", waited.append)
    monkeypatch.setattr(drive.DriveFolder, "_size", lambda self, name: None if len(waited) < 2 else size(self, name))
    with monkeypatch.context() as stale:
        stale.setattr(local.LocalFolder, "sizes", lambda self: {})
        drive_bench.publish(artefact, "tour")
    assert waited == [1, 2]
    assert contents(drive_bench.fetch("tour")) == contents(artefact)


def test_a_listing_that_stays_behind_is_one_line(drive_bench, artefact, monkeypatch):
    monkeypatch.setattr(drive.DriveFolder, "_size", lambda self, name: None)
    monkeypatch.setattr(local.LocalFolder, "sizes", lambda self: {})
    with pytest.raises(LabError) as caught:
        drive_bench.publish(artefact, "tour")
    one_line(caught, "does not read back", "Run this again")


def test_fetching_to_a_full_machine_is_one_line(drive_bench, artefact, monkeypatch):
    drive_bench.publish(artefact, "tour")
    fill_after(monkeypatch, 1, OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(LabError, match="this machine's disk is full"):
        drive_bench.fetch("tour")
    assert finished(drive_bench) == []


# ---- URIs


@pytest.mark.parametrize(
    ("uri", "store"),
    [
        ("runs/features/tour-1", local.LocalStore),
        ("~/caches/x", local.LocalStore),
        ("/content/drive/MyDrive/x", drive.DriveStore),
        ("/content/drives/x", local.LocalStore),
        ("hub://me/cache@main", hub.HubStore),
        ("hopsworks://demo/Resources/x", hopsworks.HopsworksStore),
    ],
)
def test_the_prefix_names_the_store(uri, store):
    assert type(stores.open_store(uri)) is store


@pytest.mark.parametrize("uri", ["s3://bucket/x", "gs://x", "https://huggingface.co/me/x"])
def test_an_unknown_prefix_is_one_line(uri):
    with pytest.raises(LabError, match=f"no store for {re.escape(uri)}: expected a folder, hub://"):
        stores.open_store(uri)


@pytest.mark.parametrize("uri", ["hub://", "hub://a/b/../c", "hub://a//b", "hub://a b/c", "hub://a/b@"])
def test_a_hub_uri_that_is_none_is_one_line(uri, hub_server):
    with pytest.raises(LabError, match="expected hub://owner/name"):
        stores.open_store(uri).exists(uri)
    assert hub_server.requests == []


def test_a_local_path_is_at_hand_as_it_is(artefact):
    assert stores.local_folder(str(artefact)) == artefact


def test_a_full_disk_is_one_line(local_bench, artefact, monkeypatch):
    fill_after(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(LabError) as caught:
        local_bench.publish(artefact, "tour")
    one_line(caught, "not finished: No space left")
    assert not local_bench.exists("tour")


def test_a_fetch_that_was_killed_is_no_artefact_and_goes_on(tmp_path, artefact):
    place = local.LocalFolder(artefact)
    arrived = []

    class Killed(local.LocalFolder):
        def get(self, name, path):
            if len(arrived) == 3:
                raise KeyboardInterrupt
            arrived.append(name)
            super().get(name, path)

    with pytest.raises(KeyboardInterrupt):
        transfer.fetch(Killed(artefact), "x/tour", tmp_path / "into")
    assert not [path for path in (tmp_path / "into").iterdir() if not path.name.startswith(".")]
    told = record_log()
    home = transfer.fetch(place, "x/tour", tmp_path / "into")
    assert "fetching 3 of 6" in told[0]
    assert contents(home) == contents(artefact)
    shutil.rmtree(home)
