"""The contract of all stores. Hub and Hopsworks run with their real clients against loopback servers."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from log_recorder import record_log
from servers.stores import contents
from store_artefacts import FILES, create_artefact, error_line, finished_folders

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.stores import drive, hopsworks, hub, local, transfer


def test_fetched_artefact_equals_the_published_one(bench, artefact):
    assert not bench.exists("tour")
    published = bench.publish(artefact, "tour")
    assert bench.exists("tour")
    fetched = bench.fetch("tour")
    assert contents(fetched) == contents(artefact) == bench.files("tour")
    assert contents(bench.store.fetch(published)) == contents(artefact)


def test_list_returns_finished_artefacts_only(bench, artefact):
    bench.publish(artefact, "b")
    bench.publish(artefact, "a")
    bench.publish(artefact, "c")
    bench.write("c", "manifest.json", None)
    assert bench.store.list(bench.parent) == [bench.uri("a"), bench.uri("b")]


def test_missing_artefact_is_a_one_line_error(bench):
    assert bench.store.list(bench.parent) == []
    with pytest.raises(LabError) as caught:
        bench.fetch("nothing")
    error_line(caught, "nothing", "absent|nothing finished", "Check")


def test_unfinished_folder_is_not_published(bench, artefact):
    (artefact / "manifest.json").unlink()
    with pytest.raises(LabError) as caught:
        bench.publish(artefact, "tour")
    error_line(caught, "unfinished .it has no manifest.")
    assert bench.files("tour") == {}


@pytest.mark.parametrize("lost", ["manifest.json", "shard-00001.bin", "empty.txt"])
def test_remote_with_a_missing_file_does_not_exist(bench, artefact, lost):
    bench.publish(artefact, "tour")
    bench.write("tour", lost, None)
    assert not bench.exists("tour")
    with pytest.raises(LabError):
        bench.fetch("tour")
    assert finished_folders(bench) == []


def test_remote_with_a_wrong_size_does_not_exist(bench, artefact):
    bench.publish(artefact, "tour")
    bench.write("tour", "shard-00000.bin", b"short")
    assert not bench.exists("tour")


def test_damaged_file_is_the_only_one_published_again(bench, artefact):
    bench.publish(artefact, "tour")
    bench.write("tour", "shard-00001.bin", b"!" + FILES["shard-00001.bin"][1:])
    with pytest.raises(LabError) as caught:
        bench.fetch("tour")
    error_line(caught, "shard-00001.bin", "damaged")
    assert finished_folders(bench) == []
    before = bench.uploads()
    bench.publish(artefact, "tour")
    assert bench.uploads() - before <= 2  # the file, and the manifest that was taken away for the time
    assert contents(bench.fetch("tour")) == contents(artefact)


def test_publishing_twice_uploads_once(bench, artefact):
    bench.publish(artefact, "tour")
    before, told = bench.uploads(), []
    record_log(told)
    bench.publish(artefact, "tour")
    assert bench.uploads() == before
    assert "whole and the same" in told[0]


def test_new_version_uploads_only_changed_files(bench, artefact, tmp_path):
    bench.publish(artefact, "tour")
    fetched = bench.fetch("tour")
    old = contents(fetched)
    changed = {**FILES, "shard-00001.bin": b"new" * 900}
    del changed["notes/deep.bin"]
    other = create_artefact(tmp_path / "other", changed, digest="d2")
    before = bench.uploads()
    bench.publish(other, "tour")
    assert bench.uploads() - before == 2  # the shard and the manifest
    assert bench.files("tour") == contents(other)
    assert contents(bench.fetch("tour")) == contents(other)
    assert bench.name == "local" or contents(fetched) == old  # who still reads the old one is not disturbed


def test_changed_manifest_is_uploaded_alone(bench, artefact):
    bench.publish(artefact, "tour")
    before = bench.uploads()
    manifest.amend(artefact, test={"wer": 0.25})
    bench.publish(artefact, "tour")
    assert bench.uploads() - before == 1
    assert manifest.read(bench.fetch("tour"))["test"] == {"wer": 0.25}


def test_edited_cards_are_kept_and_published(bench, artefact, tmp_path):
    front = b"---\nlicense: mit\n---\n"
    model = create_artefact(tmp_path / "model", {**FILES, "README.md": front + b"# The lab's"}, kind="model")
    bench.publish(model, "tour")
    (model / "README.md").write_bytes(front + b"# Mine, longer than before")
    before = bench.uploads()
    bench.publish(model, "tour")
    assert bench.files("tour")["README.md"] == front + b"# Mine, longer than before"
    assert bench.uploads() - before == 2  # the card and the manifest
    bench.write("tour", "README.md", b"# Edited there")
    assert bench.exists("tour")
    record_log(lines := [])
    bench.publish(model, "tour")
    manifest.amend(model, test={"wer": 0.25})
    bench.publish(model, "tour")
    assert bench.files("tour")["README.md"] == b"# Edited there"
    assert any("README.md was edited at" in line for line in lines)
    assert (bench.fetch("tour") / "README.md").read_bytes() == b"# Edited there"
    bench.write("tour", "README.md", None)
    assert manifest.problem(bench.fetch("tour")) is None


def test_manifest_is_uploaded_last(bench, artefact, monkeypatch):
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


def test_manifest_with_outside_paths_is_an_error(bench, artefact, tmp_path):
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
def test_damaged_manifest_is_no_artefact(bench, artefact, content):
    bench.publish(artefact, "tour")
    bench.write("tour", "manifest.json", content)
    assert not bench.exists("tour")
    with pytest.raises(LabError):
        bench.fetch("tour")


def test_second_fetch_downloads_only_damaged_files(bench, artefact):
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


def test_metadata_needs_no_files(bench, artefact):
    assert bench.store.metadata(bench.uri("tour")) is None
    bench.publish(artefact, "tour")
    assert bench.store.metadata(bench.uri("tour")) == manifest.read(artefact)
    bench.write("tour", "shard-00000.bin", b"short")
    assert bench.store.metadata(bench.uri("tour")) is None


def test_fetch_into_a_folder_copies_and_verifies(bench, artefact, tmp_path):
    bench.publish(artefact, "tour")
    copy = bench.store.fetch(bench.uri("tour"), into=tmp_path / "into")
    assert copy.parent == tmp_path / "into"
    assert contents(copy) == contents(artefact)
    bench.write("tour", "shard-00001.bin", b"!" + FILES["shard-00001.bin"][1:])
    shutil.rmtree(copy)
    with pytest.raises(transfer.Damaged, match=r"shard-00001.bin of .*tour arrived damaged"):
        bench.store.fetch(bench.uri("tour"), into=tmp_path / "into")


def test_nested_artefacts_do_not_affect_each_other(bench, artefact, tmp_path):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}"}
    below = create_artefact(tmp_path / "below", files, digest="b")
    bench.publish(below, "tour/b/deep")
    bench.publish(below, "tour/a")
    bench.write("tour/half", "model.safetensors", b"half")
    bench.publish(artefact, "tour")
    names = [uri.removeprefix(bench.uri("tour/")) for uri in bench.store.list_folders(bench.uri("tour"))]
    assert {"a", "b", "half"} <= {*names}
    assert names == sorted(names)
    assert bench.store.list(bench.uri("tour")) == [bench.uri("tour/a")]
    assert bench.store.list(bench.uri("tour/b")) == [bench.uri("tour/b/deep")]
    other = create_artefact(tmp_path / "other", {"shard-00000.bin": b"new" * 900}, digest="d2")
    bench.publish(other, "tour")
    assert contents(other).items() <= contents(bench.fetch("tour")).items()
    assert "notes/deep.bin" not in bench.files("tour")
    for name in ("tour/a", "tour/b/deep"):
        assert contents(bench.fetch(name)) == contents(below)


def test_remove_deletes_one_artefact_only(bench, artefact):
    bench.publish(artefact, "tour/a")
    bench.publish(artefact, "tour/b")
    bench.write("tour/half", "model.safetensors", b"half")
    for name in ("tour/a", "tour/half", "tour/never"):
        bench.store.remove(bench.uri(name))
        assert bench.files(name) == {}
    assert bench.store.list_folders(bench.uri("tour")) == [bench.uri("tour/b")]
    assert contents(bench.fetch("tour/b")) == contents(artefact)


def test_publishing_keeps_other_files_of_a_folder(bench, artefact):
    bench.write("tour", "thesis.txt", b"years of work")
    bench.publish(artefact, "tour")
    bench.publish(artefact, "tour")
    assert bench.files("tour")["thesis.txt"] == b"years of work"
