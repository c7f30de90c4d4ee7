"""The archive page: every form of transcript is read, none becomes HTML, addresses of recordings are encoded."""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.parse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines import __main__ as cli
from pipelines.inference.archive import folder, page, transcripts
from pipelines.inference.archive.page import Entry
from pipelines.inference.archive.transcripts import Line
from pipelines.inference.batch import job as batch_job
from pipelines.inference.batch import run as batch_run
from pipelines.inference.transcript import Segment, Transcript, Word
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.model import ModelRef

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 'å' & \"b\""


def data_of(html: str) -> dict:
    """Return the data in a page; the pattern ends where a browser ends the element."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL)[1])


def recording(tmp_path: Path, name: str, **transcript_files: str) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"sound")
    for suffix, content in transcript_files.items():
        path.with_suffix(f".{suffix}").write_text(content, "utf-8")
    return path


WORDS = [{"word": " Hej", "start": 1.5, "end": 1.8, "probability": 0.4}, {"word": " då", "start": 1.8, "end": 2.1}]
VTT = "\ufeffWEBVTT\r\n\r\nNOTE x\r\n\r\n00:01.500 --> 00:02.000 align:start\r\n<v Anna>Hej &amp; <b>hå</b>\r\ndu\r\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", json.dumps({"segments": [{"start": 1, "text": " Hej  då ", "words": WORDS}]}), [1, [1.5, 1.8], []]),
        ("a.json", json.dumps({"segments": [{"start": 1, "text": "Hej då", "words": WORDS[:1]}]}), [1, [], []]),
        ("a.json", '{"segments": [{"start": 1, "text": "Hej da\u030a", "word_confidences": [1, 0]}]}', [1, [], [1, 0]]),
    ],
)
def test_json_gives_words_only_if_all_are_known(tmp_path, name: str, content: str, expected):
    (tmp_path / name).write_text(content, "utf-8")
    (line,), _ = transcripts.read(tmp_path / name)
    assert line.text in ("Hej då", "Hej d\u00e5")
    assert [line.start_s, line.starts_s, line.confidences] == expected


def test_subtitles_give_times_of_cues(tmp_path):
    (tmp_path / "a.vtt").write_bytes(VTT.encode())
    (tmp_path / "a.srt").write_text("1\n01:00:01,5 --> 01:00:02,000\nEtt\n\n2\n01:00:03,000 --> 01:00:04,000\nTvå\n")
    assert transcripts.read(tmp_path / "a.vtt")[0] == [Line(1.5, "Hej & hå du")]
    assert transcripts.read(tmp_path / "a.srt")[0] == [Line(3601.5, "Ett"), Line(3603.0, "Två")]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"segments": 1}', '{"segments": [{"text": 1}]}', "[" * 100_000])
@pytest.mark.parametrize("suffix", transcripts.SUFFIXES)
def test_other_files_are_no_transcripts(tmp_path, content: str, suffix: str):
    (tmp_path / f"a{suffix}").write_text(content)
    with pytest.raises(LabError, match="is not a transcript"):
        transcripts.read(tmp_path / f"a{suffix}")


def test_hostile_texts_stay_data(tmp_path):
    entry = Entry(HOSTILE, tmp_path / "a.wav", [Line(0.0, transcripts.clean(HOSTILE), HOSTILE)], problem=HOSTILE)
    html = page.render([entry], tmp_path)
    assert "alert(1)</script>" not in html and "<!-- " not in html and "\u2028" not in html
    (fields,) = data_of(html)["recordings"]
    assert fields["name"] == fields["problem"] == fields["lines"][0][1] == transcripts.clean(HOSTILE)
    assert len(re.findall(r"<script", html)) == len(re.findall(r"</script>", html)) == 2


def test_page_loads_nothing_from_elsewhere(tmp_path):
    html = page.render([], tmp_path)
    assert not re.findall(r"(?:src|href|url|import|fetch)\s*[=(]", html.replace("audio.src =", "")), "no address at all"
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "{{" not in html


@pytest.mark.parametrize(
    "name",
    ["a b.wav", "50% #1?.wav", "a:b.wav", "å/ö.wav", "../utanför.wav", "'\"&<>.wav", "javascript:x.wav", "a\\b.wav"],
)
def test_address_of_audio_leads_to_the_file(tmp_path, name: str):
    address = page.audio_address(tmp_path / "page" / name, tmp_path / "page")
    url = urllib.parse.urljoin(f"file://{tmp_path}/page/archive.html", address)
    parts = urllib.parse.urlsplit(url)
    assert (parts.scheme, parts.query, parts.fragment) == ("file", "", "")
    assert Path(os.path.normpath(urllib.parse.unquote(parts.path))) == Path(os.path.normpath(tmp_path / "page" / name))


def test_each_transcript_belongs_to_one_recording(tmp_path):
    srt = "1\n00:00:01,000 --> 00:00:02,000\n{}\n"
    recording(tmp_path, "x/a.mp3", srt=srt.format("av mp3"))
    recording(tmp_path, "x/a.wav")
    (tmp_path / "x/a.wav.srt").write_text(srt.format("av wav"))
    recording(tmp_path, "b.wav", vtt="WEBVTT\n", json="{}")
    recording(tmp_path, "c.wav")
    entries = {entry.name: entry for entry in folder.find_entries(tmp_path)}
    assert [entries[f"x/a.{kind}"].lines[0].text for kind in ("mp3", "wav")] == ["av mp3", "av wav"]
    assert entries["b.wav"].problem == "b.json is not a transcript with times"
    assert entries["c.wav"].problem == folder.NO_TRANSCRIPT


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_name_that_is_not_utf8_is_shown_and_addressed(tmp_path):
    name = os.fsdecode(b"sm\xf6rg\xe5s.wav")
    try:
        recording(tmp_path, name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    page.write(tmp_path / "archive.html", folder.find_entries(tmp_path))
    (fields,) = data_of((tmp_path / "archive.html").read_text("utf-8"))["recordings"]
    assert (fields["name"], fields["audio"]) == ("sm\ufffdrg\ufffds.wav", "./sm%F6rg%E5s.wav")


def test_other_files_are_not_overwritten(tmp_path):
    target = tmp_path / "page.html"
    page.write(target, [])
    page.write(target, [Entry("a", None)])
    target.write_text("<html>mine</html>")
    for path in (target, tmp_path / "page.csv"):
        with pytest.raises(LabError, match=r"no archive|ends in \.html"):
            page.write(path, [])
    assert target.read_text() == "<html>mine</html>"


class FakeTranscriber:
    """Says the duration in tenths of a second, with the times of words; counts its calls."""

    times_words, language = True, "sv"
    ref, loaded = ModelRef("fake", None, "folder", "r1"), SimpleNamespace(name="stub cpu")
    options = DecodingOptions()

    def __init__(self):
        self.calls = 0

    def transcribe(self, recording, on_audio=lambda seconds: None, word_times=False):
        self.calls += 1
        duration_s = audio.decode(recording).duration_s
        assert word_times
        words = (Word("ljud", 0.9, 0.0, 0.05), Word(f"{10 * duration_s:.0f}", 0.3, 0.05, duration_s))
        text = " ".join(word.text for word in words)
        return Transcript(text, duration_s, 0.01, (Segment(0.0, duration_s, text, words),))


def test_archive_of_a_finished_folder_needs_no_decoding(tmp_path, encoded):
    for n in (1, 2):
        (tmp_path / f"talks/{n}").mkdir(parents=True)
        (tmp_path / f"talks/{n}/a.wav").write_bytes(encoded(np.full(1600 * n, 0.1, np.float32)))
    (tmp_path / "talks/bad.wav").write_bytes(b"no sound")
    job = replace(batch_job.plan([tmp_path / "talks"], formats=["json"]), archive=tmp_path / "archive.html")
    transcriber = FakeTranscriber()
    result = batch_run.run(job, transcriber)
    assert result.as_dict()["archive"] == str(job.archive) and f"archive {job.archive}" in str(result)
    first, calls = job.archive.read_bytes(), transcriber.calls
    fields = {one["name"]: one for one in data_of(first.decode())["recordings"]}
    assert fields["talks/2/a.wav"]["lines"] == [[0, "ljud 2", "", [0, 5], "93"]]
    assert fields["talks/2/a.wav"]["audio"] == "./talks/2/a.wav"
    assert fields["talks/bad.wav"]["problem"] == folder.NO_TRANSCRIPT
    job.archive.unlink()
    batch_run.run(job, transcriber)
    assert (job.archive.read_bytes(), transcriber.calls) == (first, calls)


def test_part_of_a_recording_plays_from_its_place(tmp_path, encoded):
    (tmp_path / "a.wav").write_bytes(encoded(np.full(16_000, 0.1, np.float32)))
    (tmp_path / "t.csv").write_text("audio,start,end\na.wav,0.5,0.7\n")
    job = replace(batch_job.plan([tmp_path / "t.csv"], formats=["json"]), archive=tmp_path / "archive.html")
    batch_run.run(job, FakeTranscriber())
    (fields,) = data_of(job.archive.read_text("utf-8"))["recordings"]
    assert (fields["name"], fields["lines"][0][0], fields["audio"]) == ("a.wav (0.5-0.7 s)", 50, "./a.wav")


def test_command_writes_the_archive_of_a_folder(tmp_path, monkeypatch, capsys):
    recording(tmp_path, "a.wav", vtt=VTT)
    recording(tmp_path, "b.wav")
    monkeypatch.setattr(sys, "argv", ["p", "archive", str(tmp_path), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    target = tmp_path / "archive.html"
    expected = {"archive": str(target), "recordings": 2, "without_transcript": ["b.wav"]}
    assert json.loads(capsys.readouterr().out) == expected
    assert len(data_of(target.read_text("utf-8"))["recordings"]) == 2
    monkeypatch.setattr(sys, "argv", ["p", "archive", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "there is no folder" in capsys.readouterr().err


def test_missing_transcript_is_a_text_of_the_page():
    script = (Path(page.__file__).parent / "page.js").read_text("utf-8")
    assert script.count(f"    {folder.NO_TRANSCRIPT}: ") == 2, "in English and Swedish"
