"""From a folder of recordings without transcripts to training labels; what is refused or not decoded twice."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from log_recorder import record_log

from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.data_card import card
from pipelines.features.sources import NoAudio
from pipelines.features.sources.unlabelled import labeller
from pipelines.features.sources.unlabelled.source import UnlabelledSource
from pipelines.infra.errors import LabError
from pipelines.speech.recordings import detection
from pipelines.training import model_card
from pipelines.whisper import model as whisper_model

SURE, UNSURE, NOTHING = 0.5, 0.25, 0.125
"""Peaks of recordings; the fake engine is sure of the first, unsure of the second, and writes nothing for the third."""
TEXT = "Sjön är full av näckrosor."


class FakeEngine:
    """Writes TEXT with a probability that follows the peak of the window."""

    def __init__(self):
        self.n_decoded, self.other = 0, TEXT

    def log_mel(self, waveform):
        peak, n = float(np.abs(waveform.samples).max()), len(waveform.samples) // 160
        return SimpleNamespace(frames=range(n), padded=lambda frames: np.full((1, frames), peak, np.float32))

    def decode(self, windows, options):
        self.n_decoded += len(windows)
        return [self._hypothesis(float(window.max()), options) for window in windows]

    def detect_language(self, window):
        return "da"

    def _hypothesis(self, peak, options):
        text = "" if peak <= NOTHING else TEXT if options.beam_size == 1 else self.other
        logprob = np.log(0.95 if peak > UNSURE else 0.4)
        words = tuple((word, logprob) for word in text.split())
        return SimpleNamespace(text=text, logprob=logprob, tokens=8, words=words)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    fake = FakeEngine()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(labeller, "open_labeller", lambda ref, language: fake)
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)
    return fake


@pytest.fixture
def folder(tmp_path, speech):
    """A short recording that the model is sure of, one that it is not, and a long one of two parts, and noise."""
    path = tmp_path / "radio"
    path.mkdir()
    write(path / "sure.wav", speech(32_000, 1, SURE))
    write(path / "unsure.wav", speech(32_000, 2, UNSURE))
    silence = np.zeros(4 * 16_000, np.float32)
    parts = [silence, speech(48_000, 3, SURE), silence, speech(48_000, 4, NOTHING), *[silence] * 6]
    write(path / "long.flac", np.concatenate(parts))
    return path


def write(path, samples):
    soundfile.write(path, samples, 16_000, "FLOAT" if path.suffix == ".wav" else None)


@pytest.fixture
def source(engine, folder, toy_model):
    return lambda **options: UnlabelledSource(str(folder), str(toy_model), **options)


def reasons(examples):
    return Counter(one.audio.reason for one in examples if isinstance(vars(one).get("audio"), NoAudio))


def test_clips_are_whole_recordings_or_parts_between_pauses(source, folder):
    examples = list(source().examples())
    whole, part = sorted((one for one in examples if one.meta), key=lambda one: one.id, reverse=True)
    assert (whole.id, whole.audio, whole.text, whole.split) == ("sure.wav", folder / "sure.wav", TEXT, "train")
    assert part.id.startswith("long.flac@") and abs(part.excerpt.start_s - 4) < 0.3 and part.excerpt.end_s < 8
    assert whole.meta["label"] == part.meta["label"] == "pseudo"
    assert float(whole.meta["confidence"]) == pytest.approx(0.95, abs=1e-3)
    assert whole.speaker == part.speaker == ""
    assert reasons(examples) == {"low_confidence": 1, "no_speech": 1}


def test_only_training_rows_are_given_and_decoded(source, engine):
    assert list(source().examples(("validation", "test"))) == []
    assert engine.n_decoded == 0


def test_other_limits_decode_nothing_again(source, engine):
    assert reasons(source().examples())["low_confidence"] == 1
    n_decoded = engine.n_decoded
    assert reasons(source(min_confidence=0.3).examples())["low_confidence"] == 0
    assert reasons(source(min_confidence=0.99).examples())["low_confidence"] == 3
    assert engine.n_decoded == n_decoded == 4


def test_interrupted_decoding_goes_on_at_the_next_window(source, engine, tmp_path):
    before = list(source().examples())
    (journal,) = (
        path for path in tmp_path.glob("cache/pseudo_labels/*.jsonl") if len(path.read_bytes().split(b"\n")) > 3
    )
    rows = journal.read_text("utf-8").splitlines()
    journal.write_text(f"{rows[0]}\n{rows[1][:20]}", "utf-8")  # as if killed within the second window
    n_decoded = engine.n_decoded
    assert [one.id for one in source().examples()] == [one.id for one in before]
    assert engine.n_decoded == n_decoded + 1
    assert "end" in json.loads(journal.read_text("utf-8").splitlines()[-1])


def test_stored_second_text_is_not_decoded_again(source, engine):
    assert reasons(source(agreement_model="beams").examples())["models_disagree"] == 0
    n_decoded = engine.n_decoded
    stricter = source(agreement_model="beams", max_disagreement=0.0)
    assert stricter.identity() != source(agreement_model="beams").identity() != source().identity()
    assert reasons(stricter.examples())["models_disagree"] == 0
    assert engine.n_decoded == n_decoded == 8


def test_disagreement_and_language_reject_clips(source, engine, toy_model):
    engine.other = "Kalven diar sin mor i hagen."
    assert reasons(source(agreement_model="beams").examples())["models_disagree"] == 2
    assert reasons(source(language_model=str(toy_model)).examples())["wrong_language"] == 3


def test_excluded_recordings_are_found_by_content(source, folder, tmp_path):
    other = tmp_path / "anna"
    other.mkdir()
    (other / "another name.wav").write_bytes((folder / "sure.wav").read_bytes())
    examples = list(source(exclude=str(other)).examples())
    assert reasons(examples)["excluded"] == 1
    assert not any(one.id == "sure.wav" and one.meta for one in examples)
    assert source(exclude=str(other)).identity() != source().identity()


def test_identity_names_recordings_models_and_limits(source, folder, engine, toy_of_width):
    plain = source().identity()
    assert plain == source().identity()
    assert source(min_confidence=0.8).identity() != plain
    assert UnlabelledSource(str(folder), str(toy_of_width(64))).identity() != plain
    (folder / "sure.wav").write_bytes((folder / "unsure.wav").read_bytes())
    assert source().identity() != plain
    assert engine.n_decoded == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "source.path must name a folder of recordings"),
        ({"exclude": "nowhere"}, "source.exclude must name a recording"),
        ({"agreement_model": "same"}, "source.agreement_model must be another model"),
        ({"label_model": "nowhere/model"}, "no model in nowhere/model|not on this machine"),
    ],
)
def test_wrong_argument_gives_one_line(engine, folder, toy_model, options, message):
    options = {name: str(toy_model) if value == "same" else value for name, value in options.items()}
    settings = {"path": str(folder), "label_model": str(toy_model), **options}
    with pytest.raises(LabError, match=message) as error:
        UnlabelledSource(**settings).identity()
    assert "\n" not in str(error.value)


def test_recordings_of_a_test_folder_are_refused(source, folder):
    (folder / "test").mkdir()
    (folder / "sure.wav").rename(folder / "test" / "sure.wav")
    with pytest.raises(LabError, match="for training only, got test/sure.wav"):
        list(source().examples())


UNLABELLED = {"name": "more", "kind": "unlabelled", "path": "radio", "label_model": "run:tour"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source.kind": "unlabelled", "source.path": "radio"}, "source.label_model must name the model"),
        ({"source.kind": "unlabelled", "source.label_model": "run:tour"}, "source.path must name"),
        ({"source.kind": "mix", "source.parts": [{**UNLABELLED, "gives": ["train", "test"]}]}, "can give train only"),
        ({"source.kind": "mix", "source.parts": [{**UNLABELLED, "min_confidence": 2}]}, "less than or equal to 1"),
        (
            {"guards.other.source.kind": "unlabelled"}
            | {f"guards.other.source.{name}": UNLABELLED[name] for name in ("path", "label_model")},
            "must have transcripts by people",
        ),
    ],
)
def test_wrong_setting_gives_one_line(settings, message):
    with pytest.raises(LabError, match=message) as error:
        recipes.load("tour", settings)
    assert "\n" not in str(error.value)


@pytest.fixture
def mixed(engine, folder, tmp_path, speech, toy_model):
    """`mixed(label_model=...)`: settings of a mix of three labelled recordings, one for each split, and the others."""
    own = tmp_path / "own"
    own.mkdir()
    texts = {"train": "Rasten slutar snart.", "validation": "Kalven diar sin mor.", "test": "Låten är svår."}
    rows = ["path,text,split,speaker"]
    for seed, (split, text) in enumerate(texts.items(), start=10):
        write(own / f"{split}.wav", speech(32_000, seed))
        rows.append(f"{split}.wav,{text},{split},{split}-speaker")
    (own / "transcripts.csv").write_text("\n".join(rows), "utf-8")
    every = ["train", "validation", "test"]
    labelled = {"name": "own", "kind": "folder", "path": str(own), "gives": every, "own_names": True}
    part = {**UNLABELLED, "path": str(folder), "label_model": str(toy_model)}
    return lambda **options: {"source.kind": "mix", "source.parts": [labelled, {**part, **options}]}


def test_unlabelled_folder_becomes_training_labels(mixed, engine, toy_settings, toy_model, tmp_path):
    lines = record_log()
    cache = feature_pipeline.run(toy_settings(mixed()), runs=tmp_path / "runs")
    pseudo = cache.rows[cache.rows["label"] == "pseudo"]
    assert pseudo["split"].tolist() == ["train"] * 2
    assert pseudo["text"].tolist() == [TEXT] * 2
    (own,) = cache.rows.index[cache.rows["id"] == "train"]
    assert all(len(cache.labels(row)) > len(TEXT.split()) for row in pseudo.index)
    assert list(cache.labels(pseudo.index[0])) != list(cache.labels(own))
    assert {*pseudo["confidence"]} == {"0.950"} and pseudo["label_model"].nunique() == 1
    assert cache.counts == {"train": 3, "validation": 1, "test": 1, "rejected": 2}
    assert any("no calibrated confidence" in line for line in lines)

    page = (cache.folder / card.FILE).read_text("utf-8")
    assert "| label | pseudo | 2 |" in page and "2 transcripts (0.00 hours) were written by" in page
    assert "| low&#95;confidence | 1 |" in page and "filtered, as the recipe asks" in page
    facts = model_card.facts_of(toy_settings(mixed()), cache, whisper_model.resolve(str(toy_model)))
    assert [(one["clips"], one["hours"] > 0) for one in facts["pseudo_labels"]] == [(2, True)]

    n_decoded = engine.n_decoded
    stricter = feature_pipeline.run(toy_settings(mixed(min_confidence=0.99)), runs=tmp_path / "runs")
    assert stricter.digest != cache.digest and stricter.counts["train"] == 1
    assert engine.n_decoded == n_decoded


@pytest.mark.parametrize("cut", [False, True])
def test_test_recording_among_the_unlabelled_is_a_leak(mixed, toy_settings, folder, tmp_path, cut, speech):
    held_out = tmp_path / "own" / "test.wav"
    if cut:  # silence around it: the clip is a part of the recording, with other audio than the test clip
        write(
            held_out, np.concatenate([np.zeros(48_000, np.float32), speech(32_000, 12), np.zeros(48_000, np.float32)])
        )
    (folder / "copy.wav").write_bytes(held_out.read_bytes())
    with pytest.raises(LabError, match="leak_audio"):
        feature_pipeline.run(toy_settings(mixed()), runs=tmp_path / "runs")
    dropped = feature_pipeline.run(toy_settings({**mixed(), "curation.leaks": "drop"}), runs=tmp_path / "runs")
    (row,) = dropped.rejected[dropped.rejected["reason"] == "leak_audio"].to_dict("records")
    assert row["id"].startswith("more/copy.wav")


def test_pseudo_label_that_is_a_test_sentence_is_a_leak(mixed, toy_settings, tmp_path):
    table = tmp_path / "own" / "transcripts.csv"
    table.write_text(table.read_text("utf-8").replace("Låten är svår.", TEXT), "utf-8")
    with pytest.raises(LabError, match="leak_sentence"):
        feature_pipeline.run(toy_settings(mixed()), runs=tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "message"),
    [("run:toy", "must name the model of another recipe"), ("run:tour", "no finished run of tour")],
)
def test_model_of_a_recipe_must_be_another_and_finished(mixed, toy_settings, tmp_path, name, message):
    recipe = toy_settings({**mixed(label_model=name), "name": "toy"})
    with pytest.raises(LabError, match=message):
        feature_pipeline.run(recipe, runs=tmp_path / "runs")


def test_real_engine_labels_each_window_alone(monkeypatch, folder, toy_model, tmp_path):
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)
    ref = whisper_model.resolve(str(toy_model))
    one = labeller.Labeller(ref, "sv", 15.0)
    records, facts = one.decode(folder / "long.flac", tmp_path)
    assert [list(record) for record in records] == [["start_s", "end_s", "text", "logprob", "tokens", "words"]] * 2
    assert facts["duration_s"] == pytest.approx(38.0)
    (journal,) = tmp_path.glob("*.jsonl")
    rows = journal.read_text("utf-8").splitlines()
    journal.write_text(f"{rows[0]}\n", "utf-8")
    again, _ = one.decode(folder / "long.flac", tmp_path)  # the second window in a batch of its own
    assert [record["text"] for record in again] == [record["text"] for record in records]
    spoken, _ = labeller.Labeller(ref, "sv", 15.0, labeller.LANGUAGE).decode(folder / "long.flac", tmp_path)
    assert all(len(record["language"]) == 2 for record in spoken)
