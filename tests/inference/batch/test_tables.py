"""Tables of recordings: what is read as what, and that nothing of a table is lost on the way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.inference.batch import table_files
from pipelines.inference.batch.table_files import FileList, open_table
from pipelines.inference.batch.tables import find_recordings
from pipelines.infra.errors import LabError

ADDED = [
    {"transcript": 'Hej, "du"', "confidence": 0.9, "error": None},
    {"transcript": "", "confidence": None, "error": "missing: there is no file b.wav"},
]
NAMES = ("transcript", "confidence", "error")


def written(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "content", "out"),
    [
        (
            "a.csv",
            'path,sentence\na.wav,"Hej, ""du"""\n\nb.wav,  Två\n',
            'path,sentence,transcript,confidence,error\na.wav,"Hej, ""du""","Hej, ""du""",0.9,\n'
            "b.wav,  Två,,,missing: there is no file b.wav\n",
        ),
        (
            "a.csv",
            'path;sentence\r\na.wav;"Hej; du"\r\nb.wav;Två\r\n',
            'path;sentence;transcript;confidence;error\na.wav;"Hej; du";"Hej, ""du""";0.9;\n'
            "b.wav;Två;;;missing: there is no file b.wav\n",
        ),
        (
            "a.tsv",
            'path\tsentence\na.wav\t"Hej"\nb.wav\tTvå\n',
            'path\tsentence\ttranscript\tconfidence\terror\na.wav\t"Hej"\tHej, "du"\t0.9\t\n'
            "b.wav\tTvå\t\t\tmissing: there is no file b.wav\n",
        ),
    ],
    ids=["commas", "semicolons", "tabs"],
)
def test_text_table_keeps_cells_and_gets_columns(tmp_path, name, content, out):
    table = open_table(written(tmp_path / name, "\ufeff" + content))
    assert [(row.name, row.reference.strip('"')[:3]) for row in find_recordings(table)] == [
        ("a.wav", "Hej"),
        ("b.wav", "Två"),
    ]
    table.write(tmp_path / f"out{table.path.suffix}", NAMES, iter(ADDED))
    assert (tmp_path / f"out{table.path.suffix}").read_bytes().decode() == out
    again = open_table(tmp_path / f"out{table.path.suffix}")
    assert [row["transcript"] for row in again.rows(["transcript"])] == ['Hej, "du"', ""]


def test_parquet_keeps_types_and_audio_and_gets_columns(tmp_path):
    sound = pa.array([{"bytes": b"RIFF", "path": "x/1.wav"}, {"bytes": None, "path": "2.wav"}])
    table = pa.table({"Audio": sound, "n": pa.array([1, None], pa.int8()), "text": ["Hej", None]})
    pq.write_table(table.replace_schema_metadata({"huggingface": "{}"}), tmp_path / "a.parquet")
    opened = open_table(tmp_path / "a.parquet")
    first, second = find_recordings(opened)
    assert (first.audio, first.name, first.reference) == (b"RIFF", "x/1.wav", "Hej")
    assert (second.audio, second.reference) == (tmp_path / "2.wav", "")
    opened.write(tmp_path / "out.parquet", NAMES, iter(ADDED))
    written_table = pq.read_table(tmp_path / "out.parquet")
    assert written_table.select(table.column_names).cast(table.schema).equals(table)
    assert written_table.schema.metadata[b"huggingface"] == b"{}"
    assert written_table.select(NAMES).to_pylist() == ADDED


def test_long_parquet_is_read_and_written_in_batches(tmp_path):
    n = 3 * table_files._BATCH_ROWS + 5
    pq.write_table(pa.table({"file": [f"{i}.wav" for i in range(n)]}), tmp_path / "a.parquet")
    opened = open_table(tmp_path / "a.parquet")
    assert [row.name for row in find_recordings(opened)] == [f"{i}.wav" for i in range(n)]
    opened.write(tmp_path / "out.parquet", ("transcript",), ({"transcript": str(i)} for i in range(n)))
    assert pq.read_table(tmp_path / "out.parquet")["transcript"].to_pylist() == [str(i) for i in range(n)]


def test_columns_are_found_by_usual_or_given_names(tmp_path):
    table = open_table(written(tmp_path / "a.csv", "file_name,Path,client_id,sentence,what\na,b,c,d,e\n"))
    recordings = find_recordings(table)
    assert (recordings.audio, recordings.reference, recordings.speaker) == ("Path", "sentence", "client_id")
    recordings = find_recordings(table, audio="file_name", reference="what", speaker="sentence")
    (row,) = recordings
    assert (row.name, row.reference, row.speaker) == ("a", "e", "d")
    assert row.audio == tmp_path / "a", "paths are seen from the table"


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ("a,b\n1,2\n", {}, "no column of audio: expected one of audio, path, file, file_name, got a, b. Name it with"),
        ("audio,b\n1,2\n", {"reference": "c"}, "--reference-column: no column 'c', the table has audio, b"),
        ("audio,transcript\n1,2\n", {}, "has a column transcript already"),
        ("audio,b\n1,2,3\n", {}, "line 2: a row must have the header's 2 cells, got 3"),
        ("audio,audio\n1,2\n", {}, "got 'audio' as column 1 and 'audio' as column 2"),
        ("", {}, "is empty"),
        ('audio,b\n"1,2\n', {}, "quotes must be balanced"),
    ],
)
def test_unusable_table_is_one_line(tmp_path, content, options, complaint):
    table = open_table(written(tmp_path / "a.csv", content))
    with pytest.raises(LabError) as caught:
        list(find_recordings(table, **options, added=("transcript",)))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_encoding_and_missing_file_are_one_line(tmp_path):
    with pytest.raises(LabError, match="must be UTF-8"):
        list(find_recordings(open_table(written(tmp_path / "a.csv", "audio\npå.wav\n", "cp850"))))
    with pytest.raises(LabError, match="there is no table"):
        open_table(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_bytes(b"PAR0")
    with pytest.raises(LabError, match="cannot be read as Parquet"):
        find_recordings(open_table(tmp_path / "c.parquet"))


def test_parquet_audio_is_read_only_when_needed(tmp_path, monkeypatch):
    n = 1_000
    sound = [{"bytes": bytes([row % 250]) * 1_000, "path": f"{row}.wav"} for row in range(n)]
    pq.write_table(pa.table({"audio": sound, "text": [f"rad {row}" for row in range(n)]}), tmp_path / "a.parquet")
    recordings = find_recordings(open_table(tmp_path / "a.parquet"))
    read, rows = [], recordings.table.rows
    monkeypatch.setattr(recordings.table, "rows", lambda columns: read.append(list(columns)) or rows(columns))
    assert recordings.count() == n and read == []
    assert [row.reference for row in recordings.without_audio()] == [f"rad {row}" for row in range(n)]
    assert read == [["text"]]
    monkeypatch.setattr(table_files, "_GROUP_BYTES", 300_000)
    recordings.table.write(tmp_path / "out.parquet", NAMES, [ADDED[0]] * n)
    written_table = pq.ParquetFile(tmp_path / "out.parquet")
    sizes = [written_table.metadata.row_group(number).num_rows for number in range(written_table.num_row_groups)]
    assert sum(sizes) == n and 3 <= len(sizes) <= 5
    assert written_table.read(["audio"])["audio"].to_pylist() == sound


def test_large_row_group_is_read_gradually(tmp_path):
    """As others write them: its sound is read while it is heard."""
    rng, n = np.random.default_rng(0), 6_000
    sound = pa.array([rng.bytes(16_000) for _ in range(n)])
    pq.write_table(pa.table({"audio": sound}), tmp_path / "a.parquet", use_dictionary=False)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_table(tmp_path / "a.parquet").rows(["audio"])]
    assert len(held) == n and max(held) < n * 16_000 / 2


@pytest.mark.parametrize("columns", ["audio", "audio,text"])
def test_rows_are_counted_and_read_without_audio(tmp_path, columns):
    table = find_recordings(open_table(written(tmp_path / "a.csv", f"{columns}\n" + f"{columns}\n" * 3)))
    assert table.count() == len(list(table.without_audio())) == 3


def test_file_list_has_paths_relative_to_its_folder(tmp_path):
    for name in ("t/b.wav", "t/x/a.MP3", "t/.hidden.wav", "t/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files = table_files.find_audio_files(tmp_path / "t")
    listing = FileList(files, tmp_path)
    assert [row.name for row in find_recordings(listing)] == ["t/b.wav", "t/x/a.MP3"]
    assert [row.audio for row in find_recordings(listing)] == files
    before = listing.digest()
    listing.write(tmp_path / "out.csv", ("transcript",), [{"transcript": "ett"}, {"transcript": None}])
    assert (tmp_path / "out.csv").read_text("utf-8") == "audio,transcript\nt/b.wav,ett\nt/x/a.MP3,\n"
    files[0].write_bytes(b"longer")
    assert listing.digest() != before
    with pytest.raises(LabError, match="no audio in"):
        table_files.find_audio_files(tmp_path / "t" / "none")


def test_quoted_tsv_is_read_and_written_with_quotes(tmp_path):
    content = 'path\tsentence\na.wav\t"""Hej"", sa hon."\nb.wav\t"rad\nrad"\n'
    table = open_table(written(tmp_path / "a.tsv", content))
    assert [row.reference for row in find_recordings(table)] == ['"Hej", sa hon.', "rad\nrad"]
    table.write(tmp_path / "out.tsv", NAMES, iter(ADDED))
    again = open_table(tmp_path / "out.tsv")
    assert [row["sentence"] for row in again.rows(["sentence"])] == ['"Hej", sa hon.', "rad\nrad"]
    assert [row["transcript"] for row in again.rows(["transcript"])] == ['Hej, "du"', ""]


def test_json_lines_are_read_and_written(tmp_path):
    lines = '{"audio_filepath": "a.wav", "text": NaN, "speaker": "nan"}\n{"audio_filepath": "b.wav", "text": "Två"}\n'
    table = open_table(written(tmp_path / "manifest.json", lines))
    assert [(row.name, row.reference, row.speaker) for row in find_recordings(table)] == [
        ("a.wav", "", ""),
        ("b.wav", "Två", ""),
    ]
    assert table.suffixes == (".jsonl",)
    table.write(tmp_path / "out.jsonl", NAMES, iter(ADDED))
    again = open_table(tmp_path / "out.jsonl")
    assert [row["transcript"] for row in again.rows(["transcript"])] == ['Hej, "du"', ""]


@pytest.mark.parametrize("named", ["clips\\a.wav", "Clips/A.wav", "/x/clips/a.wav", "clips/a.wav "])
def test_recording_is_found_however_it_is_named(tmp_path, named):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.wav").write_bytes(b"sound")
    (row,) = find_recordings(open_table(written(tmp_path / "a.csv", f'audio\n"{named}"\n')))
    assert row.audio == tmp_path / "clips/a.wav"


def test_parts_of_recordings_are_read(tmp_path):
    content = "audio,start,end,duration\na.wav,1,2.5,9\na.wav,2.5,,9\na.wav,,,9\na.wav,3,2,9\n"
    first, second, whole, wrong = find_recordings(open_table(written(tmp_path / "a.csv", content)))
    assert (str(first.excerpt), str(second.excerpt), whole.excerpt) == ("1-2.5", "2.5-11.5", None)
    assert wrong.excerpt.problem
    (stated,) = find_recordings(open_table(written(tmp_path / "b.csv", "audio,duration\na.wav,9\n")))
    assert stated.excerpt is None
