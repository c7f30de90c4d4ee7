"""The folder of takes: what it holds, who may use it, its splits, and what a killed process leaves."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipelines.collection.record import folder as take_folder
from pipelines.collection.record.folder import COLUMNS, UNUSED_SPLIT, Terms, assign_splits, open_folder
from pipelines.features.sources.folder import FolderSource
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform

ROOT = Path(__file__).parents[3]
TERMS = Terms("sv", "CC0-1.0", {"en": 'I agree to "this".\nAnd that.', "sv": "Jag går med på det."})
SOUND = Waveform(np.sin(np.arange(8_000) / 20).astype(np.float32))


@pytest.fixture
def opened(tmp_path):
    """`opened()`: the folder of takes in tmp_path/set, after closing the one opened before."""
    locks = []

    def open_again():
        for lock in locks:
            lock.release()
        folder, lock = open_folder(tmp_path / "set", TERMS)
        locks.append(lock)
        return folder

    yield open_again
    for lock in locks:
        lock.release()


def test_folder_source_reads_takes_as_they_are(opened):
    folder = opened()
    for speaker in ("s1", "s2"):
        for sentence in ("Hej, hej!", "=1+1 är två.", 'Han sa "nej".', "Å, ä och ö."):
            assert folder.add(speaker, sentence, SOUND, {"gender": "female", "age": "30-39"})
    examples = list(FolderSource(str(folder.path)).examples())
    assert len(examples) == 8
    assert {example.text for example in examples} == {row["text"] for row in folder.takes()}
    assert {example.speaker for example in examples} == {"s1", "s2"}
    assert examples[0].meta == {"gender": "female", "age": "30-39"}
    assert {example.split for example in examples} == {"train", "validation", "test"}
    split_of = {example.text: example.split for example in examples}
    assert all(split_of[example.text] == example.split for example in examples), "a sentence is in one split"


def test_terms_are_stored_and_kept(opened, tmp_path):
    folder = opened()
    settings = tomllib.loads((folder.path / "collection.toml").read_text("utf-8"))
    assert settings["licence"] == "CC0-1.0" and settings["consent"] == TERMS.consent and settings["language"] == "sv"
    assert opened().terms == TERMS
    with pytest.raises(LabError, match="another licence"):
        open_folder(folder.path, Terms("sv", "CC-BY-4.0", {}), ["licence"])


def test_speaker_ids_depend_on_folder_and_nickname_only(opened, tmp_path):
    folder = opened()
    ids = [folder.speaker_id(name) for name in ("Åsa", "  a\u030asa ", "ÅSA", "Bo")]
    assert len({*ids[:3]}) == 1 and ids[3] not in ids[:3]
    assert opened().speaker_id("Åsa") == ids[0]
    other, lock = open_folder(tmp_path / "other", TERMS)
    lock.release()
    assert other.speaker_id("Åsa") != ids[0]
    stored = b"".join(path.read_bytes() for path in folder.path.rglob("*") if path.is_file())
    assert "Åsa".encode() not in stored
    assert (folder.path / ".speakers.key").stat().st_mode & 0o077 == 0


def test_second_take_of_a_sentence_is_not_stored(opened):
    folder = opened()
    assert folder.add("s1", "Hej.", SOUND, {"accent": "skånska"})
    assert not folder.add("s1", "Hej.", SOUND, {})
    assert [row["accent"] for row in opened().takes()] == ["skånska"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("notes.txt", "mine", "holds 'notes.txt' but no collection.toml"),
        ("collection.toml", "format = 2", "format 2, expected 1"),
        ("collection.toml", "format = 1\n", "cannot be read"),
        ("collection.toml", 'format = 1\nlanguage="sv"\nlicence="CC0"\nconsent="yes"\n', "cannot be read"),
        ("collection.toml", 'format = 1\nlanguage="sv"\nlicence="CC0"\n[consent]\nen="yes"\n', "cannot be read"),
        ("collection.toml", 'format = 1\nlanguage="xx"\nlicence=3\n[consent]\nen="a"\nsv="b"\n', "cannot be read"),
        ("collection.toml", "[", "cannot be read"),
        ("metadata.csv", "a,b\n1,2\n", "holds 'metadata.csv'"),
    ],
)
def test_folder_of_something_else_is_refused(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(LabError, match=problem) as error:
        open_folder(tmp_path, TERMS)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is written"


def test_unusable_path_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "set", Path("/proc/set")):
        with pytest.raises(LabError, match="name another|cannot be written"):
            open_folder(path, TERMS)


def test_folder_in_use_is_refused(opened):
    folder = opened()
    with pytest.raises(LabError, match="in use by another `record`"):
        open_folder(folder.path, TERMS)


def test_damaged_table_is_refused_and_left_alone(opened):
    folder = opened()
    folder.add("s1", "Hej.", SOUND, {})
    damaged = (folder.path / "metadata.csv").read_text("utf-8").replace("text", "txt", 1)
    (folder.path / "metadata.csv").write_text(damaged, "utf-8")
    with pytest.raises(LabError, match="restore it"):
        opened()
    assert (folder.path / "metadata.csv").read_text("utf-8") == damaged


@pytest.mark.parametrize("step", [1, 2])
def test_full_disk_loses_nothing(opened, monkeypatch, step):
    folder, write, calls = opened(), manifest.write_bytes, []

    def write_until_full(path, content):
        calls.append(path)
        if len(calls) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    folder.add("s1", "Hej.", SOUND, {})
    monkeypatch.setattr(manifest, "write_bytes", write_until_full)
    with pytest.raises(OSError, match="No space"):
        folder.add("s1", "Vi ses.", SOUND, {})
    assert [row["text"] for row in folder.takes()] == ["Hej."]
    assert folder.add("s1", "Vi ses.", SOUND, {}), "the same take can be stored once there is space"
    assert [row["text"] for row in opened().takes()] == ["Hej.", "Vi ses."]


def test_full_folder_takes_no_more(opened, monkeypatch):
    monkeypatch.setattr(take_folder, "MAX_BYTES", 20_000)
    folder = opened()
    folder.add("s1", "Hej.", SOUND, {})
    with pytest.raises(LabError, match="its maximum"):
        folder.add("s1", "Vi ses.", SOUND, {})


def test_row_deleted_by_hand_stays_deleted(opened):
    folder = opened()
    for sentence in ("Ett.", "Två."):
        folder.add("s1", sentence, SOUND, {})
    header, first, _ = (folder.path / "metadata.csv").read_text("utf-8").splitlines()
    (folder.path / "metadata.csv").write_text(f"{header}\n{first}\n", "utf-8")
    folder.add("s1", "Tre.", SOUND, {})
    assert [row["text"] for row in folder.takes()] == ["Ett.", "Tre."]
    assert folder.add("s1", "Två.", SOUND, {}), "the sentence can be read again"


def test_speaker_is_withdrawn_by_deleting_their_clips(opened):
    folder = opened()
    for speaker in ("s1", "s2"):
        folder.add(speaker, "Ett.", SOUND, {})
    shutil.rmtree(folder.path / "clips" / "s1")
    assert [row["speaker"] for row in opened().takes()] == ["s2"]
    assert "s1" not in (folder.path / "metadata.csv").read_text("utf-8")


def test_folder_that_lost_all_clips_is_refused(opened):
    folder = opened()
    folder.add("s1", "Ett.", SOUND, {})
    before = (folder.path / "metadata.csv").read_bytes()
    (folder.path / "clips").rename(folder.path.parent / "moved")
    with pytest.raises(LabError, match="restore it"):
        opened()
    assert (folder.path / "metadata.csv").read_bytes() == before


def test_folder_removed_while_open_is_one_line(opened):
    folder = opened()
    folder.add("s1", "Ett.", SOUND, {})
    shutil.rmtree(folder.path)
    with pytest.raises(LabError, match="restore it"):
        folder.add("s1", "Två.", SOUND, {})
    assert not folder.path.exists()


def rows_of(n_speakers, sentences):
    return [
        dict.fromkeys(COLUMNS, "") | {"path": f"clips/s{i}/{text}.wav", "text": text, "speaker": f"s{i}"}
        for i in range(n_speakers)
        for text in sentences
    ]


def test_splits_of_few_speakers_are_left_to_the_source():
    assert {*assign_splits(rows_of(1, ["Ett.", "Två.", "Tre."]))} == {""}
    assert {*assign_splits(rows_of(2, ["Ett.", "Två.", "Tre."]))} == {""}


def test_no_speaker_and_no_sentence_is_in_two_splits():
    rows = rows_of(12, [f"Mening {word}." for word in "ett två tre fyra fem sex sju åtta nio tio".split()])
    splits = assign_splits(rows)
    used = [(row, split) for row, split in zip(rows, splits, strict=True) if split != UNUSED_SPLIT]
    assert {split for _, split in used} == {"train", "validation", "test"}
    for name in ("speaker", "text"):
        places = Counter(value for value, _ in {(row[name], split) for row, split in used})
        assert {*places.values()} == {1}, name


def test_unused_takes_are_kept_beside_the_table(opened):
    folder = opened()
    for row in rows_of(8, ["Ett.", "Två.", "Tre."]):
        folder.add(row["speaker"], row["text"], SOUND, {})
    n_read = len(list(FolderSource(str(folder.path)).examples()))
    assert 0 < n_read < 24
    assert len(opened().takes()) == 24


WRITER = """
import sys
from pathlib import Path
import numpy as np
from pipelines.collection.record.folder import Terms, open_folder
from pipelines.speech.audio import Waveform

folder, lock = open_folder(Path(sys.argv[1]), Terms("sv", "CC0-1.0", {"en": "Yes.", "sv": "Ja."}))
n = len(folder.takes())
while True:
    n += 1
    folder.add(f"s{n % 8}", f"Mening nummer {n // 3}.", Waveform(np.zeros(160_000, np.float32)), {})
    print(n, flush=True)
"""


@pytest.mark.slow
def test_killed_process_leaves_no_half_take(tmp_path):
    """Kill a process that stores takes, ten times, at different moments: every take that it reported is complete."""
    import soundfile

    n_reported = 0
    for attempt in range(10):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "set")]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            n_reported = int(writer.stdout.readline())
        time.sleep(0.003 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        n_reported = int((writer.stdout.read().split() or [n_reported])[-1])
        writer.wait()
        folder, lock = open_folder(tmp_path / "set", TERMS)
        lock.release()
        assert len(folder.takes()) in (n_reported, n_reported + 1)
        assert not list(folder.path.rglob("*.partial"))
        for row in folder.takes():
            assert soundfile.info(folder.path / row["path"]).duration == 10
        n_reported = len(folder.takes())
    assert FolderSource(str(folder.path)).identity()


def test_git_leaves_the_key_of_speakers_out(opened):
    path = opened().path
    ignored = (path / ".gitignore").read_text("utf-8").split()
    assert ".speakers.key" in ignored and (path / ".speakers.key").is_file()
