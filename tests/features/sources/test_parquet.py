"""Local Parquet files: their splits and columns, and every row once."""

from __future__ import annotations

import dataclasses
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from log_recorder import record_log

from pipelines import recipes
from pipelines.features.sources import Example
from pipelines.features.sources.parquet.layout import LayoutSettings
from pipelines.features.sources.parquet.local import LocalFiles
from pipelines.features.sources.parquet.source import ParquetSource
from pipelines.features.sources.registry import open_source
from pipelines.infra.errors import LabError

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(n: int, start: int = 0, **columns) -> pa.Table:
    """`n` rows: audio, text, speaker_id; further columns, or None to leave one out."""
    rows = range(start, start + n)
    given = {
        "audio": pa.array([{"bytes": b"sound %d" % i, "path": f"{i}.wav"} for i in rows], AUDIO),
        "text": pa.array([f"mening {i}" for i in rows]),
        "speaker_id": pa.array([i % 3 for i in rows]),
        **columns,
    }
    return pa.table({name: column for name, column in given.items() if column is not None})


def write(path: Path, content: pa.Table, rows_a_group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=rows_a_group)
    return path


@pytest.fixture
def lines() -> list[str]:
    return record_log()


@pytest.fixture
def source(lines):
    """`source(path, seed=7, **settings)`: returns a local ParquetSource; `lines` records its log."""
    return lambda path, seed=7, **settings: ParquetSource(LocalFiles(str(path)), LayoutSettings(**settings), seed)


@pytest.fixture
def refusal(source):
    """`refusal(path, **settings)` returns the one-line error that both `examples` and `identity` raise."""

    def refuse(path, **settings) -> str:
        with pytest.raises(LabError) as error:
            source(path, **settings).examples()  # at once, not at the first example
        with pytest.raises(LabError):
            source(path, **settings).identity()
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


def test_every_row_appears_once_in_order_with_its_fields(tmp_path, source, lines):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", table(10))
    write(tmp_path / "data" / "train-00001-of-00002.parquet", table(3, 10))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", table(2, 100))
    examples = list(source(tmp_path).examples())
    assert [e.text for e in examples] == [f"mening {i}" for i in [*range(13), 100, 101]]
    assert [e.audio for e in examples] == [b"sound %d" % i for i in [*range(13), 100, 101]]
    assert [e.split for e in examples] == ["train"] * 13 + ["test"] * 2
    assert len({e.id for e in examples}) == 15
    assert (examples[11].id, examples[11].speaker) == ("data/train-00001-of-00002:1", "2")
    assert any("train = train, test = test; audio = audio, text = text, speaker = speaker_id" in line for line in lines)
    assert any("has no validation" in line for line in lines)
    assert [e.text for e in source(tmp_path).examples(("test",))] == ["mening 100", "mening 101"]


def test_audio_is_read_on_access_and_pickled(tmp_path, source, monkeypatch):
    path = write(tmp_path / "train.parquet", table(10))
    reads = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns: reads.append((group, *columns)) or read(self, group, columns=columns),
    )
    examples = list(source(path).examples())
    assert [columns for columns in reads if "audio" in columns] == []
    assert [examples[i].audio for i in (9, 8, 8)] == [b"sound 9", b"sound 8", b"sound 8"]
    assert [columns for columns in reads if "audio" in columns] == [(2, "audio")]
    there = pickle.loads(pickle.dumps(examples[9]))
    assert type(there) is Example and there.audio == b"sound 9" and there.meta == examples[9].meta
    renamed = dataclasses.replace(examples[9], text="hej")
    assert (renamed.text, renamed.audio, renamed.id) == ("hej", b"sound 9", examples[9].id)


def test_audio_can_be_read_from_several_threads(tmp_path, source, monkeypatch):
    write(tmp_path / "train.parquet", table(400), 20)
    read, inside, reads = pq.ParquetFile.read_row_group, [], []

    def watched(self, group, columns):
        inside.append(group)
        alone = len(inside) == 1
        time.sleep(0.002)
        inside.pop()
        reads.append((group, *columns) if alone else "two at once")
        return read(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    rows = source(tmp_path).examples()
    with ThreadPoolExecutor(8) as threads:
        blocks = iter(lambda: list(islice(rows, 10)), [])
        sounds = [threads.submit(lambda block=block: [e.audio for e in block]) for block in blocks for _ in range(2)]
    assert [s for future in sounds[::2] for s in future.result()] == [b"sound %d" % i for i in range(400)]
    assert [future.result() for future in sounds[::2]] == [future.result() for future in sounds[1::2]]
    assert "two at once" not in reads
    assert len([what for what in reads if what[1:] == ("audio",)]) == 20


def test_outline_reads_no_audio(tmp_path, source, monkeypatch):
    write(tmp_path / "train.parquet", table(10))
    monkeypatch.setattr("pipelines.features.sources.parquet.source._AudioColumn.__getitem__", lambda *index: 1 / 0)
    assert [e.id for e in source(tmp_path).outline()] == [f"train:{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.parquet", "train"),
        ("data/validation-00000-of-00001-a09b74b3ef9c3b56.parquet", "validation"),
        ("eval.parquet", "validation"),
        ("Testing-00000-of-00001.parquet", "test"),
        ("data/split=test/part-0.parquet", "test"),
        ("evaluation/0000.parquet", "validation"),
        ("TEST.PARQUET", "test"),
        ("test/anna/part-0.pq", "test"),
        ("sv_se/test/0000.parquet", "test"),
        ("sv-SE/dev-00001.parquet", "validation"),
        ("valid/part-00000.parquet", "validation"),
        ("data/partial-train/0003.parquet", "train"),
        ("anything.parquet", "train"),
        ("0000.parquet", "train"),
    ],
)
def test_splits_are_guessed_by_name(tmp_path, source, name, split):
    write(tmp_path / name, table(1))
    assert [e.split for e in source(tmp_path).examples()] == [split]


def test_partial_conversion_is_logged(tmp_path, source, lines):
    write(tmp_path / "partial-train" / "0000.parquet", table(1))
    source(tmp_path).identity()
    assert any("only the head" in line for line in lines)


def test_splits_are_set_by_settings(tmp_path, source, refusal, lines):
    for number, name in enumerate(("train", "other", "validated", "test")):
        write(tmp_path / f"{name}.parquet", table(1, number))
    settings = {"train": "validated+other", "validation": "train", "test": "none"}
    chosen = source(tmp_path, splits=settings)
    assert [(e.split, e.text) for e in chosen.examples()] == [
        ("train", "mening 1"),
        ("train", "mening 2"),
        ("validation", "mening 0"),
    ]
    assert any("not used: test" in line for line in lines)
    assert chosen.identity() != source(tmp_path).identity()
    assert "other, test, train, validated" in refusal(tmp_path, splits={"train": "traain"})
    assert "two splits" in refusal(tmp_path, splits={"train": "train", "validation": "train"})
    assert "two splits" in refusal(tmp_path, splits={"train": "train+test", "test": "test"})
    assert [e.split for e in source(tmp_path, splits={"train": "train+test"}).examples()] == ["train", "train"]
    assert "source.splits.train" in refusal(tmp_path, splits=dict.fromkeys(("train", "validation", "test"), "none"))


def test_file_declared_for_two_splits_raises(tmp_path):
    class Carded(LocalFiles):
        def declared(self):
            return {"": {"train": ["a.parquet"], "validation": ["b.parquet"], "test": ["b.parquet"]}}

    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.parquet", table(1, number))
    with pytest.raises(LabError, match="b.parquet is declared for validation and for test: no row may serve two"):
        ParquetSource(Carded(str(tmp_path))).identity()
    settings = LayoutSettings(splits={"validation": "none"})
    assert [e.split for e in ParquetSource(Carded(str(tmp_path)), settings).examples()] == ["train", "test"]


def test_held_out_speakers_are_drawn_from_train(tmp_path, source, refusal, lines):
    speakers = [f"s{i % 200}" for i in range(1000)]
    write(tmp_path / "train.parquet", table(1000, speaker_id=pa.array(speakers)), 100)
    write(tmp_path / "test.parquet", table(5, 1000, speaker_id=pa.array(["s1"] * 5)))
    drawn = source(tmp_path, splits={"validation": "20%"})
    examples = list(drawn.examples())
    by_split = {split: [e for e in examples if e.split == split] for split in ("train", "validation", "test")}
    assert len(examples) == 1005 and len(by_split["test"]) == 5
    assert 120 < len(by_split["validation"]) < 280
    assert not {e.speaker for e in by_split["train"]} & {e.speaker for e in by_split["validation"]}
    assert [e.id for e in drawn.examples(("validation",))] == [e.id for e in by_split["validation"]]
    assert [e.id for e in drawn.examples(("train",))] == [e.id for e in by_split["train"]]
    assert any("validation = 0.2 of train, test = test" in line for line in lines)
    other = source(tmp_path, splits={"validation": "20%"}, seed=8)
    assert {e.id for e in other.examples(("validation",))} != {e.id for e in by_split["validation"]}
    identities = [drawn, other, source(tmp_path, splits={"validation": "30%"}), source(tmp_path)]
    assert len({str(each.identity()) for each in identities}) == 4
    assert source(tmp_path, seed=8).identity() == source(tmp_path).identity()
    assert "100% or more" in refusal(tmp_path, splits={"validation": "60%", "test": "40%"})
    assert "no training rows" in refusal(tmp_path, splits={"train": "none", "validation": "5%"})


def test_rows_without_speaker_are_drawn_one_by_one(tmp_path, source):
    path = write(tmp_path / "train.parquet", table(400, speaker_id=None), 100)
    examples = [e.split for e in source(path, splits={"validation": "10%", "test": "10 %"}).examples()]
    assert 15 < examples.count("validation") < 70 and 15 < examples.count("test") < 70 and len(examples) == 400


def test_mirror_of_common_voice_is_read(tmp_path, source, lines):
    votes = {"up_votes": pa.array([2]), "locale": pa.array(["sv-SE"]), "client_id": pa.array(["ab" * 64])}
    clip = table(1, text=None, speaker_id=None, sentence=pa.array(["Hej."]), path=pa.array(["cv_1.mp3"]), **votes)
    for split in ("train", "validation", "test", "validated"):
        write(tmp_path / "sv-SE" / f"{split}-00000-of-00001.parquet", clip)
        write(tmp_path / "cy" / f"{split}-00000-of-00001.parquet", clip)
    examples = list(source(tmp_path, splits={"train": "train+validation"}).examples())
    assert [e.split for e in examples] == ["train", "train", "test"]
    assert (examples[0].speaker, examples[0].meta) == ("ab" * 64, {"up_votes": "2", "path": "cv_1.mp3"})


def test_configuration_is_chosen_by_language_or_setting(tmp_path, source, refusal, lines):
    write(tmp_path / "sv_se" / "train" / "0000.parquet", table(1))
    write(tmp_path / "da_dk" / "train" / "0000.parquet", table(1, 5))
    assert [e.text for e in source(tmp_path).examples()] == ["mening 0"]
    assert any("(sv_se)" in line for line in lines)
    assert [e.text for e in source(tmp_path, config="da_dk").examples()] == ["mening 5"]
    message = refusal(tmp_path, config="nb_no")
    assert "'da_dk', 'sv_se'" in message and "'nb_no'" in message and "source.config" in message
    assert [e.text for e in source(tmp_path, language="da").examples()] == ["mening 5"]
    write(tmp_path / "nb_no" / "train" / "0000.parquet", table(1, 7))
    assert [e.text for e in source(tmp_path, language="no").examples()] == ["mening 7"]
    assert "no source.config" in refusal(tmp_path, language="fi")
    (tmp_path / "sv_se").rename(tmp_path / "fi_fi")
    assert "no source.config" in refusal(tmp_path)


def test_missing_audio_column_raises(tmp_path, refusal):
    path = write(tmp_path / "train.parquet", table(1, audio=pa.array([1])))
    assert "no column of audio files" in refusal(path)
    assert "of type int64" in refusal(path, audio_column="audio")
    assert "absent" in refusal(path, audio_column="sound")


def test_two_audio_columns_need_a_setting(tmp_path, source, refusal):
    path = write(tmp_path / "train.parquet", table(1, close=pa.array([{"bytes": b"near", "path": None}], AUDIO)))
    assert "audio columns audio, close" in refusal(path)
    assert [e.audio for e in source(path, audio_column="close").examples()] == [b"near"]


def test_audio_column_may_be_bytes_but_no_image(tmp_path, source):
    features = {"image": {"_type": "Image"}, "speech": {"_type": "Audio"}}
    content = table(1, audio=None, speech=pa.array([b"sound"]), image=pa.array([{"bytes": b"", "path": ""}], AUDIO))
    content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    assert [e.audio for e in source(write(tmp_path / "train.parquet", content)).examples()] == [b"sound"]


def test_text_column_is_guessed_or_set(tmp_path, source, refusal):
    two = write(tmp_path / "two.parquet", table(1, raw_transcription=pa.array(["Mening, 0."])))
    message = refusal(two)
    assert "text columns text, raw_transcription" in message and "source.text_column" in message
    assert [e.text for e in source(two, text_column="raw_transcription").examples()] == ["Mening, 0."]
    assert "must be one of text, raw_transcription, got 'sentence'" in refusal(two, text_column="sentence")
    none = write(tmp_path / "none.parquet", table(1, text=None, words=pa.array(["hej"])))
    assert "name one of words" in refusal(none)
    assert "'speaker_id'" in refusal(none, text_column="speaker_id")
    assert "'who'" in refusal(two, text_column="text", speaker_column="who")


def test_meta_columns_are_read(tmp_path, source):
    features = {"gender": {"names": ["male", "female"], "_type": "ClassLabel"}}
    content = table(
        2,
        gender=pa.array([1, None]),
        Age=pa.array([None, 34]),
        path=pa.array(["/data/clips/common_voice_sv-SE_1.mp3", ""]),
        embedding=pa.array([[1.0], [2.0]]),
        speaker_id=None,
        client_id=pa.array(["ab", None]),
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    first, second = source(write(tmp_path / "train.parquet", content)).examples()
    assert (first.meta, first.speaker) == ({"gender": "female", "path": "common_voice_sv-SE_1.mp3"}, "ab")
    assert (second.meta, second.speaker) == ({"Age": "34"}, "")


def test_row_without_audio_or_text_is_included(tmp_path, source):
    content = table(3, audio=pa.array([None, {"bytes": None, "path": "a.wav"}, {"bytes": b"x", "path": ""}], AUDIO))
    content = content.set_column(1, "text", pa.array(["ett", "två", None]))
    neither, absent, sound = source(write(tmp_path / "train.parquet", content)).examples()
    assert (neither.audio.reason, neither.text) == ("missing", "ett")
    assert "neither the bytes of a recording nor a path" in neither.audio.detail
    assert "no file 'a.wav' beside its Parquet file" in absent.audio.detail
    assert pickle.loads(pickle.dumps(absent)).audio == absent.audio
    assert (sound.audio, sound.text) == (b"x", "")


def test_unusable_files_raise(tmp_path, source, refusal):
    assert "must name a Parquet file" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "must hold Parquet files, got none" in refusal(tmp_path / "empty")
    torn = tmp_path / "torn" / "train.parquet"
    content = write(torn, table(100)).read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    assert "must be a whole Parquet file" in refusal(torn)
    (tmp_path / "torn" / "train.parquet").write_bytes(b"")
    assert "must be a whole Parquet file" in refusal(torn)


def test_later_file_with_other_columns_raises(tmp_path, source):
    write(tmp_path / "train-0000.parquet", table(1, age=pa.array([3])))
    write(tmp_path / "train-0001.parquet", table(1, speaker_id=None))
    assert [e.meta for e in source(tmp_path / "train-0000.parquet").examples()] == [{"age": "3"}]
    with pytest.raises(LabError, match=r"train-0001.parquet must have the columns of the first file, lacks speaker_id"):
        list(source(tmp_path).examples())


def test_later_file_with_fewer_meta_columns_is_read(tmp_path, source):
    write(tmp_path / "train-0000.parquet", table(1, age=pa.array([3])))
    write(tmp_path / "train-0001.parquet", table(1))
    assert [e.meta for e in source(tmp_path).examples()] == [{"age": "3"}, {}]


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow"])
def test_text_that_is_not_utf8_is_one_line(tmp_path, source, name):
    good = table(3)
    offsets, text = (pa.py_buffer(part) for part in (np.array([0, 2, 3, 4], "<i4").tobytes(), b"\xe5\xe4ab"))
    latin = pa.Array.from_buffers(pa.string(), 3, [None, offsets, text])
    bad = good.set_column(good.schema.get_field_index("text"), "text", latin)
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(bad, path)
    else:
        with pa.ipc.new_stream(str(path), bad.schema) as writer:
            writer.write_table(bad)
    with pytest.raises(LabError, match="must be a whole (Parquet|Arrow) file, got: .*UTF8"):
        list(source(path).examples())


def test_damaged_row_group_raises(tmp_path, source):
    path = tmp_path / "train.parquet"
    pq.write_table(table(2000), path, row_group_size=500, compression="zstd")
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(2).column(2).data_page_offset  # text
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    got = []
    with pytest.raises(LabError, match="must be a whole Parquet file"):
        got.extend(example.text for example in source(path).examples())
    assert len(got) == 1000


def test_identity_changes_with_bytes_and_choices(tmp_path, source, monkeypatch):
    path = write(tmp_path / "train.parquet", table(3))
    before = source(path).identity()
    assert before == source(path).identity() and all(isinstance(value, str) for value in before.values())
    assert (before["kind"], before["splits.train"], before["splits.test"]) == ("parquet", "train", "none")
    assert source(path, splits={"train": "none", "test": "train"}).identity() != before
    write(path, table(3, text=pa.array(["a", "b", "c"])))
    assert source(path).identity() != before
    monkeypatch.setattr("pipelines.features.sources.stamps.HASHED_BYTES", 0)
    assert source(path).identity()["files_by"] == "size and time"


def test_recipe_opens_the_source(tmp_path, lines):
    write(tmp_path / "train.parquet", table(2, raw_text=pa.array(["A", "B"])))
    settings = {"source.kind": "parquet", "source.path": str(tmp_path), "source.text_column": "raw_text"}
    settings |= {"source.splits.train": "none", "source.splits.test": "train"}
    opened = open_source(recipes.load("tour", settings).source)
    assert [(e.text, e.split) for e in opened.examples()] == [("A", "test"), ("B", "test")]
