"""Handlers of the page: transcribe, download, compare, give feedback."""

import logging
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.inference.app.handlers import Handlers
from pipelines.inference.app.i18n import ENGLISH, SWEDISH, TEXTS
from pipelines.inference.app.service import Choices, Service
from pipelines.inference.transcript import Segment, Transcript, Word
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from tests.inference.app.app_fakes import (
    FakeTranscriber,
    expect_refusal,
    feedback_rows,
)

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parents[3]
REFUSALS = ENGLISH["refused"]


def test_downloads_contain_the_transcript(handlers, spoken):
    segments = (Segment(0.0, 2.1, "Hej på dig.", (Word("Hej", 0.9),)),)
    transcript = replace(handlers.transcribe(spoken, None, "en")[2], segments=segments)
    _, files, *saves, _ = handlers.show_details(transcript, "en")
    assert files["txt"] == "Hej på dig.\n"
    assert files["srt"].startswith("1\n00:00:00,000 --> 00:00:02,100\nHej på dig.")
    assert files["vtt"].startswith("WEBVTT")
    assert [save.interactive for save in saves] == [True] * 3
    segments, files, *saves, _ = handlers.show_details(None, "en")
    assert (segments, files) == ("", None)
    assert [save.interactive for save in saves] == [False] * 3


def test_transcript_comes_with_durations(handlers, spoken):
    text, line, transcript = handlers.transcribe(spoken, None, "en")
    assert text == "Hej på dig."
    assert line.startswith("2.1 s of speech in 0.")
    assert transcript.source == spoken
    assert transcript.recording.duration_s == pytest.approx(2.1)


class ChannelReader(FakeTranscriber):
    """Returns one segment for a channel with sound."""

    def transcribe(self, recording, max_duration_s=600.0, on_audio=None, track=0):
        samples = np.concatenate(list(audio.blocks(recording, max_duration_s, track=track)))
        on_audio(len(samples) / audio.SAMPLE_RATE_HZ)
        start_s = float(np.flatnonzero(samples)[0]) / audio.SAMPLE_RATE_HZ
        return Transcript(self.text, 2.0, 0.1, (Segment(start_s, start_s + 1, self.text, (Word("Hej", 0.9),)),))


@pytest.mark.parametrize(("language", "names"), [("en", ("Left", "Right")), ("sv", ("Vänster", "Höger"))])
def test_channels_are_named_in_the_page_s_language(tmp_path, encoded, speech, language, names):
    service = Service(ChannelReader(tmp_path), tmp_path / "log.csv", lambda: FakeTranscriber(tmp_path / "x"))
    handlers, path, shares = Handlers(service), tmp_path / "two.wav", []
    sound, silence = speech(16_000), np.zeros(16_000, np.float32)
    path.write_bytes(encoded(np.stack([np.append(sound, silence), np.append(silence, sound)], axis=1)))
    text, _, transcript = handlers.transcribe(
        str(path), None, language, shares.append, "", Choices(split_channels=True)
    )
    assert text == "\n".join(f"{name}: Hej på dig." for name in names)
    assert shares == sorted(shares) and shares[-1] == 1.0
    details, files, *_ = handlers.show_details(transcript, language)
    assert all(f"<b>{name}:</b>" in details and f"{name}: Hej" in files["srt"] for name in names)
    assert names[0] not in handlers.compare(transcript, language)
    handlers.mark_wrong(transcript, f"{names[0]}: Hej på er.\n{names[1]}: Hej!", "", False, language)
    (row,) = feedback_rows(handlers)
    assert (row["output"], row["reference"]) == ("Hej på dig. Hej på dig.", "Hej på er. Hej!")


def test_same_upload_is_transcribed_once(handlers, spoken):
    first = handlers.transcribe(spoken, None, "en")
    Path(spoken).unlink()
    assert handlers.transcribe(spoken, first[2], "en") == first
    assert handlers.service.transcriber.calls == 1


def test_upload_is_transcribed_again_with_other_options(handlers, spoken):
    first = handlers.transcribe(spoken, None, "en")[2]
    Path(spoken).unlink()  # as an upload is
    assert handlers.service.transcriber.changes == []
    choices = Choices(prompt=" Elsa bor i Åmål. ", hotwords="Åmål, Elsa\nBo", beam_size=5)
    second = handlers.transcribe(spoken, first, "en", choices=choices)[2]
    assert (second.source, second.recording, second.choices) == (spoken, first.recording, choices)
    assert handlers.transcribe(spoken, second, "en", choices=choices)[2] is second
    assert handlers.service.transcriber.changes == [
        {"prompt": "Elsa bor i Åmål.", "hotwords": ("Åmål", "Elsa", "Bo"), "beam_size": 5}
    ]
    split = choices._replace(split_channels=True)  # the channels were in the file
    assert expect_refusal(lambda: handlers.transcribe(spoken, second, "en", choices=split)) == REFUSALS["missing"]


@pytest.mark.parametrize(
    "choices",
    [
        Choices(prompt="a" * 2_001),
        Choices(hotwords="a," * 1_001),
        Choices(beam_size=11),
        Choices(prompt=None),
        Choices(hotwords="Åmål"),  # the engine has none
    ],
)
def test_unusable_options_keep_the_upload(handlers, spoken, monkeypatch, choices):
    def refuse(**changes):
        raise LabError("no hotwords")

    monkeypatch.setattr(handlers.service.transcriber, "with_options", refuse)
    assert expect_refusal(lambda: handlers.transcribe(spoken, None, "en", choices=choices)) == REFUSALS["options"]
    assert Path(spoken).exists() and handlers.service.transcriber.calls == 0


def test_empty_transcript_has_its_own_text(handlers, spoken):
    handlers.service.transcriber.text = ""
    assert handlers.transcribe(spoken, None, "en")[1].startswith("No words were recognised in 2.1 s")


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
def test_unusable_recording_is_refused_in_one_line(handlers, tmp_path, encoded, reason, make):
    path = tmp_path / "hostile.wav"
    path.write_bytes(make(encoded))
    assert expect_refusal(handlers.transcribe, str(path), None, "en") == REFUSALS[reason]
    assert handlers.service.transcriber.calls == 0


@pytest.mark.parametrize("language", ["en", "sv"])
def test_damaged_recording_is_transcribed_with_a_message(handlers, tmp_path, encoded, speech, language):
    sound = encoded(speech(32_000))
    (tmp_path / "cut.wav").write_bytes(sound[: len(sound) // 2])
    text, line, transcript = handlers.transcribe(str(tmp_path / "cut.wav"), None, language)
    assert text == "Hej på dig."
    assert transcript.gaps[0].end_s is None
    assert {"en": "could not be read after 1.0 s", "sv": "kunde inte läsas efter 1.0 s"}[language] in line
    (tmp_path / "cut.mp3").write_bytes(encoded(speech(32_000), format="MP3")[:100])
    refusal = expect_refusal(handlers.transcribe, str(tmp_path / "cut.mp3"), None, language)
    assert refusal == TEXTS[language]["refused"]["damaged"]


def test_no_and_missing_recording_have_different_texts(handlers, tmp_path):
    assert expect_refusal(handlers.transcribe, None, None, "en") == REFUSALS["no_recording"]
    assert expect_refusal(handlers.transcribe, str(tmp_path / "gone.wav"), None, "en") == REFUSALS["missing"]


def test_unexpected_error_is_logged_but_not_shown(handlers, spoken, caplog):
    handlers.service.transcriber.text = RuntimeError("/secret/path exploded")
    with caplog.at_level(logging.ERROR):
        assert expect_refusal(handlers.transcribe, spoken, None, "en") == ENGLISH["failed"]
    assert "/secret/path exploded" in caplog.text


def test_progress_is_a_share(handlers, spoken):
    shares = []
    handlers.transcribe(spoken, None, "en", shares.append)
    assert shares == [pytest.approx(1.0)]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
def test_formats_of_ffmpeg_are_transcribed(handlers, spoken, tmp_path):
    for name in ("spoken.m4a", "spoken.mp4"):
        path = tmp_path / name
        picture = ["-f", "lavfi", "-i", "color=size=16x16:rate=5", "-shortest"] if name.endswith("mp4") else []
        subprocess.run(["ffmpeg", "-v", "error", "-i", spoken, *picture, path], check=True)
        text, line, _ = handlers.transcribe(str(path), None, "en")
        assert text == "Hej på dig."
        assert line.startswith("2.")


def test_comparison_loads_the_base_model_once(tmp_path, spoken):
    loads = []

    def load():
        loads.append(1)
        return FakeTranscriber(tmp_path / "whisper-x", text="Hey pa dig.")

    tuned = FakeTranscriber(tmp_path / "runs" / "train-1" / "model")
    handlers = Handlers(Service(tuned, tmp_path / "log.csv", load))
    transcript = handlers.transcribe(spoken, None, "en")[2]
    assert loads == [], "the base model is loaded at the first comparison"
    assert handlers.show_details(transcript, "en")[-1].interactive
    comparison = handlers.compare(transcript, "en")
    assert "<mark>Hey</mark> <mark>pa</mark> dig." in comparison
    assert "<mark>Hej</mark> <mark>på</mark> dig." in comparison
    assert str(tmp_path) not in comparison
    handlers.compare(transcript, "en")
    assert loads == [1]


def test_comparison_needs_a_recording_and_a_base_model(handlers, spoken, warnings):
    transcript = handlers.transcribe(spoken, None, "en")[2]
    assert not handlers.show_details(transcript, "en")[-1].interactive
    assert handlers.compare(None, "en") == ""
    assert handlers.compare(replace(transcript, recording=None), "sv") == ""
    assert warnings == [ENGLISH["nothing_to_compare"], SWEDISH["nothing_to_compare"]]


def test_base_model_that_fails_to_load_is_one_line(tmp_path, spoken):
    def load():
        raise LabError("/secret/path is not there")

    handlers = Handlers(Service(FakeTranscriber(tmp_path), tmp_path / "log.csv", load))
    transcript = handlers.transcribe(spoken, None, "en")[2]
    assert expect_refusal(handlers.compare, transcript, "en") == ENGLISH["failed"]
    assert not handlers.show_details(transcript, "en")[-1].interactive, "a failed load is not repeated"


def test_loading_the_base_model_does_not_block_recordings(tmp_path, spoken):
    loading, go = threading.Event(), threading.Event()

    def load():
        loading.set()
        assert go.wait(10)
        return FakeTranscriber(tmp_path / "x")

    handlers = Handlers(Service(FakeTranscriber(tmp_path), tmp_path / "log.csv", load))
    transcript = handlers.transcribe(spoken, None, "en")[2]
    comparing = threading.Thread(target=lambda: comparisons.append(handlers.compare(transcript, "en")))
    comparisons = []
    comparing.start()
    assert loading.wait(10)
    assert handlers.transcribe(spoken, None, "en")[0] == "Hej på dig."
    assert expect_refusal(handlers.compare, transcript, "en") == REFUSALS["busy"]
    go.set()
    comparing.join(10)
    assert "<dl>" in comparisons[0]


def test_feedback_without_a_transcript_is_a_warning(handlers, warnings):
    assert handlers.mark_right(None, "", True, "en") == ("", None)
    assert handlers.mark_wrong(None, "x", "", False, "en") == ("", None)
    assert warnings == [ENGLISH["nothing_to_judge"]] * 2
    assert feedback_rows(handlers) == []


def test_wrong_with_a_correction_is_saved_with_wer(handlers, spoken):
    transcript = handlers.transcribe(spoken, None, "en")[2]
    thanks, _ = handlers.mark_wrong(transcript, "Hej på er.", "Åsa", False, "en")
    [row] = feedback_rows(handlers)
    assert "Thank you" in thanks
    assert row["model"] == "train-1 @ abc123"
    assert [row[name] for name in ("audio", "output", "flag", "username", "reference", "wer")] == [
        "",
        "Hej på dig.",
        "wrong",
        "Åsa",
        "Hej på er.",
        "0.3333",
    ]


def test_unchanged_transcript_is_not_a_correction(handlers, spoken):
    transcript = handlers.transcribe(spoken, None, "en")[2]
    handlers.mark_wrong(transcript, " Hej på dig. ", "", False, "en")
    assert [feedback_rows(handlers)[0][name] for name in ("flag", "reference", "wer")] == ["wrong", "", ""]


def test_recording_is_saved_only_with_consent(handlers, spoken):
    transcript = handlers.transcribe(spoken, None, "en")[2]
    _, transcript = handlers.mark_right(transcript, "", False, "en")
    assert feedback_rows(handlers)[0]["audio"] == ""
    assert not (handlers.service.log.parent / "audio").exists()
    thanks, _ = handlers.mark_right(transcript, "", True, "en")
    assert (handlers.service.log.parent / feedback_rows(handlers)[1]["audio"]).is_file()
    assert "with your recording" in thanks


def test_repeated_feedback_is_one_row_changed_feedback_two(handlers, spoken):
    transcript = handlers.transcribe(spoken, None, "en")[2]
    _, transcript = handlers.mark_right(transcript, "", False, "en")
    _, transcript = handlers.mark_right(transcript, "", False, "en")
    _, transcript = handlers.mark_wrong(transcript, "Hej", "", False, "en")
    assert [row["flag"] for row in feedback_rows(handlers)] == ["right", "wrong"]


def test_long_recording_is_transcribed_but_not_saved(handlers, tmp_path, encoded, speech):
    path = tmp_path / "long.wav"
    path.write_bytes(encoded(speech(61 * 16_000)))
    transcript = handlers.transcribe(str(path), None, "en")[2]
    assert transcript.recording is None
    assert "not saved" in handlers.mark_right(transcript, "", True, "en")[0]
    assert feedback_rows(handlers)[0]["audio"] == ""


def test_too_long_correction_is_a_warning(handlers, spoken, warnings):
    transcript = handlers.transcribe(spoken, None, "en")[2]
    assert handlers.mark_wrong(transcript, "a" * 2_001, "", False, "en") == ("", transcript)
    assert warnings == [ENGLISH["text_too_long"]]
    assert feedback_rows(handlers) == []


def test_unwritable_log_is_one_line(handlers, spoken):
    transcript = handlers.transcribe(spoken, None, "en")[2]
    handlers.service.log.write_text("other,columns\n")
    assert expect_refusal(handlers.mark_right, transcript, "", False, "en") == ENGLISH["not_noted"]


def test_visitor_above_the_limit_keeps_the_recording(handlers, spoken, tmp_path):
    handlers.limiter.requests_per_minute = 1
    other = tmp_path / "other.wav"
    other.write_bytes(Path(spoken).read_bytes())
    *_, transcript = handlers.transcribe(spoken, None, "en", client="a")
    assert handlers.transcribe(spoken, transcript, "en", client="a")[2] is transcript, "it is not transcribed again"
    line = expect_refusal(handlers.transcribe, str(other), None, "sv", None, "a")
    assert line.startswith("Din adress har skickat mycket") and other.exists()
    assert handlers.transcribe(str(other), None, "sv", client="b")


def test_audio_of_a_recording_is_charged(handlers, spoken):
    handlers.limiter.audio_s_per_minute = 1.0
    handlers.transcribe(spoken, None, "en", client="a")
    assert "Your address" in expect_refusal(handlers.transcribe, spoken, None, "en", None, "a")
