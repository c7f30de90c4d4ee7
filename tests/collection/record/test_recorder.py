"""Sessions of speakers: the next sentence, the check of a take and its storage."""

from dataclasses import replace

import pytest

from pipelines.collection.record.folder import Terms, open_folder
from pipelines.collection.record.recorder import Recorder, load_model
from pipelines.infra.errors import LabError
from tests.inference.app.app_fakes import FakeTranscriber

SENTENCES = ["Ett hus vid vägen.", "Två träd i parken.", "Tre får på ängen."]


@pytest.fixture
def folder(tmp_path):
    folder, lock = open_folder(tmp_path / "set", Terms("sv", "CC0-1.0", {}))
    yield folder
    lock.release()


@pytest.fixture
def recorder(folder):
    return Recorder(SENTENCES, folder)


@pytest.fixture
def take(tmp_path, encoded, speech, monkeypatch):
    """The path of a take without problems; everything but silence counts as speech."""
    from pipelines.speech.recordings import detection

    monkeypatch.setattr(detection, "is_packaged", lambda: False)
    path = tmp_path / "take.wav"
    path.write_bytes(encoded(speech(24_000)))
    return str(path)


def test_speaker_reads_every_sentence_once(recorder, folder, take):
    session = recorder.start("Åsa", "female", "30-39", "skånska")
    for number, sentence in enumerate(SENTENCES):
        assert (session.sentence, session.n_done) == (sentence, number)
        session = recorder.store(recorder.check(session, take))
    assert (session.sentence, session.n_done) == (None, 3)
    rows = folder.takes()
    assert [row["text"] for row in rows] == SENTENCES
    assert {(row["gender"], row["age"], row["accent"], row["problems"]) for row in rows} == {
        ("female", "30-39", "skånska", "")
    }
    assert all(row["consented_at"] for row in rows)


def test_interrupted_session_goes_on_where_it_was(recorder, take):
    recorder.store(recorder.check(recorder.start("Åsa"), take))
    assert recorder.start(" åsa ").sentence == SENTENCES[1]


def test_speakers_divide_the_list(recorder, take):
    recorder.store(recorder.check(recorder.start("Åsa"), take))
    session = recorder.start("Bo")
    assert session.sentence == SENTENCES[1]
    assert recorder.skip(session).sentence == SENTENCES[2]
    assert recorder.skip(recorder.skip(session)).sentence == SENTENCES[0]


def test_take_is_compared_with_its_sentence(folder, take, tmp_path):
    class Listener(FakeTranscriber):
        def transcribe(self, recording, **options):
            return super().transcribe(recording, lambda seconds: None, lambda segment: None)

    right = Recorder(SENTENCES, folder, Listener(tmp_path, SENTENCES[0]))
    wrong = Recorder(SENTENCES, folder, Listener(tmp_path, "Kaffe med mjölk, tack!"))
    session = right.start("Åsa")
    assert right.check(session, take).take.check.problems == ()
    checked = wrong.check(session, take)
    assert checked.take.check.problems == ("mismatch",)
    wrong.store(checked)  # the speaker says that it is right
    [row] = folder.takes()
    assert (row["problems"], row["hypothesis"]) == ("mismatch", "Kaffe med mjölk, tack!")


@pytest.mark.parametrize(
    ("n_samples", "content", "problem"),
    [(16_000 * 31, None, "too_long"), (0, None, "no_speech"), (0, b"not audio" * 99, "unreadable"), (0, b"", None)],
)
def test_unusable_take_is_a_problem_and_not_stored(recorder, take, encoded, speech, n_samples, content, problem):
    import numpy as np

    samples = speech(n_samples) if n_samples else np.zeros(8_000, np.float32)
    with open(take, "wb") as file:
        file.write(encoded(samples) if content is None else content)
    session = recorder.check(recorder.start("Åsa"), take)
    assert session.take.check.problems[0] in ((problem,) if problem else ("no_speech", "unreadable"))
    assert recorder.store(session) == session
    assert recorder.folder.takes() == []


def test_unknown_details_are_not_stored(recorder):
    details = recorder.start("Åsa", "<b>", "1000", "a\n" * 100).details
    assert (details["gender"], details["age"]) == ("", "")
    assert len(details["accent"]) <= 60 and "\n" not in details["accent"]


def test_take_that_cannot_be_stored_stays(recorder, take, monkeypatch):
    session = recorder.check(recorder.start("Åsa"), take)
    monkeypatch.setattr(recorder.folder, "add", lambda *arguments: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        recorder.store(session)
    monkeypatch.undo()
    assert recorder.store(session).sentence == SENTENCES[1]


def test_store_without_a_take_changes_nothing(recorder):
    session = recorder.start("Åsa")
    assert recorder.store(session) == session
    assert recorder.store(replace(session, take=None)) == session


def test_missing_model_is_a_warning_only():
    warnings = []

    def fail():
        raise LabError("no such model")

    assert load_model(fail, warnings.append) is None
    assert "no such model" in warnings[0]
