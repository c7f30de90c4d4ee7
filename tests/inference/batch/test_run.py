"""Tables of recordings: finished rows are kept, output is complete or absent, a bad file is a row with an error."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from log_recorder import record_log

from pipelines import __main__ as cli
from pipelines.inference.batch import job as batch_job
from pipelines.inference.batch import journal
from pipelines.inference.batch import run as batch_run
from pipelines.inference.batch.job import BatchResult
from pipelines.inference.subtitles import Style
from pipelines.inference.transcript import DamagedRecording, Segment, Transcript, Word
from pipelines.infra import files, manifest, tables
from pipelines.infra.errors import LabError, Unfinished
from pipelines.speech import audio, scoring
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.model import ModelRef

ROOT = Path(__file__).parents[3]


class FakeTranscriber:
    """Returns the duration of a recording in tenths of a second, as `ljud 12`; is interrupted after `most` calls."""

    times_words = False

    def __init__(self, revision: str = "r1", most: int = 1000):
        self.ref = ModelRef("fake", Path(), "folder", revision)
        self.loaded, self.language = SimpleNamespace(name="stub cpu"), "sv"
        self.options = DecodingOptions()
        self.most, self.calls = most, 0

    def transcribe(self, recording, on_audio=lambda seconds: None):
        sound = audio.decode(recording)
        if self.calls == self.most:
            raise KeyboardInterrupt
        self.calls += 1
        on_audio(sound.duration_s)
        words = ("ljud", str(round(10 * sound.duration_s)))
        messages = Segment(0.0, sound.duration_s, " ".join(words), tuple(Word(word, 0.75) for word in words))
        return Transcript(messages.text, sound.duration_s, 0.01, (messages,))


@pytest.fixture
def talks(tmp_path, encoded):
    """A table of six rows: row 3 names a file that is not audio, row 5 none, row 6 has no reference."""
    folder = tmp_path / "talks"
    (folder / "clips").mkdir(parents=True)
    for n in (1, 2, 4, 6):
        (folder / f"clips/{n}.wav").write_bytes(encoded(np.full(1600 * n, 0.1, dtype=np.float32)))
    (folder / "clips/3.wav").write_bytes(b"this is no sound" * 20)
    messages = ["Ljud 1.", "ljud nio", "x", "helt fel här", "y", ""]
    who = ["a", "a", "b", "b", "c", "c"]
    names = [f"clips/{n}.wav" if n != 5 else "" for n in range(1, 7)]
    lines = ["path,sentence,client_id", *map(",".join, zip(names, messages, who))]
    (folder / "talks.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "talks.csv"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(path: Path, transcriber: FakeTranscriber | None = None, again=False, retry=False, **options):
    job = batch_job.plan([path], **options)
    return job, batch_run.run(job, transcriber or FakeTranscriber(), again=again, retry=retry).summary


def test_table_gets_transcripts_errors_and_wer(talks):
    job, summary = run(talks)
    assert job.out == talks.parent / "talks.transcribed.csv"
    table = rows(job.out)
    assert list(table[0]) == ["path", "sentence", "client_id", "transcript", "confidence", "audio_s", "error", "wer"]
    assert [row["transcript"] for row in table] == ["ljud 1", "ljud 2", "", "ljud 4", "", "ljud 6"]
    assert [row["wer"] for row in table] == ["0.0", "0.5", "", "1.0", "", ""]
    assert [row["audio_s"] for row in table] == ["0.1", "0.2", "", "0.4", "", "0.6"]
    assert [bool(row["error"]) for row in table] == [False, False, True, False, True, False]
    assert table[0]["confidence"] == "0.75"
    assert table[2]["error"].startswith("unreadable: ")
    assert table[4]["error"] == "missing: the row names no file"
    assert (summary.rows, summary.errors, summary.audio_s) == (6, 2, 1.3)
    expected = scoring.score(["Ljud 1.", "ljud nio", "helt fel här"], ["ljud 1", "ljud 2", "ljud 4"], ["a", "a", "b"])
    assert summary.score == json.loads(json.dumps(expected.as_dict()))
    assert summary.score["speakers"] == 2
    assert str(expected) in str(BatchResult(job, summary))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_formulas_of_the_input_are_text_in_the_output(tmp_path, encoded, suffix):
    import pandas as pd

    (tmp_path / "-1.wav").write_bytes(encoded(np.full(1600, 0.1, dtype=np.float32)))
    frame = pd.DataFrame({"path": ["-1.wav"], "text": ["'=1+1"], "=note": ["@SUM(1)"], "dbfs": ["-45.5"]})
    path = tmp_path / f"t{suffix}"
    frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    job, summary = run(path)
    assert summary.errors == 0
    content = job.out.read_text("utf-8").replace("\t", ",")
    assert content.startswith("path,text,'=note,dbfs,") and "\n'-1.wav,'=1+1,'@SUM(1),-45.5,ljud 1," in content
    [(_, cells)] = tables.open_table(job.out).rows()
    assert [*cells.values()][:5] == ["-1.wav", "=1+1", "@SUM(1)", "-45.5", "ljud 1"]


def test_without_a_reference_there_is_no_wer(talks):
    talks.write_text("audio\nclips/1.wav\n")
    job, summary = run(talks)
    assert rows(job.out) == [
        {"audio": "clips/1.wav", "transcript": "ljud 1", "confidence": "0.75", "audio_s": "0.1", "error": ""}
    ]
    assert summary.score is None


def test_interrupted_table_continues_with_equal_result(talks, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(talks, FakeTranscriber(most=2))
    job = batch_job.plan([talks])
    assert not job.out.exists()
    assert batch_run.Outline(job).fields["rows_done"] == 3
    with open(job.partial, "ab") as file:
        file.write(b'{"transcript": "ljud')  # as a crash leaves it
    messages, transcriber = [], FakeTranscriber()
    record_log(messages)
    _, summary = run(talks, transcriber)
    assert messages == ["continuing after 3 of 6 rows"]
    assert transcriber.calls == 2, "what was done is not done again"
    assert not job.partial.exists()
    other, at_once = run(talks, out=str(tmp_path / "at-once.csv"))
    assert other.out.read_bytes() == job.out.read_bytes()
    assert summary == at_once
    left = {path.name for path in talks.parent.iterdir()}
    of_table = {f"talks.transcribed.csv{ending}" for ending in ("", ".json", ".earlier")}
    assert left == {"clips", "talks.csv"} | of_table, "two rows have an error: the others are kept for a retry"


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b"[]\n", b'{"other": 1}\n', b"\n"])
def test_invalid_journal_lines_are_not_rows(talks, damage):
    with pytest.raises(KeyboardInterrupt):
        run(talks, FakeTranscriber(most=1))
    job = batch_job.plan([talks])
    with open(job.partial, "ab") as file:
        file.write(damage + b'{"transcript": "not mine", "confidence": 1, "audio_s": 1, "error": null}\n')
    run(talks)
    assert [row["transcript"] for row in rows(job.out)] == ["ljud 1", "ljud 2", "", "ljud 4", "", "ljud 6"]


def test_journal_without_first_line_starts_again(talks):
    job = batch_job.plan([talks])
    job.partial.write_bytes(b'{"made_of": {"tab')
    run(talks)
    assert len(rows(job.out)) == 6


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda talks: talks.write_text(talks.read_text("utf-8") + "clips/1.wav,hej,d\n", "utf-8"), "table"),
        ({"transcriber": FakeTranscriber("r2")}, "model"),
        ({"formats": ["srt"]}, "format"),
        ({"reference_column": "path"}, "reference column"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_changed_input_is_refused_without_again(talks, change, changed, finished):
    if finished:
        run(talks)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(talks, FakeTranscriber(most=1))
    options = change if isinstance(change, dict) else change(talks) and {}
    options = options or {}
    with pytest.raises(LabError, match=f"was started with another {changed}: call it as before.*--again") as caught:
        run(talks, **options)
    assert "\n" not in str(caught.value)
    job, summary = run(talks, again=True, **options)
    assert (summary.rows, job.out.is_file()) == (len(rows(talks)), True)


@pytest.mark.parametrize("state", ["interrupted", "finished with errors", "finished"])
def test_exchanged_recording_is_refused_without_again(talks, encoded, state):
    if state == "finished":
        talks.write_text("path\nclips/1.wav\nclips/2.wav\n")
    if state == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            run(talks, FakeTranscriber(most=2))
    else:
        run(talks)
    clip = talks.parent / "clips/1.wav"
    os.utime(clip, ns=(0, 0))  # copied elsewhere, with the same content
    with pytest.raises(KeyboardInterrupt) if state == "interrupted" else contextlib.nullcontext():
        run(talks, FakeTranscriber(most=0))
    stat = clip.stat()
    clip.write_bytes(clip.read_bytes()[:-4] + b"\1\2\3\4")
    os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    complaint = "a recording was changed since" if state == "finished" else "clips/1.wav was changed since"
    with pytest.raises(LabError, match=complaint) as caught:
        run(talks)
    assert "--again" in str(caught.value) and "\n" not in str(caught.value)
    run(talks, again=True)
    clip.unlink()
    assert run(talks, FakeTranscriber(most=0))[0].out.exists(), "a recording that was removed is no other one"


def test_finished_or_foreign_table_is_not_replaced(talks):
    job, first = run(talks)
    transcriber, messages = FakeTranscriber(), []
    record_log(messages)
    assert run(talks, transcriber)[1] == first
    assert (transcriber.calls, messages) == (0, [f"{job.out} exists already, from the same table and model"])
    job.out.write_text("my own words")
    with pytest.raises(LabError, match="exists and was not written by this command, or was changed since"):
        run(talks)
    assert job.out.read_text() == "my own words"
    run(talks, again=True)
    assert len(rows(job.out)) == 6


def test_table_changed_during_the_run_is_an_error(talks):
    class EditingTranscriber(FakeTranscriber):
        def transcribe(self, recording, **options):
            talks.write_text(talks.read_text("utf-8").replace("nio", "tio"), "utf-8")
            return super().transcribe(recording, **options)

    with pytest.raises(LabError, match="the table was changed while"):
        run(talks, EditingTranscriber())
    assert not batch_job.plan([talks]).out.exists()


class FailingTranscriber(FakeTranscriber):
    """Fails for the files in `missing`, as if a drive were not mounted."""

    def __init__(self, *missing: str, **options):
        super().__init__(**options)
        self.missing, self.requested = missing, []

    def transcribe(self, recording, **options):
        self.requested.append(recording.name)
        if recording.name in self.missing:
            raise audio.AudioError("missing", f"there is no file {recording.name}")
        return super().transcribe(recording, **options)


def test_retry_repeats_only_rows_with_errors(talks, tmp_path):
    job, first = run(talks, FailingTranscriber("2.wav", "4.wav"))
    assert first.errors == 4
    printed = str(BatchResult(job, first))
    assert "--retry-errors" in printed and "--again" not in printed
    messages, transcriber = [], FailingTranscriber()
    record_log(messages)
    assert run(talks, transcriber)[1] == first and not transcriber.requested, "nobody asked for a retry"
    _, second = run(talks, transcriber, retry=True)
    assert transcriber.requested == ["2.wav", "3.wav", "4.wav"]
    assert messages[-1] == "keeping the good ones of 6 rows"
    other, at_once = run(talks, out=str(tmp_path / "at-once.csv"))
    assert other.out.read_bytes() == job.out.read_bytes()
    assert second == at_once


def test_successful_retry_leaves_no_extra_files(talks):
    talks.write_text("audio\nclips/1.wav\nclips/2.wav\n")
    run(talks, FailingTranscriber("2.wav"))
    assert (talks.parent / "talks.transcribed.csv.earlier").exists()
    _, summary = run(talks, retry=True)
    assert summary.errors == 0
    left = {path.name for path in talks.parent.iterdir()}
    assert left == {"clips", "talks.csv", "talks.transcribed.csv", "talks.transcribed.csv.json"}
    transcriber = FailingTranscriber()
    assert run(talks, transcriber, retry=True)[1] == summary and not transcriber.requested, (
        "there is nothing to do once more"
    )


@pytest.mark.parametrize("retry", [False, True])
def test_interrupted_retry_continues(talks, tmp_path, retry):
    """The first call is interrupted in row 4, its retry after row 2; each row is transcribed once."""
    with pytest.raises(KeyboardInterrupt):
        run(talks, FailingTranscriber("2.wav", most=1))
    first = FailingTranscriber(most=1)
    with pytest.raises(KeyboardInterrupt):
        run(talks, first, retry=True)
    assert first.requested == ["2.wav", "3.wav", "4.wav"], "row 1 was kept, row 4 is where this one ends"
    last = FailingTranscriber()
    job, summary = run(talks, last, retry=retry)
    assert last.requested == ["4.wav", "6.wav"]
    other, at_once = run(talks, out=str(tmp_path / "at-once.csv"))
    assert (other.out.read_bytes(), at_once) == (job.out.read_bytes(), summary)


def test_retry_needs_the_same_table_and_model(talks):
    job, _ = run(talks)
    with pytest.raises(LabError, match="was started with another model"):
        run(talks, FakeTranscriber("r2"), retry=True)
    with pytest.raises(LabError, match="give one of them"):
        run(talks, again=True, retry=True)
    job.earlier.unlink()
    with pytest.raises(LabError, match="is gone: start again with --again"):
        run(talks, retry=True)
    _, summary = run(talks, again=True)
    assert summary.rows == 6
    job.out.write_text("my own words")
    with pytest.raises(LabError, match="was changed since"):
        run(talks, retry=True)
    with pytest.raises(LabError, match="is for tables"):
        batch_run.run(batch_job.plan([talks.parent / "clips" / "1.wav"]), FakeTranscriber(), retry=True)


def test_again_repeats_every_row(talks):
    run(talks, FailingTranscriber("2.wav"))
    transcriber = FailingTranscriber()
    run(talks, transcriber, again=True)
    assert transcriber.requested == ["1.wav", "2.wav", "3.wav", "4.wav", "6.wav"]


def test_parts_of_a_recording_are_transcribed_apart(talks, tmp_path):
    table = talks.with_name("parts.csv")
    table.write_text("audio,start,end\nclips/6.wav,0,0.25\nclips/6.wav,0.25,0.5\nclips/6.wav,50,60\n")
    heard = []

    class Fake(FakeTranscriber):
        def transcribe(self, recording, **options):
            heard.append(len(audio.decode(recording).samples))
            return super().transcribe(recording, **options)

    run(table, Fake(), formats=["srt"], out=str(tmp_path / "out"))
    assert heard == [4_000, 4_000]
    *_, last = rows(tmp_path / "out/parts.transcribed.csv")
    assert "bad_segment" in last["error"]
    assert (tmp_path / "out/clips/6@0.25-0.5.srt").is_file()


def test_damaged_recording_has_transcript_and_error(talks):
    class DamagedTranscriber(FakeTranscriber):
        def transcribe(self, recording, **options):
            transcript = super().transcribe(recording, **options)
            if recording.name == "4.wav":
                raise DamagedRecording(audio.AudioError("damaged", "it cannot be read after 0.4 s"), transcript)
            return transcript

    job, summary = run(talks, DamagedTranscriber(), formats=["txt"])
    row = rows(job.out)[3]
    assert (row["transcript"], row["audio_s"]) == ("ljud 4", "0.4")
    assert row["error"] == "damaged: it cannot be read after 0.4 s"
    assert row["wer"] == "", "its reference holds what could not be read, too"
    assert (talks.parent / "clips/4.txt").read_text() == "ljud 4\n"
    assert (summary.errors, summary.score["n"]) == (3, 2)
    files = batch_job.plan([talks.parent / "clips/4.wav"])
    result = batch_run.run(files, DamagedTranscriber())
    (fields,) = result.as_dict()["transcripts"]
    assert (fields["text"], fields["error"]) == ("ljud 4", row["error"])
    assert str(result).endswith("4.wav: ljud 4; damaged: it cannot be read after 0.4 s")


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_odd_cells_are_rows_with_an_error(talks, kind):
    clip = str(talks.parent / "clips/1.wav")
    if kind == "text":
        cells = ["~no-such-user/a.wav", "a" * 5_000, "\x00.wav", clip]
        talks.write_text("audio\n" + "\n".join(cells) + "\n")
        (talks.parent / "clips/~a.wav").write_bytes((talks.parent / "clips/1.wav").read_bytes())
        (result,) = batch_run.run(batch_job.plan([talks.parent / "clips/~a.wav"]), FakeTranscriber()).results
        assert result.transcript == "ljud 1"
        run(talks.parent / "clips")  # it is one of these, too
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        talks = talks.with_suffix(".parquet")
        parquet.write_table(pyarrow.table({"file": [5, 0, None]}), talks)
    job = batch_job.plan([talks])
    summary = batch_run.run(job, FakeTranscriber()).summary
    assert (summary.rows, summary.errors) == ((4, 3) if kind == "text" else (3, 3))
    if kind == "parquet":
        table = parquet.read_table(job.out)["error"].to_pylist()
        assert table[:2] == [f"unreadable: the row contains {n} instead of a path or audio" for n in (5, 0)]
        assert table[2] == "missing: the row names no file"


def test_half_a_surrogate_in_json_is_kept(talks):
    path = talks.with_suffix(".jsonl")
    path.write_text(
        '{"path": "clips/1.wav", "text": "\\ud800"}\n{"path": "\\udfff.wav", "text": "hej", "\\ud800": 1}\n'
    )
    job, summary = run(path)
    assert (summary.rows, summary.errors) == (2, 1)
    first, second = map(json.loads, job.out.read_text("utf-8").splitlines())
    assert (first["text"], second["path"], second["\ud800"]) == ("\ud800", "\udfff.wav", 1)


def test_parquet_text_that_is_not_utf8_is_one_line(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    offsets, text = (pyarrow.py_buffer(part) for part in (np.array([0, 2], "<i4").tobytes(), b"\xe5\xe4"))
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, text])
    parquet.write_table(pyarrow.table({"path": latin}), tmp_path / "latin.parquet")
    with pytest.raises(LabError, match="latin.parquet cannot be read as Parquet: .*UTF8"):
        run(tmp_path / "latin.parquet")


def test_missing_summary_is_written_by_the_next_call(talks, monkeypatch):
    def full(*table):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(manifest, "write_json", full)
        with pytest.raises(OSError):
            run(talks)
    job = batch_job.plan([talks])
    assert job.out.exists() and job.partial.exists()
    transcriber = FakeTranscriber()
    assert run(talks, transcriber)[1].rows == 6
    assert (transcriber.calls, job.partial.exists(), job.summary.exists()) == (0, False, True)


def test_locked_table_is_refused(talks):
    job = batch_job.plan([talks])
    with journal.lock_table(job.out), pytest.raises(LabError, match="another process is writing"):
        run(talks)


# ---- files and folders


def test_folder_is_written_as_a_table_beside_it(talks, tmp_path):
    job, summary = run(talks.parent)
    assert job.out == tmp_path / "talks.transcribed.csv"
    assert [row["audio"] for row in rows(job.out)] == [f"talks/clips/{n}.wav" for n in (1, 2, 3, 4, 6)]
    assert summary.errors == 1
    changed = batch_job.plan([talks.parent], str(tmp_path / "x" / "out.tsv"))
    batch_run.run(changed, FakeTranscriber())
    assert changed.out.read_text("utf-8").splitlines()[1].startswith("../talks/clips/1.wav\tljud 1\t")


def test_audio_files_write_nothing_by_default(talks, tmp_path):
    clip = talks.parent / "clips" / "1.wav"
    job = batch_job.plan([clip])
    outcome = batch_run.run(job, FakeTranscriber())
    (result,) = outcome.results
    assert (result.name, result.transcript, outcome.summary.rows) == (str(clip), "ljud 1", 1)
    assert sorted(path.name for path in clip.parent.iterdir()) == ["1.wav", "2.wav", "3.wav", "4.wav", "6.wav"]
    changed = batch_job.plan([clip, clip], str(tmp_path / "out"))
    assert changed.out == tmp_path / "out" / "transcribed.csv"


@pytest.mark.parametrize(
    ("inputs", "options", "complaint"),
    [
        (["talks.csv", "clips/1.wav"], {}, "a table is transcribed alone"),
        (["talks.csv"], {"out": "TALKS"}, "is the table itself, which is never replaced"),
        (["talks.csv"], {"out": "x.parquet"}, "--out must end in .csv here"),
        (["clips"], {"out": "x.parquet"}, "--out must end in .csv or .tsv here"),
        (["clips/1.wav"], {"formats": ["doc"]}, "--format takes txt, srt, vtt, tsv, json, got 'doc'"),
        (["none.csv"], {}, "there is no table"),
        (
            ["clips/1.wav"],
            {"out": "talk.srt"},
            "--out takes a table (.csv, .tsv, .jsonl, .parquet) or",
        ),
    ],
)
def test_invalid_input_is_one_line(talks, inputs, options, complaint):
    options = {name: str(talks) if value == "TALKS" else value for name, value in options.items()}
    with pytest.raises(LabError) as caught:
        batch_job.plan([talks.parent / name for name in inputs], **options)
    assert complaint in str(caught.value)


# ---- subtitle files


def test_subtitles_beside_recordings_replace_nothing(talks):
    clips = talks.parent / "clips"
    (clips / "1.txt").write_text("a transcript by hand")
    with pytest.raises(LabError, match=r"1.txt exists already: name a folder with --out"):
        run(talks, formats=["srt", "txt"])
    assert (clips / "1.txt").read_text() == "a transcript by hand"
    run(talks, formats=["srt", "json"])
    assert (clips / "1.srt").read_text("utf-8") == "1\n00:00:00,000 --> 00:00:00,100\nljud 1\n\n"
    assert json.loads((clips / "6.json").read_text("utf-8"))["text"] == "ljud 6"
    assert not (clips / "3.srt").exists()


def test_style_of_subtitles_is_part_of_the_journal(talks, tmp_path):
    options = {"formats": ["srt"], "out": str(tmp_path / "out")}
    with pytest.raises(KeyboardInterrupt):
        run(talks, FakeTranscriber(most=2), **options)
    job = batch_job.plan([talks], **options)
    with pytest.raises(LabError, match="started with another style of subtitles"):
        batch_run.run(replace(job, style=Style(max_line_width=20)), FakeTranscriber())
    with pytest.raises(LabError, match="has no word times, which --highlight-words needs"):
        batch_run.run(replace(job, style=Style(highlight_words=True)), FakeTranscriber())
    batch_run.run(replace(job, style=Style(max_line_width=10)), FakeTranscriber(), again=True)
    with pytest.raises(LabError, match="another style of subtitles"):
        batch_run.run(job, FakeTranscriber())
    with pytest.raises(LabError, match="are for subtitles: add --format srt or vtt"):
        replace(job, formats=("txt",), style=Style(max_line_count=1))


def test_subtitles_in_a_folder_have_unique_names(talks, tmp_path, encoded):
    content = (talks.parent / "clips" / "1.wav").read_bytes()
    for name in ("1.wav", "1.flac"):
        (talks.parent / name).write_bytes(content)
    (tmp_path / "far.wav").write_bytes(content)
    names = ["clips/1.wav", "1.wav", "1.flac", "../far.wav", "1.wav"]
    talks.write_text("audio\n" + "\n".join(names) + "\n")
    job, _ = run(talks, out=str(tmp_path / "subs"), formats=["vtt"])
    assert job.out == tmp_path / "subs" / "talks.transcribed.csv"
    found = sorted(path.relative_to(tmp_path / "subs").as_posix() for path in (tmp_path / "subs").rglob("*.vtt"))
    assert found == ["1.flac.vtt", "1.vtt", "clips/1.vtt", "far.vtt"]


# ---- the command, and a real death


def transcribe(capfd, *arguments: object) -> tuple[int, str, str]:
    code, argv = 0, sys.argv
    sys.argv = ["pipelines", "transcribe", *map(str, arguments)]
    capfd.readouterr()
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
    return code, *capfd.readouterr()


def test_dry_run_counts_and_writes_nothing(talks, capfd):
    before = sorted(talks.parent.rglob("*"))
    code, out, _ = transcribe(capfd, talks, "--dry-run", "--model", "no/where", "--format", "srt")
    assert code == 0
    assert out.splitlines() == [
        "model no/where",
        "would transcribe 6 recordings (audio: path, reference: sentence, speaker: client_id)",
        f"would write {talks.parent / 'talks.transcribed.csv'}",
        "would write srt: beside each recording",
        "nothing was done",
    ]
    assert sorted(talks.parent.rglob("*")) == before


@pytest.mark.slow
def test_killed_process_loses_no_finished_row(talks, tmp_path):
    talks.write_text("audio,text\n" + "".join(f"clips/{(1, 2, 4, 6)[n % 4]}.wav,hej {n}\n" for n in range(200)))
    job = batch_job.plan([talks])
    code = f"""
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(Path(__file__).parent)!r}]
from pipelines.inference.batch import job, run
from test_run import FakeTranscriber
class SlowTranscriber(FakeTranscriber):
    def transcribe(self, *args, **options):
        time.sleep(0.02)
        return super().transcribe(*args, **options)
run.run(job.plan([Path({str(talks)!r})]), SlowTranscriber())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while batch_run.Outline(job).fields["rows_done"] < 3:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    done = batch_run.Outline(job).fields["rows_done"]
    assert 3 <= done < 200
    assert not job.out.exists()
    transcriber = FakeTranscriber()
    run(talks, transcriber)
    assert transcriber.calls == 200 - done
    other, _ = run(talks, out=str(tmp_path / "at-once.csv"))
    assert other.out.read_bytes() == job.out.read_bytes()


@pytest.mark.usefixtures("one_thread")
def test_command_transcribes_a_table_with_a_model(talks, toy_model, encoded, speech, capfd):
    (talks.parent / "spoken.wav").write_bytes(encoded(speech(6_000)))
    talks.write_text("audio,text\nspoken.wav,hej\nclips/3.wav,hej\n")
    out = talks.parent / "x" / "heard.csv"
    code, messages, _ = transcribe(
        capfd, talks, "--model", toy_model, "--engine", "transformers", "--json", "--out", out, "--format", "srt"
    )
    table = json.loads(messages)
    assert (code, table["rows"], table["errors"], table["table"]) == (1, 2, 1, str(out))
    assert table["engine"].startswith("transformers cpu")
    first, second = rows(out)
    assert (first["audio_s"], first["error"], second["transcript"]) == ("0.375", "", "")
    assert float(first["wer"]) == table["score"]["wer"]
    assert (talks.parent / "spoken.srt").exists()


def test_recording_that_cannot_be_read_now_stays_unfinished(talks, monkeypatch):
    def fail(path, *args):
        if str(path).endswith("4.wav"):
            raise OSError(errno.EIO, "I/O error")
        return open(path, *args)

    monkeypatch.setattr(files, "WAITS_S", ())
    monkeypatch.setattr(files, "open", fail, raising=False)
    transcriber = FakeTranscriber()
    decode = transcriber.transcribe
    monkeypatch.setattr(
        transcriber, "transcribe", lambda path, **options: (files.check_readable(path), decode(path, **options))[1]
    )
    with pytest.raises(Unfinished, match="4.wav cannot be read at the moment"):
        run(talks, transcriber)
    assert journal.read_journal(batch_job.plan([talks]).partial).rows == 3
    recordings = batch_run.run(batch_job.plan([talks.parent / "clips" / "4.wav"]), transcriber).results
    assert "cannot be read at the moment" in recordings[0].error
    monkeypatch.undo()
    job, summary = run(talks)
    assert summary.errors == 2 and rows(job.out)[3]["transcript"] == "ljud 4"


def test_parquet_with_decoded_samples_is_transcribed(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cells = [{"array": [0.1] * 1600, "sampling_rate": 16_000}, {"array": [0.1] * 1600, "sampling_rate": None}]
    pq.write_table(pa.table({"audio": cells}), tmp_path / "talks.parquet")
    job, _ = run(tmp_path / "talks.parquet")
    first, second = pq.read_table(job.out).to_pylist()
    assert first["transcript"] == "ljud 1" and "without their sampling rate" in second["error"]


def test_parquet_pointer_of_git_lfs_names_its_command(tmp_path):
    path = tmp_path / "talks.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(LabError, match="git lfs pull"):
        run(path)
