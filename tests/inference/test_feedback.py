"""The feedback log: what goes in comes out, whoever writes at once and whatever a crash left behind."""

import csv
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from pipelines.experiments import transcript_log
from pipelines.inference import feedback
from pipelines.infra import csv_log, feedback_log
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform

ROOT = Path(__file__).resolve().parents[2]
NOON = datetime(2026, 3, 1, 12, 0, 0, 123_456, tzinfo=UTC)


def add(log, output="hej på dig", flag="wrong", **more):
    return feedback.append(log, feedback.Feedback(output=output, flag=flag, **{"model": "tiny @ abc", **more}), NOON)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "feedback" / "log.csv"


def test_a_row_is_written_and_read_back(log):
    row = add(log, reference="hej på er", username="Åsa")
    assert log.read_text("utf-8").splitlines()[0] == "audio,output,flag,username,timestamp,reference,wer,model"
    assert row == {
        "audio": "",
        "output": "hej på dig",
        "flag": "wrong",
        "username": "Åsa",
        "timestamp": "2026-03-01T12:00:00+00:00",
        "reference": "hej på er",
        "wer": "0.3333",
        "model": "tiny @ abc",
    }
    assert feedback_log.read(log) == [row]


def test_right_flag_makes_the_output_the_reference(log):
    row = add(log, flag="right", reference="ignored")
    assert (row["reference"], row["wer"]) == ("hej på dig", "0.0000")


@pytest.mark.parametrize("reference", ["", " ", "...", "–"])
def test_reference_without_words_gives_no_wer(log, reference):
    assert add(log, reference=reference)["wer"] == ""


def test_wer_is_normalised_and_counts_from_zero(log):
    assert add(log, output="Hej, på DIG!", reference="hej på dig.")["wer"] == "0.0000"
    assert add(log, output="", reference="hej på dig")["wer"] == "1.0000"


@pytest.mark.parametrize("flag", ["", "Right", "maybe", "=1"])
def test_other_flags_are_refused(log, flag):
    with pytest.raises(LabError, match="right or wrong"):
        add(log, flag=flag)
    assert not log.exists()


@pytest.mark.parametrize("field", ["output", "reference", "username", "model"])
def test_texts_over_2000_characters_are_refused(log, field):
    add(log, **{field: "a" * 2_000})
    with pytest.raises(LabError, match=f"{field} has 2,001"):
        add(log, **{field: "a" * 2_001})
    assert len(feedback_log.read(log)) == 1


def test_control_characters_and_line_breaks_are_cleaned(log):
    row = add(log, output="ett\x00två\r\ntre\x9bfyra\u2028fem\ud800", username="rad\nrad")
    assert row["output"] == "ett två tre fyra fem?"
    assert row["username"] == "rad rad"
    assert len(log.read_bytes().splitlines()) == 2


@pytest.mark.parametrize(
    "cell", ["=1+1", "+46 70", "-5 grader", "@a", "'=1", "''+1", "＝1", "a;=1+1", "a; -1", "'hej", ""]
)
def test_formulas_are_escaped_in_the_file_and_read_back(log, cell):
    add(log, username=cell)
    with open(log, newline="", encoding="utf-8") as file:
        stored = next(iter(csv.DictReader(file)))["username"]
    parts = [stored, *stored.split(";")[1:]]
    assert not any(part.strip().startswith(tuple("=+-@\t＝")) for part in parts)
    assert feedback_log.read(log)[0]["username"] == cell


def test_quotes_commas_and_swedish_letters_survive(log):
    texts = ['hon sa "hej", och gick', "a,b,,c", '"', "räksmörgås é"]
    for text in texts:
        add(log, reference=text)
    assert [row["reference"] for row in feedback_log.read(log)] == texts


def test_foreign_header_is_refused_and_unchanged(log):
    log.parent.mkdir()
    log.write_text("audio,output,flag,username,timestamp\n1,2,3,4,5\n")
    before = log.read_bytes()
    with pytest.raises(LabError, match="name another log"):
        add(log)
    with pytest.raises(LabError, match="name another log"):
        feedback_log.read(log)
    assert log.read_bytes() == before


@pytest.mark.parametrize("torn", [b'audio/x.wav,"hej, p', b"audio/x.wav,hej", b"x" * 50, "hej å".encode()[:-1]])
def test_torn_last_line_loses_no_other_row(log, torn):
    first = add(log, username="first")
    with open(log, "ab") as file:
        file.write(torn)
    assert feedback_log.read(log) == [first]
    second = add(log, username="second")
    assert feedback_log.read(log) == [first, second]
    with open(log, newline="", encoding="utf-8") as file:
        assert [row["username"] for row in csv.DictReader(file)] == ["first", "second"]


@pytest.mark.parametrize("keep", range(0, 60, 5))
def test_log_with_a_cut_header_starts_again(log, keep):
    add(log)
    log.write_bytes(log.read_bytes().splitlines()[0][:keep])
    row = add(log, username="after")
    assert feedback_log.read(log) == [row]


def test_complete_last_row_without_newline_is_kept(log):
    first = add(log, username="first")
    os.truncate(log, log.stat().st_size - 1)
    second = add(log, username="second")
    assert feedback_log.read(log) == [first, second]


def test_log_saved_by_a_spreadsheet_is_read(log):
    first = add(log, username="first")
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes().replace(b"\n", b"\r\n"))
    second = add(log, username="second")
    assert feedback_log.read(log) == [first, second]


def test_full_disk_leaves_no_partial_row(log, monkeypatch):
    add(log)
    before = log.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LabError, match="No space left"):
        add(log, recording=Waveform(np.zeros(160, np.float32)))
    assert log.read_bytes() == before
    assert not list(log.parent.glob("audio/*.wav"))


def test_recording_is_saved_only_if_given(log):
    import soundfile

    samples = np.sin(np.arange(16_000, dtype=np.float32) / 20) / 2
    name = add(log, recording=Waveform(samples))["audio"]
    assert add(log)["audio"] == ""
    kept, rate_hz = soundfile.read(log.parent / name, dtype="float32")
    assert rate_hz == 16_000
    assert np.abs(kept - samples).max() < 1e-4
    assert (log.parent / "audio" / ".gitignore").read_text() == "*\n"


def test_missing_log_has_no_rows(log):
    assert feedback_log.read(log) == []


@pytest.mark.slow
def test_concurrent_processes_and_threads_lose_no_row(log):
    code = (
        "import sys; from pathlib import Path; from pipelines.inference import feedback\n"
        "for i in range(40): feedback.append(Path(sys.argv[1]), feedback.Feedback(output=f'rad {i}', "
        "flag='right', model='m', username=sys.argv[2]))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(log), f"process {n}"], cwd=ROOT) for n in range(2)]
    threads = [
        threading.Thread(target=lambda n=n: [add(log, username=f"thread {n}") for _ in range(20)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in processes] == [0, 0]
    names = [row["username"] for row in feedback_log.read(log)]
    assert {name: names.count(name) for name in set(names)} == (
        {f"process {n}": 40 for n in range(2)} | {f"thread {n}": 20 for n in range(4)}
    )
    assert log.read_bytes().count(b"\n") == 161


def test_concurrent_first_rows_write_one_header(log, monkeypatch):
    """Appenders that all saw an empty log would write a header each: a slow look at the log makes that certain."""
    repair = csv_log.CsvLog._repair
    monkeypatch.setattr(csv_log.CsvLog, "_repair", lambda log: (repair(log), time.sleep(0.02))[0])
    threads = [threading.Thread(target=add, args=(log,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_bytes().count(b"timestamp") == 1
    assert len(feedback_log.read(log)) == 4


def test_report_is_written_as_a_log_and_read_back(tmp_path):
    predictions = pd.DataFrame(
        {"id": ["a", "b"], "reference": ["Hej du.", "=nej"], "hypothesis": ["hej du", ""], "speaker": ["x", "y"]}
    )
    report = SimpleNamespace(predictions=predictions, model="tiny @ 1")
    log = tmp_path / "log.csv"
    for _ in range(2):  # the second replaces what the first wrote
        transcript_log.write(log, report)
    rows = feedback_log.read(log)
    assert [(row["audio"], row["flag"], row["wer"]) for row in rows] == [
        ("a", "right", "0.0000"),
        ("b", "wrong", "1.0000"),
    ]
    assert rows[1]["reference"] == "=nej"
    assert {row["model"] for row in rows} == {"tiny @ 1"}
    assert not list(tmp_path.glob(".*partial"))


def test_report_never_replaces_listeners_feedback(tmp_path):
    log = tmp_path / "log.csv"
    feedback.append(log, feedback.Feedback(output="hej", flag="right", model="tiny @ 1"))
    before = log.read_bytes()
    with pytest.raises(LabError, match="listeners"):
        transcript_log.write(log, SimpleNamespace(predictions=pd.DataFrame(), model="tiny @ 1"))
    assert log.read_bytes() == before
    with pytest.raises(LabError, match="no folder"):
        transcript_log.refuse_listeners(tmp_path / "absent" / "log.csv")


def test_full_log_or_folder_of_recordings_is_refused(log, monkeypatch):
    recording = Waveform(np.zeros(16_000, np.float32))
    monkeypatch.setattr(feedback, "MAX_RECORDINGS_BYTES", 60_000)
    assert [add(log, recording=recording)["audio"] != "" for _ in range(2)] == [True, True]
    with pytest.raises(LabError, match="of recordings: move them away"):
        add(log, recording=recording)
    assert add(log)["audio"] == "", "feedback without a recording still has room"
    monkeypatch.setattr(feedback, "MAX_LOG_BYTES", 10)
    with pytest.raises(LabError, match="log.csv is larger than"):
        add(log)
    assert len(feedback_log.read(log)) == 3
    assert len(list(log.parent.glob("audio/*.wav"))) == 2
