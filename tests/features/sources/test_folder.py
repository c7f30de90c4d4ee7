from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipelines.features.sources import SPLITS, NoTranscript, stamps
from pipelines.features.sources.folder import FolderSource
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError, decode

ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path):
    """`corpus({"name": content, ...})`: a folder with these files; `.wav` content is generated if it is None."""

    def make(files: dict[str, str | bytes | None]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = f"sound of {name}" if content is None else content
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return make


def read(folder: Path, seed: int = 7) -> list:
    return list(FolderSource(str(folder), seed).examples())


def refusal(folder: Path) -> str:
    """Return the one-line error that both `identity` and `examples` raise."""
    with pytest.raises(LabError) as error:
        FolderSource(str(folder)).examples()  # at once, not at the first example
    with pytest.raises(LabError):
        FolderSource(str(folder)).identity()
    assert "\n" not in str(error.value)
    return str(error.value)


CSV = 'path,text,split,speaker,gender,age,accent,note\nc/1.wav,"Hej, ""du""!",train,anna,female,,skånska,x\n'


def test_csv_provides_every_field(corpus):
    [example] = read(corpus({"transcripts.csv": CSV, "c/1.wav": None}))
    assert (example.id, example.split, example.text, example.speaker) == ("c/1", "train", 'Hej, "du"!', "anna")
    assert example.meta == {"gender": "female", "accent": "skånska"}
    assert example.audio.read_bytes() == b"sound of c/1.wav"


HEADER, ROW = CSV.splitlines(keepends=True)


@pytest.mark.parametrize(
    "content",
    [
        CSV.encode(),
        codecs.BOM_UTF8 + CSV.encode(),
        CSV.replace("\n", "\r\n").encode(),
        CSV.replace("e", "e\0").encode(),
        (HEADER.upper() + ROW).encode(),
        (CSV.replace(",", ";").replace("Hej;", "Hej,") + ";;;;;;;\r\n\r\n").encode(),
    ],
    ids=["plain", "bom", "crlf", "nul", "capitals", "semicolons and empty rows"],
)
def test_csv_variants_of_spreadsheets_are_read(corpus, content):
    plain = read(corpus({"transcripts.csv": CSV, "c/1.wav": None}))
    assert read(corpus({"transcripts.csv": content})) == plain


def test_tsv_keeps_quotes_and_commas(corpus):
    table = 'file\tsentence\n1.wav\t"Hej, sa han\n2.wav\tja"\n'
    assert [e.text for e in read(corpus({"transcripts.tsv": table}))] == ['"Hej, sa han', 'ja"']


def test_jsonl_is_read(corpus):
    lines = [
        {"audio": "1.wav", "transcription": "å\u2028ä", "client_id": 7, "age": None},
        {"audio": "2.wav", "transcription": None},
    ]
    table = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    first, second = read(corpus({"metadata.jsonl": table}))
    assert (first.text, first.speaker, first.meta, second.text) == ("å\u2028ä", "7", {}, "")


@pytest.mark.parametrize("file", ["path", "file_name", "file", "audio"])
@pytest.mark.parametrize("text", ["text", "sentence", "transcript", "transcription"])
@pytest.mark.parametrize("speaker", ["speaker", "client_id", "speaker_id"])
def test_all_column_names_are_recognised(corpus, file, text, speaker):
    [example] = read(corpus({"metadata.csv": f"{file},{text},{speaker}\n1.wav,hej,anna\n"}))
    assert (example.id, example.text, example.speaker) == ("1", "hej", "anna")


def test_jsonl_nul_bytes_are_dropped(corpus):
    assert [e.text for e in read(corpus({"metadata.jsonl": '{"path": "a.wav", "text": "h\0ej \\u0000"}'}))] == ["hej "]


def test_txt_files_replace_a_missing_table(corpus):
    folder = corpus(
        {
            "b/2.FLAC": None,
            "b/2.txt": codecs.BOM_UTF8 + "två\r\n".encode(),
            "a.wav": None,
            "a.txt": "ett",
            "c.mp3": None,
            "readme.txt": "not a clip",
            "._a.wav": None,
            ".cache/d.wav": None,
        }
    )
    examples = [(e.id, e.text.strip()) for e in read(folder)]
    assert examples == [("a", "ett"), ("b/2", "två"), ("c", "")]  # c comes too: curation rejects it as no_text


def test_missing_audio_file_becomes_an_example(corpus):
    here, gone = read(corpus({"transcripts.csv": "path,text\na.wav,ett\nb.wav,två\n", "a.wav": None}))
    assert here.audio.is_file()
    assert not gone.audio.exists()
    with pytest.raises(AudioError) as error:
        decode(gone.audio)
    assert error.value.reason == "missing"


def test_ids_are_unique(corpus):
    ids = [e.id for e in read(corpus({"metadata.csv": "path,text\na.wav,x\na.mp3,x\nd/a.wav,x\nb.1.wav,x\nå.wav,x\n"}))]
    assert ids == ["a.wav", "a.mp3", "d/a", "b.1", "å"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"transcripts.csv": "path,text\na.wav,gå bort\n".encode("cp850")}, ["UTF-8", "0x86", "transcripts.csv"]),
        ({"a.wav": None, "a.txt": "gå bort".encode("mac-roman")}, ["UTF-8", "a.txt"]),
        ({"transcripts.csv": "path,words\na.wav,hej\n"}, ["text or sentence or transcript", "got path, words"]),
        ({"transcripts.csv": "name|text\na.wav|hej\n"}, ["path or file_name or file or audio", "name, text"]),
        ({"transcripts.jsonl": '{"path": "a.wav", "text": "x"}\n{"path": "b.wav"}\n'}, ["line 2", "text or sentence"]),
        ({"transcripts.csv": "path,text\na.wav,x\nb.wav,y\n./a.wav,z\n"}, ["line 4", "'a.wav' again", "line 2"]),
        ({"transcripts.csv": "path,text\n"}, ["at least one transcript", "no row in transcripts.csv"]),
        ({"transcripts.csv": ""}, ["transcripts.csv is empty"]),
        ({"transcripts.jsonl": "\n"}, ["at least one transcript"]),
        ({}, ["at least one transcript", "transcripts.csv"]),
        ({"a.wav": None, "b.txt": "not beside it"}, ["at least one transcript"]),
        ({"transcripts.csv": "path,text\na.wav,hej, du\n"}, ["line 2", "2 cells", "got 3", "quotes"]),
        ({"transcripts.csv": "path,text\na.wav\n"}, ["line 2", "got 1"]),
        ({"transcripts.csv": 'path,text\na.wav,"hej\nb.wav,du\n'}, ["quotes must be balanced"]),
        ({"transcripts.csv": 'path,text\na.wav,"hej" du\n'}, ["line 2", "quotes must be balanced"]),
        ({"transcripts.csv": f"path,text\na.wav,{'x' * 200_000}\n"}, ["line 2", "field larger"]),
        ({"transcripts.csv": "path,text\n ,hej\n"}, ["line 2", "inside the folder"]),
        ({"transcripts.jsonl": '{"path": "a.wav", "text": "x"}\n{"path": \n'}, ["line 2", "JSON object"]),
        ({"transcripts.jsonl": "[" * 100_000}, ["line 1", "JSON object"]),
        ({"transcripts.jsonl": '["a.wav", "hej"]\n'}, ["line 1", "JSON object"]),
        ({"transcripts.jsonl": '{"audio": {"path": "a.wav"}, "text": "x"}\n'}, ["line 1", "audio", "plain"]),
        ({"transcripts.jsonl": '{"path": "a.wav", "text": "\\ud800"}\n'}, ["line 1", "text", "UTF-8"]),
        (
            {"transcripts.csv": "path,text\na.wav,x\n", "metadata.csv": "path,text\n"},
            ["transcripts.csv and metadata.csv"],
        ),
        ({"transcripts.csv/a.wav": None}, ["transcripts.csv", "directory"]),
    ],
)
def test_unusable_table_is_a_one_line_error(corpus, files, words):
    message = refusal(corpus(files))
    assert all(word in message for word in words), message


def test_absent_folder_raises(tmp_path):
    assert "source.path" in refusal(tmp_path / "nowhere")


def test_file_name_that_is_not_utf8_raises(tmp_path):
    (tmp_path / "a.txt").write_text("ett")
    (tmp_path / "a.wav").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe5.wav")).write_bytes(b"x")
    assert refusal(tmp_path).encode()


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hosts",
        "../secret.wav",
        "c/../../secret.wav",
        "link.wav",
        "away/secret.wav",
        "circle",
        ".",
        "c/..",
    ],
)
def test_paths_out_of_the_folder_raise(tmp_path, name):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "secret.wav").write_bytes(b"secret")
    (inside / "link.wav").symlink_to(tmp_path / "secret.wav")
    (inside / "away").symlink_to(tmp_path)
    (inside / "circle").symlink_to(inside / "circle")
    (inside / "transcripts.csv").write_text(f"path,text\nok.wav,hej\n{name},hej\n")
    message = refusal(inside)
    assert "transcripts.csv line 3" in message
    assert "inside the folder" in message


@pytest.mark.parametrize("link", ["a.wav", "a.txt"])
def test_txt_files_out_of_the_folder_raise(corpus, tmp_path_factory, link):
    folder = corpus({"a.wav": None, "a.txt": "hej", "b.wav": None, "b.txt": "du"})
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("secret")
    (folder / link).unlink()
    (folder / link).symlink_to(secret)
    assert "a.wav" in refusal(folder)


def test_links_within_the_folder_are_accepted(corpus):
    folder = corpus({"b.wav": None, "transcripts.csv": "path,text\na.wav,hej\nd/../b.wav,du\n"})
    (folder / "a.wav").symlink_to(folder / "b.wav")
    assert [(e.id, e.audio.read_bytes()) for e in read(folder)] == [("a", b"sound of b.wav"), ("b", b"sound of b.wav")]


def test_split_names_are_mapped(corpus):
    names = ["train", "Training", "dev", "valid", "VAL", "validation", " test ", "other", ""]
    rows = "".join(f"{i}.wav,x,{name}\n" for i, name in enumerate(names))
    source = FolderSource(str(corpus({"transcripts.csv": f"path,text,split\n{rows}"})))
    assert [e.split for e in source.examples()] == ["train"] * 2 + ["validation"] * 4 + ["test", "other", ""]
    assert [e.id for e in source.examples(("test",))] == ["6"]
    assert [e.id for e in source.examples(("validation", "train"))] == ["0", "1", "2", "3", "4", "5"]


def speakers_table(n: int, speaker: str = "s{}") -> str:
    return "path,text,speaker\n" + "".join(f"{i}.wav,hej,{speaker.format(i // 3)}\n" for i in range(n))


def test_drawn_splits_are_about_80_10_10(corpus):
    n = Counter(e.split for e in read(corpus({"transcripts.csv": speakers_table(6_000)})))
    assert abs(n["train"] / 6_000 - 0.8) < 0.03
    assert abs(n["validation"] / 6_000 - 0.1) < 0.03
    assert abs(n["test"] / 6_000 - 0.1) < 0.03
    files = Counter(e.split for e in read(corpus({"transcripts.csv": speakers_table(2_000, "")})))
    assert abs(files["train"] / 2_000 - 0.8) < 0.03
    assert set(files) == set(SPLITS)


def test_drawn_split_is_per_speaker_else_per_file(corpus):
    by_speaker = {}
    for example in read(corpus({"transcripts.csv": speakers_table(300)})):
        by_speaker.setdefault(example.speaker, set()).add(example.split)
    assert all(len(splits) == 1 for splits in by_speaker.values())
    threes = [e.split for e in read(corpus({"transcripts.csv": speakers_table(300, "")}))]
    assert any(len(set(threes[i : i + 3])) > 1 for i in range(0, 300, 3))


@pytest.mark.parametrize("speaker", ["s{}", ""])
def test_added_file_changes_no_other_split(corpus, speaker):
    before = {e.audio: e.split for e in read(corpus({"transcripts.csv": speakers_table(90, speaker)}))}
    more = "path,text,speaker\n0.mp3,hej,new\n" + speakers_table(120, speaker).partition("\n")[2]
    after = {e.audio: e.split for e in read(corpus({"transcripts.csv": more}))}
    assert before.items() <= after.items()
    assert len(after) == 121


@pytest.mark.slow
def test_drawn_splits_depend_on_the_seed_only(corpus):
    folder = corpus({"transcripts.csv": speakers_table(300)})
    show = f"print([e.split for e in F({str(folder)!r}).examples()])"
    script = f"from pipelines.features.sources.folder import FolderSource as F; {show}"
    other = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert other == str([e.split for e in read(folder)]) != str([e.split for e in read(folder, seed=8)])


def test_identity_changes_with_rows_and_audio(corpus):
    folder = corpus({"transcripts.csv": "path,text\na.wav,ett\nb.wav,två\n", "a.wav": "12", "unused.wav": "x"})
    identity = FolderSource(str(folder)).identity()
    assert identity["kind"] == "folder"
    assert all(isinstance(value, str) for value in identity.values())
    assert FolderSource(str(folder)).identity() == identity
    os.utime(folder / "a.wav", (1, 1))
    (folder / "unused.wav").write_text("y")
    assert FolderSource(str(folder)).identity() == identity
    assert FolderSource(str(folder), seed=8).identity() != identity
    for name, content in {
        "a.wav": "13",
        "b.wav": "came",
        "transcripts.csv": "path,text\na.wav,Ett\nb.wav,två\n",
    }.items():
        (folder / name).write_text(content)
        changed = FolderSource(str(folder)).identity()
        assert changed != identity
        identity = changed


def test_identity_does_not_depend_on_the_path(corpus, tmp_path_factory):
    folder = corpus({"transcripts.csv": "path,text\na.wav,ett\n", "a.wav": "12"})
    elsewhere = folder.rename(tmp_path_factory.mktemp("other") / "x")
    before = FolderSource(str(elsewhere)).identity()
    again = elsewhere.rename(elsewhere.with_name("y"))
    assert FolderSource(str(again)).identity() == before


def test_identity_of_much_audio_uses_size_and_time(corpus, monkeypatch):
    monkeypatch.setattr(stamps, "HASHED_BYTES", 2)
    folder = corpus({"transcripts.csv": "path,text\na.wav,ett\nb.wav,x\n", "a.wav": "12"})
    os.utime(folder / "a.wav", (1, 1))
    identity = FolderSource(str(folder)).identity()
    os.utime(folder / "a.wav", (2, 2))
    assert FolderSource(str(folder)).identity() != identity
    (folder / "a.wav").write_text("21")
    os.utime(folder / "a.wav", (1, 1))
    assert FolderSource(str(folder)).identity() == identity


def test_identity_without_a_table_includes_texts(corpus):
    folder = corpus({"a.wav": None, "a.txt": "ett"})
    before = FolderSource(str(folder)).identity()
    (folder / "a.txt").write_text("två")
    assert FolderSource(str(folder)).identity() != before


def test_too_long_file_name_counts_as_missing(corpus):
    folder = corpus({"transcripts.csv": f"path,text\n{'x' * 5000}.wav,hej\na.wav,hej\n", "a.wav": None})
    assert len(read(folder)) == 2
    assert FolderSource(str(folder)).identity()


def test_recording_without_a_txt_has_no_transcript(corpus):
    examples = read(corpus({"a.wav": b"", "a.txt": "ett", "b.wav": b"", "b.txt": "", "c.wav": b""}))
    assert [isinstance(example.text, NoTranscript) for example in examples] == [False, False, True]
