"""From a folder of recordings without transcripts to training labels; what is refused or not decoded twice."""

import dataclasses
import json
import os
from collections import Counter

import numpy as np
import pytest
from log_recorder import record_log

from pipelines.features.sources import NoAudio
from pipelines.features.sources.unlabelled import labeller
from pipelines.features.sources.unlabelled.source import UnlabelledSource
from pipelines.infra import progress_file
from pipelines.infra.errors import LabError
from pipelines.speech.recordings import detection
from pipelines.whisper import model as whisper_model
from tests.features.sources.unlabelled.conftest import TEXT, write


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


def test_progress_counts_recordings_only_while_it_decodes(source, tmp_path, monkeypatch):
    lines = tmp_path / "progress.txt"
    monkeypatch.setenv(progress_file.VARIABLE, str(lines))
    list(source().examples())
    assert lines.read_text("utf-8").splitlines()[-1] == "pseudo-labels: 3/3 recordings, 0:00 left"
    lines.write_text("")
    list(source().examples())  # all stored
    assert lines.read_text("utf-8") == ""


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


@pytest.mark.parametrize("context", ["clip", "full"])
def test_real_engine_labels_each_window_alone(monkeypatch, tmp_path, speech, toy_model, context):
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)
    path, silence = tmp_path / "long.flac", np.zeros(48_000, np.float32)
    write(path, np.concatenate([speech(16_000, 3), silence, speech(80_000, 4), *[silence] * 4]))
    ref = dataclasses.replace(whisper_model.resolve(str(toy_model)), context=context)
    one = labeller.Labeller(ref, "sv", 15.0)
    records, facts = one.decode(path, tmp_path)
    assert [list(record) for record in records] == [["start_s", "end_s", "text", "logprob", "tokens", "words"]] * 2
    assert facts["duration_s"] == pytest.approx(21.0)
    (journal,) = tmp_path.glob("*.jsonl")
    rows = journal.read_text("utf-8").splitlines()
    journal.write_text(f"{rows[1]}\n", "utf-8")
    again, _ = one.decode(path, tmp_path)  # the shorter window in a batch of its own
    assert [record["text"] for record in again] == [record["text"] for record in records]
    assert again[0]["logprob"] == pytest.approx(records[0]["logprob"], abs=1e-4)
    spoken, _ = labeller.Labeller(ref, "sv", 15.0, labeller.LANGUAGE).decode(path, tmp_path)
    assert all(len(record["language"]) == 2 for record in spoken)


def test_link_to_another_folder_is_refused_and_other_files_are_logged(source, folder, tmp_path):
    lines = record_log()
    (folder / "notes.xyz").write_text("no recording")
    (folder / "broken.wav").symlink_to(tmp_path / "absent.wav")
    assert source().identity()
    assert any("skipped: 1 not a file (such as broken.wav); 1 not audio by its suffix .xyz" in line for line in lines)
    (tmp_path / "disk").mkdir()
    (folder / "disk").symlink_to(tmp_path / "disk")
    with pytest.raises(LabError, match="disk is a link to .*, outside"):
        source().identity()


def test_name_that_is_no_text_gives_one_line(source, folder):
    os.rename(folder / "sure.wav", os.fsencode(folder) + b"/\xff.wav")
    with pytest.raises(LabError, match=r"must be in UTF-8, got '.*\\udcff.wav': rename it"):
        source().identity()


def test_windows_of_another_detector_are_not_taken_over(source, engine, monkeypatch):
    monkeypatch.setattr(detection, "is_packaged", lambda: True)
    identity, examples = source().identity(), list(source().examples())
    n_decoded = engine.n_decoded
    monkeypatch.setattr(detection, "is_packaged", lambda: False)
    assert source().identity() == identity | {"detector": "any sound"}
    assert len(list(source().examples())) == len(examples) and engine.n_decoded == 2 * n_decoded
