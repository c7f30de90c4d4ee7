"""The data set card of a cache on the Hub."""

from __future__ import annotations

import shutil

import pytest
import yaml
from servers.stores import contents
from store_artefacts import create_artefact

from pipelines.infra import manifest


def test_card_is_not_part_of_the_cache(hub_bench, toy_cache):
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


def test_card_is_updated_unless_a_person_wrote_it(hub_bench, toy_cache, tmp_path):
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
def test_licence_is_that_of_the_source(hub_bench, tmp_path, source, licence):
    (tmp_path / "them").mkdir()
    hub_bench.server.add("dataset", "them/speech", tmp_path / "them", commit="c1")
    hub_bench.server.repos["dataset", "them/speech"].card_data = {"license": "cc-by-4.0"}
    identity = {"language": "sv", "features.dtype": "float32", "features.n_mels": 80, "note": "a | b\nc"}
    identity |= {f"source.{name}": value for name, value in source.items()}
    hub_bench.publish(create_artefact(tmp_path / "made", identity=identity, counts={"train": 1}), "cache")
    card = hub_bench.files("cache")["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == licence
    assert ("may not be re-hosted" in card) == ("common_voice" in source.values())
    assert "| note | `a \\| b c` |" in card


def test_model_gets_no_data_set_card(hub_bench, tmp_path):
    files = {"model.safetensors": b"w" * 5000}
    hub_bench.publish(create_artefact(tmp_path / "model", files, kind="model", identity={}, counts={}), "model")
    assert "README.md" not in hub_bench.server.files("model", "lab/model")
