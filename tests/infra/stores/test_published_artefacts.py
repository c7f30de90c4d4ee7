"""Published caches and models in the pipelines and commands."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
from log_recorder import record_log
from servers.stores import contents
from store_artefacts import create_artefact

from pipelines import __main__ as cli
from pipelines.features import pipeline as feature_pipeline
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hopsworks
from pipelines.recipes import runs as recipe_runs
from pipelines.whisper import model as whisper_model


def test_published_cache_opens_on_another_machine(hub_bench, toy_settings, toy_cache, tmp_path, lab_cache):
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


def test_cache_on_a_drive_is_copied_to_this_machine(drive_bench, toy_settings, toy_cache, lab_cache):
    drive_bench.publish(toy_cache.folder, "toy")
    opened = feature_pipeline.open_cache(toy_settings(), drive_bench.uri("toy"))
    assert opened.folder.is_relative_to(lab_cache)
    made = feature_pipeline.run(toy_settings(), cache_uri=drive_bench.uri("toy"), runs=lab_cache / "runs")
    assert made.uri == drive_bench.uri("toy")  # stage 01 builds and opens where it is told to


def test_rows_are_written_to_the_named_feature_group(hopsworks_bench, toy_cache, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(hopsworks, "add_rows", lambda uri, rows, group: taken.append((uri, len(rows), group)))
    feature_pipeline.publish_cache(toy_cache, hopsworks_bench.uri("toy"))
    monkeypatch.setenv("LAB_FEATURE_GROUP", "clips")
    feature_pipeline.publish_cache(toy_cache, hopsworks_bench.uri("toy"))
    assert taken == [(hopsworks_bench.uri("toy"), len(toy_cache.rows), "clips")]


def test_model_in_the_registry_resolves(hopsworks_bench, tmp_path):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}"}
    model = create_artefact(tmp_path / "model", files, kind="model", name="tuned-d1", context="clip")
    uri = hopsworks_bench.store.publish(model, "hopsworks://demo/Models/tuned")
    ref = whisper_model.resolve(uri)
    assert (ref.name, ref.revision, ref.context) == ("tuned-d1", "d1", "clip")
    assert contents(ref.folder) == contents(model)


def test_model_in_a_repository_folder_resolves(hub_bench, tmp_path):
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}"}
    model = create_artefact(tmp_path / "model", files, kind="model", name="tuned-d1", context="clip")
    published = hub_bench.publish(model, "runs/tuned/model")
    assert re.fullmatch(r"hub://lab/runs/tuned/model@[0-9a-f]{40}", published)
    assert contents(whisper_model.resolve(published).folder) == contents(model)


def test_publish_and_fetch_commands(hub_bench, artefact, monkeypatch, capfd):
    def call(*arguments: object) -> dict:
        monkeypatch.setattr("sys.argv", ["pipelines", *map(str, arguments), "--json"])
        with contextlib.suppress(SystemExit):
            cli.main()
        return json.loads(capfd.readouterr().out)

    assert call("publish", artefact, "hub://lab/tour", "--dry-run")["writes"] == "hub://lab/tour"
    assert hub_bench.server.requests == []
    uri = call("publish", artefact, "hub://lab/tour")["uri"]
    assert contents(Path(call("fetch", uri)["folder"])) == contents(artefact)
