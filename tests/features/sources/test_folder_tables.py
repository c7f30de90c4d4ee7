"""Folders as others hand them on: names of files, missing values, parts of recordings, layouts of other programs."""

from __future__ import annotations

import io
import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipelines.features.sources.folder import FolderSource
from pipelines.infra.errors import LabError
from pipelines.speech.audio import SAMPLE_RATE_HZ, AudioError

NFC, NFD = (unicodedata.normalize(form, "båtsmän 0.wav") for form in ("NFC", "NFD"))


@pytest.fixture
def corpus(tmp_path):
    """`corpus({"name": content, ...})`: a folder `speech` with these files; `None` is 6 s of a rising ramp as wav."""
    samples = np.arange(6 * SAMPLE_RATE_HZ, dtype="float32") / (6 * SAMPLE_RATE_HZ)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT")

    def make(files: dict[str, str | bytes | None]) -> Path:
        for name, content in files.items():
            path = tmp_path / "speech" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue() if content is None else content.encode())
        return tmp_path / "speech"

    return make


def read(folder: Path) -> list:
    return list(FolderSource(str(folder)).examples())


def samples_of(example) -> np.ndarray:
    return soundfile.read(io.BytesIO(example.audio), dtype="float32")[0]


# --- names of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (NFD, NFC),
        (NFC, NFD),
        (f"{NFC[:3]}/{NFC}", f"{NFD[:4]}\\{NFD}"),
        ("clips/a b.wav", "clips\\a b.wav"),
        ("clips/a b.wav", ".\\clips\\a b.wav"),
        ("clips/a b.wav", "./clips//a b.wav"),
        ("clips/a b.wav", "clips/a%20b.wav"),
        ("clips/a b.wav", "  clips/a b.wav "),
        ("clips/a b.wav", "Clips/A B.WAV"),
        ("clips/a b.wav", "/media/anna/corpus/clips/a b.wav"),
        ("clips/a b.wav", "C:\\data\\speech\\clips\\a b.wav"),
        ("clips/a b.wav", "\\\\server\\share\\clips\\a b.wav"),
        ("clips/a b.wav", "file:///media/anna/clips/a%20b.wav"),
        ("clips/a b.wav", "speech/clips/a b.wav"),
        ("clips/a b.wav", "../speech/clips/a b.wav"),
        ("clips/a b.wav", "a b.wav"),
        ("a%20b.wav", "a%20b.wav"),
        ("a\\b.wav", "a\\b.wav"),
    ],
)
def test_file_is_found_however_its_name_is_written(corpus, file, named):
    folder = corpus({file: None, "transcripts.jsonl": json.dumps({"path": named, "text": "hej"})})
    [example] = read(folder)
    assert example.audio == folder / file
    assert example.id == str(Path(file).with_suffix(""))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["A.wav", "a.wav"], "/x/other.wav"),
        (["A.wav", "a.wav"], "á.wav"),
        (["A.WAV", "a.WAV"], "A.wav"),
        (["x/a.wav", "a.wav"], "/y/x/a.wav"),
        (["x/a.wav", "y/a.wav"], "a.wav"),
        (["a.wav"], "clips/a.wav"),
        (["a.wav"], "anna/1.wav"),
    ],
)
def test_file_that_several_or_none_fit_is_missing(corpus, files, named):
    folder = corpus({**dict.fromkeys(files), "transcripts.jsonl": json.dumps({"path": named, "text": "hej"})})
    [example] = read(folder)
    assert not example.audio.exists()
    assert example.audio.is_relative_to(folder)


def test_two_names_of_one_file_are_refused(corpus):
    folder = corpus({"1.wav": None, "transcripts.csv": "path,text\n/anna/1.wav,hej\n/bo/1.wav,nej\n"})
    with pytest.raises(
        LabError, match="line 3: a file must have one row, got '1.wav' again, as transcripts.csv line 2"
    ):
        read(folder)


@pytest.mark.parametrize(("link", "target"), [("clips", "clips"), ("clips/a.wav", "clips/a.wav")])
@pytest.mark.parametrize("has_table", [True, False])
def test_link_out_of_the_folder_is_named(corpus, tmp_path, link, target, has_table):
    table = {"transcripts.csv": "path,text\nclips/a.wav,hej\n"} if has_table else {"b.txt": "hej", "b.wav": None}
    folder = corpus(table)
    (tmp_path / "store/clips").mkdir(parents=True)
    (tmp_path / "store/clips/a.wav").write_bytes(b"sound")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(tmp_path / "store" / target)
    with pytest.raises(LabError, match=r"link .*to .*store.*source\.path"):
        read(folder)


# --- missing values and speakers --------------------------------------------------------------------------------------


def test_nan_is_no_word_no_speaker_and_no_gender(corpus):
    lines = '{"path": "a.wav", "text": NaN, "speaker": NaN, "gender": NaN}\n{"path": "b.wav", "text": "Nan"}'
    first, second = read(corpus({"metadata.jsonl": lines}))
    assert (first.text, first.speaker, first.meta, second.text) == ("", "", {}, "Nan")


def test_words_for_missing_metadata_are_no_values(corpus):
    table = "path,text,speaker,gender,split\na.wav,Na,NA,None,train\nb.wav,ja,nan,female,<NA>\n"
    first, second = read(corpus({"transcripts.csv": table}))
    assert (first.text, first.speaker, first.meta) == ("Na", "", {})
    assert (second.speaker, second.meta, second.split) == ("", {"gender": "female"}, "")


def test_spellings_of_a_speaker_are_one_speaker(corpus):
    names = [3, 3.0, "3", " 3.0", "03", "Åsa", "åsa ", unicodedata.normalize("NFD", "Åsa"), "Anna  Ek", "anna ek", 4]
    lines = (json.dumps({"path": f"{i}.wav", "text": "hej", "speaker": name}) for i, name in enumerate(names))
    examples = read(corpus({"transcripts.jsonl": "\n".join(lines)}))
    assert [example.speaker for example in examples] == ["3"] * 5 + ["Åsa"] * 3 + ["Anna  Ek"] * 2 + ["4"]


def test_words_for_an_unknown_speaker_are_no_speaker(corpus):
    names = ["unknown", "Okänd", "?", "NONE", "Anna"]
    table = "path,text,speaker\n" + "".join(f"{i}.wav,hej,{name}\n" for i, name in enumerate(names))
    assert [example.speaker for example in read(corpus({"transcripts.csv": table}))] == ["", "", "", "", "Anna"]


# --- parts of recordings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "cells"),
    [
        ("start,end", "1.5,2.5"),
        ("Begin,Stop", "1.5,2.5"),
        ("start_time,end_time", "0:01.5,00:00:02.500"),
        ("startTime,endTime", "1.5 s,2.5s"),
        ("start_ms,end_ms", "1500,2500 ms"),
        ("offset,duration", "1.5,1"),
        ("start,dur", "1.5,1.0"),
        ("offset_ms,duration_ms", "1500,1000"),
        ("onset,offset", "1.5,2.5"),
        ("from,to", "1.5,2.5"),
        ("xmin,xmax", "1.5,2.5"),
        ("segment_start_time,segment_end_time", "1.5,2.5"),
        ("Starttid,Sluttid", '"1,5","2,5"'),
        ("start (s),end (s)", "1.5,2.5"),
        ("begin,end,duration", "1.5,2.5,6"),
        ("start,end", '"1,5","2,5"'),
    ],
)
def test_part_of_a_recording_is_cut(corpus, columns, cells):
    folder = corpus({"a.wav": None, "transcripts.csv": f"path,text,{columns}\na.wav,hej,{cells}\n"})
    [example] = read(folder)
    cut = samples_of(pickle.loads(pickle.dumps(example)))
    assert np.array_equal(cut, soundfile.read(folder / "a.wav", dtype="float32")[0][24_000:40_000])
    assert example.id == "a@1.5-2.5"


def test_column_from_without_to_is_no_time(corpus):
    [example] = read(corpus({"a.wav": None, "transcripts.csv": "path,text,from\na.wav,hej,Umeå\n"}))
    assert example.id == "a"


def test_several_parts_of_a_file_share_its_split(corpus):
    table = (
        "path,text,start,end\n" + "".join(f"a.wav,hej,{n / 4},{n / 4 + 0.2}\n" for n in range(20)) + "a.wav,slut,5.5,\n"
    )
    folder = corpus({"a.wav": None, "transcripts.csv": table})
    examples = read(folder)
    assert len({example.id for example in examples}) == 21
    assert len({example.split for example in examples}) == 1
    assert len(samples_of(examples[-1])) == SAMPLE_RATE_HZ / 2
    before = FolderSource(str(folder)).identity()
    corpus({"transcripts.csv": table.replace("5.5,", "5.4,")})
    assert FolderSource(str(folder)).identity() != before


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2.5,1.5", "end after its start"),
        ("-1,1.5", "start at 0"),
        ("1,1", "end after its start"),
        ("7,8", "not inside the recording of 6.000 s"),
        ("5,6.5", "not inside the recording of 6.000 s"),
        ("1500,2500", "start_ms"),
        ("x,2", "start must be a time such as 1.5, got 'x'"),
    ],
)
def test_unusable_part_is_a_rejected_row(corpus, row, words):
    folder = corpus({"a.wav": None, "transcripts.csv": f"path,text,start,end\na.wav,hej,{row}\n"})
    [example] = read(folder)
    with pytest.raises(AudioError, match=words) as error:
        example.audio  # noqa: B018  decodes
    assert error.value.reason == "bad_segment"
    assert FolderSource(str(folder)).identity()


def test_empty_cells_and_rounded_ends_are_accepted(corpus):
    table = "path,text,start,end\na.wav,hej,,\nb.wav,hej,NA,2\nc.wav,hej,1,-1\nd.wav,hej,1,6.1\n"
    whole, *parts = read(corpus({**dict.fromkeys(("a.wav", "b.wav", "c.wav", "d.wav")), "transcripts.csv": table}))
    assert isinstance(whole.audio, Path)
    assert [len(samples_of(part)) / SAMPLE_RATE_HZ for part in parts] == [2, 5, 5]


def test_samples_as_unit_are_refused(corpus):
    with pytest.raises(LabError, match="'start_sample' must state seconds"):
        read(corpus({"transcripts.csv": "path,text,start_sample\na.wav,hej,100\n"}))


def test_stated_duration_shorter_than_the_file_is_rejected(corpus):
    table = "path,text,duration\na.wav,hej,6.04\nb.wav,hej,1\nc.wav,hej,okänd\n"
    fits, part, unknown = read(corpus({**dict.fromkeys(("a.wav", "b.wav", "c.wav")), "transcripts.csv": table}))
    assert len(samples_of(fits)) == 6 * SAMPLE_RATE_HZ
    assert fits.id == "a"
    assert isinstance(unknown.audio, Path)
    with pytest.raises(AudioError, match="states a duration of 1 s, the recording lasts 6.000 s"):
        part.audio  # noqa: B018  decodes


# --- layouts of other programs ----------------------------------------------------------------------------------------


def test_nemo_manifests_are_read(corpus):
    row = {"audio_filepath": "/data/speech/wav/a.wav", "text": "hej", "duration": 2.0, "speaker": 3}
    rows = [row, {**row, "offset": 2.0}]
    lines = "\n".join(map(json.dumps, rows))
    folder = corpus(
        {"wav/a.wav": None, "train_manifest.json": lines, "dev_manifest.json": json.dumps({**row, "offset": 5})}
    )
    examples = read(folder)
    assert [(e.id, e.split, e.speaker) for e in examples] == [
        ("wav/a@0-2", "train", "3"),
        ("wav/a@2-4", "train", "3"),
        ("wav/a@5-7", "validation", "3"),
    ]
    assert [len(samples_of(example)) / SAMPLE_RATE_HZ for example in examples[:2]] == [2, 2]


KALDI = {
    "a.wav": None,
    "wav.scp": "rec1 /corpora/speech/a.wav\n",
    "segments": "anna-1 rec1 0.5 1.5\nanna-2 rec1 2 -1\n",
    "text": "anna-1 Hej på dig.\nanna-2\nanna-3 Utan ljud.\n",
    "utt2spk": "anna-1 anna\nanna-2 anna\n",
}


def test_kaldi_directories_are_read(corpus):
    first, second, third = read(corpus(KALDI))
    assert (third.text, third.audio.exists()) == ("Utan ljud.", False)
    assert (first.id, first.text, first.speaker) == ("a@0.5-1.5", "Hej på dig.", "anna")
    assert (second.id, second.text, len(samples_of(second))) == ("a@2-", "", 4 * SAMPLE_RATE_HZ)


def test_kaldi_directories_of_splits_are_read(corpus):
    folder = {name: content for name, content in KALDI.items() if name != "segments"}
    folder |= {"wav.scp": "anna-1 a.wav\n", "text": "anna-1 Hej.\n"}
    files = {f"{split}/{name}": content for split in ("train", "dev", "test") for name, content in folder.items()}
    examples = {example.id: example.split for example in read(corpus(files))}
    assert examples == {"train/a": "train", "dev/a": "validation", "test/a": "test"}


@pytest.mark.parametrize(
    "value", ["sph2pipe -f wav a.sph |", "| cat a.wav", "touch executed; cat a.wav |", "raw.ark:17", "flac -dc a.flac|"]
)
def test_kaldi_commands_are_refused_and_never_run(corpus, value, monkeypatch):
    folder = corpus({**KALDI, "wav.scp": f"rec1 {value}\n"})
    monkeypatch.chdir(folder)
    with pytest.raises(LabError, match="wav.scp line 1: rec1 must be a file.*never executed"):
        read(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("suffix", ["", ".wav"])
def test_ljspeech_is_read(corpus, suffix):
    table = f'LJ001-0001{suffix}|"Hej", sa 2.' + ("\n" if suffix else "|Hej, sa två.\n")
    [example] = read(corpus({"wavs/LJ001-0001.wav": None, "metadata.csv": table}))
    assert (example.id, example.text, example.audio.exists()) == ("wavs/LJ001-0001", '"Hej", sa 2.', True)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["x_recordings.jsonl.gz", "x_supervisions.jsonl.gz"], "lhotse kaldi export x_recordings.jsonl.gz"),
        (["cuts_train.jsonl.gz"], "lhotse cut decompose cuts_train.jsonl.gz"),
        (["dataset_info.json", "state.json", "data-00000-of-00001.arrow"], "source.kind=parquet"),
        (["train-00000-of-00001.parquet"], "source.kind=parquet"),
        (["Intervjuer.ods"], "save it as transcripts.xlsx"),
        (["shard-000000.tar"], "tar xf"),
        (["a.TextGrid"], "transcripts.csv with the columns path, start, end and text"),
    ],
)
def test_other_layouts_are_named_with_the_way_to_convert(corpus, files, words):
    folder = corpus({"a.wav": None, **dict.fromkeys(files)})
    with pytest.raises(LabError) as error:
        read(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_common_voice_spontaneous_speech_is_read(corpus):
    table = "client_id\taudio_file\tduration_ms\tprompt\ttranscription\tsplit\n"
    table += "abc\ts-1.mp3\t6000\tVad gör du?\tJag läser.\tdev\n"
    [example] = read(corpus({"audios/s-1.mp3": None, "ss-corpus-sv-SE.tsv": table}))
    assert (example.text, example.split, example.speaker) == ("Jag läser.", "validation", "abc")


# --- the table that transcribe writes ---------------------------------------------------------------------------------


def test_transcribed_table_is_a_source_without_its_failures(corpus):
    table = (
        "audio,transcript,confidence,audio_s,error\nspeech/a.wav,Hej.,0.9,6.0,\nspeech/b.wav,He,0.4,2.0,damaged: x\n"
    )
    folder = corpus({"a.wav": None, "b.wav": None, "transcripts.csv": table})
    good, failed = read(folder)
    assert (good.id, good.text, good.audio) == ("a", "Hej.", folder / "a.wav")
    with pytest.raises(AudioError, match="damaged: x") as error:
        failed.audio  # noqa: B018  refuses
    assert error.value.reason == "not_transcribed"
