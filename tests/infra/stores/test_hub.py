"""The store on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import re

import pytest
from servers.stores import contents
from store_artefacts import FILES, create_artefact, error_line

from pipelines.infra import manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hub


def test_failed_commits_are_an_error(hub_bench, artefact):
    hub_bench.server.fault("POST .*/commit/", "500", times=None)
    with pytest.raises(LabError) as caught:
        hub_bench.publish(artefact, "tour")
    error_line(caught, "the Hub failed .500.", "not finished", "Run this again")
    assert not hub_bench.exists("tour")
    hub_bench.server.faults.clear()
    large = sum(len(content) >= 1000 for content in FILES.values())
    assert hub_bench.uploads() == large
    hub_bench.publish(artefact, "tour")
    assert hub_bench.uploads() == len(FILES) + 1


def test_temporary_failure_is_retried(hub_bench, artefact):
    hub_bench.server.fault("PUT /lfs/", "500", times=2)
    hub_bench.server.fault("PUT /lfs/", "429", times=1, **{"Retry-After": "1"})
    hub_bench.publish(artefact, "tour")
    assert hub_bench.exists("tour")


def test_new_repositories_are_private_and_of_their_type(hub_bench, artefact, tmp_path):
    model = create_artefact(tmp_path / "model", {"model.safetensors": b"w" * 5000, "config.json": b"{}"}, kind="model")
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


def test_public_data_set_needs_lab_hub_public(hub_bench, artefact, monkeypatch):
    hub_bench.publish(artefact, "tour")
    hub_bench.server.repos["dataset", "lab/tour"].private = False
    before = hub_bench.uploads()
    with pytest.raises(LabError, match=r"public data set.*LAB_HUB_PUBLIC=1"):
        hub_bench.publish(artefact, "tour")
    assert hub_bench.uploads() == before
    monkeypatch.setenv("LAB_HUB_PUBLIC", "1")
    hub_bench.publish(artefact, "tour")


def test_uri_of_a_commit_stays_valid(hub_bench, artefact, tmp_path):
    first = hub_bench.publish(artefact, "tour")
    assert re.fullmatch(r"hub://lab/tour@[0-9a-f]{40}", first)
    other = create_artefact(tmp_path / "other", {"shard-00000.bin": b"o" * 2000}, digest="d2")
    second = hub_bench.publish(other, "tour")
    assert second != first
    assert contents(hub_bench.store.fetch(first)) == contents(artefact)
    assert contents(hub_bench.store.fetch(second)) == contents(other)
    with pytest.raises(LabError, match="no such repository .or revision"):
        hub_bench.store.fetch("hub://lab/tour@nowhere")
    with pytest.raises(LabError, match="leave out @revision"):
        hub_bench.store.publish(artefact, "hub://lab/tour@main")


def test_private_repository_without_token_is_an_error(hub_bench, artefact, monkeypatch):
    hub_bench.publish(artefact, "tour")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(LabError, match=r"it is private. .*set HF_TOKEN"):
        hub_bench.fetch("tour")
    with pytest.raises(LabError, match=r"does not accept the token.*HF_TOKEN"):
        hub_bench.publish(artefact, "tour")


def test_wrong_token_is_reported_as_such(hub_bench, artefact, monkeypatch):
    hub_bench.publish(artefact, "tour")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    with pytest.raises(LabError) as caught:
        hub_bench.exists("tour")
    assert "wrong" not in error_line(caught, "does not accept the token")
    hub_bench.server.fault("GET /api/", "401", times=None, **{"X-Error-Code": "RepoNotFound"})
    with pytest.raises(LabError, match="does not accept the token"):
        hub_bench.exists("tour")


def test_remove_deletes_large_files_from_storage(hub_bench, artefact, tmp_path):
    """The Hub's history keeps large files, and counts them, until they are deleted one by one."""
    both = {"shared.bin": b"s" * 4000}
    first = create_artefact(tmp_path / "a", {**both, "own.bin": b"a" * 4000}, kind="checkpoint")
    second = create_artefact(tmp_path / "b", {**both, "own.bin": b"b" * 4000}, kind="checkpoint")
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


def test_repository_itself_is_not_removed(hub_bench, artefact):
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


@pytest.mark.parametrize("uri", ["hub://", "hub://a/b/../c", "hub://a//b", "hub://a b/c", "hub://a/b@"])
def test_invalid_hub_uri_is_a_one_line_error(uri, hub_server):
    with pytest.raises(LabError, match="expected hub://owner/name"):
        stores.open_store(uri).exists(uri)
    assert hub_server.requests == []
