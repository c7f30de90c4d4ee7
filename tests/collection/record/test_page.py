"""The recording page: what its handlers return, its texts, its routes."""

import json
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipelines.collection.record import folder as take_folder
from pipelines.collection.record import i18n, recorder
from pipelines.collection.record.checks import FINAL
from pipelines.collection.record.handlers import Handlers, SameNickname
from pipelines.inference.http.rate_limits import RateLimiter
from pipelines.infra import manifest
from pipelines.infra.errors import LabError

gr = pytest.importorskip("gradio")

SENTENCES = ["Hej på dig.", "<b>Tyst</b> & stilla."]
ABOUT = ("female", "30-39", "Skåne")


@pytest.fixture
def folder(tmp_path):
    terms = take_folder.Terms("sv", "CC0-1.0", i18n.default_consent("CC0-1.0"))
    opened, lock = take_folder.open_folder(tmp_path / "takes", terms)
    yield opened
    lock.release()


@pytest.fixture
def handlers(folder):
    heard = SimpleNamespace(transcribe=lambda waveform: SimpleNamespace(text="<i>Hej</i> på dig"))
    return Handlers(recorder.Recorder(SENTENCES, folder, heard))


@pytest.fixture
def messages(monkeypatch):
    shown = []
    monkeypatch.setattr(gr, "Warning", lambda message, **more: shown.append(message))
    return shown


@pytest.fixture
def take(tmp_path, encoded, speech):
    path = tmp_path / "take.wav"
    path.write_bytes(encoded(speech(24_000)))
    return str(path)


def expect_error(action, *arguments):
    with pytest.raises(gr.Error) as caught:
        action(*arguments)
    assert "\n" not in caught.value.message and "/" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("agrees", [False, None, "yes", 1])
def test_no_visit_without_consent(handlers, folder, messages, agrees):
    assert handlers.start(agrees, "Åsa", ABOUT, "sv") is None
    assert messages == [i18n.SWEDISH["must_agree"]]
    assert folder.takes() == []


def test_take_is_kept_without_the_nickname(handlers, folder, take):
    visit = handlers.check(take, handlers.start(True, "Åsa Öberg", ABOUT, "en"), "en")
    kept = handlers.keep(visit, "en")
    [row] = folder.takes()
    assert (row["text"], row["gender"], row["age"], row["accent"]) == (SENTENCES[0], *ABOUT)
    assert kept.session.sentence == SENTENCES[1] and kept.session.take is None and kept.upload is None
    written = [path for path in folder.path.rglob("*") if path.is_file()]
    assert not any("berg" in path.name or b"berg" in path.read_bytes() for path in written)


def test_same_nickname_goes_on_where_it_stopped(handlers, take):
    handlers.keep(handlers.check(take, handlers.start(True, "Åsa", ABOUT, "en"), "en"), "en")
    again = handlers.start(True, " åsa ", ABOUT, "sv", confirmed="Åsa")
    assert (again.session.sentence, again.session.n_done) == (SENTENCES[1], 1)
    assert handlers.start(True, "", ABOUT, "sv").nickname != handlers.start(True, "", ABOUT, "sv").nickname


def test_nickname_of_another_is_asked_about(handlers, folder, take):
    visit = handlers.start(True, "Kim", ABOUT, "en")
    for confirmed in ("", "Bo"):
        with pytest.raises(SameNickname):  # two people begin at once: no take is stored yet
            handlers.start(True, "kim ", ABOUT, "en", confirmed=confirmed)
    handlers.keep(handlers.check(take, visit, "en"), "en")
    restarted = Handlers(recorder.Recorder(SENTENCES, folder))
    with pytest.raises(SameNickname):
        restarted.start(True, "KIM", ABOUT, "en")
    assert restarted.start(True, "Kim 2", ABOUT, "en").session.speaker != visit.session.speaker


def test_page_asks_whose_nickname_it_is(handlers):
    from pipelines.collection.record import page

    demo = page.build(handlers)
    events = [fn.fn for fn in demo.fns.values() if fn.fn and fn.fn.__name__ == "start" and len(fn.inputs) == 7]
    request = SimpleNamespace(client=None)
    assert len(events) == 2
    fields = (True, "Åsa", "", "", "")
    visit, asked, question, *_ = events[0]("", "en", request, *fields)
    assert visit is not None and asked == "" and question["visible"] is False
    visit, asked, question, agreement, *_ = events[0]("", "en", request, *fields)
    assert (visit, asked, question["visible"], agreement["visible"]) == (None, "Åsa", True, True)
    assert events[1](asked, "en", request, *fields)[0] is not None


def test_press_for_another_sentence_does_nothing(handlers, folder, take, messages):
    visit = handlers.start(True, "Åsa", ABOUT, "en")
    first, second = map(take_folder.sentence_id, SENTENCES)
    checked = handlers.check(take, visit, "en", sentence=first)
    assert handlers.keep(checked, "en", second) is checked and handlers.skip(checked, "en", second) is checked
    kept = handlers.keep(checked, "en", first)
    assert handlers.skip(kept, "en", first) is kept and handlers.skip(kept, "en", "") is kept
    assert messages == [i18n.ENGLISH["other_sentence"]] * 4 and len(folder.takes()) == 1


def test_late_upload_is_not_a_take_of_the_next_sentence(handlers, folder, take, messages):
    visit = handlers.start(True, "Åsa", ABOUT, "en")
    skipped = handlers.skip(visit, "en", take_folder.sentence_id(SENTENCES[0]))
    checked = handlers.check(take, skipped, "en", sentence=take_folder.sentence_id(SENTENCES[0]))
    assert checked.session.take is None and checked.upload is None and messages == [i18n.ENGLISH["other_sentence"]]
    assert handlers.keep(checked, "en").session.n_done == 0 and folder.takes() == []


def test_second_press_at_once_stores_and_skips_nothing(handlers, folder, take, messages):
    visit = handlers.check(take, handlers.start(True, "Åsa", ABOUT, "en"), "en")
    first = take_folder.sentence_id(SENTENCES[0])
    assert handlers.keep(visit, "en", first).session.sentence == SENTENCES[1]
    assert handlers.keep(visit, "en", first) is None and handlers.skip(visit, "en", first) is None
    assert messages == [] and len(folder.takes()) == 1


def test_recording_on_an_expired_page_is_said(handlers, take, messages):
    assert handlers.check(take, None, "sv") is None and handlers.check(None, None, "sv") is None
    assert messages == [i18n.SWEDISH["visit_expired"]]


def test_check_that_ends_after_a_skip_changes_nothing(handlers, take, monkeypatch):
    visit = handlers.start(True, "Åsa", ABOUT, "en")
    check_take = handlers.recorder.check

    def slow_check(session, path):
        handlers.skip(visit, "en")
        return check_take(session, path)

    monkeypatch.setattr(handlers.recorder, "check", slow_check)
    assert handlers.check(take, visit, "en") is None


def test_second_take_from_another_page_is_said(handlers, folder, take, tmp_path, messages):
    pages = [handlers.start(True, "Åsa", ABOUT, "en", confirmed="Åsa") for _ in range(2)]
    for visit in pages:
        copy = shutil.copy(take, tmp_path / "copy.wav")
        assert handlers.keep(handlers.check(copy, visit, "en"), "en").session.sentence == SENTENCES[1]
    assert messages == [i18n.ENGLISH["repeated"]] and len(folder.takes()) == 1


def test_take_that_cannot_be_stored_stays(handlers, folder, take, monkeypatch):
    visit = handlers.check(take, handlers.start(True, "Åsa", ABOUT, "en"), "en")

    write = manifest.write_bytes

    def full(*arguments):
        raise OSError(28, "No space left on device", "/secret/path")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write_bytes", full)
        assert expect_error(handlers.keep, visit, "en") == i18n.ENGLISH["not_saved"]
        assert folder.takes() == []
    with monkeypatch.context() as patched:  # the disk has room for the audio, not for the table
        patched.setattr(
            manifest, "write_bytes", lambda path, content: (full if path.suffix == ".csv" else write)(path, content)
        )
        assert expect_error(handlers.keep, visit, "en") == i18n.ENGLISH["not_saved"]
    assert folder.takes() == [] and not [*folder.path.glob("clips/*/*")]
    assert handlers.keep(visit, "en").session.n_done == 1


def test_expired_visit_and_too_many_requests_are_one_line(handlers, take):
    assert expect_error(handlers.keep, None, "sv") == i18n.SWEDISH["visit_expired"]
    assert expect_error(handlers.skip, None, "en") == i18n.ENGLISH["visit_expired"]
    handlers.limiter = RateLimiter(1, 0)
    visit = handlers.start(True, "Åsa", ABOUT, "en", "1.2.3.4")
    assert "try again" in expect_error(handlers.check, take, visit, "en", "1.2.3.4")


@pytest.mark.parametrize("content", [b"", b"no audio", b"RIFF"])
def test_unusable_recording_cannot_be_kept(handlers, folder, tmp_path, content):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(content)
    visit = handlers.check(str(broken), handlers.start(True, "Åsa", ABOUT, "en"), "en")
    *_, status, _, keep, _ = handlers.show(visit, "en")
    assert i18n.ENGLISH["again_please"] in status and keep["interactive"] is False
    assert handlers.keep(visit, "en") is visit and folder.takes() == []


def test_texts_of_others_are_escaped(handlers, take):
    visit = handlers.start(True, "<script>", ABOUT, "en")
    visit = handlers.check(take, visit, "en")
    visit = replace(visit, session=replace(visit.session, sentence=SENTENCES[1]))
    shown = "".join(value for value in handlers.show(visit, "en") if isinstance(value, str))
    assert "&lt;b&gt;Tyst" in shown and "&lt;i&gt;Hej" in shown and "&lt;script" in shown
    assert not {"<b>", "<i>", "<script"} & {tag for tag in ("<b>", "<i>", "<script") if tag in shown}


def test_every_text_has_two_languages_and_every_problem_one():
    def shape(texts):
        return {key: shape(value) if isinstance(value, dict) else "" for key, value in texts.items()}

    assert shape(i18n.ENGLISH) == shape(i18n.SWEDISH)
    assert {*FINAL, "clipped", "quiet", "noisy", "silence", "slow", "fast", "mismatch"} == {*i18n.ENGLISH["problems"]}
    assert {*recorder.AGES} == {*i18n.ENGLISH["ages"]} and {*recorder.GENDERS} == {*i18n.SWEDISH["genders"]}


def test_page_is_translated_and_has_no_public_event(handlers):
    from pipelines.collection.record import page

    demo = page.build(handlers)
    [switch] = [fn for fn in demo.fns.values() if getattr(fn.fn, "__name__", "") == "switch"]
    swedish = switch.fn("sv", handlers.start(True, "Åsa", ABOUT, "sv"))
    assert len(swedish) == len(switch.outputs) and swedish[0] == "sv"
    values = json.dumps(swedish, ensure_ascii=False, default=str)
    for key in ("consent_title", "agree", "start", "known", "next", "again", "skip", "hint"):
        assert i18n.SWEDISH[key] in values
    assert "läser meningar högt" in values and "0 av 2" in values
    assert demo.get_api_info()["named_endpoints"] == {}


def test_address_of_another_machine_is_one_line_at_once(handlers):
    from pipelines.collection.record import page
    from pipelines.inference.app import launch

    with pytest.raises(LabError, match="cannot be served at 192.0.2.1"):
        launch.launch(page.build(handlers), host="192.0.2.1")


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_page_script_is_valid_javascript(handlers, tmp_path):
    from pipelines.collection.record import page

    (tmp_path / "page.js").write_text(f"const run = {page.build(handlers).page_script}\n", "utf-8")
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
