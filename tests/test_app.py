"""The app without a browser: what an import costs, which model it takes, and what its buttons answer."""

import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import app
from pipelines import feedback, manifest, served
from pipelines.errors import LabError
from pipelines.models import ModelRef
from pipelines.served import Service
from pipelines.transcriber import Segment, Transcript, Word

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parent.parent
PARTS = app.TEXTS["refused"]


class FakeTranscriber:
    """Hears the same words in everything; counts how often it was asked."""

    def __init__(self, folder, text="Hej på dig.", **facts):
        self.ref = ModelRef(str(folder), Path(folder), "folder", "abc123", facts.pop("quantisation", None), facts=facts)
        self.text, self.calls = text, 0

    def transcribe(self, recording):
        self.calls += 1
        if isinstance(self.text, Exception):
            raise self.text
        return Transcript(self.text, recording.duration_s, 0.1)


@pytest.fixture
def buttons(tmp_path):
    return app.Buttons(Service(FakeTranscriber(tmp_path / "runs" / "train-1" / "model"), tmp_path / "log.csv"))


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
    words = (Word("Hej", 0.93), Word("<b>&dig</b>", 0.21))
    shown = app._details((Segment(61.5, 63.0, "Hej <b>&dig</b>", words),))
    assert '<mark title="21% sure">&lt;b&gt;&amp;dig&lt;/b&gt;</mark>' in shown
    assert "<mark" not in shown.split("Hej")[0]
    assert "<b>" not in shown
    assert "<time>1:01.5</time>" in shown
    assert shown.startswith("<details open>")
    assert app.TEXTS["unsure"] in shown


def test_a_transcript_without_unsure_words_is_folded_and_none_shows_nothing():
    shown = app._details((Segment(0, 1, "Hej", (Word("Hej", 0.93),)),))
    assert shown.startswith("<details><summary>")
    assert app.TEXTS["sure"] in shown
    assert app._details(()) == ""


def test_the_files_to_download_are_the_transcript(buttons, spoken):
    segments = (Segment(0.0, 2.1, "Hej på dig.", (Word("Hej", 0.9),)),)
    heard = replace(buttons.transcribe(spoken, None)[2], segments=segments)
    _, files, *saves = buttons.details(heard)
    assert files["txt"] == "Hej på dig.\n"
    assert files["srt"].startswith("1\n00:00:00,000 --> 00:00:02,100\nHej på dig.")
    assert files["vtt"].startswith("WEBVTT")
    assert [save.interactive for save in saves] == [True] * 3
    shown, files, *saves = buttons.details(None)
    assert (shown, files) == ("", None)
    assert [save.interactive for save in saves] == [False] * 3


# ---- transcribing


def test_a_transcript_comes_with_its_durations(buttons, spoken):
    text, line, heard = buttons.transcribe(spoken, None)
    assert text == "Hej på dig."
    assert line.startswith("2.1 s of speech in 0.")
    assert heard.source == spoken
    assert heard.recording.duration_s == pytest.approx(2.1)


def test_the_same_upload_is_transcribed_once(buttons, spoken):
    first = buttons.transcribe(spoken, None)
    Path(spoken).unlink()
    assert buttons.transcribe(spoken, first[2]) == first
    assert buttons.service.transcriber.calls == 1


def test_nothing_heard_is_said_plainly(buttons, spoken):
    buttons.service.transcriber.text = ""
    assert buttons.transcribe(spoken, None)[1].startswith("no words heard in 2.1 s")


def test_uploads_are_deleted_even_when_refused_and_other_files_never(buttons, spoken, tmp_path, monkeypatch):
    uploads = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    for content in (Path(spoken).read_bytes(), b"not audio"):
        upload = uploads / "0a1b" / "clip.wav"
        upload.parent.mkdir(parents=True)
        upload.write_bytes(content)
        try:
            buttons.transcribe(str(upload), None)
        except gr.Error:
            pass
        assert not upload.parent.exists()
    buttons.transcribe(spoken, None)
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
    assert refusal(buttons.transcribe, str(path), None) == PARTS[reason]
    assert buttons.service.transcriber.calls == 0


def test_no_recording_and_a_vanished_one_are_told_apart(buttons, tmp_path):
    assert refusal(buttons.transcribe, None, None) == PARTS["no_recording"]
    assert refusal(buttons.transcribe, str(tmp_path / "gone.wav"), None) == PARTS["missing"]


def test_an_unexpected_failure_shows_nothing_of_the_server(buttons, spoken, caplog):
    buttons.service.transcriber.text = RuntimeError("/secret/path exploded")
    with caplog.at_level(logging.ERROR):
        assert refusal(buttons.transcribe, spoken, None) == app.TEXTS["failed"]
    assert "/secret/path exploded" in caplog.text


# ---- feedback


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", lambda message, **more: said.append(message))
    return said


def rows(buttons):
    return feedback.read(buttons.service.log)


def test_feedback_without_a_transcript_is_a_friendly_warning(buttons, warnings):
    assert buttons.right(None, "", True) == ("", None)
    assert buttons.wrong(None, "x", "", False) == ("", None)
    assert warnings == [app.TEXTS["nothing_to_judge"]] * 2
    assert rows(buttons) == []


def test_wrong_with_a_correction(buttons, spoken):
    heard = buttons.transcribe(spoken, None)[2]
    thanks, _ = buttons.wrong(heard, "Hej på er.", "Åsa", False)
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
    heard = buttons.transcribe(spoken, None)[2]
    buttons.wrong(heard, " Hej på dig. ", "", False)
    assert [rows(buttons)[0][name] for name in ("flag", "reference", "wer")] == ["wrong", "", ""]


def test_the_recording_is_kept_only_with_consent(buttons, spoken):
    heard = buttons.transcribe(spoken, None)[2]
    _, heard = buttons.right(heard, "", False)
    assert rows(buttons)[0]["audio"] == ""
    assert not (buttons.service.log.parent / "audio").exists()
    thanks, _ = buttons.right(heard, "", True)
    assert (buttons.service.log.parent / rows(buttons)[1]["audio"]).is_file()
    assert "kept" in thanks


def test_a_double_click_is_one_row_and_a_changed_mind_two(buttons, spoken):
    heard = buttons.transcribe(spoken, None)[2]
    _, heard = buttons.right(heard, "", False)
    _, heard = buttons.right(heard, "", False)
    _, heard = buttons.wrong(heard, "Hej", "", False)
    assert [row["flag"] for row in rows(buttons)] == ["right", "wrong"]


def test_a_long_recording_is_transcribed_but_not_held(buttons, tmp_path, encoded, speech):
    path = tmp_path / "long.wav"
    path.write_bytes(encoded(speech(61 * 16_000)))
    heard = buttons.transcribe(str(path), None)[2]
    assert heard.recording is None
    assert "not kept" in buttons.right(heard, "", True)[0]
    assert rows(buttons)[0]["audio"] == ""


def test_a_text_that_is_too_long_is_a_warning(buttons, spoken, warnings):
    heard = buttons.transcribe(spoken, None)[2]
    assert buttons.wrong(heard, "a" * 2_001, "", False) == ("", heard)
    assert warnings == [app.TEXTS["text_too_long"]]
    assert rows(buttons) == []


def test_a_log_that_cannot_be_written_is_one_line(buttons, spoken):
    heard = buttons.transcribe(spoken, None)[2]
    buttons.service.log.write_text("other,columns\n")
    assert refusal(buttons.right, heard, "", False) == app.TEXTS["not_noted"]


# ---- the page


def test_the_card_tells_the_test_score_and_no_path(tmp_path):
    score = {"wer": 0.2541, "ci95": [0.2212, 0.29], "n": 160, "speakers": 12}
    ref = FakeTranscriber(
        tmp_path / "train-9" / "model", base=f"{tmp_path}/whisper-x @ 12ab", test=score, quantisation="q8"
    ).ref
    page = app._card(served.card(ref), "newest")
    assert "WER 0.254 (95 % 0.221–0.290, n = 160, 12 speakers)" in page
    assert "(q8)" in page
    assert "train-9" in page
    assert "whisper-x @ 12ab" in page
    assert str(tmp_path) not in page
    assert app.TEXTS["why"]["newest"] in page


def test_the_card_says_not_scored_and_is_escaped(tmp_path):
    ref = ModelRef("<script>alert(1)", tmp_path, "hub", "1")
    assert app.TEXTS["not_scored"] in app._card(served.card(ref), "base")
    assert "<script" not in app._card(served.card(ref), "base")


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
    theme = app._theme()
    assert theme._stylesheets == []
    assert "@font-face" not in theme._get_theme_css()
