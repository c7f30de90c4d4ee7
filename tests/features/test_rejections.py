"""Why clips were not used: counts, examples, and the limit of features.max_rejected_share."""

from __future__ import annotations

import json

import pytest
from log_recorder import record_log

from pipelines.features import pipeline as feature_pipeline
from pipelines.features.rejections import TooManyRejected, as_dict, summarise


def row(id: str, reason: str, detail: str = "x") -> dict[str, str]:
    return {"id": id, "split": "train", "reason": reason, "detail": detail}


def test_reasons_are_counted_with_an_example_each():
    rows = [row("a", "votes"), row("b", "unreadable", "no\naudio"), row("c", "unreadable")]
    first, second = summarise(rows, {})
    assert str(first) == "unreadable 2 (b: no audio)"
    assert (second.reason, second.clips, second.example) == ("votes", 1, "a")


@pytest.mark.parametrize(
    ("reason", "identity", "fault"),
    [
        *((name, {}, True) for name in ("unreadable", "missing", "no_text", "unknown_split", "too_long", "silent")),
        *((name, {}, False) for name in ("votes", "leak_speaker", "noisy", "quiet", "duplicate_audio", "label_error")),
        ("too_long", {"features.max_duration_s": 30.0}, True),
        ("too_long", {"features.max_duration_s": 12.0}, False),
        ("silent", {"features.min_peak": 0.1}, False),
    ],
)
def test_filters_of_the_recipe_are_no_faults(reason, identity, fault):
    assert summarise([row("a", reason)], identity)[0].fault is fault


@pytest.fixture
def half_unreadable(tmp_path, encoded, speech, toy_settings):
    """Return a function from overrides to the settings of a folder of four clips, one of them damaged."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    lines = ["path,text,speaker,split"]
    for n, split in enumerate(("train", "train", "validation", "test")):
        (folder / f"{n}.wav").write_bytes(b"no audio" if n == 0 else encoded(speech(8_000, seed=n)))
        lines.append(f"{n}.wav,mening nummer {n},speaker {n},{split}")
    (folder / "transcripts.csv").write_text("\n".join(lines) + "\n")
    source = {"source.kind": "folder", "source.path": str(folder)}
    return lambda overrides={}: toy_settings({**source, **overrides})


def test_too_many_faults_end_the_stage(half_unreadable, tmp_path):
    lines = record_log()
    with pytest.raises(TooManyRejected) as error:
        feature_pipeline.run(half_unreadable(), runs=tmp_path / "runs")
    cache, message = error.value.cache, str(error.value)
    assert "1 of 4 clips cannot be used (25%, at most 20% are allowed): unreadable 1 (0: " in message
    assert str(cache.folder / "rejected.csv") in message and "features.max_rejected_share=0.25" in message
    assert any("not used: 1 of 4 clips" in line and "unreadable 1 (0: " in line for line in lines)
    assert cache.counts == {"train": 1, "validation": 1, "test": 1, "rejected": 1}


def test_allowed_share_changes_no_digest(half_unreadable, tmp_path):
    with pytest.raises(TooManyRejected) as error:
        feature_pipeline.run(half_unreadable(), runs=tmp_path / "runs")
    allowed = half_unreadable({"features.max_rejected_share": 0.25})
    cache = feature_pipeline.run(allowed, runs=tmp_path / "runs")
    assert cache.digest == error.value.cache.digest
    [rejection] = json.loads(json.dumps(as_dict(cache)))["rejected"]
    assert (rejection["reason"], rejection["clips"], rejection["example"]) == ("unreadable", 1, "0")
