"""Splits by columns, tables and folders: honoured or refused, and always logged."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest
from log_recorder import record_log

from pipelines.features.sources.folder import FolderSource
from pipelines.features.sources.splits import SYNONYMS, canonical_split, path_splits
from pipelines.infra.errors import LabError


@pytest.fixture
def log() -> list[str]:
    return record_log()


def splits(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """Write text files and return the split of each example by its id."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return {example.id: example.split for example in FolderSource(str(folder)).examples()}


def clips(*names: str) -> dict[str, str]:
    """Return files of clips, each with a text beside it."""
    return {f"{name}.{suffix}": name for name in names for suffix in ("wav", "txt")}


def kaldi(*names: str) -> dict[str, str]:
    """Return a Kaldi directory of one utterance for each name, with recordings in another folder."""
    recordings = {f"clips/{name}.wav": name for name in names}
    tables = {f"{name}/wav.scp": f"{name} clips/{name}.wav\n" for name in names}
    return recordings | tables | {f"{name}/text": f"{name} hej {name}\n" for name in names}


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in SYNONYMS.items() for name in names])
def test_synonym_in_any_case_means_its_split(split, name):
    assert {canonical_split(form) for form in (name, name.upper(), f" {name.title()} ")} == {split}


def test_other_names_stay_as_they_are():
    assert [canonical_split(name) for name in (" tset", "test2", "", "other")] == ["tset", "test2", "", "other"]


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "eval", "test"),
        ("Training", "VAL", "Testing"),
        ("audio/train/anna", "audio/dev/bo", "audio/test/cia/2024"),
        ("split=train", "split=validation", "split=test"),
        ("train-clean-100", "dev-other", "test_clean"),
        ("anna/train", "bo/valid", "cia/test"),
        ("01_train", "02_val", "03_test"),
        ("fold=train", "my-dev-2", "Testset"),
        ("train/val_2022", "dev/testers", "test/my_train"),
    ],
)
def test_split_folders_decide(tmp_path, folders, log):
    read = splits(tmp_path, clips(*(f"{folder}/1" for folder in folders)))
    assert list(read.values()) == [read[f"{folder}/1"] for folder in sorted(folders)]
    assert [read[f"{folder}/1"] for folder in folders] == ["train", "validation", "test"]
    assert "splits by folder names: 1 train, 1 validation, 1 test" in log[0]


def test_split_folders_decide_for_a_table_without_splits(tmp_path):
    table = "file_name,transcription\ntrain/a.wav,ett\neval/b.wav,två\ntest/c.wav,tre\n"
    assert [*splits(tmp_path, {"metadata.csv": table}).values()] == ["train", "validation", "test"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_table_in_each_split_folder_is_read(tmp_path, suffix):
    row = {"csv": "file_name,text\n1.wav,hej\n", "jsonl": '{"file_name": "1.wav", "text": "hej"}\n'}[suffix]
    read = splits(tmp_path, {f"{split}/metadata.{suffix}": row for split in ("train", "dev", "test")})
    assert read == {"train/1": "train", "dev/1": "validation", "test/1": "test"}


def test_table_of_each_split_is_read(tmp_path, log):
    tables = {f"{split}.csv": f"path,text\nclips/{split}.wav,hej\n" for split in ("train", "dev", "test")}
    read = splits(tmp_path, tables)
    assert read == {"clips/train": "train", "clips/dev": "validation", "clips/test": "test"}
    assert "splits by table" in log[0]


def test_tables_of_splits_may_have_a_usual_prefix(tmp_path):
    tables = {"metadata_train.csv": "path,text\na.wav,x\n", "transcripts-Test.csv": "path,text\nb.wav,y\n"}
    assert splits(tmp_path, tables) == {"a": "train", "b": "test"}


def test_table_names_may_have_other_words(tmp_path):
    tables = {f"sv_{split}.csv": f"path,text\nclips/{split}.wav,hej\n" for split in ("train", "dev", "test")}
    assert splits(tmp_path, tables) == {"clips/train": "train", "clips/dev": "validation", "clips/test": "test"}


@pytest.mark.parametrize("names", [("train", "dev", "test"), ("train_sv", "dev_sv", "test_sv")])
def test_kaldi_folders_of_splits_decide(tmp_path, names):
    read = splits(tmp_path, kaldi(*names))
    assert [read[f"clips/{name}"] for name in names] == ["train", "validation", "test"]


def test_folder_of_the_table_decides_for_recordings_elsewhere(tmp_path):
    tables = {f"{split}/metadata.csv": f"path,text\n../clips/{split}.wav,hej\n" for split in ("train", "dev", "test")}
    files = {f"clips/{split}.wav": "" for split in ("train", "dev", "test")}
    assert [*splits(tmp_path, tables | files).values()] == ["validation", "test", "train"]


def test_file_names_of_splits_decide(tmp_path, log):
    read = splits(tmp_path, clips("train_01", "train_02", "dev_01", "test_01"))
    assert read == {"dev_01": "validation", "test_01": "test", "train_01": "train", "train_02": "train"}
    assert "splits by file names" in log[0]


def test_tables_beside_the_one_that_is_read_are_logged(tmp_path, log):
    splits(tmp_path, {"metadata.csv": "path,text\na.wav,x\n", "test/metadata.csv": "path,text\nb.wav,y\n"})
    assert "test/metadata.csv and 0 more tables of subfolders are not read" in log[0]


def test_split_column_has_priority_over_folders(tmp_path, log):
    table = "path,text,split\ntest/a.wav,ett,TRAIN\ntest/b.wav,två, evaluation\ntest/c.wav,tre,testing\ntest/d.wav,x,\n"
    assert [*splits(tmp_path, {"metadata.csv": table}).values()] == ["train", "validation", "test", ""]
    assert "splits by table (its column `split` or its name): 1 train, 1 validation, 1 test, 1 ''" in log[0]


def test_empty_split_column_is_no_rule(tmp_path, log):
    splits(tmp_path, {"metadata.csv": "path,text,split\na.wav,ett,\nb.wav,två, \n"})
    assert "splits by a draw of files (source.seed = 7)" in log[0]


@pytest.mark.parametrize("folders", [("train_station", "market"), ("testimonials", "evaluated", "anna")])
def test_folder_that_only_resembles_a_split_is_none(folders):
    assert path_splits("corpus", [PurePath(folder, "1.wav") for folder in folders]) is None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (clips("train/1", "test/1", "extra/1"), ["extra/1.wav", "in none of them", "test/, train/"]),
        (clips("clips/1", "test/1"), ["clips/1.wav", "in none of them"]),
        (clips("train/test/1", "train/2"), ["train/test/1.wav", "in two of them"]),
        (clips("train-a/1", "test-a/1", "more/1"), ["more/1.wav", "in none of them"]),
        (clips("train/1", "dev/1", "eval/1"), ["'eval' beside 'dev'", "rename"]),
        (clips("sv_train/1", "sv_dev/1", "sv_eval/1"), ["'eval' beside 'dev'", "rename"]),
        (kaldi("train", "dev", "eval"), ["'eval' beside 'dev'", "rename"]),
        (
            {"metadata.csv": "path,text,subset\na.wav,x,train\nb.wav,y,test\n"},
            ["column 'subset'", "rename it to split"],
        ),
        ({"metadata.csv": "path,text\na.wav,x\n", "test.csv": "path,text\n"}, ["test.csv", "keep one"]),
        ({"metadata.csv": "path,text,split\na.wav,x,dev\nb.wav,y,Eval\n"}, ["'eval' beside 'dev'", "rename"]),
        ({"metadata.csv": "path,text\na.wav,x\n", "train.csv": "path,text\n"}, ["train.csv", "keep one"]),
        ({"train.csv": "path,text\n", "training.tsv": "path\ttext\n"}, ["train.csv and training.tsv", "keep one"]),
        ({f"a/{name}.csv": "path,text\n" for name in ("metadata", "transcripts")}, ["a must hold one table"]),
    ],
)
def test_ambiguous_splits_are_refused(tmp_path, files, words):
    with pytest.raises(LabError) as error:
        splits(tmp_path, files)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
