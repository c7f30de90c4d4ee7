from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.features import guards
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.guards import GAP_S, GuardSource
from pipelines.features.sources import Example, NoAudio
from pipelines.features.sources.synthetic import tour
from pipelines.features.sources.synthetic.english import EnglishSource
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from pipelines.training import pipeline as training_pipeline

TOUR = {"train": 48, "validation": 8, "test": 12}
"""The source of the toy recipe."""


class Clips:
    """A source of clips, a second each, of two speakers in turn; the last has no audio."""

    def __init__(self, sound: bytes, n: int = 8):
        self.sound, self.n = sound, n

    def identity(self) -> dict[str, str]:
        return {"kind": "clips"}

    def examples(self, splits=("train", "validation", "test")) -> Iterator[Example]:
        for split in splits:
            for i in range(self.n):
                yield Example(f"{split}-{i}", split, f"Mening {i}.", self.sound, "ab"[i % 2])
            yield Example(f"{split}-none", split, "Inget ljud.", NoAudio("missing", ""), "a")


@pytest.fixture(scope="module")
def second(encoded, speech) -> bytes:
    return encoded(speech(16_000))


def test_training_clips_are_not_read(second):
    assert {example.split for example in GuardSource(Clips(second)).examples()} == {"validation", "test"}


def test_clips_of_a_speaker_are_joined(second):
    source = GuardSource(Clips(second), join_s=2.5)
    joined = [example for example in source.examples(("test",)) if "+" in example.id]
    assert [example.text for example in joined if example.speaker == "a"] == [
        "Mening 0. Mening 2.",
        "Mening 4. Mening 6.",
    ]
    assert all(audio.decode(example.audio).duration_s == pytest.approx(2 + GAP_S, abs=0.01) for example in joined)


def test_clip_that_cannot_be_joined_is_rejected_alone(second):
    (left,) = [one for one in GuardSource(Clips(second), join_s=2.5).examples(("test",)) if "+" not in one.id]
    assert left.id == "test-none"


@pytest.mark.parametrize(("n", "is_noted"), [(8, False), (2, True)], ids=["two of a speaker", "one of a speaker"])
def test_guard_that_joins_no_clips_says_so(second, caplog, n, is_noted):
    with caplog.at_level("INFO", logger="pipelines"):
        list(GuardSource(Clips(second, n), join_s=2.5).examples(("test",)))
    assert ("note: join_s=2.5 joined no clips" in caplog.text) is is_noted


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        ({"source": {**TOUR, "seed": 8}}, "by leak_"),
        ({"source": {**TOUR, "seed": 8}, "join_s": 9}, "by leak_"),
    ],
    ids=["clips", "joined"],
)
def test_guard_that_shares_rows_with_training_is_refused(toy_settings, toy_cache, tmp_path, guard, reason):
    recipe = toy_settings({"guards.other": guard})
    with pytest.raises(LabError, match=f"the guard other, got .*{reason}.*curation.held_out"):
        feature_pipeline.guard_cache(recipe, "other", toy_cache, runs=tmp_path)


def test_guard_is_aligned_by_the_model_of_another_recipe(toy_settings, toy_cache, tmp_path):
    source = {"kind": "aligned", "path": str(tmp_path), "aligner": "run:tour"}
    recipe = toy_settings({"guards.other": {"source": source}, "training.seed": 5})
    (tmp_path / "talk.wav").write_bytes(b"x")
    (tmp_path / "talk.txt").write_text("Hej.")
    with pytest.raises(LabError, match=r"source.aligner is 'run:tour', and no finished run .* training.seed=5"):
        feature_pipeline.guard_cache(recipe, "other", toy_cache, runs=tmp_path / "runs")


def test_training_refuses_a_guard_that_leaks(toy_settings, toy_cache, tmp_path):
    recipe = toy_settings({"guards.other": {"source": {**TOUR, "seed": 8}}})
    with pytest.raises(LabError, match="training rows must share nothing with the guard other"):
        training_pipeline.run(recipe, toy_cache, runs=tmp_path)
    assert not list(tmp_path.glob("*/train-*"))


def test_guards_leave_the_digest_of_the_cache(toy_settings, toy_cache, tmp_path):
    recipe = toy_settings({"guards.long": {"join_s": 9, "source": TOUR}})
    clips = feature_pipeline.guard_cache(recipe, "long", toy_cache, runs=tmp_path)
    assert feature_pipeline.guard_cache(recipe, "long", toy_cache, runs=tmp_path).folder == clips.folder
    assert set(clips.rows["split"]) == {"validation", "test"}
    assert (clips.identity["source.join_s"], clips.identity["source.kind"]) == ("9", "tour")
    assert "guards" not in toy_settings().model_dump()


def test_guard_is_decoded_in_its_language_without_a_limit(toy_settings):
    recipe = toy_settings({"guards.english": {"language": "English", "source": {"kind": "tour-english"}}})
    settings = guards.recipe_of(recipe, "english")
    assert (settings.language, settings.evaluation.max_new_tokens) == ("en", "auto")


def test_english_sentences_and_speakers_are_in_one_split():
    plan = EnglishSource(30, 10, 20).plan()
    assert len({utterance.text for utterance in plan}) == 60
    for name in ("speaker", "variant"):
        pairs = {(getattr(utterance, name), utterance.split) for utterance in plan}
        assert len({value for value, _ in pairs}) == len(pairs)
    assert EnglishSource(1, 10, 20).plan()[:30] == plan[:30], "more training sentences change no test sentence"
    assert set(tour.plan()[0].variant[:3]) == set("sv+")


def test_english_speech_is_the_same_every_time():
    (first, *_), (again, *_) = (list(EnglishSource(1, 1, 1).examples(("test",))) for _ in range(2))
    assert first.audio == again.audio
    assert np.abs(audio.decode(first.audio).samples).max() > 0.1


def test_too_many_english_sentences_are_refused():
    with pytest.raises(LabError, match="tour-english has .* sentences"):
        EnglishSource(10_000, 10, 10).plan()
