"""The app without a browser: what an import costs, which model it takes, and what its buttons answer."""

import base64
import json
import logging
import os
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from servers.loopback import free_port

import app
from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference import segmentation
from pipelines.inference.app import assets, html, i18n, live, middleware
from pipelines.inference.app import handlers as page_buttons
from pipelines.inference.app import service as app_service
from pipelines.inference.app.service import Service
from pipelines.inference.segmentation import Window
from pipelines.inference.streaming import Partial
from pipelines.inference.transcriber import Segment, Transcript, Word
from pipelines.infra import feedback_log, manifest
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError
from pipelines.whisper.model import ModelRef

gr = pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parents[3]
WORDS = i18n.WORDS
ENGLISH, SWEDISH = WORDS["en"], WORDS["sv"]
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
        "import time; start = time.process_time(); import app, sys, json; seconds = time.process_time() - start\n"
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
    assert inference_pipeline.choose_model("hub://a/b", tmp_path) == ("hub://a/b", "named")


def test_the_newest_finished_run_is_chosen_next(tmp_path):
    sealed_model(tmp_path, "z", 100)
    newest = sealed_model(tmp_path, "a", 200)
    sealed_model(tmp_path, "c", 300, kind="report")
    (sealed_model(tmp_path, "damaged", 400) / "config.json").unlink()
    (sealed_model(tmp_path, "unfinished", 500) / manifest.MANIFEST).unlink()
    assert inference_pipeline.choose_model("", tmp_path) == (str(newest), "newest")


@pytest.mark.parametrize("runs", ["", "absent"])
def test_the_base_model_is_chosen_last(tmp_path, runs):
    assert inference_pipeline.choose_model(None, tmp_path / runs) == ("openai/whisper-tiny", "base")


def run_app(*arguments, env=None):
    return subprocess.run([sys.executable, "app.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_dry_run_says_which_and_loads_nothing(tmp_path):
    environ = {**os.environ, "LAB_RUNS": str(tmp_path), "MODEL_URI": "hub://me/mine"}
    done = run_app("--dry-run", env=environ)
    first, last = done.stdout.splitlines()
    assert done.returncode == 0
    assert first.startswith("model: hub://me/mine (")
    assert last.startswith("next: ")


def test_the_log_is_named_by_the_environment_where_no_option_does(monkeypatch):
    monkeypatch.setenv("LAB_LOG", "/data/log.csv")
    assert app._options([]).log == Path("/data/log.csv")
    assert app._options(["--log", "other.csv"]).log == Path("other.csv")
    monkeypatch.delenv("LAB_LOG")
    assert app._options([]).log == ROOT / "log.csv"


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = run_app("--model", str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no model in ")


# ---- what is shown of a transcript


def test_unsure_words_are_marked_and_nothing_in_them_is_markup():
    heard = (Word("Hej", 0.93), Word("<b>&dig</b>", 0.21))
    told = html.details((Segment(61.5, 63.0, "Hej <b>&dig</b>", heard),), ENGLISH)
    assert '<mark title="21% sure">&lt;b&gt;&amp;dig&lt;/b&gt;</mark>' in told
    assert "<mark" not in told.split("Hej")[0]
    assert "<b>" not in told
    assert "<time>1:01.5</time>" in told
    assert 'data-start="61.500" data-end="63.000"' in told
    assert told.startswith("<details open>")
    assert ENGLISH["unsure"] in told


def test_a_notebook_shows_the_same_marks():
    from pipelines.inference import figures

    heard = (Word("Hej", 0.93), Word("<b>dig", 0.21))
    told = figures.transcript(Transcript("Hej <b>dig", 3.0, 0.1, (Segment(61.5, 63.0, "Hej <b>dig", heard),))).data
    assert 'Hej <mark title="21% sure">&lt;b&gt;dig</mark>' in told
    assert "1:01.5" in told
    assert "57% sure of the words" in told


def test_a_transcript_without_unsure_words_is_folded_and_none_shows_nothing():
    told = html.details((Segment(0, 1, "Hej", (Word("Hej", 0.93),)),), ENGLISH)
    assert told.startswith("<details><summary>")
    assert ENGLISH["sure"] in told
    assert html.details((), ENGLISH) == ""


@pytest.mark.parametrize(("seconds", "told"), [(0, "0:00.0"), (59.96, "1:00.0"), (61.5, "1:01.5"), (605.04, "10:05.0")])
def test_a_clock_carries_over(seconds, told):
    assert html.clock(seconds) == told


def test_side_by_side_marks_what_only_one_of_the_two_heard():
    told = html.side_by_side(("base", "Båten gor klockan <sju>."), ("tuned", "båten går klockan"), ENGLISH)
    assert told.count("<mark>") == 3
    for word in ("gor", "&lt;sju&gt;.", "går"):
        assert f"<mark>{word}</mark>" in told
    assert ENGLISH["differs"] in told
    same = html.side_by_side(("base", "Hej!"), ("tuned", "hej"), ENGLISH)
    assert "<mark>" not in same
    assert ENGLISH["same"] in same
    assert ENGLISH["no_words"] in html.side_by_side(("base", ""), ("tuned", "hej"), ENGLISH)


def test_words_that_may_yet_change_are_set_apart():
    told = html.live(Partial((Segment(0, 1, "<Hej>"),), "på", "dig &", 2.0, 0.31), ENGLISH)
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
    assert i18n.preferred(header) == tag


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


def test_whoever_waits_too_long_for_the_model_is_told_that_it_is_busy_and_may_ask_again(
    buttons, spoken, monkeypatch, tmp_path
):
    monkeypatch.setattr(app_service, "TURN_S", 0.05)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # as if it had been uploaded
    with buttons.service.turn():
        asked = threading.Thread(target=lambda: said.append(refusal(buttons.transcribe, spoken, None, "sv")))
        said = []
        asked.start()
        asked.join(10)
    assert said == [WORDS["sv"]["refused"]["busy"]]
    assert buttons.transcribe(spoken, None, "en")[0] == "Hej på dig."


def test_a_recording_that_takes_too_long_is_given_up_and_the_next_one_heard(buttons, spoken, monkeypatch):
    monkeypatch.setattr(app_service, "TIMEOUT_S", -1.0)
    assert refusal(buttons.transcribe, spoken, None, "en") == PARTS["too_slow"]
    monkeypatch.setattr(app_service, "TIMEOUT_S", 60.0)
    assert buttons.transcribe(spoken, None, "en")[0] == "Hej på dig."


class Batches(FakeTranscriber):
    """Decodes a recording in three batches; between two of them it tells how far it came, as Transcriber does."""

    def transcribe(self, recording, on_audio, on_segment):
        for n in range(3):
            on_audio(float(n))
            self.log.append(f"batch {n}")
            self.reached.set()
            assert self.go_on.wait(10)
        return Transcript(self.text, recording.duration_s, 0.1)


def test_an_open_microphone_is_heard_between_two_batches_of_a_long_recording(tmp_path, spoken, speech):
    fake = Batches(tmp_path)
    fake.log, fake.reached, fake.go_on = [], threading.Event(), threading.Event()
    buttons = page_buttons.Buttons(Service(fake, tmp_path / "log.csv"))
    recording = threading.Thread(target=lambda: buttons.transcribe(spoken, None, "en"))
    talking = threading.Thread(target=lambda: (say(buttons, piece(speech(8_000))), fake.log.append("piece")))
    recording.start()
    assert fake.reached.wait(10)
    talking.start()
    while len(buttons.service._line._waiting) < 2:
        time.sleep(0.01)
    fake.go_on.set()
    talking.join(10)
    recording.join(10)
    assert fake.log == ["batch 0", "piece", "batch 1", "batch 2"]


def test_a_recording_whose_turn_does_not_come_again_is_given_up(tmp_path, spoken, monkeypatch):
    fake = Batches(tmp_path)
    fake.log, fake.reached, fake.go_on, said = [], threading.Event(), threading.Event(), []
    buttons = page_buttons.Buttons(Service(fake, tmp_path / "log.csv"))
    monkeypatch.setattr(app_service, "TIMEOUT_S", 1.0)
    recording = threading.Thread(target=lambda: said.append(refusal(buttons.transcribe, spoken, None, "en")))
    recording.start()
    assert fake.reached.wait(10)
    threading.Timer(0.1, fake.go_on.set).start()
    with buttons.service.turn():
        recording.join(10)
    assert said == [PARTS["too_slow"]]
    assert buttons.service._line._waiting == app_service.deque(), "nobody stands in the line who has gone"


def test_those_who_wait_for_the_model_come_in_turn():
    line, order = app_service.Line(), []

    def wait(name):
        ticket = line.enter(10)
        order.append(name)
        line.leave(ticket)

    first, threads = line.enter(1), []
    for n in range(5):
        threads.append(threading.Thread(target=wait, args=(n,)))
        threads[-1].start()
        while len(line._waiting) < n + 2:
            time.sleep(0.001)
    assert line.enter(0.01) is None
    line.leave(first)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]


BOMB = """
import resource, sys
from types import SimpleNamespace
from pipelines.inference.app.service import Service
service = Service(SimpleNamespace(), None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    service.transcribe(sys.argv[1])
except Exception as error:
    print(error.reason, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_small_file_that_unpacks_to_much_does_not_take_up_the_memory(tmp_path):
    """Half a minute of eight channels at 384 kHz: 380 MB as floats, half a megabyte as silence in FLAC."""
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "bomb.flac"
    with soundfile.SoundFile(path, "w", 384_000, 8, "PCM_16", format="FLAC") as file:
        for _ in range(32):
            file.write(np.zeros((384_000, 8), np.int16))
    assert path.stat().st_size < 1_000_000
    done = subprocess.run([sys.executable, "-c", BOMB, path], cwd=ROOT, capture_output=True, text=True, check=True)
    reason, grown_mb = done.stdout.split()
    assert reason == "silent", "it was read to its end"
    assert int(grown_mb) < 200


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


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
def test_what_ffmpeg_reads_can_be_transcribed_too(buttons, spoken, tmp_path):
    for name in ("spoken.m4a", "spoken.mp4"):
        path = tmp_path / name
        picture = ["-f", "lavfi", "-i", "color=size=16x16:rate=5", "-shortest"] if name.endswith("mp4") else []
        subprocess.run(["ffmpeg", "-v", "error", "-i", spoken, *picture, path], check=True)
        text, line, _ = buttons.transcribe(str(path), None, "en")
        assert text == "Hej på dig."
        assert line.startswith("2.")


# ---- a microphone that is heard while it is open


@pytest.fixture
def all_is_speech(monkeypatch):
    monkeypatch.setattr(segmentation, "is_packaged", lambda: False)


TALK = "a-name-nobody-can-guess"


def piece(samples, start=0, rate_hz=16_000, last=False, talk=TALK):
    """Sound as the page sends it."""
    values = np.round(np.asarray(samples) * 32_768).clip(-32_768, 32_767).astype("<i2")
    encoded = base64.b64encode(values.tobytes()).decode()
    return {"talk": talk, "start": start, "rate": rate_hz, "samples": encoded, "last": last}


def pieces(samples, rate_hz=16_000, every_s=0.5, talk=TALK):
    """A whole recording as the page sends it."""
    step = int(every_s * rate_hz)
    for at in range(0, len(samples), step):
        yield piece(samples[at : at + step], at, rate_hz, at + step >= len(samples), talk)


def say(buttons, told):
    return buttons.talks.take(live.piece_of(told))


def reason(buttons, told):
    with pytest.raises(AudioError) as caught:
        say(buttons, told)
    return caught.value.reason


def test_an_open_microphone_is_heard_piece_by_piece_and_becomes_one_recording(buttons, speech, all_is_speech):
    import soxr

    samples = soxr.resample(speech(3 * 16_000), 16_000, 48_000)
    *most, last = pieces(samples, 48_000)
    for one in most:
        partial, taken, ended = say(buttons, one)
        assert not ended
    assert partial.text == "Hej på dig."
    assert taken == 2.5 * 48_000
    assert say(buttons, last)[1:] == (len(samples), True)
    text, line, heard = buttons.collect(TALK, "en")
    assert text == "Hej på dig."
    assert line.startswith("3.0 s of speech in ")
    assert heard.recording.duration_s == pytest.approx(3.0, abs=0.01)
    whole = soxr.resample(samples, 48_000, 16_000)
    n = min(len(whole), len(heard.recording.samples))
    assert np.abs(whole[:n] - heard.recording.samples[:n]).max() < 1e-3, "no seam between two pieces"
    _, heard = buttons.right(heard, "", True, "en")
    assert (buttons.service.log.parent / rows(buttons)[0]["audio"]).is_file()
    assert refusal(buttons.collect, TALK, "en") == PARTS["no_recording"], "it is forgotten once it is fetched"


def test_whatever_is_sent_again_lost_or_out_of_order_is_heard_once_and_whole(buttons, speech):
    samples = speech(2 * 16_000)
    for start, end, taken in [
        (8_000, 16_000, 0),  # the first one was lost on its way: it is asked for
        (0, 8_000, 8_000),
        (0, 8_000, 8_000),  # the answer was lost
        (0, 12_000, 12_000),  # and meanwhile more was said
        (20_000, 24_000, 12_000),
        (12_000, 24_000, 24_000),
    ]:
        assert say(buttons, piece(samples[start:end], start))[1] == taken
    assert say(buttons, piece(samples[28_000:], 28_000, last=True))[1:] == (24_000, False), "a gap is no end"
    for _ in range(2):  # the answer to the last one was lost, too
        assert say(buttons, piece(samples[24_000:], 24_000, last=True))[1:] == (32_000, True)
    heard = buttons.collect(TALK, "en")[2]
    told = np.round(samples * 32_768).clip(-32_768, 32_767) / 32_768
    np.testing.assert_allclose(heard.recording.samples, told, atol=1e-6)


def test_a_decoding_that_fails_loses_nothing(buttons, speech, monkeypatch, all_is_speech):
    fake, fails, windows = buttons.service.transcriber, [], []
    real = fake.decode_windows

    def sometimes(asked):
        fails.append(1)
        if len(fails) % 2:
            raise RuntimeError("the engine hiccups")
        windows.extend(asked)
        return real(asked)

    monkeypatch.setattr(fake, "longest_s", 1.0)
    monkeypatch.setattr(fake, "decode_windows", sometimes)
    samples, taken, ended, tries = speech(5 * 16_000), 0, False, 0
    while not ended and (tries := tries + 1) < 100:
        end = taken + 8_000
        try:
            _, taken, ended = say(buttons, piece(samples[taken:end], taken, last=end >= len(samples)))
        except RuntimeError:
            pass
    heard = buttons.collect(TALK, "en")[2]
    assert heard.audio_s == pytest.approx(5.0, abs=0.01)
    finished = {round(segment.start_s, 2): segment.end_s for segment in heard.segments}
    assert len(finished) == len(heard.segments), "no stretch twice"
    assert sum(segment.end_s - segment.start_s for segment in heard.segments) == pytest.approx(5.0, abs=0.2)


def test_two_who_speak_at_once_are_kept_apart(buttons, speech):
    for one, other in zip(pieces(speech(16_000)), pieces(speech(16_000, seed=1), talk="b" * 16), strict=True):
        say(buttons, one)
        say(buttons, other)
    mine, theirs = (buttons.collect(talk, "en")[2].recording.samples for talk in (TALK, "b" * 16))
    assert not np.allclose(mine, theirs)


@pytest.mark.parametrize(
    "told",
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
        {"rate": 8_000, "samples": "AAAA", "start": -1},
        {"rate": 8_000, "samples": "AAAA", "start": 0.5},
        {"rate": 8_000, "samples": "AAAA", "talk": "short"},
        {"rate": 8_000, "samples": "AAAA", "talk": "a" * 100},
    ],
    ids=str,
)
def test_a_piece_that_is_no_sound_is_refused(buttons, told):
    if isinstance(told, dict):
        told = {"talk": TALK, "start": 0, **told}
    assert reason(buttons, told) == "unreadable"


def test_pieces_of_another_rate_are_refused(buttons, speech):
    say(buttons, piece(speech(16_000)))
    assert reason(buttons, piece(speech(16_000), 16_000, 44_100)) == "unreadable"


def test_a_microphone_that_sends_nothing_or_silence_is_said_plainly(buttons, warnings):
    assert reason(buttons, piece([], last=True)) == "no_recording"
    *most, last = pieces(np.zeros(48_000, np.float32))
    for one in most:
        say(buttons, one)
    assert [reason(buttons, last) for _ in range(2)] == ["silent"] * 2
    buttons.open(False, "sv")
    assert warnings == [WORDS["sv"]["no_microphone"]]


def test_an_open_microphone_is_heard_for_ten_minutes_and_held_for_one(buttons, monkeypatch, speech):
    monkeypatch.setattr(live, "HELD_S", 1.0)
    monkeypatch.setattr(live, "MAX_DURATION_S", 2.0)
    for one in pieces(speech(int(1.9 * 16_000))):
        say(buttons, one)
    assert buttons.collect(TALK, "en")[2].recording is None
    *first, last = pieces(speech(int(2.2 * 16_000)))
    for one in first:
        say(buttons, one)
    assert reason(buttons, last) == "too_long"
    assert say(buttons, piece([], 32_000, last=True))[1:] == (32_000, True)
    heard = buttons.collect(TALK, "en")[2]
    assert heard.audio_s == pytest.approx(2.0, abs=0.01), "what came before is not lost with a piece that is refused"


def test_a_microphone_of_which_nothing_is_heard_is_forgotten(buttons, monkeypatch, speech):
    say(buttons, piece(speech(8_000)))
    buttons.talks.forget()
    assert say(buttons, piece(speech(8_000), 8_000))[1] == 16_000
    monkeypatch.setattr(live, "FORGOTTEN_S", -1.0)
    buttons.talks.forget()
    assert say(buttons, piece(speech(8_000), 16_000))[1] == 0, "its page is told to send all of it again"


def test_new_microphones_shut_out_none_that_speaks_and_only_one_that_was_quiet(buttons, monkeypatch, speech):
    monkeypatch.setattr(live, "MAX_TALKS", 2)
    first, other, third = "a" * 16, "b" * 16, "c" * 16
    say(buttons, piece(speech(8_000), talk=first))
    say(buttons, piece(speech(8_000), talk=other))
    for n in range(3):
        assert reason(buttons, piece(speech(1), talk=f"somebody-else-{n:03}")) == "busy"
    assert say(buttons, piece(speech(8_000), 8_000, talk=first))[1] == 16_000
    monkeypatch.setattr(live, "QUIET_S", -1.0)
    assert say(buttons, piece(speech(8_000), 8_000, talk=third))[1] == 0
    assert set(buttons.talks._talks) == {first, other}, "what begins with a gap needs no room"
    assert say(buttons, piece(speech(8_000), talk=third))[1] == 8_000
    assert say(buttons, piece(speech(8_000), 16_000, talk=first))[1] == 24_000
    assert say(buttons, piece(speech(8_000), 8_000, talk=other))[1] == 0, "it was quiet for longest"


def test_a_microphone_has_one_piece_that_waits_and_it_keeps_its_place_meanwhile(buttons, monkeypatch, speech):
    monkeypatch.setattr(live, "MAX_TALKS", 1)
    monkeypatch.setattr(live, "QUIET_S", -1.0)
    monkeypatch.setattr(live, "FORGOTTEN_S", -1.0)
    said = []
    with buttons.service.turn():
        waits = threading.Thread(target=lambda: said.append(say(buttons, piece(speech(8_000)))[1]))
        waits.start()
        while len(buttons.service._line._waiting) < 2:
            time.sleep(0.01)
        assert reason(buttons, piece(speech(8_000))) == "busy"
        assert reason(buttons, piece(speech(8_000), talk="b" * 16)) == "busy", "nor is it dropped for another"
        buttons.talks.forget()
    waits.join(10)
    assert said == [8_000]
    assert say(buttons, piece(speech(8_000), 8_000))[1] == 16_000


def test_a_piece_for_whose_answer_nobody_waits_is_not_heard(buttons, speech):
    told = live.piece_of(piece(speech(8_000)))
    with pytest.raises(AudioError, match="busy"):
        buttons.talks.take(told, lambda: True)
    assert buttons.talks.take(told)[1] == 8_000
    assert say(buttons, piece([], 4_000))[1] == 8_000


def test_one_timer_looks_for_microphones_that_are_quiet(buttons, speech, monkeypatch):
    started = []

    class Timer:
        def __init__(self, seconds, call):
            self.call = call

        def start(self):
            started.append(self.call)
            time.sleep(0.05)  # long enough for the others to come, too

    monkeypatch.setattr(live.threading, "Timer", Timer)
    together = threading.Barrier(8)

    def begin(n):
        together.wait(10)
        with buttons.talks._alone(live.piece_of(piece(speech(1), talk=f"somebody-else-{n:03}"))):
            pass

    threads = [threading.Thread(target=begin, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    buttons.talks.forget()
    assert len(started) == 1
    started[0]()
    assert len(started) == 2, "it looks again while there is one"
    monkeypatch.setattr(live, "FORGOTTEN_S", -1.0)
    started[1]()
    assert len(started) == 2
    say(buttons, piece(speech(1)))
    assert len(started) == 3


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
    return feedback_log.read(buttons.service.log)


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


@pytest.mark.parametrize(
    ("space", "log", "lost"), [("", "log.csv", 0), ("a/b", "log.csv", 1), ("a/b", "/data/l.csv", 0)]
)
def test_the_page_says_what_is_stored_and_whether_it_stays(tmp_path, monkeypatch, space, log, lost):
    monkeypatch.setenv("SPACE_ID", space) if space else monkeypatch.delenv("SPACE_ID", raising=False)
    demo = app.build(FakeTranscriber(tmp_path), ROOT / log)
    [stored] = [block for block in demo.blocks.values() if block.elem_id == "stored"]
    assert stored.value.startswith(ENGLISH["stored"])
    assert stored.value.count(ENGLISH["fleeting"]) == lost


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
    page = html.card(inference_pipeline.model_info(ref), "newest", ENGLISH)
    assert "WER 0.254 (95 % 0.221–0.290, n = 160, 12 speakers; by transformers)" in page
    assert "(q8)" in page
    assert "train-9" in page
    assert "whisper-x @ 12ab" in page
    assert str(tmp_path) not in page
    assert ENGLISH["why"]["newest"] in page


def test_the_card_says_not_scored_and_is_escaped(tmp_path):
    ref = ModelRef("<script>alert(1)", tmp_path, "hub", "1")
    assert ENGLISH["not_scored"] in html.card(inference_pipeline.model_info(ref), "base", ENGLISH)
    assert "<script" not in html.card(inference_pipeline.model_info(ref), "base", ENGLISH)


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


# ---- the door before it


@pytest.fixture
def front(tmp_path, monkeypatch):
    """The page with a transcriber that hears the same in everything, served; `front.uploads` is its folder."""
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    demo = app.build(FakeTranscriber(tmp_path / "x"), tmp_path / "log.csv")
    address = app.launch(demo, port=free_port())
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        yield SimpleNamespace(demo=demo, client=client, uploads=tmp_path / "uploads", address=address)
    demo.close(verbose=False)


JSON = {"content-type": "application/json"}


def sent(front, content, name="spoken.wav", **headers):
    return front.client.post("/gradio_api/upload", files={"files": (name, content)}, headers=headers)


def files(front):
    return [path for path in front.uploads.rglob("*") if path.is_file()]


def asked(front, path):
    """What the public endpoint answers for a file at `path`."""
    call = "/gradio_api/call/transcribe"
    told = front.client.post(call, json={"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]})
    return front.client.get(f"{call}/{told.json()['event_id']}").text if told.status_code == 200 else told


def test_two_visitors_with_the_same_file_do_not_delete_each_others(front, spoken):
    content = Path(spoken).read_bytes()
    (one,), (other,) = (sent(front, content).json() for _ in range(2))
    assert one != other
    assert Path(one).name == Path(other).name == "spoken.wav"
    assert front.demo.upload_file_set >= {one, other}, "what nobody transcribes is deleted by Gradio, in half an hour"
    heard = []
    both = [threading.Thread(target=lambda path=path: heard.append(asked(front, path))) for path in (one, other)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(30)
    assert [("event: complete" in told, "Hej p" in told) for told in heard] == [(True, True)] * 2, heard
    assert files(front) == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/a.wav", "https://127.0.0.1:{port}/a.wav"])
def test_an_address_in_a_files_place_is_refused_before_anything_is_fetched(front, monkeypatch, address):
    from gradio import processing_utils

    fetched = []

    async def fetch(url, cache_dir):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        path = address.format(port=listening.getsockname()[1])
        told = asked(front, path)
        assert told.status_code == 400
        assert told.json()["detail"] == PARTS["address"]
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        for n, fn in front.demo.fns.items():  # those that only the page calls, too
            body = {"fn_index": n, "data": data * len(fn.inputs), "session_hash": "x", "trigger_id": None}
            for place in ("queue/join", "run/predict"):
                if fn.inputs:
                    answer = front.client.post(f"/gradio_api/{place}", json=body, headers={"accept-language": "sv"})
                    assert (answer.status_code, answer.json()["error"]) == (400, SWEDISH["refused"]["address"])
        with pytest.raises(TimeoutError):
            listening.accept()
    assert fetched == []


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ('[{"a": [{"path": "http://x/a.wav"}]}]', True),
        ('{"p\\u0061th": "\\u0068ttp://x/a.wav"}', True),
        ('{"path": " HTTPS://x"}', True),
        ('{"path": "/tmp/http/a.wav"}', False),
        ('{"other": "http://x"}', False),
        ('{"path": 3}', False),
        ("http://", False),
        ("[" * 100_000, False),
    ],
)
def test_addresses_are_found_however_they_are_written(body, names):
    assert middleware.names_an_address(body.encode()) is names


def test_more_than_a_file_at_once_is_refused_while_it_comes(front, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_BODY", 300_000)
    assert sent(front, b"a" * 200_000).status_code == 200
    told = sent(front, b"a" * 400_000)
    assert (told.status_code, told.text) == (413, PARTS["too_large"])
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=x", "accept-language": "sv"}
    parts = (part for part in (head, *[b"a" * 100_000] * 5))
    told = front.client.post("/gradio_api/upload", content=parts, headers=kind)  # in chunks: no length is told
    assert (told.status_code, told.text) == (413, SWEDISH["refused"]["too_large"])
    told = front.client.post("/gradio_api/queue/join", content=b"[" + b" " * 400_000 + b"]")
    assert (told.status_code, told.json()["detail"]) == (413, PARTS["too_large"])


def test_uploads_take_up_only_so_much_of_the_disk(front, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_FOLDER", 2_500_000)
    told = [sent(front, b"few").status_code for _ in range(4)]
    assert told == [200, 200, 200, 503], "a small file counts as a megabyte"
    assert sent(front, b"few", **{"accept-language": "sv"}).text == SWEDISH["refused"]["busy"]
    (front.uploads / "tmpbrokenoff").write_bytes(b"few")
    (front.uploads / "another").mkdir()
    (front.uploads / "another" / "page.wav").write_bytes(b"few")
    assert middleware.swept(front.uploads, 60) == 4_000_000
    assert middleware.swept(front.uploads, -60) == 0
    assert [path.name for path in files(front)] == ["page.wav"], "uploads of other pages are not touched"
    assert sent(front, b"few").status_code == 200


def test_an_open_microphone_has_a_way_of_its_own(front, speech, monkeypatch):
    samples = speech(16_000)
    told = front.client.post("/live", json=piece(samples)).json()
    assert (told["taken"], told["ended"]) == (16_000, False)
    assert told["told"].startswith('<p lang="sv">')
    told = front.client.post("/live", json=piece([], 16_000, last=True)).json()
    assert told["ended"]
    assert front.demo.talks.collect(TALK).audio_s == pytest.approx(1.0, abs=0.01)
    for nonsense in (b"", b"[" * 100_000, b"{}", b"7", b"\xff"):
        told = front.client.post("/live", content=nonsense, headers={**JSON, "accept-language": "sv"})
        assert (told.status_code, told.json()["detail"]) == (400, SWEDISH["refused"]["unreadable"])
    monkeypatch.setattr(app_service, "TURN_S", 0.01)
    with front.demo.talks.service.turn():
        told = front.client.post("/live", json={**piece(samples), "language": "sv"})
    assert (told.status_code, told.json()["reason"]) == (503, "busy")
    assert told.json()["detail"] == SWEDISH["refused"]["busy"]
    monkeypatch.setattr(front.demo.talks, "take", lambda piece, gone: 1 / 0)
    told = front.client.post("/live", json=piece(samples))
    assert (told.status_code, told.json()["detail"]) == (500, ENGLISH["failed"])


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/live", {"content-type": "application/json; charset=utf-8", "sec-fetch-site": "same-origin"}, 200),
        ("/live", {**JSON, "sec-fetch-site": "cross-site"}, 403),
        ("/live", {"content-type": "text/plain"}, 415),  # which a browser sends for any page, and does not ask first
        ("/live", {}, 415),
        ("/elsewhere/live", JSON, 404),
        ("/gradio_api/live", JSON, 404),
    ],
)
def test_pieces_come_from_the_page_alone_and_by_one_way(front, speech, path, headers, status):
    content = json.dumps(piece(speech(8_000))).encode()
    assert front.client.post(path, content=content, headers=headers).status_code == status
    assert (TALK in front.demo.talks._talks) == (status == 200)


@pytest.mark.parametrize(
    ("path", "root", "place"),
    [
        ("/live", "", "/live"),
        ("/live/", "/", "/live"),
        ("/app/live", "/app", "/live"),
        ("/live", "/app/", "/live"),
        ("/live", "https://x.example/app", "/live"),
        ("/other/live", "/app", "/other/live"),
    ],
)
def test_a_proxy_may_leave_the_root_path_or_cut_it_off(path, root, place):
    assert middleware._place({"path": path, "root_path": root}) == place


def form(count, content=b"few"):
    """So many files in one form."""
    return [("files", (f"{n}.wav", content)) for n in range(count)]


def test_a_request_with_many_files_is_refused_before_they_fill_the_folder(front):
    for count in (2, 1_000, 1_001):  # more than a thousand Gradio refuses itself, and leaves them there
        told = front.client.post("/gradio_api/upload", files=form(count, b""), headers={"accept-language": "sv"})
        assert (told.status_code, told.text) == (400, SWEDISH["refused"]["unreadable"])
    whole = front.client.build_request("POST", "/gradio_api/upload", files=form(100))
    content, kind = whole.read(), {"content-type": whole.headers["content-type"]}
    for size in (7, 1_000, len(content)):
        parts = (content[at : at + size] for at in range(0, len(content), size))
        assert front.client.post("/gradio_api/upload", content=parts, headers=kind).status_code == 400
    assert len(files(front)) <= 6 * 2, "those that came before it was seen that there are more"
    assert sent(front, b"--" * 1_000 + b"\r\n--").status_code == 200


def test_what_is_no_file_has_a_smaller_limit(front, speech, monkeypatch):
    nested = b"[" + b"[]," * 100_000 + b"[]]"
    told = front.client.post("/gradio_api/queue/join", content=nested, headers=JSON)
    assert (told.status_code, told.json()["detail"]) == (413, PARTS["too_large"])
    longest = piece(np.zeros(480_000), rate_hz=48_000)
    assert front.client.post("/live", json=longest).json()["taken"] == 480_000, "the most that the page sends"
    told = front.client.post("/live", json=longest | {"more": "a" * middleware.MAX_PIECE})
    assert (told.status_code, told.json()["reason"]) == (413, "too_large")
    assert middleware._flat(nested) is None
    assert middleware._flat(json.dumps(longest).encode()) == longest
    found = {"data": [{"path": "http://x/a.wav"}, "a" * 2 * middleware._ASIDE]}  # looked through by a thread
    told = front.client.post("/gradio_api/queue/join", json=found)
    assert (told.status_code, told.json()["detail"]) == (400, PARTS["address"])


def passed(messages, talks, headers=JSON, path="/live"):
    """What the door alone answers to a request of these ASGI messages, after which nothing comes: status, body."""
    import anyio

    out, rest = [], iter(messages)

    async def receive():
        for message in rest:
            return message
        await anyio.sleep_forever()

    async def send(message):
        out.append(message)

    async def ask():
        guard = middleware.Door(None, talks, Path("nowhere"), 60.0)
        told = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": told, "query_string": b""}
        with anyio.fail_after(30):
            await guard(scope, receive, send)

    anyio.run(ask)
    return out[0]["status"], json.loads(out[1]["body"])


def test_a_request_that_does_not_come_to_its_end_is_given_up(monkeypatch):
    monkeypatch.setattr(middleware, "BODY_S", 0.05)
    begun = [{"type": "http.request", "body": b"{", "more_body": True}]
    for path in ("/live", "/gradio_api/queue/join"):
        status, told = passed(begun, None, path=path)
        assert (status, told["reason"]) == (408, "busy")


def test_where_no_place_is_free_a_piece_is_not_even_read(monkeypatch):
    monkeypatch.setattr(middleware, "MAX_WAITING", 0)
    status, told = passed([], None)
    assert (status, told["reason"]) == (503, "busy")


def test_the_work_of_those_who_have_gone_is_dropped(speech):
    class Patient:
        def take(self, piece, gone):
            until = time.monotonic() + 10
            while not gone():
                assert time.monotonic() < until
                time.sleep(0.01)
            raise AudioError("busy", "nobody waits")

    body = json.dumps(piece(speech(8_000))).encode()
    status, told = passed([{"type": "http.request", "body": body}, {"type": "http.disconnect"}], Patient())
    assert (status, told["reason"]) == (503, "busy")


def test_the_theme_fetches_no_fonts():
    theme = assets.theme()
    assert theme._stylesheets == []
    assert "@font-face" not in theme._get_theme_css()
