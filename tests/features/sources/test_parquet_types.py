"""Parquet and Arrow files as other programs write them: types, splits in a column, paths, missing files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from log_recorder import record_log

from pipelines.features.sources import Example
from pipelines.features.sources.parquet.layout import LayoutSettings
from pipelines.features.sources.parquet.local import LocalFiles
from pipelines.features.sources.parquet.source import ParquetSource
from pipelines.infra.errors import LabError
from pipelines.speech.audio import decode

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TONE = np.sin(np.arange(1600) / 5).astype(np.float32) / 2


def columns(n: int, **given) -> pa.Table:
    """Return a table of `n` rows; a column that is None is left out."""
    plain = {
        "audio": pa.array([{"bytes": b"sound %d" % i, "path": f"{i}.wav"} for i in range(n)], AUDIO),
        "text": pa.array([f"mening {i}" for i in range(n)]),
        "speaker": pa.array([f"s{i}" for i in range(n)]),
    }
    return pa.table({name: column for name, column in {**plain, **given}.items() if column is not None})


def write(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


def opened(path: Path, **settings) -> ParquetSource:
    return ParquetSource(LocalFiles(str(path)), LayoutSettings(**settings))


def read(path: Path, **settings) -> list[Example]:
    return list(opened(path, **settings).examples())


def refusal(path: Path, **settings) -> str:
    with pytest.raises(LabError) as error:
        read(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int8(), pa.string()), pa.large_string(), pa.string_view()], ids=str)
def test_text_types_are_read(tmp_path, kind):
    cells = {name: pa.array(["a", "b", None]).cast(kind) for name in ("text", "speaker", "gender")}
    examples = read(write(tmp_path / "train.parquet", columns(3, **cells)))
    assert [(e.text, e.speaker, e.meta.get("gender", "")) for e in examples] == [(c, c, c) for c in ("a", "b", "")]


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.binary(1)], ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_binary_types_are_read(tmp_path, kind, nested):
    sounds = pa.array([b"x", b"y"], kind)
    audio = pa.StructArray.from_arrays([sounds, pa.array(["", ""])], ["bytes", "path"]) if nested else sounds
    assert [e.audio for e in read(write(tmp_path / "train.parquet", columns(2, audio=audio)))] == [b"x", b"y"]


@pytest.mark.parametrize(
    ("samples", "kind"),
    [
        (TONE, pa.list_(pa.float32())),
        (TONE.astype(np.float64), pa.large_list(pa.float64())),
        ((TONE * 32768).astype(np.int16), pa.list_(pa.int16())),
        (np.stack([TONE, TONE]), pa.list_(pa.list_(pa.float32()))),
        (np.stack([TONE, TONE], axis=1), pa.list_(pa.list_(pa.float32()))),
    ],
)
def test_decoded_samples_are_read(tmp_path, samples, kind):
    row = {"array": samples.tolist(), "sampling_rate": 16_000, "path": None}
    audio = pa.array([row], pa.struct([("array", kind), ("sampling_rate", pa.int64()), ("path", pa.string())]))
    [example] = read(write(tmp_path / "struct" / "train.parquet", columns(1, audio=audio)))
    np.testing.assert_allclose(decode(example.audio).samples, TONE, atol=1e-4)
    cells = {"audio": pa.array([samples.tolist()], kind), "sampling_rate": pa.array([16_000])}
    [plain] = read(write(tmp_path / "list" / "train.parquet", columns(1, **cells)))
    np.testing.assert_allclose(decode(plain.audio).samples, TONE, atol=1e-4)


def test_samples_without_rate_are_refused(tmp_path):
    path = write(tmp_path / "train.parquet", columns(1, audio=pa.array([TONE.tolist()])))
    assert "no column sampling_rate or sample_rate" in refusal(path)


@pytest.mark.parametrize("kind", ["struct", "string", "dictionary"])
def test_recordings_beside_the_file_are_read(tmp_path, kind):
    names = ["clips/a.wav", "../clips/b.wav", "/etc/hosts", "gone.wav"]
    (tmp_path / "clips").mkdir()
    (tmp_path / "data" / "clips").mkdir(parents=True)
    for name in ("clips/b.wav", "data/clips/a.wav"):
        (tmp_path / name).write_bytes(name.encode())
    audio = pa.array([{"bytes": None, "path": name} for name in names], AUDIO)
    if kind != "struct":
        audio = pa.array(names) if kind == "string" else pa.array(names).dictionary_encode()
    write(tmp_path / "data" / "train.parquet", columns(4, audio=audio))
    before, examples = opened(tmp_path).identity(), read(tmp_path)
    assert [e.audio.read_bytes() for e in examples[:2]] == [b"data/clips/a.wav", b"clips/b.wav"]
    assert [e.audio.reason for e in examples[2:]] == ["missing", "missing"]
    (tmp_path / "clips" / "b.wav").write_bytes(b"another")
    assert opened(tmp_path).identity() != before
    (tmp_path / "data" / "gone.wav").write_bytes(b"returned")
    assert opened(tmp_path).identity() != before


def test_split_column_decides(tmp_path):
    lines = record_log()
    splits = pa.array(["TRAIN", "train", "eval", "testing", "other", None]).dictionary_encode()
    path = write(tmp_path / "corpus.parquet", columns(6, split=splits))
    assert [e.split for e in read(path)] == ["train", "train", "validation", "test", "other", ""]
    assert [e.text for e in opened(path).examples(("test",))] == ["mening 3"]
    assert opened(path).identity()["splits.train"] == "TRAIN+train"
    assert any("validation = eval, test = testing (column split)" in line for line in lines)
    chosen = read(path, splits={"train": "train+other", "test": "none"})
    assert [(e.split, e.text) for e in chosen] == [
        ("train", "mening 1"),
        ("validation", "mening 2"),
        ("train", "mening 4"),
    ]


def test_split_column_of_a_file_named_train_decides(tmp_path):
    path = write(tmp_path / "train.parquet", columns(2, split=pa.array(["train", "test"])))
    assert [e.split for e in read(path)] == ["train", "test"]
    assert [e.split for e in read(path, splits={"train": "train", "test": "none"})] == ["train", "train"]


def test_split_column_that_agrees_changes_no_identity(tmp_path):
    path = write(tmp_path / "train.parquet", columns(2, split=pa.array(["train", "Training"])))
    assert "split_column" not in opened(path).identity()


def test_start_and_end_of_paths_are_refused_and_else_logged(tmp_path):
    times = {"start": pa.array([0.0, 1.0]), "end": pa.array([1.0, 2.0])}
    lines = record_log()
    assert len(read(write(tmp_path / "bytes" / "train.parquet", columns(2, **times)))) == 2
    assert any("the columns start, end are not used" in line for line in lines)
    path = write(tmp_path / "paths" / "train.parquet", columns(2, audio=pa.array(["a.wav", "a.wav"]), **times))
    assert "not read in parts" in refusal(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])], ["audio", "text", "text"])
    assert "two columns 'text'" in refusal(write(tmp_path / "train.parquet", table))


def test_splits_in_a_column_of_another_name_are_refused(tmp_path):
    path = write(tmp_path / "train.parquet", columns(2, subset=pa.array(["train", "test"])))
    assert "the column 'subset' holds names of splits" in refusal(path)


def test_split_column_that_contradicts_the_file_is_refused(tmp_path):
    write(tmp_path / "train.parquet", columns(2, split=pa.array(["train", "test"])))
    write(tmp_path / "test.parquet", columns(1, split=pa.array(["test"])))
    assert "train.parquet row 1: the column split says 'test'" in refusal(tmp_path)
    settings = {"train": "train", "test": "test"}
    assert [e.split for e in read(tmp_path, splits=settings)] == ["train", "train", "test"]


def test_split_settings_accept_synonyms(tmp_path):
    for name in ("Training", "dev"):
        write(tmp_path / f"{name}.parquet", columns(1))
    settings = {"train": "train", "validation": "validation"}
    assert [e.split for e in read(tmp_path, splits=settings)] == ["train", "validation"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-00000-of-00004"], ["lacks 3 of them", "numbers 1, 2, 3", "source.allow_missing_files"]),
        (["train-00001-of-00003-0123456789abcdef", "train-00003-of-00003"], ["lacks 1 of them", "numbers 2"]),
        (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"], ["two versions", "-of-00001"]),
    ],
)
def test_incomplete_series_is_refused(tmp_path, names, words):
    for name in names:
        write(tmp_path / f"{name}.parquet", columns(1))
    message = refusal(tmp_path)
    assert all(word in message for word in words), message
    assert len(read(tmp_path, allow_missing_files=True)) == len(names)


def test_incomplete_series_of_an_unused_split_is_no_error(tmp_path):
    write(tmp_path / "train-00001-of-00001.parquet", columns(1))
    write(tmp_path / "other-00000-of-00002.parquet", columns(1))
    assert [e.split for e in read(tmp_path)] == ["train"]


def test_lfs_pointer_names_its_command(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 40224\n"
    (tmp_path / "train.parquet").write_text(pointer)
    assert "git lfs pull" in refusal(tmp_path)


def test_speaker_column_in_later_files_only_is_refused(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", columns(1, speaker=None))
    write(tmp_path / "train-00001-of-00002.parquet", columns(1))
    assert "has speaker, which is missing there" in refusal(tmp_path)


def save_to_disk(folder: Path, table: pa.Table, **state) -> None:
    """Write what `Dataset.save_to_disk` writes: Arrow files in the streaming format, and the list of them."""
    folder.mkdir(parents=True)
    for number in range(2):
        with pa.ipc.new_stream(folder / f"data-0000{number}-of-00002.arrow", table.schema) as writer:
            writer.write_table(table.slice(number, 1))
    (folder / "cache-0123.arrow").write_bytes(b"left over from map")
    names = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, **state}))


def test_saved_data_set_is_read(tmp_path):
    for split in ("train", "validation", "test"):
        save_to_disk(tmp_path / "dict" / split, columns(2))
    assert [e.split for e in read(tmp_path / "dict")] == [s for s in ("train", "validation", "test") for _ in range(2)]
    save_to_disk(tmp_path / "alone", columns(2))
    assert [(e.id, e.audio) for e in read(tmp_path / "alone")] == [
        ("data-00000-of-00002:0", b"sound 0"),
        ("data-00001-of-00002:0", b"sound 1"),
    ]
    save_to_disk(tmp_path / "paths", columns(2, audio=pa.array([{"bytes": None, "path": "a.wav"}] * 2, AUDIO)))
    (tmp_path / "paths" / "a.wav").write_bytes(b"x")
    assert "recordings_sha256" in opened(tmp_path / "paths").identity()
    assert read(tmp_path / "paths")[1].audio.read_bytes() == b"x"


def test_incomplete_saved_data_set_is_refused(tmp_path):
    save_to_disk(tmp_path / "a", columns(2))
    (tmp_path / "a" / "data-00001-of-00002.arrow").unlink()
    assert "lacks data-00001-of-00002.arrow" in refusal(tmp_path / "a")
    save_to_disk(tmp_path / "b", columns(2), _indices_data_files=[{"filename": "indices.arrow"}])
    assert "to_parquet" in refusal(tmp_path / "b")
