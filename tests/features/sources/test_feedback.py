"""Feedback as training examples: every verdict becomes an example or a rejection with a reason."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pipelines import recipes
from pipelines.features.clips import Rejected
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.sources.feedback import FeedbackSource
from pipelines.features.sources.registry import open_source
from pipelines.inference import feedback
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "feedback" / "log.csv"


@pytest.fixture
def say(log, speech):
    """`say(flag, reference="", username="", recorded=True)` adds a verdict on "hej på dig"."""

    def add(flag: str, reference: str = "", username: str = "", recorded: bool = True) -> None:
        sound = Waveform(speech(16_000)) if recorded else None
        more = {"reference": reference, "username": username, "recording": sound}
        feedback.append(log, feedback.Feedback(output="hej på dig", flag=flag, model="tiny @ abc", **more), NOON)

    return add


def outcome(example) -> str:
    """Return the training transcript of an example, or the reason of its rejection."""
    clip_filter = ClipFilter(lambda text: [1], 80, 0.1, 30.0, 1e-3)
    try:
        return clip_filter.create_clip(example).text
    except Rejected as error:
        return error.reason


def test_every_verdict_is_an_example_or_rejected(log, say):
    say("right", username="Åsa")
    say("wrong", "hej på er")
    say("wrong")
    say("right", recorded=False)
    say("wrong", "=hej på er", recorded=False)
    examples = list(FeedbackSource(str(log)).examples())
    assert [outcome(e) for e in examples] == ["hej på dig", "hej på er", "no_text", "missing", "missing"]
    assert [e.text for e in examples] == ["hej på dig", "hej på er", "", "hej på dig", "=hej på er"]
    assert {e.split for e in examples} == {"train"} and len({e.id for e in examples}) == 5
    assert examples[0].speaker == "Åsa"
    assert len({e.speaker for e in examples}) == 5 and all(e.speaker for e in examples)
    assert examples[1].meta == {"flag": "wrong", "timestamp": "2026-03-01T12:00:00+00:00", "model": "tiny @ abc"}


def test_examples_are_stable_when_the_log_grows(log, say):
    say("right")
    say("wrong", "hej på er")
    source = FeedbackSource(str(log))
    before, identity = list(source.examples()), source.identity()
    assert list(FeedbackSource(str(log)).examples()) == before
    assert FeedbackSource(str(log)).identity() == identity and identity["kind"] == "feedback"
    say("right")
    assert list(FeedbackSource(str(log)).examples())[:2] == before
    assert FeedbackSource(str(log)).identity() != identity


def test_identity_changes_with_recordings(log, say):
    say("right")
    before = FeedbackSource(str(log)).identity()
    [recording] = (log.parent / "audio").glob("*.wav")
    recording.write_bytes(recording.read_bytes()[:-2] + b"\1\1")
    changed = FeedbackSource(str(log)).identity()
    assert changed["files_sha256"] != before["files_sha256"] and changed["rows_sha256"] == before["rows_sha256"]
    recording.unlink()
    assert FeedbackSource(str(log)).identity() not in (before, changed)


def test_feedback_has_training_rows_only(log, say):
    say("right")
    assert list(FeedbackSource(str(log)).examples(("validation", "test"))) == []
    assert len(list(FeedbackSource(str(log)).examples(("train",)))) == 1
    assert list(FeedbackSource(str(log)).outline()) == list(FeedbackSource(str(log)).examples())


def test_recording_outside_the_folder_is_missing(log, say, tmp_path, encoded, speech):
    say("right", recorded=False)
    outside = tmp_path / "outside.wav"
    outside.write_bytes(encoded(speech(16_000)))
    (log.parent / "link.wav").symlink_to(outside)
    (log.parent / "circle.wav").symlink_to("circle.wav")
    for cell in (str(outside), "../outside.wav", "link.wav", "circle.wav", "a\0b", "x" * 300):
        header, row = log.read_text("utf-8").splitlines()[:2]
        log.write_text(f"{header}\n{cell}{row}\n", "utf-8")
        [example] = FeedbackSource(str(log)).examples()
        assert outcome(example) in ("missing", "unreadable"), cell
        assert example.audio.parent == log.parent and example.audio.name != "link.wav"
        assert FeedbackSource(str(log)).identity()
        log.write_text(f"{header}\n{row}\n", "utf-8")


def test_unusable_log_raises(log, say, tmp_path):
    for path, told in ((log, "no file"), (tmp_path, "no file")):
        with pytest.raises(LabError, match=told):
            FeedbackSource(str(path)).examples()
    say("right")
    header = log.read_text("utf-8").splitlines()[0]
    log.write_text(header + "\n", "utf-8")
    with pytest.raises(LabError, match="no verdict yet"):
        FeedbackSource(str(log)).identity()
    log.write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(LabError, match="columns"):
        FeedbackSource(str(log)).examples()


def test_recipe_opens_the_source(log, say):
    say("right")
    settings = recipes.load("tour", {"source.kind": "feedback", "source.path": str(log)}).source
    assert [e.text for e in open_source(settings).examples()] == ["hej på dig"]
