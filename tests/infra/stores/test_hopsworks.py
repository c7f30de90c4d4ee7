"""The store in a Hopsworks project."""

from __future__ import annotations

import contextlib
import tempfile
import types

import pytest
from servers.stores import contents
from store_artefacts import create_artefact, error_line

from pipelines.infra import manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hopsworks


def test_silent_server_is_a_timeout(hopsworks_bench, monkeypatch):
    monkeypatch.setattr(hopsworks, "_TIMEOUT_S", (10, 0.1))
    hopsworks_bench.server.fault("GET .*/dataset/", "slow", times=None)
    with pytest.raises(LabError) as caught:
        hopsworks_bench.exists("tour")
    error_line(caught, "broke off", "(?i)timed out")


def test_missing_api_key_is_an_error_that_names_it(cluster, monkeypatch):
    monkeypatch.delenv("HOPSWORKS_API_KEY")
    with pytest.raises(LabError, match="needs an API key: set HOPSWORKS_API_KEY"):
        stores.open_store("hopsworks://demo/x").exists("hopsworks://demo/Resources/x")
    assert cluster.requests == []


def test_certificate_of_the_cluster_is_verified(hopsworks_bench, monkeypatch):
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


def test_model_is_registered_as_a_new_version(hopsworks_bench, tmp_path, capsys):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}", "empty": b""}
    model = create_artefact(tmp_path / "model", files, kind="model", test={"wer": 0.25, "n": 3})
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


def test_failed_registration_leaves_no_version(hopsworks_bench, tmp_path):
    model = create_artefact(tmp_path / "model", {"model.safetensors": b"w" * 5000}, kind="model")
    uri = "hopsworks://demo/Models/whisper_sv"
    hopsworks_bench.server.fault("PUT .*/modelregistries/", "500")
    with pytest.raises(LabError, match="Hopsworks failed .500."):
        hopsworks_bench.store.publish(model, uri)
    assert not hopsworks_bench.store.exists(uri)
    assert hopsworks_bench.store.publish(model, uri) == f"{uri}/1"


def test_registry_accepts_only_models(hopsworks_bench, artefact):
    with pytest.raises(LabError, match=r"takes models: .* such as hopsworks://demo/Resources/run"):
        hopsworks_bench.store.publish(artefact, "hopsworks://demo/Models/run/checkpoint-4")
    assert hopsworks_bench.server.models == {}


def test_client_is_muted_in_one_thread(capsys):
    import threading

    with hopsworks._muted_client():
        print("of the client")
        beside = threading.Thread(target=lambda: print("of the training"))
        beside.start()
        beside.join()
    assert capsys.readouterr().out == "of the training\n"


def test_feature_group_gets_one_row_per_clip(monkeypatch):
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
def test_uri_without_a_path_is_a_one_line_error(cluster, uri):
    with pytest.raises(LabError, match="expected hopsworks://project/path"):
        stores.open_store(uri).exists(uri)
