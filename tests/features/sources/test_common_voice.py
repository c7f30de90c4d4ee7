"""Archives of Common Voice built here: three speakers, tables like CorporaCreator's, and malicious members."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_recorder import record_log

from pipelines import recipes
from pipelines.features.sources.common_voice import archive, release
from pipelines.features.sources.common_voice.release import CommonVoiceSource
from pipelines.features.sources.registry import open_source
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError, decode

RELEASE = "cv-corpus-25.0-2026-03-09"
BASE = f"{RELEASE}/sv-SE"
OLD = "client_id path sentence up_votes down_votes age gender accent locale segment".split()
RELEASE_11 = "client_id path sentence up_votes down_votes age gender accents locale segment".split()
RELEASE_17 = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
).split()
SPEAKERS = {"train": ("anna", "bo", "eva"), "dev": ("dag",), "test": ("tom",)}


def clip(name: str) -> str:
    return f"common_voice_sv-SE_{name}.mp3"


def line(name: str, speaker: str, sentence: str = "", columns: list[str] = RELEASE_17, **cells: str) -> str:
    row = {
        "client_id": speaker,
        "path": clip(name),
        "sentence": sentence or f"Mening {name}.",
        "locale": "sv-SE",
    }
    row |= {"up_votes": "3", "down_votes": "1", **cells}
    return "\t".join(row.get(column, "") for column in columns)


def table(*lines: str, columns: list[str] = RELEASE_17) -> bytes:
    return ("\n".join(["\t".join(columns), *lines]) + "\n").encode()


def toy(columns: list[str] = RELEASE_17) -> dict[str, bytes]:
    """File name below the language's folder to content, in the bundler's order: clips before the tables."""
    tables = {}
    for name, speakers in SPEAKERS.items():
        rows = [line(f"{name}{n}", speaker, columns=columns) for speaker in speakers for n in _numbers(speaker)]
        tables[f"{name}.tsv"] = table(*rows, columns=columns)
    extra = [
        line("more1", "anna", "En ny mening.", columns),
        line("more2", "gun", "Ännu en mening.", columns),
        line("more3", "gun", "mening, DEV40!", columns),  # dev has this sentence
        line("more4", "tom", "Något helt annat.", columns),  # test has this speaker
    ]
    rows = [row for content in tables.values() for row in content.decode().splitlines()[1:]]
    tables["validated.tsv"] = table(*rows, *extra, columns=columns)
    names = [row.split("\t")[columns.index("path")] for row in rows + extra]
    clips = {f"clips/{name}": f"sound of {name}".encode() for name in names}
    return {"clip_durations.tsv": b"clip\tduration[ms]\n", **clips, **tables, "other.tsv": table(columns=columns)}


def _numbers(speaker: str) -> range:
    """anna has 1 clip in train, bo 20, eva 9: with dag's 2 these are the 32 of train and dev."""
    return {"anna": range(1), "bo": range(1, 21), "eva": range(21, 30), "dag": range(40, 42), "tom": range(50, 53)}[
        speaker
    ]


def pack(path: Path, files: dict[str, bytes], base: str = BASE, extra: list = ()) -> Path:
    """Write a .tar.gz; `extra` are (TarInfo, bytes) that come first."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for info, content in extra:
            tar.addfile(info, io.BytesIO(content))
        for name, content in files.items():
            info = tarfile.TarInfo(f"{base}/{name}" if base else name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(folder: Path, files: dict[str, bytes], base: str = BASE) -> Path:
    for name, content in files.items():
        path = folder / base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def archive_path(tmp_path):
    return pack(tmp_path / f"{RELEASE}-sv-SE.tar.gz", toy())


def read(path: Path, **options) -> list:
    return list(CommonVoiceSource(str(path), **options).examples())


def ids(examples: list, split: str) -> list[str]:
    return [e.id.removeprefix("common_voice_sv-SE_") for e in examples if e.split == split]


def refusal(path: Path, **options) -> str:
    """Return the one-line error that both `identity` and `examples` raise before any example."""
    with pytest.raises(LabError) as error:
        CommonVoiceSource(str(path), **options).examples()
    if str(error.value).startswith(("train, dev and test", "pool")):
        CommonVoiceSource(str(path), **options).identity()  # the release itself is whole
    else:
        with pytest.raises(LabError):
            CommonVoiceSource(str(path), **options).identity()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


# --- what a release gives ---------------------------------------------------------------------------------------------


def test_archive_has_every_field_since_release_17(tmp_path):
    files = toy()
    cells = {"age": "fourties", "gender": "female_feminine", "accents": "Skånska", "variant": "finlandssvenska"}
    cells |= {"sentence_id": "5f", "sentence_domain": "agriculture_food", "segment": "Benchmark"}
    files["dev.tsv"] = table(line("dev40", "dag", "Hej, \\o/!", **cells), line("dev41", "dag"))
    [first, _] = [e for e in read(pack(tmp_path / "a.tar.gz", files)) if e.split == "validation"]
    assert (first.id, first.text, first.speaker) == ("common_voice_sv-SE_dev40", "Hej, \\o/!", "dag")
    assert first.audio == b"sound of common_voice_sv-SE_dev40.mp3"
    assert first.meta == {
        "gender": "female", "age": "fourties", "accent": "Skånska", "variant": "finlandssvenska",
        "segment": "Benchmark", "sentence_id": "5f", "sentence_domain": "agriculture_food",
        "up_votes": "3", "down_votes": "1",
    }  # fmt: skip


def test_source_can_be_pickled(archive_path):
    source = CommonVoiceSource(str(archive_path))
    identity = source.identity()
    assert pickle.loads(pickle.dumps(source)).identity() == identity


@pytest.mark.parametrize(("columns", "accent"), [(OLD, "accent"), (RELEASE_11, "accents"), (RELEASE_17, "accents")])
def test_columns_of_every_release_are_read(tmp_path, columns, accent):
    files = toy(columns)
    cells = {accent: "Rikssvenska", "gender": "male"}
    files["test.tsv"] = table(line("test50", "tom", columns=columns, **cells), columns=columns)
    [test] = [e for e in read(pack(tmp_path / "a.tar.gz", files)) if e.split == "test"]
    assert test.meta == {"gender": "male", "accent": "Rikssvenska", "up_votes": "3", "down_votes": "1"}


def test_train_pool_uses_official_splits(archive_path):
    examples = read(archive_path)
    assert ids(examples, "train") == [f"train{n}" for n in range(30)]
    assert ids(examples, "validation") == ["dev40", "dev41"]
    assert ids(examples, "test") == ["test50", "test51", "test52"]
    assert [e.id for e in CommonVoiceSource(str(archive_path)).examples(("test",))] == [e.id for e in examples[-3:]]


def test_folder_has_the_same_examples_as_archive(archive_path, tmp_path):
    folder = unpack(tmp_path / "folder", toy())
    packed = {e.id: replace(e, audio=b"") for e in read(archive_path)}
    for path in (folder, folder / RELEASE, folder / BASE):
        examples = read(path)
        assert {e.id: replace(e, audio=b"") for e in examples} == packed
        assert all(e.audio.read_bytes() == f"sound of {e.id}.mp3".encode() for e in examples)
        assert [e.id for e in examples] == [e.id for e in read(path)]
        assert CommonVoiceSource(str(path)).identity()["release"] == "25.0-2026-03-09"


@pytest.mark.parametrize("name", ["validation", "Valid", "DEV"])
def test_table_of_a_folder_may_have_a_synonym(tmp_path, name):
    folder = unpack(tmp_path / "folder", toy())
    (folder / BASE / "dev.tsv").rename(folder / BASE / f"{name}.tsv")
    assert ids(read(folder), "validation") == ["dev40", "dev41"]


@pytest.mark.parametrize("path", ["archive", "folder"])
def test_validated_pool_shares_nothing_with_held_out(archive_path, tmp_path, path):
    path = archive_path if path == "archive" else unpack(tmp_path / "folder", toy())
    lines = record_log()
    source = CommonVoiceSource(str(path), pool="validated")
    examples = list(source.examples())
    assert sorted(ids(examples, "train")) == sorted([f"train{n}" for n in range(30)] + ["more1", "more2"])
    assert source.selection.left_out == {"speaker": 1, "sentence": 1}
    assert list(source.examples(("test",)))
    assert lines == [
        "Common Voice 25.0-2026-03-09 sv-SE, pool 'validated': 32 train, 2 validation, 3 test; "
        "left out, because validation or test has it too: 1 by speaker and 1 by sentence"
    ]
    held = {e.speaker for e in examples if e.split != "train"}
    assert not held & {e.speaker for e in examples if e.split == "train"}


def test_unknown_speakers_are_not_one_speaker(tmp_path):
    files = {**toy(), "dev.tsv": table(line("dev40", "")), "validated.tsv": table(line("more1", ""), line("dev40", ""))}
    assert ids(read(pack(tmp_path / "a.tar.gz", files), pool="validated"), "train") == ["more1"]


def test_train_validation_pool_holds_out_whole_speakers(archive_path):
    """32 clips leave room for one in validation: anna's, which fits whatever the seed."""
    examples = read(archive_path, pool="train+validation")
    assert ids(examples, "validation") == ["train0"]
    assert sorted(ids(examples, "train")) == sorted([f"train{n}" for n in range(1, 30)] + ["dev40", "dev41"])
    assert ids(examples, "test") == ["test50", "test51", "test52"]


def test_seed_draws_among_fitting_speakers(tmp_path):
    rows = [line(f"train{n}", f"s{n // 2}") for n in range(80)]
    files = {**toy(), "train.tsv": table(*rows)}
    path = unpack(tmp_path, files)
    drawn = {seed: tuple(ids(read(path, pool="train+validation", seed=seed), "validation")) for seed in range(4)}
    assert {len(clips) for clips in drawn.values()} == {4}  # 5 % of 82
    assert len(set(drawn.values())) > 1
    assert drawn[2] == tuple(ids(read(path, pool="train+validation", seed=2), "validation"))


def test_validation_has_at_least_one_speaker(tmp_path):
    files = {**toy(), "train.tsv": table(*(line(f"train{n}", "bo") for n in range(5)))}
    files["dev.tsv"] = table(line("dev40", "dag"))
    assert ids(read(pack(tmp_path / "a.tar.gz", files), pool="train+validation"), "validation") == ["dev40"]


def test_missing_clip_comes_last_and_is_rejected(tmp_path):
    files = {name: content for name, content in toy().items() if name != f"clips/{clip('train3')}"}
    for path in (pack(tmp_path / "a.tar.gz", files), unpack(tmp_path / "folder", files)):
        examples = read(path)
        assert len(examples) == 35
        [lost] = [e for e in examples if e.id.endswith("train3")]
        with pytest.raises(AudioError) as error:
            decode(lost.audio)
        assert error.value.reason == "missing"
    assert read(tmp_path / "a.tar.gz")[-1].id == lost.id


def test_real_mp3_is_decoded(tmp_path, encoded):
    tone = (0.3 * np.sin(np.arange(48_000) * 0.05)).astype(np.float32)
    files = {**toy(), f"clips/{clip('test50')}": encoded(tone, 48_000, "MP3")}
    [example, *_] = [e for e in read(pack(tmp_path / "a.tar.gz", files)) if e.split == "test"]
    assert decode(example.audio).duration_s == pytest.approx(1, abs=0.1)


def test_archives_of_other_tools_are_read(tmp_path):
    files = toy()
    expected = [e.id for e in read(pack(tmp_path / "a.tar.gz", files))]
    dotted = pack(tmp_path / "b.tar.gz", files, f"./{BASE}")
    bare = pack(tmp_path / "c.tar.gz", files, "sv-SE")
    with gzip.open(dotted) as packed:
        (tmp_path / "d.tar").write_bytes(packed.read())
    tables = {name: content for name, content in files.items() if name.endswith(".tsv")}
    first = pack(tmp_path / "cv-corpus-11.0-2022-09-21-sv-SE.tar.gz", tables | files, "sv-SE")
    for path in (dotted, bare, tmp_path / "d.tar", first):
        assert [e.id for e in read(path)] == expected
    assert CommonVoiceSource(str(bare)).identity()["release"] == "unknown"
    assert CommonVoiceSource(str(first)).identity()["release"] == "11.0-2022-09-21"


def test_unrelated_members_are_ignored(tmp_path):
    files = {**toy(), "reported.tsv": b"\xff", "clips/._x.mp3": b"", "datasheet.md": b"x", "._train.tsv": b"\xff\0"}
    assert len(read(pack(tmp_path / "a.tar.gz", files))) == 35


# --- identity ---------------------------------------------------------------------------------------------------------


def test_identity_has_release_tables_clips_options(archive_path):
    identity = CommonVoiceSource(str(archive_path)).identity()
    assert identity.keys() == {
        "kind", "release", "locale", "pool", "train_tsv", "dev_tsv", "test_tsv", "clips", "clips_sha256"
    }  # fmt: skip
    assert all(isinstance(value, str) for value in identity.values())
    assert (identity["release"], identity["locale"], identity["clips"]) == ("25.0-2026-03-09", "sv-SE", "39")
    assert CommonVoiceSource(str(archive_path), seed=8).identity() == identity  # it draws nothing here
    for options in ({"pool": "validated"}, {"pool": "train+validation"}):
        assert CommonVoiceSource(str(archive_path), **options).identity() != identity
    drawn = [CommonVoiceSource(str(archive_path), pool="train+validation", seed=seed).identity() for seed in (7, 8)]
    assert drawn[0] != drawn[1]


def test_identity_does_not_depend_on_the_path(archive_path, tmp_path):
    before = CommonVoiceSource(str(archive_path)).identity()
    (tmp_path / "x").mkdir()
    assert CommonVoiceSource(str(archive_path.rename(tmp_path / "x" / "renamed.tgz"))).identity() == before


def test_identity_changes_with_tables_sizes_order(tmp_path):
    def identity(files):
        return CommonVoiceSource(str(pack(tmp_path / "a.tar.gz", files))).identity()

    base = identity(toy())
    assert identity({**toy(), "other.tsv": b"x"}) == base
    assert identity({**toy(), "dev.tsv": toy()["dev.tsv"].replace(b"\t3\t", b"\t4\t")}) != base
    assert identity({**toy(), f"clips/{clip('dev40')}": b"longer than before, much longer than before"}) != base
    assert identity(dict(reversed(toy().items()))) != base


def test_clips_are_read_once_and_on_demand(archive_path, monkeypatch):
    opened = []
    original = archive.Member.open
    monkeypatch.setattr(archive.Member, "open", lambda self: opened.append(self.name.name) or original(self))
    examples = CommonVoiceSource(str(archive_path)).examples(("validation",))
    assert opened == ["train.tsv", "dev.tsv", "test.tsv"]
    assert len(list(examples)) == 2
    assert opened[3:] == [clip("dev40"), clip("dev41")]


@pytest.mark.parametrize("pool", ["train", "train+validation", "validated"])
def test_outline_has_the_examples_without_audio(tmp_path, monkeypatch, pool):
    files = dict(sorted(toy().items(), reverse=True))  # neither the order of the tables nor that of the names
    files.pop(f"clips/{clip('train3')}")
    for path in (pack(tmp_path / "a.tar.gz", files), unpack(tmp_path / "folder", files)):
        source = CommonVoiceSource(str(path), pool=pool)
        expected = [replace(e, audio=b"") for e in source.examples()]
        monkeypatch.setattr(archive.Member, "open", None)  # no clip is read for it
        assert list(source.outline()) == expected
        monkeypatch.undo()


def test_memory_does_not_depend_on_clip_sizes(tmp_path):
    files = {**toy(), **{f"clips/big{n}.mp3": os.urandom(1 << 20) for n in range(12)}}
    files["train.tsv"] = table(
        *("\t".join(["bo", f"big{n}.mp3", "Mening."]) for n in range(12)), columns=["client_id", "path", "sentence"]
    )
    path = pack(tmp_path / "a.tar.gz", files)
    tracemalloc.start()
    try:
        assert sum(len(e.audio) for e in CommonVoiceSource(str(path)).examples()) > 12 << 20
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_members(tmp_path):
    path = pack(tmp_path / "a.tar.gz", {f"clips/{n}.mp3": b"" for n in range(4_000)})
    tracemalloc.start()
    try:
        assert sum(1 for _ in archive.members(path)) == 4_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_second_pass_ends_with_last_selected_clip(archive_path, monkeypatch):
    source, seen, original = CommonVoiceSource(str(archive_path)), [], archive.members
    source.identity()
    monkeypatch.setattr(archive, "members", lambda path: (seen.append(m.name.name) or m for m in original(path)))
    assert len(list(source.examples(("train",)))) == 30
    assert seen[-1] == clip("train29")


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_recipe_opens_the_source(archive_path):
    chosen = {
        "source.kind": "common_voice",
        "source.path": str(archive_path),
        "source.pool": "validated",
        "source.seed": 9,
    }
    loaded = recipes.load("tour", chosen)
    assert open_source(loaded.source, loaded.language) == CommonVoiceSource(str(archive_path), "sv", "validated", 9)
    with pytest.raises(LabError, match=r"source\.path"):
        recipes.load("tour", {"source.kind": "common_voice"})
    with pytest.raises(LabError, match=r"source\.pool"):
        recipes.load("tour", {**chosen, "source.pool": "everything"})


# --- tables -----------------------------------------------------------------------------------------------------------

DEV = line("dev40", "dag", "Hej du.")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (table(DEV), ["Hej du."]),
        (codecs.BOM_UTF8 + table(DEV), ["Hej du."]),
        (table(DEV).replace(b"\n", b"\r\n"), ["Hej du."]),
        (table("dag\tx.mp3\tHej du.\r", columns=["client_id", "path", "sentence\r"]), ["Hej du."]),
        (table(DEV).replace(b"Hej", b"H\0ej"), ["Hej du."]),
        (table(DEV).rstrip(b"\n"), ["Hej du."]),
        (table(DEV) + b"\n\n", ["Hej du."]),
        (table(line("dev40", "dag", '"Hej du.')), ['"Hej du.']),
        (table(line("dev40", "dag", '"Hej", sa hon.')), ['"Hej", sa hon.']),
        (table(line("dev40", "dag", '"Hej du."')), ['"Hej du."']),
        (table(line("dev40", "dag", '"""Hej"", sa hon."')), ['"Hej", sa hon.']),
        (table(line("dev40", "dag", "Hej\\\tdu.")), ["Hej\tdu."]),
        (table(line("dev40", "dag", "Hej \u2028\x85 du.")), ["Hej \u2028\x85 du."]),
        (table(line("dev40", "")), ["Mening dev40."]),
        (table(line("dev40", "dag", locale="")), ["Mening dev40."]),
    ],
    ids=lambda value: None if isinstance(value, bytes) else repr(value[0]),
)
def test_table_variants_are_read(tmp_path, content, texts):
    path = unpack(tmp_path, {**toy(), "dev.tsv": content})
    assert [e.text for e in read(path) if e.split == "validation"] == texts
    assert [e.text for e in read(pack(tmp_path / "a.tar.gz", {**toy(), "dev.tsv": content})) if e.split == "validation"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "dev.tsv",
            table(line("dev40", "dag", "smörgås")).decode().encode("cp1252"),
            ["dev.tsv line 2", "UTF-8", "0xf6"],
        ),
        ("dev.tsv", table(DEV).decode().encode("utf-16"), ["dev.tsv line 1", "UTF-8", "0xff"]),
        ("dev.tsv", b"\x89PNG\r\n\x1a\n" + bytes(50), ["line 1", "UTF-8"]),
        ("dev.tsv", b"client_id\tpath\n1\t2\n", ["dev.tsv", "no sentence among"]),
        ("dev.tsv", table(DEV).replace(b"\t", b","), ["no client_id and no path and no sentence"]),
        ("dev.tsv", b"client_id\tpath\tsentence\tpath\n", ["a column twice"]),
        ("dev.tsv", b"<!DOCTYPE html>\n<html>\n", ["no client_id"]),
        ("dev.tsv", table(), ["dev.tsv", "no row"]),
        ("test.tsv", table(), ["test.tsv", "no row"]),
        ("dev.tsv", b"", ["dev.tsv", "no row"]),
        ("dev.tsv", b"\n\n\n", ["no client_id"]),
        ("dev.tsv", table(DEV, DEV), ["dev.tsv", "dev40.mp3' twice"]),
        ("dev.tsv", table(line("train0", "dag")), ["train, dev and test", "train0.mp3' twice"]),
        ("dev.tsv", table("dag\tx.mp3"), ["dev.tsv line 2", "13 cells, got 2"]),
        ("dev.tsv", table(line("dev40", "dag", "Hej\tdu.")), ["dev.tsv line 2", "13 cells, got 14"]),
        ("dev.tsv", table(line("dev40", "dag", "a" * (1 << 20))), ["dev.tsv line 2", "1048576 bytes"]),
        ("dev.tsv", bytes(1 << 22), ["dev.tsv line 1", "1048576 bytes"]),
        ("dev.tsv", table(line("dev40", "dag", locale="da")), ["dev.tsv line 2", "locale", "'da'"]),
        ("dev.tsv", table(DEV.replace(clip("dev40"), "../../../etc/passwd")), ["line 2", "bare name"]),
        ("dev.tsv", table(DEV.replace(clip("dev40"), "/etc/passwd")), ["line 2", "bare name"]),
        ("dev.tsv", table(DEV.replace(clip("dev40"), "..")), ["line 2", "bare name"]),
        ("dev.tsv", table(DEV.replace(clip("dev40"), "C:\\x.mp3")), ["line 2", "bare name"]),
        ("dev.tsv", table(DEV.replace(clip("dev40"), " ")), ["line 2", "bare name"]),
        ("dev.tsv", None, ["got no dev.tsv", "source.pool"]),
        ("train.tsv", None, ["got no train.tsv", "delta"]),
    ],
)
@pytest.mark.parametrize("form", ["archive", "folder"])
def test_unusable_table_is_a_one_line_error(tmp_path, form, name, content, words):
    files = {key: value for key, value in {**toy(), name: content}.items() if value is not None}
    path = pack(tmp_path / "a.tar.gz", files) if form == "archive" else unpack(tmp_path, files)
    message = refusal(path)
    assert all(word in message for word in words), message


def test_empty_pool_raises(tmp_path):
    files = {**toy(), "validated.tsv": table(line("more4", "tom"), line("dev40", "dag"))}
    assert "none" in refusal(pack(tmp_path / "a.tar.gz", files), pool="validated")


# --- hostile archives -------------------------------------------------------------------------------------------------


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


HOSTILE = {
    "up": (info("../evil.txt", size=4), "leads upwards"),
    "up in the middle": (info(f"{BASE}/clips/../../../../evil.mp3", size=4), "leads upwards"),
    "absolute": (info("/tmp/evil.txt", size=4), "absolute name"),
    "drive": (info("C:/evil.txt", size=4), "absolute name"),
    "backslashes": (info("..\\..\\evil.txt", size=4), "absolute name"),
    "link out": (info(f"{BASE}/clips/x.mp3", tarfile.SYMTYPE, "/etc/passwd"), "a link"),
    "link within": (info(f"{BASE}/train.tsv", tarfile.SYMTYPE, "dev.tsv"), "a link"),
    "hard link": (info(f"{BASE}/clips/x.mp3", tarfile.LNKTYPE, "../../etc/passwd"), "a link"),
    "linked folder": (info(f"{BASE}/clips", tarfile.SYMTYPE, "/tmp"), "a link"),
    "character device": (info(f"{BASE}/clips/x.mp3", tarfile.CHRTYPE), "no plain file"),
    "block device": (info(f"{BASE}/clips/x.mp3", tarfile.BLKTYPE), "no plain file"),
    "fifo": (info(f"{BASE}/clips/x.mp3", tarfile.FIFOTYPE), "no plain file"),
    "same clip again": (info(f"{BASE}/clips/{clip('dev40')}", size=4), "twice"),
    "second language": (info(f"{RELEASE}/sv-FI/clips/x.mp3", size=4), "one folder"),
    "second release": (info("cv-corpus-24.0-2025-12-05/sv-SE/clips/x.mp3", size=4), "one folder"),
    "name that is no utf-8": (info(f"{BASE}/clips/\udce5/../x", size=4), "leads upwards"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_member_raises_and_writes_nothing(tmp_path, monkeypatch, kind):
    member, word = HOSTILE[kind]
    path = pack(tmp_path / "a.tar.gz", toy(), extra=[(member, b"evil"[: member.size])])
    (tmp_path / "in" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "here")
    before = sorted(tmp_path.rglob("*"))
    message = refusal(path)
    assert word in message, message
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil.txt").exists()


def test_duplicate_table_raises(tmp_path):
    content = toy()["train.tsv"]
    first = (info(f"{BASE}/train.tsv", size=len(content)), content)
    assert "train.tsv' twice" in refusal(pack(tmp_path / "a.tar.gz", toy(), extra=[first]))


def test_too_large_clip_raises_from_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "MAX_CLIP_BYTES", 1000)
    path = pack(tmp_path / "a.tar.gz", {**toy(), "clips/bomb.mp3": bytes(1001)})
    assert "at most 1000 bytes" in refusal(path)


def test_too_large_header_raises(tmp_path):
    bomb = info("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=archive.MAX_HEADER_BYTES + 1)
    path = pack(tmp_path / "a.tar.gz", toy(), extra=[(bomb, b"a" * bomb.size)])
    assert "a header of" in refusal(path)


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def flipped(content: bytes, share: float) -> bytes:
    place = int(len(content) * share)
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "one byte": lambda content: b"\x1f",
    "a magic alone": lambda content: b"\x1f\x8b",
    "cut in the clips": lambda content: cut(content, 0.2),
    "cut in the tables": lambda content: cut(content, 0.9),
    "cut by the last byte": lambda content: content[:-1],
    "checksum": lambda content: content[:-8] + b"abcd" + content[-4:],
    "a byte early": lambda content: flipped(content, 0.3),
    "a byte late": lambda content: flipped(content, 0.8),
    "garbage behind": lambda content: content + b"garbage",
    "a login page": lambda content: b"<!DOCTYPE html><html>Please log in</html>" * 100,
    "a zip": lambda content: b"PK\x03\x04" + bytes(2000),
    "zeros": lambda content: bytes(10240),
    "gzip of nothing": lambda content: gzip.compress(b""),
    "gzip of text": lambda content: gzip.compress(b"no tar at all" * 100),
    "tar cut, gzip whole": lambda content: gzip.compress(cut(gzip.decompress(content), 0.5)),
    "tar cut between members": lambda content: gzip.compress(gzip.decompress(content).rstrip(b"\0")),
    "tar header damaged": lambda content: gzip.compress(
        gzip.decompress(content).replace(clip("train5").encode() + b"\0", clip("train5").encode() + b"X", 1)
    ),
    "plain tar, cut": lambda content: cut(gzip.decompress(content), 0.5),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_raises_before_any_clip(archive_path, kind):
    archive_path.write_bytes(DAMAGE[kind](archive_path.read_bytes()))
    message = refusal(archive_path)
    assert archive_path.name in message or "dev.tsv" in message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_tar_damage_raises_or_is_harmless(archive_path, changes):
    content = bytearray(gzip.decompress(archive_path.read_bytes()))
    for share, value in changes:
        content[int(share * len(content))] = value
    path = archive_path.with_name("damaged.tar")
    path.write_bytes(content)
    with contextlib.suppress(LabError):  # every other exception fails
        read(path)


@pytest.mark.parametrize("what", ["header damaged", "cut between members", "cut in a clip"])
def test_damage_after_the_tables_raises(tmp_path, what):
    """tarfile takes the first two kinds of damage for the end of the archive and drops the rest of it."""
    files = toy()
    tables = {name: content for name, content in files.items() if name.endswith(".tsv")}
    path = pack(tmp_path / "a.tar.gz", {**tables, **{name: files[name] for name in files if name not in tables}})
    content = gzip.decompress(path.read_bytes())
    place = content.index(f"{BASE}/clips/{clip('train5')}".encode() + b"\0")
    path.write_bytes(
        gzip.compress(
            {
                "header damaged": content[:place] + b"X" + content[place + 1 :],
                "cut between members": content[:place],
                "cut in a clip": content[: place + 520],
            }[what]
        )
    )
    assert "whole .tar.gz" in refusal(path)


def test_archive_damaged_between_passes_raises(archive_path):
    source = CommonVoiceSource(str(archive_path))
    source.identity()
    archive_path.write_bytes(cut(archive_path.read_bytes(), 0.5))
    with pytest.raises(LabError, match="whole"):
        list(source.examples())


# --- places -----------------------------------------------------------------------------------------------------------


def test_paths_without_a_corpus_raise(archive_path, tmp_path):
    assert "source.path" in refusal(tmp_path / "nowhere.tar.gz")
    (tmp_path / "empty").mkdir()
    assert "no table and no clip" in refusal(tmp_path / "empty")
    assert "'sv-SE'" in refusal(archive_path, language="da")
    assert "'da'" in refusal(pack(tmp_path / "da.tar.gz", {"train.tsv": b"", "clips/x.mp3": b""}, "cv-corpus/da"))
    assert "no dev.tsv" in refusal(pack(tmp_path / "delta.tar.gz", {"clips/x.mp3": b"", "other.tsv": b""}))
    with pytest.raises(LabError, match="splits"):
        CommonVoiceSource(str(archive_path)).examples(("dev",))
    with pytest.raises(LabError, match=r"source\.pool"):
        CommonVoiceSource(str(archive_path), pool="all").examples()


def test_exact_language_is_preferred_to_region(tmp_path):
    files = {f"sv/{name}": content.replace(b"sv-SE\t", b"sv\t") for name, content in toy().items()}
    files |= {f"sv-SE/{name}": content for name, content in toy().items()}
    path = pack(tmp_path / "a.tar.gz", files, RELEASE)
    assert CommonVoiceSource(str(path)).identity()["locale"] == "sv"


def test_links_out_of_the_folder_raise(tmp_path):
    folder = unpack(tmp_path / "in", toy())
    clips = folder / BASE / "clips"
    (clips / clip("dev41")).unlink()
    (clips / clip("dev41")).symlink_to(clips / clip("dev40"))
    assert len(read(folder)) == 35
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (clips / "x.mp3").symlink_to(secret)
    assert "leads out" in refusal(folder)
    (clips / "x.mp3").unlink()
    (folder / BASE / "dev.tsv").rename(tmp_path / "dev.tsv")
    (folder / BASE / "dev.tsv").symlink_to(tmp_path / "dev.tsv")
    assert "leads out" in refusal(folder)


def test_folder_without_clips_or_with_a_pipe_raises(tmp_path):
    folder = unpack(tmp_path, toy())
    (folder / BASE / "clips" / clip("dev40")).unlink()
    os.mkfifo(folder / BASE / "clips" / clip("dev40"))
    [pipe, _] = [e for e in read(folder) if e.split == "validation"]
    with pytest.raises(AudioError, match="missing"):
        decode(pipe.audio)
    (folder / BASE / "clips").rename(folder / "elsewhere")
    assert "folder of clips" in refusal(folder)


# --- the whole stage --------------------------------------------------------------------------------------------------


def test_pipeline_builds_cache_of_an_archive(tmp_path, toy_settings, encoded, speech):
    from pipelines.features import pipeline as feature_pipeline

    samples = np.repeat(speech(16_000), 3)
    sound, other = encoded(samples, 48_000, "MP3"), encoded(samples[::-1].copy(), 48_000, "MP3")
    sounds = {name: other if "dev" in name else sound for name in toy() if name.startswith("clips/")}
    files = toy() | sounds
    files.pop(f"clips/{clip('train3')}")
    files[f"clips/{clip('train4')}"] = b"no mp3"
    # one sound for training and test: the leak check would refuse it, and is not the matter here
    chosen = {"source.kind": "common_voice", "source.path": str(pack(tmp_path / "a.tar.gz", files))}
    chosen["curation.leaks"] = "ignore"
    lines = record_log()
    cache = feature_pipeline.run(toy_settings(chosen), runs=tmp_path)
    assert cache.counts == {"train": 28, "validation": 2, "test": 3, "rejected": 2}
    assert dict(zip(cache.rejected["id"], cache.rejected["reason"])) == {
        "common_voice_sv-SE_train3": "missing",
        "common_voice_sv-SE_train4": "unreadable",
    }
    assert set(cache.rows["up_votes"]) == {"3"}
    assert [line for line in lines if line.startswith("Common Voice 25.0")]
    assert feature_pipeline.open_cache(toy_settings(chosen), runs=tmp_path).digest == cache.digest
    with pytest.raises(LabError, match="'da'"):
        feature_pipeline.run(toy_settings({**chosen, "language": "da"}), runs=tmp_path)


@pytest.mark.parametrize("name", ["sps-corpus-1.0-2025-09-05-sv-SE.tar.gz", "unpacked"])
def test_spontaneous_speech_is_named_with_its_source(tmp_path, name):
    if name == "unpacked":
        (tmp_path / name).mkdir()
        (tmp_path / name / "ss-corpus-sv-SE.tsv").write_text("client_id\n")
    with pytest.raises(LabError, match="Spontaneous Speech: unpack it .*source.kind=folder"):
        CommonVoiceSource(str(tmp_path / name), "sv").identity()
