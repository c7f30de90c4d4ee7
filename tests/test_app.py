"""The app without a browser: what an import costs, which model it takes, and what its buttons answer."""

import base64
import json
import logging
import os
import socket
import string
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import app
from pipelines import feedback, manifest, segmentation, served
from pipelines.errors import LabError
from pipelines.models import ModelRef
from pipelines.page import buttons as page_buttons
from pipelines.page import look, shown, words
from pipelines.segmentation import Window
from pipelines.served import Service
from pipelines.streaming import Partial
from pipelines.transcriber import Segment, Transcript, Word

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parent.parent
WORDS = words.WORDS
ENGLISH = WORDS["en"]
PARTS = ENGLISH["refused"]


class FakeTranscriber:
    """Hears the same words in everything; counts how often it was asked."""

    def __init__(self, folder, text="Hej på dig.", **facts):
        self.ref = ModelRef(str(folder), Path(folder), "folder", "abc123", facts.pop("quantisation", None), facts=facts)
        self.text, self.calls = text, 0

    longest_s = 30.0

    def transcribe(self, recording, on_audio, on_segment):
        self.calls += 1
        if isinstance(self.text, Exception):
            raise self.text
        on_audio(recording.duration_s)
        for segment in self.decode_windows([Window(recording.samples, 0.0)]):
            on_segment(segment)
        return Transcript(self.text, recording.duration_s, 0.1)

    def decode_windows(self, windows):
        return [Segment(w.start_s, w.end_s, self.text) for w in windows]


@pytest.fixture
def buttons(tmp_path):
    return page_buttons.Buttons(Service(FakeTranscriber(tmp_path / "runs" / "train-1" / "model"), tmp_path / "log.csv"))


@pytest.fixture
def spoken(tmp_path, encoded, speech):
    path = tmp_path / "spoken.wav"
    path.write_bytes(encoded(speech(33_600)))
    return str(path)


def refusal(action, *arguments):
    """The one line that a button answers with."""
    with pytest.raises(gr.Error) as caught:
        action(*arguments)
    line = caught.value.message
    assert "\n" not in line
    assert "/" not in line
    assert "Traceback" not in line
    assert not caught.value.print_exception
    return line


# ---- importing and choosing


def test_import_is_instant_and_loads_nothing_heavy():
    code = (
        "import time; start = time.perf_counter(); import app, sys, json; seconds = time.perf_counter() - start\n"
        "heavy = ['gradio', 'torch', 'transformers', 'pandas', 'huggingface_hub', 'httpx']\n"
        "print(json.dumps([seconds, [name for name in heavy if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(done.stdout)
    assert loaded == []
    assert seconds < 1.0


def sealed_model(runs, name, finished_s, kind="model"):
    folder = runs / "tour" / f"train-{name}" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    manifest.seal(folder, kind=kind)
    os.utime(folder / manifest.MANIFEST, (finished_s, finished_s))
    return folder


def test_a_named_model_is_chosen_first(tmp_path):
    sealed_model(tmp_path, "a", 100)
    assert served.choose("hub://a/b", tmp_path) == ("hub://a/b", "named")


def test_the_newest_finished_run_is_chosen_next(tmp_path):
    sealed_model(tmp_path, "z", 100)
    newest = sealed_model(tmp_path, "a", 200)
    sealed_model(tmp_path, "c", 300, kind="report")
    (sealed_model(tmp_path, "damaged", 400) / "config.json").unlink()
    (sealed_model(tmp_path, "unfinished", 500) / manifest.MANIFEST).unlink()
    assert served.choose("", tmp_path) == (str(newest), "newest")


@pytest.mark.parametrize("runs", ["", "absent"])
def test_the_base_model_is_chosen_last(tmp_path, runs):
    assert served.choose(None, tmp_path / runs) == ("openai/whisper-tiny", "base")


def run_app(*arguments, env=None):
    return subprocess.run([sys.executable, "app.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_dry_run_says_which_and_loads_nothing(tmp_path):
    environ = {**os.environ, "LAB_RUNS": str(tmp_path), "MODEL_URI": "hub://me/mine"}
    done = run_app("--dry-run", env=environ)
    first, last = done.stdout.splitlines()
    assert done.returncode == 0
    assert first.startswith("model: hub://me/mine (")
    assert last.startswith("next: ")


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = run_app("--model", str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no model in ")


# ---- what is shown of a transcript


def test_unsure_words_are_marked_and_nothing_in_them_is_markup():
    heard = (Word("Hej", 0.93), Word("<b>&dig</b>", 0.21))
    told = shown.details((Segment(61.5, 63.0, "Hej <b>&dig</b>", heard),), ENGLISH)
    assert '<mark title="21% sure">&lt;b&gt;&amp;dig&lt;/b&gt;</mark>' in told
    assert "<mark" not in told.split("Hej")[0]
    assert "<b>" not in told
    assert "<time>1:01.5</time>" in told
    assert 'data-start="61.500" data-end="63.000"' in told
    assert told.startswith("<details open>")
    assert ENGLISH["unsure"] in told


def test_a_notebook_shows_the_same_marks():
    from pipelines import figures

    heard = (Word("Hej", 0.93), Word("<b>dig", 0.21))
    told = figures.transcript(Transcript("Hej <b>dig", 3.0, 0.1, (Segment(61.5, 63.0, "Hej <b>dig", heard),))).data
    assert 'Hej <mark title="21% sure">&lt;b&gt;dig</mark>' in told
    assert "1:01.5" in told
    assert "57% sure of the words" in told


def test_a_transcript_without_unsure_words_is_folded_and_none_shows_nothing():
    told = shown.details((Segment(0, 1, "Hej", (Word("Hej", 0.93),)),), ENGLISH)
    assert told.startswith("<details><summary>")
    assert ENGLISH["sure"] in told
    assert shown.details((), ENGLISH) == ""


@pytest.mark.parametrize(("seconds", "told"), [(0, "0:00.0"), (59.96, "1:00.0"), (61.5, "1:01.5"), (605.04, "10:05.0")])
def test_a_clock_carries_over(seconds, told):
    assert shown.clock(seconds) == told


def test_side_by_side_marks_what_only_one_of_the_two_heard():
    told = shown.side_by_side(("base", "Båten gor klockan <sju>."), ("tuned", "båten går klockan"), ENGLISH)
    assert told.count("<mark>") == 3
    for word in ("gor", "&lt;sju&gt;.", "går"):
        assert f"<mark>{word}</mark>" in told
    assert ENGLISH["differs"] in told
    same = shown.side_by_side(("base", "Hej!"), ("tuned", "hej"), ENGLISH)
    assert "<mark>" not in same
    assert ENGLISH["same"] in same
    assert ENGLISH["no_words"] in shown.side_by_side(("base", ""), ("tuned", "hej"), ENGLISH)


def test_words_that_may_yet_change_are_set_apart():
    told = shown.live(Partial((Segment(0, 1, "<Hej>"),), "på", "dig &", 2.0, 0.31), ENGLISH)
    assert "&lt;Hej&gt; på <span>dig &amp;</span>" in told
    assert "2.0 s heard; the words came <b>0.3</b> s after" in told


# ---- two languages


def leaves(told, path=()):
    """(path, text) of every word in the dictionary."""
    for name, value in told.items():
        yield from leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]


def test_both_languages_say_all_and_fill_in_the_same_places():
    english, swedish = (dict(leaves(WORDS[tag])) for tag in ("en", "sv"))
    assert english.keys() == swedish.keys()
    for path, said in english.items():
        places = {name for _, name, _, _ in string.Formatter().parse(said) if name}
        assert {name for _, name, _, _ in string.Formatter().parse(swedish[path]) if name} == places, path
    alike = {path[0] for path, said in english.items() if said == swedish[path]}
    assert alike <= {"title", "model"}, "left untranslated"


@pytest.mark.parametrize(
    ("header", "tag"),
    [
        ("sv-SE,sv;q=0.9,en;q=0.8", "sv"),
        ("en-GB,sv;q=0.9", "en"),
        ("fi,sv;q=0.5,en;q=0.3", "sv"),
        ("da;q=0.9, SV", "sv"),
        ("sv;q=0", "en"),
        ("sv;q=nonsense", "en"),
        ("", "en"),
        ("*," * 5_000 + "sv", "en"),
    ],
)
def test_the_page_begins_in_the_browsers_language(header, tag):
    assert words.preferred(header) == tag


def test_every_component_with_words_is_said_in_both_languages(tmp_path):
    demo = app.build(FakeTranscriber(tmp_path, base_model="x"), tmp_path / "log.csv")
    switches = [fn for fn in demo.fns.values() if fn.targets and fn.targets[0][1] == "input" and fn.fn]
    [switch] = switches
    [first] = [fn for fn in demo.fns.values() if fn.targets and fn.targets[0][1] == "load" and fn.fn]
    swedish = switch.fn("sv", None)
    assert swedish[0] == "sv"
    assert len(swedish) == len(switch.outputs)
    request = SimpleNamespace(headers={"accept-language": "sv"})
    assert first.fn(request)[:2] == swedish[:2]
    assert len(first.fn(request)) == len(first.outputs)
    assert switch.fn("nonsense", None)[0] == "en"
    values = json.dumps([told for told in swedish if isinstance(told, dict)], ensure_ascii=False, default=str)
    for key in ("transcribe", "live_tab", "keep", "wrong", "compare", "live_hint", "correction_hint"):
        assert WORDS["sv"][key] in values


def test_the_files_to_download_are_the_transcript(buttons, spoken):
    segments = (Segment(0.0, 2.1, "Hej på dig.", (Word("Hej", 0.9),)),)
    heard = replace(buttons.transcribe(spoken, None, "en")[2], segments=segments)
    _, files, *saves, _ = buttons.details(heard, "en")
    assert files["txt"] == "Hej på dig.\n"
    assert files["srt"].startswith("1\n00:00:00,000 --> 00:00:02,100\nHej på dig.")
    assert files["vtt"].startswith("WEBVTT")
    assert [save.interactive for save in saves] == [True] * 3
    told, files, *saves, _ = buttons.details(None, "en")
    assert (told, files) == ("", None)
    assert [save.interactive for save in saves] == [False] * 3


# ---- transcribing


def test_a_transcript_comes_with_its_durations(buttons, spoken):
    text, line, heard = buttons.transcribe(spoken, None, "en")
    assert text == "Hej på dig."
    assert line.startswith("2.1 s of speech in 0.")
    assert heard.source == spoken
    assert heard.recording.duration_s == pytest.approx(2.1)


def test_the_same_upload_is_transcribed_once(buttons, spoken):
    first = buttons.transcribe(spoken, None, "en")
    Path(spoken).unlink()
    assert buttons.transcribe(spoken, first[2], "en") == first
    assert buttons.service.transcriber.calls == 1


def test_nothing_heard_is_said_plainly(buttons, spoken):
    buttons.service.transcriber.text = ""
    assert buttons.transcribe(spoken, None, "en")[1].startswith("no words heard in 2.1 s")


def test_uploads_are_deleted_even_when_refused_and_other_files_never(buttons, spoken, tmp_path, monkeypatch):
    uploads = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    for content in (Path(spoken).read_bytes(), b"not audio"):
        upload = uploads / "0a1b" / "clip.wav"
        upload.parent.mkdir(parents=True)
        upload.write_bytes(content)
        try:
            buttons.transcribe(str(upload), None, "en")
        except gr.Error:
            pass
        assert not upload.parent.exists()
    buttons.transcribe(spoken, None, "en")
    assert Path(spoken).exists()


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("unreadable", lambda wav: b"This is no sound.\n" * 50),
        ("unreadable", lambda wav: wav(np.zeros(1_600, np.float32))[:20]),
        ("empty", lambda wav: b""),
        ("empty", lambda wav: wav(np.zeros(0, np.float32))),
        ("not_finite", lambda wav: wav(np.full(1_600, np.nan, np.float32), subtype="FLOAT")),
        ("silent", lambda wav: wav(np.zeros(16_000, np.float32))),
        ("too_long", lambda wav: wav(np.zeros(601 * 1_000, np.float32), 1_000)),
    ],
)
def test_hostile_recordings_are_refused_in_one_line(buttons, tmp_path, encoded, reason, make):
    path = tmp_path / "hostile.wav"
    path.write_bytes(make(encoded))
    assert refusal(buttons.transcribe, str(path), None, "en") == PARTS[reason]
    assert buttons.service.transcriber.calls == 0


def test_no_recording_and_a_vanished_one_are_told_apart(buttons, tmp_path):
    assert refusal(buttons.transcribe, None, None, "en") == PARTS["no_recording"]
    assert refusal(buttons.transcribe, str(tmp_path / "gone.wav"), None, "en") == PARTS["missing"]


def test_an_unexpected_failure_shows_nothing_of_the_server(buttons, spoken, caplog):
    buttons.service.transcriber.text = RuntimeError("/secret/path exploded")
    with caplog.at_level(logging.ERROR):
        assert refusal(buttons.transcribe, spoken, None, "en") == ENGLISH["failed"]
    assert "/secret/path exploded" in caplog.text


def test_whoever_waits_too_long_for_the_model_is_told_that_it_is_busy(buttons, spoken, monkeypatch):
    monkeypatch.setattr(served, "TURN_S", 0.05)
    with buttons.service.turn():
        asked = threading.Thread(target=lambda: said.append(refusal(buttons.transcribe, spoken, None, "sv")))
        said = []
        asked.start()
        asked.join(10)
    assert said == [WORDS["sv"]["refused"]["busy"]]
    assert buttons.transcribe(spoken, None, "en")[0] == "Hej på dig."


def test_a_recording_that_takes_too_long_is_given_up_and_the_next_one_heard(buttons, spoken, monkeypatch):
    monkeypatch.setattr(served, "TIMEOUT_S", -1.0)
    assert refusal(buttons.transcribe, spoken, None, "en") == PARTS["too_slow"]
    monkeypatch.setattr(served, "TIMEOUT_S", 60.0)
    assert buttons.transcribe(spoken, None, "en")[0] == "Hej på dig."


def test_progress_is_told_in_shares(buttons, spoken):
    shares = []
    buttons.transcribe(spoken, None, "en", shares.append)
    assert shares == [pytest.approx(1.0)]


def test_an_example_can_be_chosen_again_and_again(buttons, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    for name in page_buttons.EXAMPLES:
        upload = tmp_path / "0a1b" / name
        upload.parent.mkdir(exist_ok=True)
        upload.write_bytes(Path(page_buttons.example(name)).read_bytes())
        assert buttons.transcribe(str(upload), None, "en")[0]
        assert upload.exists(), "another visitor may have it open"
        upload.write_bytes(Path(spoken_by_a_visitor(tmp_path)).read_bytes())
        buttons.transcribe(str(upload), None, "en")
        assert not upload.exists(), "a visitor's own file of that name is deleted"


def spoken_by_a_visitor(folder):
    soundfile = pytest.importorskip("soundfile")
    path = folder / "own.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(16_000, dtype=np.float32) / 20), 16_000)
    return path


# ---- a microphone that is heard while it is open


@pytest.fixture
def all_is_speech(monkeypatch):
    monkeypatch.setattr(segmentation, "is_packaged", lambda: False)


def pieces(samples, rate_hz=48_000, every_s=0.5):
    """A recording as the page sends it."""
    whole = np.round(samples * 32_768).clip(-32_768, 32_767).astype("<i2")
    step = int(every_s * rate_hz)
    for at in range(0, len(whole), step):
        yield {"rate": rate_hz, "samples": base64.b64encode(whole[at : at + step].tobytes()).decode()}


def test_an_open_microphone_is_heard_piece_by_piece_and_becomes_one_recording(buttons, speech, all_is_speech):
    import soxr

    samples = soxr.resample(speech(3 * 16_000), 16_000, 48_000)
    live, told = None, ""
    *most, last = pieces(samples)
    for piece in most:
        told, live = buttons.listen(piece, live, "en")
    assert "Hej på dig." in told
    text, line, heard, closed = buttons.stop(last, live, "en")
    assert (text, closed) == ("Hej på dig.", None)
    assert line.startswith("3.0 s of speech in ")
    assert heard.recording.duration_s == pytest.approx(3.0, abs=0.01)
    whole = soxr.resample(samples, 48_000, 16_000)
    n = min(len(whole), len(heard.recording.samples))
    assert np.abs(whole[:n] - heard.recording.samples[:n]).max() < 1e-3, "no seam between two pieces"
    _, heard = buttons.right(heard, "", True, "en")
    assert (buttons.service.log.parent / rows(buttons)[0]["audio"]).is_file()


def test_a_piece_that_is_sent_again_is_heard_once(buttons, speech):
    one, other = ({**piece, "number": n} for n, piece in enumerate(pieces(speech(16_000), 16_000), 1))
    live = None
    for piece in (one, one, other, other):
        _, live = buttons.listen(piece, live, "en")
    assert buttons.stop(None, live, "en")[2].audio_s == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "piece",
    [
        None,
        [],
        "AAAA",
        {"rate": 48_000},
        {"rate": "48000", "samples": "AAAA"},
        {"rate": True, "samples": "AAAA"},
        {"rate": 10**9, "samples": "AAAA"},
        {"rate": 48_000, "samples": "no base64!"},
        {"rate": 48_000, "samples": "A" * 1_600_004},
        {"rate": 8_000, "samples": "A" * 400_000},
    ],
    ids=str,
)
def test_a_piece_that_is_no_sound_is_refused_in_one_line(buttons, piece):
    assert refusal(buttons.listen, piece, None, "en") == PARTS["unreadable"]


def test_pieces_of_another_rate_are_refused(buttons, speech):
    _, live = buttons.listen(next(pieces(speech(16_000))), None, "en")
    assert refusal(buttons.listen, next(pieces(speech(16_000), 44_100)), live, "en") == PARTS["unreadable"]


def test_a_microphone_that_sends_nothing_or_silence_is_said_plainly(buttons, warnings):
    assert refusal(buttons.stop, None, None, "en") == PARTS["no_recording"]
    live = None
    for piece in pieces(np.zeros(48_000, np.float32)):
        _, live = buttons.listen(piece, live, "en")
    assert refusal(buttons.stop, None, live, "en") == PARTS["silent"]
    assert not buttons.open(False, "sv")[1].visible
    assert warnings == [WORDS["sv"]["no_microphone"]]


def test_an_open_microphone_is_heard_for_ten_minutes_and_held_for_one(buttons, monkeypatch, speech):
    from pipelines.page import live as page_live

    monkeypatch.setattr(page_live, "HELD_S", 1.0)
    monkeypatch.setattr(page_live, "MAX_DURATION_S", 2.0)
    live = None
    for piece in pieces(speech(int(1.9 * 16_000)), 16_000):
        _, live = buttons.listen(piece, live, "en")
    assert buttons.stop(None, live, "en")[2].recording is None
    *first, last = pieces(speech(int(2.2 * 16_000)), 16_000)
    live = None
    for piece in first:
        _, live = buttons.listen(piece, live, "en")
    assert refusal(buttons.listen, last, live, "en") == PARTS["too_long"]
    heard = buttons.stop(last, live, "en")[2]
    assert heard.audio_s == pytest.approx(2.0, abs=0.1), "what came before is not lost with a piece that is refused"


# ---- before and after tuning


def test_what_it_heard_before_it_was_tuned(tmp_path, spoken):
    loads = []

    def load():
        loads.append(1)
        return FakeTranscriber(tmp_path / "whisper-x", text="Hey pa dig.")

    tuned = FakeTranscriber(tmp_path / "runs" / "train-1" / "model")
    buttons = page_buttons.Buttons(Service(tuned, tmp_path / "log.csv", load))
    heard = buttons.transcribe(spoken, None, "en")[2]
    assert loads == [], "the other model is loaded only where somebody asks"
    assert buttons.details(heard, "en")[-1].interactive
    told = buttons.compare(heard, "en")
    assert "<mark>Hey</mark> <mark>pa</mark> dig." in told
    assert "<mark>Hej</mark> <mark>på</mark> dig." in told
    assert str(tmp_path) not in told
    buttons.compare(heard, "en")
    assert loads == [1]


def test_without_a_recording_or_another_model_there_is_nothing_to_compare(buttons, spoken, warnings):
    heard = buttons.transcribe(spoken, None, "en")[2]
    assert not buttons.details(heard, "en")[-1].interactive
    assert buttons.compare(None, "en") == ""
    assert buttons.compare(replace(heard, recording=None), "sv") == ""
    assert warnings == [ENGLISH["nothing_to_compare"], WORDS["sv"]["nothing_to_compare"]]


def test_a_model_before_tuning_that_is_not_to_be_had_is_one_line(tmp_path, spoken):
    def load():
        raise LabError("/secret/path is not there")

    buttons = page_buttons.Buttons(Service(FakeTranscriber(tmp_path), tmp_path / "log.csv", load))
    heard = buttons.transcribe(spoken, None, "en")[2]
    assert refusal(buttons.compare, heard, "en") == ENGLISH["failed"]
    assert not buttons.details(heard, "en")[-1].interactive, "what failed once is not tried again"


def test_while_the_model_before_tuning_is_loaded_recordings_go_on(tmp_path, spoken):
    loading, go = threading.Event(), threading.Event()

    def load():
        loading.set()
        assert go.wait(10)
        return FakeTranscriber(tmp_path / "x")

    buttons = page_buttons.Buttons(Service(FakeTranscriber(tmp_path), tmp_path / "log.csv", load))
    heard = buttons.transcribe(spoken, None, "en")[2]
    asked = threading.Thread(target=lambda: told.append(buttons.compare(heard, "en")))
    told = []
    asked.start()
    assert loading.wait(10)
    assert buttons.transcribe(spoken, None, "en")[0] == "Hej på dig."
    assert refusal(buttons.compare, heard, "en") == PARTS["busy"]
    go.set()
    asked.join(10)
    assert "<dl>" in told[0]


# ---- feedback


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", lambda message, **more: said.append(message))
    return said


def rows(buttons):
    return feedback.read(buttons.service.log)


def test_feedback_without_a_transcript_is_a_friendly_warning(buttons, warnings):
    assert buttons.right(None, "", True, "en") == ("", None)
    assert buttons.wrong(None, "x", "", False, "en") == ("", None)
    assert warnings == [ENGLISH["nothing_to_judge"]] * 2
    assert rows(buttons) == []


def test_wrong_with_a_correction(buttons, spoken):
    heard = buttons.transcribe(spoken, None, "en")[2]
    thanks, _ = buttons.wrong(heard, "Hej på er.", "Åsa", False, "en")
    [row] = rows(buttons)
    assert "Tack" in thanks
    assert row["model"] == "train-1 @ abc123"
    assert [row[name] for name in ("audio", "output", "flag", "username", "reference", "wer")] == [
        "",
        "Hej på dig.",
        "wrong",
        "Åsa",
        "Hej på er.",
        "0.3333",
    ]


def test_an_unchanged_transcript_is_no_correction(buttons, spoken):
    heard = buttons.transcribe(spoken, None, "en")[2]
    buttons.wrong(heard, " Hej på dig. ", "", False, "en")
    assert [rows(buttons)[0][name] for name in ("flag", "reference", "wer")] == ["wrong", "", ""]


def test_the_recording_is_kept_only_with_consent(buttons, spoken):
    heard = buttons.transcribe(spoken, None, "en")[2]
    _, heard = buttons.right(heard, "", False, "en")
    assert rows(buttons)[0]["audio"] == ""
    assert not (buttons.service.log.parent / "audio").exists()
    thanks, _ = buttons.right(heard, "", True, "en")
    assert (buttons.service.log.parent / rows(buttons)[1]["audio"]).is_file()
    assert "kept" in thanks


def test_a_double_click_is_one_row_and_a_changed_mind_two(buttons, spoken):
    heard = buttons.transcribe(spoken, None, "en")[2]
    _, heard = buttons.right(heard, "", False, "en")
    _, heard = buttons.right(heard, "", False, "en")
    _, heard = buttons.wrong(heard, "Hej", "", False, "en")
    assert [row["flag"] for row in rows(buttons)] == ["right", "wrong"]


def test_a_long_recording_is_transcribed_but_not_held(buttons, tmp_path, encoded, speech):
    path = tmp_path / "long.wav"
    path.write_bytes(encoded(speech(61 * 16_000)))
    heard = buttons.transcribe(str(path), None, "en")[2]
    assert heard.recording is None
    assert "not kept" in buttons.right(heard, "", True, "en")[0]
    assert rows(buttons)[0]["audio"] == ""


def test_a_text_that_is_too_long_is_a_warning(buttons, spoken, warnings):
    heard = buttons.transcribe(spoken, None, "en")[2]
    assert buttons.wrong(heard, "a" * 2_001, "", False, "en") == ("", heard)
    assert warnings == [ENGLISH["text_too_long"]]
    assert rows(buttons) == []


def test_a_log_that_cannot_be_written_is_one_line(buttons, spoken):
    heard = buttons.transcribe(spoken, None, "en")[2]
    buttons.service.log.write_text("other,columns\n")
    assert refusal(buttons.right, heard, "", False, "en") == ENGLISH["not_noted"]


# ---- the page


def test_the_card_tells_the_test_score_and_no_path(tmp_path):
    score = {"wer": 0.2541, "ci95": [0.2212, 0.29], "n": 160, "speakers": 12}
    ref = FakeTranscriber(
        tmp_path / "train-9" / "model", base=f"{tmp_path}/whisper-x @ 12ab", test=score, quantisation="q8"
    ).ref
    page = shown.card(served.card(ref), "newest", ENGLISH)
    assert "WER 0.254 (95 % 0.221–0.290, n = 160, 12 speakers)" in page
    assert "(q8)" in page
    assert "train-9" in page
    assert "whisper-x @ 12ab" in page
    assert str(tmp_path) not in page
    assert ENGLISH["why"]["newest"] in page


def test_the_card_says_not_scored_and_is_escaped(tmp_path):
    ref = ModelRef("<script>alert(1)", tmp_path, "hub", "1")
    assert ENGLISH["not_scored"] in shown.card(served.card(ref), "base", ENGLISH)
    assert "<script" not in shown.card(served.card(ref), "base", ENGLISH)


def test_the_page_has_one_public_endpoint_limits_and_no_analytics(tmp_path):
    demo = app.build(FakeTranscriber(tmp_path), tmp_path / "log.csv")
    public = {fn.api_name for fn in demo.fns.values() if fn.api_visibility == "public"}
    assert public == {"transcribe"}
    assert demo.analytics_enabled is False
    assert demo.delete_cache == (60, 1_800)
    assert (demo._queue.max_size, demo._queue.default_concurrency_limit) == (20, 1)
    assert str(tmp_path) not in json.dumps(demo.get_config_file(), default=str)


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LabError, match="--port"):
            app.launch(app.build(FakeTranscriber(tmp_path), tmp_path / "log.csv"), port=taken.getsockname()[1])


def test_the_theme_fetches_no_fonts():
    theme = look.theme()
    assert theme._stylesheets == []
    assert "@font-face" not in theme._get_theme_css()
