"""The data card of a feature cache: content, edits, copies in stores, and sources of terms."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from servers.stores import contents

from pipelines import recipes
from pipelines.features import cache as caches
from pipelines.features import pipeline
from pipelines.features.data_card import card, terms
from pipelines.infra import manifest
from pipelines.infra.errors import LabError


def head_of(text: str) -> dict:
    """Return the front matter of a card."""
    return yaml.safe_load(text.split("---")[1])


@pytest.fixture
def copied(toy_cache, tmp_path) -> Path:
    """A copy of the toy's cache without its card, as older versions made it."""
    folder = shutil.copytree(toy_cache.folder, tmp_path / toy_cache.folder.name)
    (folder / card.FILE).unlink()
    sealed = manifest.read(folder)
    sealed["files"].pop(card.FILE)
    manifest.write_json(folder / manifest.MANIFEST, sealed)
    return folder


def test_card_of_a_new_cache_has_every_section(toy_cache):
    text = (toy_cache.folder / card.FILE).read_text("utf-8")
    head = head_of(text)
    assert (head["license"], head["language"], head["size_categories"]) == ("apache-2.0", ["sv"], "n<1K")
    assert "synthetic-speech" in head["tags"]
    assert f"Digest {toy_cache.digest}" in text
    for split in ("train", "validation", "test"):
        rows = toy_cache.rows[toy_cache.rows["split"] == split]
        hours, speakers = rows["duration_s"].sum() / 3600, rows["speaker"].nunique()
        assert f"| {split} | {len(rows)} | {hours:.2f} | {speakers} |" in text
    for heading in ("Source, licence and consent", "Curation", "Rejected clips", "Known faults", "Lineage"):
        assert f"\n## {heading}\n" in text
    assert all(f"\n| {name.replace('_', '&#95;')} | " in text for name in ("id", "pad_value", *toy_cache.identity))
    assert not set(toy_cache.rows["speaker"]) & set(text.split())  # no speaker is named


def test_card_is_outside_the_digest_and_may_be_edited(toy_cache, copied):
    assert not any("card" in name for name in toy_cache.identity)
    card.add(copied)
    assert contents(copied) == contents(toy_cache.folder)  # an older cache gets the same card
    (copied / card.FILE).write_text("mine")
    assert caches.open_cache(copied, toy_cache.identity).digest == toy_cache.digest
    card.add(copied)
    assert (copied / card.FILE).read_text() == "mine"
    (copied / card.FILE).unlink()
    caches.open_cache(copied, toy_cache.identity)
    card.add(copied)  # a card that was removed is written again
    assert contents(copied) == contents(toy_cache.folder)


def test_card_of_a_person_in_an_old_cache_stays(copied):
    (copied / card.FILE).write_text("mine")
    card.add(copied)
    assert (copied / card.FILE).read_text() == "mine"


@pytest.mark.parametrize("edited", [True, False])
def test_repair_of_a_cache_keeps_an_edited_card(toy_settings, copied, edited, monkeypatch):
    card.add(copied)
    before = (copied / card.FILE).read_text("utf-8")
    if edited:
        (copied / card.FILE).write_text("mine")
    damaged = next(copied.glob("*.bin"))
    damaged.write_bytes(b"0" * damaged.stat().st_size)
    cache = pipeline.run(toy_settings(), runs=copied.parent / "runs", cache_uri=str(copied))
    assert (cache.folder / card.FILE).read_text("utf-8") == ("mine" if edited else before)


def test_folder_with_a_readme_is_no_place_for_a_cache(toy_settings, tmp_path):
    (tmp_path / card.FILE).write_text("notes of a person")
    with pytest.raises(LabError, match="not a feature cache"):
        pipeline.run(toy_settings(), cache_uri=str(tmp_path))
    assert (tmp_path / card.FILE).read_text() == "notes of a person"


def test_card_is_published_once_and_a_persons_card_stays(hub_bench, toy_cache):
    hub_bench.write("toy", card.FILE, b"---\nlicense: mit\n---\nMy own words")  # made on the Hub's page
    hub_bench.publish(toy_cache.folder, "toy")
    assert b"My own words" in hub_bench.files("toy")[card.FILE]
    hub_bench.write("toy", card.FILE, b"<!-- Written when published. Remove this line to keep a card of your own. -->")
    hub_bench.publish(toy_cache.folder, "other")
    assert hub_bench.files("other")[card.FILE] == (toy_cache.folder / card.FILE).read_bytes()
    assert contents(hub_bench.fetch("other")) == contents(toy_cache.folder)
    before = hub_bench.uploads()
    hub_bench.publish(toy_cache.folder, "other")
    assert hub_bench.uploads() == before


def identity_of(source: dict[str, str]) -> dict[str, str]:
    return {f"source.{name}": value for name, value in source.items()}


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ({"kind": "common_voice"}, "cc0-1.0"),
        ({"kind": "mozilla"}, "cc0-1.0"),
        ({"kind": "folder"}, "unknown"),
        ({"kind": "from_the_future"}, "unknown"),
        ({"kind": "hub", "dataset": "them/speech", "commit": "c1"}, "cc-by-4.0"),
        ({"kind": "hub", "dataset": "them/gone", "commit": "c1"}, "unknown"),
        ({"kind": "mix", "parts": "a b", "a.kind": "common_voice", "b.kind": "common_voice"}, "cc0-1.0"),
        ({"kind": "mix", "parts": "a b", "a.kind": "common_voice", "b.kind": "tour"}, "unknown"),
    ],
)
def test_licence_is_that_of_the_source(hub_server, tmp_path, source, licence):
    (tmp_path / "them").mkdir()
    hub_server.add("dataset", "them/speech", tmp_path / "them", commit="c1")
    hub_server.repos["dataset", "them/speech"].card_data = {"license": "cc-by-4.0"}
    assert terms.hub_licence(terms.read_terms(identity_of(source)))["license"] == licence


@pytest.mark.parametrize(
    ("content", "licence", "consent"),
    [
        ('licence = "CC0-1.0"\n[consent]\nsv = "Ja"\nen = "I agree"', {"license": "cc0-1.0"}, "Ja / I agree"),
        ('license = "CC BY 4.0"\nconsent = "Yes\\n# x"', {"license": "cc-by-4.0"}, "Yes\n# x"),
        ('licence = "Internal use"', {"license": "other", "license_name": "internal-use"}, ""),
        ("licence = 3\nconsent = [1]", {"license": "unknown"}, ""),
        ("not TOML", {"license": "unknown"}, ""),
        ("\udcff", {"license": "unknown"}, ""),
    ],
)
def test_collection_file_states_licence_and_consent(tmp_path, content, licence, consent):
    (tmp_path / terms.COLLECTION).write_bytes(content.encode("utf-8", "surrogateescape"))
    recipe = recipes.load("tour", {"source.kind": "folder", "source.path": str(tmp_path)})
    read = terms.read_terms({"source.kind": "folder"}, recipe)
    assert terms.hub_licence(read) == licence
    assert read[0].consent == (f"Speakers agreed to: {consent}" if consent else "")
    assert "\n#" not in card._terms(read)


def test_card_shows_slices_rejections_and_faults(copied):
    cache = caches.load(copied, manifest.read(copied))
    rows = cache.rows.assign(label="", variant="a | <b>", speaker="")
    rows.loc[:4, ["label", "text"]] = ["pseudo", "hej [skratt]"]
    (copied / "rejected.csv").write_text("id,split,reason,detail\nx,train,noisy,secret words\ny,train,odd_reason,z\n")
    changed = caches.FeatureCache(copied, cache.identity, rows, cache.counts, cache.token_ids)
    text = card._card(changed, manifest.read(copied), [terms.Terms("folder", "own")])
    assert "| label | pseudo | 5 |" in text and "| label | not stated |" in text
    assert "a &#124; &lt;b&gt;" in text
    assert "| noisy | 1 |" in text and "see rejected.csv" in text and "secret words" not in text
    for fault in (
        "5 transcripts (0.00 hours) were written by a model",
        "name no speaker",
        "may not be spoken",
        "no licence",
    ):
        assert fault in text


def test_card_of_aligned_recordings_explains_their_rejections(copied):
    reasons = ("no_match", "wrong_language", "paraphrased", "music", "too_short", "too_long", "damaged")
    rows = "".join(f"x,train,{reason},z\n" for reason in reasons)
    (copied / "rejected.csv").write_text(f"id,split,reason,detail\n{rows}", "utf-8")
    cache = caches.load(copied, manifest.read(copied))
    text = card._card(cache, manifest.read(copied), [terms.Terms("aligned", "talks")])
    assert all(f"| {reason.replace('_', '&#95;')} | 1 |" in text for reason in reasons)
    assert "see rejected.csv" not in text
    assert "a model matched" in text
    assert "untuned aligner of a long recording" in text


def test_accent_of_one_speaker_is_not_listed():
    rows = pd.DataFrame({"speaker": list("aabcd"), "duration_s": 1.0, "accent": ["rare"] * 2 + ["common"] * 3})
    table = card._slices(rows)
    assert "| accent | common | 3 | 0.00 | 3 |" in table and "| accent | 1 other values | 2 | 0.00 | 1 |" in table
    assert "rare" not in table


def test_card_made_again_to_publish_keeps_licence_and_consent(copied, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / terms.COLLECTION).write_text('licence = "CC-BY-4.0"\n[consent]\nsv = "Ja, gärna"\n', "utf-8")
    card.add(copied, recipes.load("tour", {"source.kind": "folder", "source.path": str(folder)}))
    written = (copied / card.FILE).read_text("utf-8")
    assert head_of(written)["license"] == "cc-by-4.0" and "Ja, gärna" in written
    (copied / card.FILE).unlink()
    pipeline.publish_cache(caches.load(copied, manifest.read(copied)), str(tmp_path / "published"))
    assert (tmp_path / "published" / card.FILE).read_text("utf-8") == written
