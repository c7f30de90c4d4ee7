"""The stages between the rooms: what one hands to the next, and what it refuses."""

from __future__ import annotations

import shutil

import pytest
from log_recorder import record_log

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


def test_training_needs_the_cache_and_not_what_it_was_made_of(recordings, toy_settings, tmp_path):
    told = {"source.kind": "folder", "source.path": str(recordings)}
    done: list[tuple[int, int]] = []
    told |= {"features.shard_clips": 4}
    made = feature_pipeline.run(toy_settings(told), runs=tmp_path / "runs", on_clips=lambda *told: done.append(told))
    assert done == [(4, 6), (2, 6)]
    shutil.rmtree(recordings)
    lines = record_log()
    opened = feature_pipeline.open_cache(toy_settings(told), made.uri, runs=tmp_path / "runs")
    assert opened.digest == made.digest
    assert any("not available" in line for line in lines)
    with pytest.raises(StaleCache, match="source.seed"):
        feature_pipeline.open_cache(toy_settings({**told, "source.seed": 8}), made.uri, runs=tmp_path / "runs")


def test_a_source_that_is_at_hand_is_compared(recordings, toy_settings, tmp_path):
    told = {"source.kind": "folder", "source.path": str(recordings)}
    made = feature_pipeline.run(toy_settings(told), runs=tmp_path / "runs")
    (recordings / "transcripts.csv").write_text("path,text,split\n0.wav,en annan mening,train\n", encoding="utf-8")
    with pytest.raises(StaleCache, match="source"):
        feature_pipeline.open_cache(toy_settings(told), made.uri, runs=tmp_path / "runs")


def test_samples_pass_over_what_cannot_be_decoded(recordings, toy_settings):
    (recordings / "0.wav").unlink()
    (recordings / "4.wav").write_bytes(b"no audio")
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    assert [example.id for example in feature_pipeline.samples(settings, 2, "train")] == ["1"]
    assert [example.id for example in feature_pipeline.samples(settings, 2, "test")] == ["5"]


def test_a_split_without_clips_is_told_at_once(recordings, toy_settings, tmp_path):
    (recordings / "transcripts.csv").write_text("path,text,split\n0.wav,en mening,train\n", encoding="utf-8")
    lines = record_log()
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    feature_pipeline.run(settings, runs=tmp_path / "runs")
    assert any("no validation and no test clips" in line for line in lines)


def test_a_source_that_lies_here_but_cannot_be_read_is_no_absent_one(recordings, toy_settings, tmp_path):
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings)})
    made = feature_pipeline.run(settings, runs=tmp_path / "runs")
    (recordings / "transcripts.csv").write_text("nothing,of,use\n1,2,3\n", encoding="utf-8")
    with pytest.raises(LabError, match="column"):
        feature_pipeline.open_cache(settings, made.uri, runs=tmp_path / "runs")


def test_where_the_parts_of_a_mix_lie_is_not_part_of_a_cache(recordings, toy_settings, tmp_path):
    def digest() -> str:
        part = {"name": "own", "kind": "folder", "path": str(place), "gives": ["train", "validation", "test"]}
        settings = toy_settings({"source.kind": "mix", "source.parts": [part]})
        made = feature_pipeline.run(settings, runs=tmp_path / "runs")
        assert str(place) not in str(made.identity)
        return made.digest

    place = recordings
    before = digest()
    place = recordings.rename(tmp_path / "moved")
    assert digest() == before
