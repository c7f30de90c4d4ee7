"""The feature pipeline: build, reopen and refuse a cache; samples."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from log_recorder import record_log
from toy_whisper import END, NO_TIMESTAMPS, SWEDISH, TRANSCRIBE

from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import StaleCache
from pipelines.infra.errors import LabError


@pytest.fixture
def recordings(tmp_path, encoded, speech):
    """A folder of six recordings by three speakers, one for each split."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    lines = ["path,text,speaker,split"]
    for n, split in enumerate(("train", "train", "validation", "validation", "test", "test")):
        (folder / f"{n}.wav").write_bytes(encoded(speech(8_000, seed=n)))
        lines.append(f"{n}.wav,mening nummer {n},{split},{split}")
    (folder / "transcripts.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.4, 1), (0.5, 2)])
def test_clips_without_speech_are_kept_up_to_their_share(recordings, toy_settings, encoded, tmp_path, share, kept):
    for name in ("silence", "hum", "tested"):
        (recordings / f"{name}.wav").write_bytes(encoded(np.zeros(8_000, dtype=np.float32)))
    with open(recordings / "transcripts.csv", "a", encoding="utf-8") as table:
        table.write("silence.wav,,noise,train\nhum.wav,,noise,train\ntested.wav,,other,test\n")
    overrides = {"source.kind": "folder", "source.path": str(recordings), "curation.non_speech_share": share}
    overrides["features.max_rejected_share"] = 1.0
    cache = feature_pipeline.run(toy_settings(overrides), runs=tmp_path / "runs")
    silent = cache.rows.index[cache.rows["text"] == ""]
    assert (len(silent), cache.counts["train"], cache.counts["test"]) == (kept, 2 + kept, 2)
    assert all(cache.labels(row) == [SWEDISH, TRANSCRIBE, NO_TIMESTAMPS, END] for row in silent)


def test_tour_is_made_again_on_another_machine(toy_settings, toy_cache, tmp_path):
    small = toy_settings({"source.train": 2, "source.validation": 1, "source.test": 1})
    elsewhere = str(tmp_path / "colab" / "features" / "tour-1a2b")
    lines = record_log()
    made = feature_pipeline.open_or_make_cache(small, elsewhere, runs=tmp_path / "runs")
    assert made.counts["train"] == 2
    assert lines[0] == f"{elsewhere} is not on this machine: its speech is synthetic and is made here"
    assert feature_pipeline.open_or_make_cache(small, runs=tmp_path / "runs").uri == made.uri
    with pytest.raises(StaleCache):
        feature_pipeline.open_or_make_cache(small, toy_cache.uri, runs=tmp_path / "runs")


def test_cache_of_another_machine_names_drive(recordings, toy_settings, tmp_path):
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    with pytest.raises(LabError, match=r"none is not on this machine\. .* `runs` folder on Drive, or `publish`"):
        feature_pipeline.open_or_make_cache(settings, str(tmp_path / "none"), runs=tmp_path)
    with pytest.raises(LabError, match="python -m pipelines features --recipe .*toy.toml --set source.kind=folder"):
        feature_pipeline.open_or_make_cache(settings, runs=tmp_path)


def test_cache_opens_without_its_source(recordings, toy_settings, tmp_path):
    overrides = {"source.kind": "folder", "source.path": str(recordings)}
    done: list[tuple[int, int]] = []
    overrides |= {"features.shard_clips": 4}
    cache = feature_pipeline.run(
        toy_settings(overrides), runs=tmp_path / "runs", on_clips=lambda *counts: done.append(counts)
    )
    assert done == [(4, 6), (2, 6)]
    shutil.rmtree(recordings)
    lines = record_log()
    opened = feature_pipeline.open_cache(toy_settings(overrides), cache.uri, runs=tmp_path / "runs")
    assert opened.digest == cache.digest
    assert any("not available" in line for line in lines)
    with pytest.raises(StaleCache, match="source.seed"):
        feature_pipeline.open_cache(toy_settings({**overrides, "source.seed": 8}), cache.uri, runs=tmp_path / "runs")


@pytest.mark.parametrize("split", [True, False])
def test_one_speaker_is_split_by_sentence_and_noted(split, tmp_path, encoded, speech, toy_settings):
    lines = ["path,text,speaker" + ",split" * split]
    for n in range(12):
        (tmp_path / f"{n}.wav").write_bytes(encoded(speech(4_000, seed=n)))
        lines.append(f"{n}.wav,mening nummer {n},me" + f",{('train', 'train', 'validation', 'test')[n % 4]}" * split)
    (tmp_path / "transcripts.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    logged = record_log()
    cache = feature_pipeline.run(
        toy_settings({"source.kind": "folder", "source.path": str(tmp_path)}), runs=tmp_path / "runs"
    )
    assert {*cache.rows["split"]} == {"train", "validation", "test"} and len(cache.rows) == 12
    assert any("1 speaker is in train and in test: the scores hold for this voice" in line for line in logged)


def test_fitting_cache_is_found_after_another_source(recordings, toy_settings, tmp_path):
    first = {"name": "mine", "source.kind": "folder", "source.path": str(recordings)}
    second = {**first, "source.seed": 8}
    caches = [feature_pipeline.run(toy_settings(one), runs=tmp_path / "runs") for one in (first, second)]
    for overrides, cache in zip((first, second, {**first, "name": "other"}), (*caches, caches[0]), strict=True):
        assert feature_pipeline.open_cache(toy_settings(overrides), runs=tmp_path / "runs").digest == cache.digest
    with pytest.raises(StaleCache):
        feature_pipeline.open_cache(toy_settings(first), caches[1].uri, runs=tmp_path / "runs")
    with pytest.raises(LabError, match="no feature cache for recipe other"):
        feature_pipeline.open_cache(toy_settings({**first, "name": "other", "source.seed": 9}), runs=tmp_path / "runs")


def test_changed_source_makes_cache_stale(recordings, toy_settings, tmp_path):
    overrides = {"source.kind": "folder", "source.path": str(recordings)}
    cache = feature_pipeline.run(toy_settings(overrides), runs=tmp_path / "runs")
    (recordings / "transcripts.csv").write_text("path,text,split\n0.wav,en annan mening,train\n", encoding="utf-8")
    with pytest.raises(StaleCache, match="source"):
        feature_pipeline.open_cache(toy_settings(overrides), cache.uri, runs=tmp_path / "runs")


def test_samples_skip_undecodable_clips(recordings, toy_settings):
    (recordings / "0.wav").unlink()
    (recordings / "4.wav").write_bytes(b"no audio")
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    assert [example.id for example in feature_pipeline.samples(settings, 2, "train")] == ["1"]
    assert [example.id for example in feature_pipeline.samples(settings, 2, "test")] == ["5"]


def test_missing_splits_are_logged(recordings, toy_settings, tmp_path):
    (recordings / "transcripts.csv").write_text("path,text,split\n0.wav,en mening,train\n", encoding="utf-8")
    lines = record_log()
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    feature_pipeline.run(settings, runs=tmp_path / "runs")
    assert any("no validation and no test clips" in line for line in lines)


def test_unreadable_source_is_an_error(recordings, toy_settings, tmp_path):
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    cache = feature_pipeline.run(settings, runs=tmp_path / "runs")
    (recordings / "transcripts.csv").write_text("nothing,of,use\n1,2,3\n", encoding="utf-8")
    with pytest.raises(LabError, match="column"):
        feature_pipeline.open_cache(settings, cache.uri, runs=tmp_path / "runs")


def test_paths_of_mix_parts_do_not_change_digest(recordings, toy_settings, tmp_path):
    def digest() -> str:
        part = {"name": "own", "kind": "folder", "path": str(folder), "gives": ["train", "validation", "test"]}
        settings = toy_settings({"source.kind": "mix", "source.parts": [part]})
        cache = feature_pipeline.run(settings, runs=tmp_path / "runs")
        assert str(folder) not in str(cache.identity)
        return cache.digest

    folder = recordings
    before = digest()
    folder = recordings.rename(tmp_path / "moved")
    assert digest() == before


@pytest.mark.parametrize(
    "name", ["shard-00000.bin", "shard-00000.parquet", "rejected.csv", "build.json", "manifest.json"]
)
def test_damaged_cache_is_repaired_by_the_next_call(recordings, toy_settings, tmp_path, name):
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    made = feature_pipeline.run(settings, runs=tmp_path)
    whole = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    content = bytearray(whole[name])
    content[len(content) // 2] ^= 1
    (made.folder / name).write_bytes(content if name != "manifest.json" else content[:20])
    with pytest.raises(LabError, match="cannot be used: .*Run 01_feature_pipeline"):
        feature_pipeline.open_cache(settings, runs=tmp_path)
    feature_pipeline.run(settings, runs=tmp_path)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == whole
    feature_pipeline.open_cache(settings, runs=tmp_path)
