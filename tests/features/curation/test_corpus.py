"""Curation over small planted corpora, from a source to a sealed cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from log_recorder import record_log

from pipelines.features import cache as caches
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.build import BuildOptions, build
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import corpus
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.curation.held_out import load_held_out
from pipelines.features.curation.leaks import HeldOut
from pipelines.features.curation.selection import ORDER
from pipelines.features.sources import SPLITS, Example
from pipelines.infra.errors import LabError
from pipelines.recipes import load, setting_names
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.settings import Recipe
from pipelines.whisper.model import ModelRef

IDENTITY = {"features.dtype": "float32", "features.n_mels": 80}


@dataclass
class Listed:
    """A source without an outline."""

    rows: list[Example]

    def identity(self) -> dict[str, str]:
        return {"kind": "listed"}

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        return (row for row in self.rows if row.split in splits)


class Outlined(Listed):
    """A source with an outline."""

    def outline(self) -> Iterator[Example]:
        return (replace(row, audio=b"") for row in self.rows)


@pytest.fixture(scope="module")
def sounds(encoded, speech) -> list[bytes]:
    return [encoded((speech(8_000, seed) * 32_767).astype(np.int16)) for seed in range(30)]


@pytest.fixture
def rows(sounds) -> list[Example]:
    """Twenty-six training clips, two of validation, two of test, none of them leaking."""
    splits = ["test", "test", "validation", "validation", *["train"] * 26]
    return [
        Example(f"{split}-{n}", split, f"Mening nummer {n}.", sounds[n], f"{split} {n % 5}")
        for n, split in enumerate(splits)
    ]


def curated(
    folder: Path, source: Listed, transcribe=lambda cache, rows: pytest.fail("unexpected transcription"), **settings
):
    """Build a curated cache like the pipeline, with one token per letter of a transcript and no model."""
    chosen = load("tour", {f"curation.{name}": value for name, value in settings.items()}).curation
    clip_filter = ClipFilter(
        lambda text: [*map(ord, text)],
        80,
        0.1,
        30.0,
        1e-3,
        corpus.limits(chosen),
        chosen.full_stop,
        non_speech=chosen.non_speech_share > 0,
    )
    held_out = load_held_out(chosen.held_out, 80)
    before = corpus.survey(chosen, source, held_out)

    def functions(cache: FeatureCache) -> corpus.LabelErrors:
        return corpus.LabelErrors(lambda indices: transcribe(cache, indices), clip_filter.label)

    return build(
        folder,
        corpus.selected(source, before),
        clip_filter.create_clip,
        IDENTITY,
        BuildOptions(shard_clips=8),
        curate=lambda cache, rejected: corpus.finish(chosen, cache, rejected, before, held_out, functions(cache)),
    )


def reasons(cache: FeatureCache) -> dict[str, str]:
    return dict(zip(cache.rejected["id"], cache.rejected["reason"], strict=True))


def counts(cache: FeatureCache) -> dict[str, tuple[int, int]]:
    return {row["step"]: (row["before"], row["after"]) for row in cache.curation}


def planted(rows: list[Example], encoded, speech) -> tuple[list[Example], dict[str, str]]:
    """Return the rows with leaks of each kind planted in training, and the expected reason of each."""
    leaking = {n: replace(row) for n, row in enumerate(rows)}
    leaking[6] = replace(rows[6], speaker=rows[0].speaker)
    leaking[7] = replace(rows[7], speaker=rows[3].speaker)
    leaking[8] = replace(rows[8], text="mening, nummer 1")
    leaking[9] = replace(rows[9], audio=rows[2].audio)
    leaking[10] = replace(rows[10], audio=encoded((speech(8_000, 1) * 32_767).astype(np.int16), format="FLAC"))
    kinds = {6: "speaker", 7: "speaker", 8: "sentence", 9: "audio", 10: "audio"}
    return list(leaking.values()), {rows[n].id: f"leak_{kind}" for n, kind in kinds.items()}


@pytest.mark.parametrize("kind", [Outlined, Listed])
def test_planted_leaks_of_every_kind_are_dropped(tmp_path, rows, encoded, speech, kind):
    leaking, expected = planted(rows, encoded, speech)
    cache = curated(tmp_path / "c", kind(leaking), leaks="drop")
    assert reasons(cache) == expected
    assert cache.rows["id"].tolist() == [row.id for row in rows if row.id not in expected]
    assert cache.counts == {"test": 2, "validation": 2, "train": 21, "rejected": 5}
    assert {step: before - after for step, (before, after) in counts(cache).items() if before > after} == {
        "leak_speaker": 2,
        "leak_sentence": 1,
        "leak_audio": 2,
    }
    again = caches.open_cache(cache.folder)
    assert again.rows.equals(cache.rows)
    assert again.curation == cache.curation
    clean = curated(tmp_path / "clean", kind([row for row in rows if row.id not in expected]))
    for row in range(len(clean.rows)):  # frames of dropped rows stay in their shard: the others are still found
        assert np.array_equal(cache.log_mel(row).frames, clean.log_mel(row).frames)


@pytest.mark.parametrize("kind", [Outlined, Listed])
@pytest.mark.parametrize(("at", "which"), [(6, "leak_speaker"), (8, "leak_sentence"), (10, "leak_audio")])
def test_leaking_corpus_raises_by_default(tmp_path, rows, encoded, speech, kind, at, which):
    leaking = planted(rows, encoded, speech)[0]
    one = [leaking[n] if n == at else row for n, row in enumerate(rows)]
    with pytest.raises(LabError, match=rf"got 1 that do: 1 by {which} \({rows[at].id}: .*curation.leaks=drop"):
        curated(tmp_path / "c", kind(one))
    assert not caches.is_finished(tmp_path / "c")
    assert len(curated(tmp_path / "d", kind(one), leaks="ignore").rows) == 30


@pytest.mark.parametrize("leaks", ["refuse", "drop", "ignore"])
def test_recording_in_validation_and_test_raises(tmp_path, rows, encoded, speech, leaks):
    """The copy has another name, sentence, speaker and container."""
    again = encoded((speech(8_000, 1) * 32_767).astype(np.int16), format="FLAC")
    rows[3] = replace(rows[3], audio=again)
    with pytest.raises(LabError, match="no recording in common, got 1: validation row validation-3 is test row test-1"):
        curated(tmp_path / "c", Outlined(rows), leaks=leaks)
    assert not caches.is_finished(tmp_path / "c")


def test_same_source_as_validation_and_test_raises(tmp_path, rows):
    """The same files are validation in one part and test in the other."""
    twice = [replace(row, id=f"a/{row.id}", split="validation") for row in rows[:2]]
    with pytest.raises(LabError, match="no recording in common, got 2: validation row a/test-0 is test row test-0"):
        curated(tmp_path / "c", Outlined([*rows, *twice]))


def test_metadata_leaks_raise_before_audio_is_read(tmp_path, rows):
    leaking = [replace(row, text="Samma.", audio=b"no sound") for row in rows]
    with pytest.raises(LabError, match="26 by leak_sentence"):
        curated(tmp_path / "c", Outlined(leaking))
    assert not (tmp_path / "c").exists()


def test_all_steps_run_in_order_with_matching_counts(tmp_path, rows, speech, encoded):
    rows[4] = replace(rows[4], speaker=rows[1].speaker)
    rows[5] = replace(rows[5], text="Mening nummer 0!")
    rows[6] = replace(rows[6], meta={"up_votes": "0"})
    rows[8] = replace(rows[7], id="train-8")
    rows[9] = replace(rows[9], meta={"gender": "male"})
    rows[10] = replace(rows[10], meta={"gender": "male"})
    rows[11] = replace(rows[11], meta={"gender": "female"})
    rows[12] = replace(rows[12], audio=b"no sound")
    rows[13] = replace(rows[13], audio=encoded(speech(1_000)))
    rows[14] = replace(rows[14], audio=encoded(np.clip(speech(8_000) * 9, -1, 1)))
    rows[15] = replace(rows[15], text="Lång " * 60)
    rows[16] = replace(rows[16], audio=encoded(np.concatenate([speech(8_000, 40), np.zeros(30_000)])))
    rows[17] = replace(rows[17], audio=encoded(np.random.default_rng(1).uniform(-0.5, 0.5, 8_000)))
    rows[18] = replace(rows[18], audio=rows[0].audio)
    rows[20] = replace(rows[20], audio=rows[19].audio)
    rows[21], rows[22] = (replace(row, text="") for row in rows[21:23])
    settings = {
        "leaks": "drop",
        "marks": "remove",
        "min_up_votes": 1,
        "unique_sentences": True,
        "unique_audio": True,
        "balance_by": "gender",
        "max_per_speaker": 50,
        "max_clipped_share": 0.1,
        "max_chars_per_s": 100,
        "max_silence_share": 0.5,
        "min_snr_db": 1.0,
        "max_label_cer": 0.5,
        "non_speech_share": 0.01,
    }

    def transcribe(cache: FeatureCache, indices: np.ndarray) -> list[str]:
        assert set(cache.rows["split"].iloc[indices]) == {"train"}
        return ["något annat" if name == "train-29" else text for name, text in zip(*ids_and_texts(cache, indices))]

    cache = curated(tmp_path / "c", Outlined(rows), transcribe, **settings)
    dropped, drawn = reasons(cache), ("train-9", "train-10", "train-21", "train-22")
    assert {name: reason for name, reason in dropped.items() if name not in drawn} == {
        "train-4": "leak_speaker",
        "train-5": "leak_sentence",
        "train-6": "votes",
        "train-8": "duplicate_sentence",
        "train-12": "unreadable",
        "train-13": "too_short",
        "train-14": "clipped",
        "train-15": "fast_speech",
        "train-16": "silence",
        "train-17": "noisy",
        "train-18": "leak_audio",
        "train-20": "duplicate_audio",
        "train-29": "label_error",
    }
    assert [dropped.get(name) for name in drawn[:2]].count("balance") == 1
    assert [dropped.get(name) for name in drawn[2:]].count("non_speech") == 1
    assert [row["step"] for row in cache.curation] == [step for step in ORDER if step != "reviewed"]
    before = len(rows)
    for row in cache.curation:
        assert row["before"] == before
        assert row["after"] == before - row["dropped"]
        before = row["after"]
    assert before == len(cache.rows) == len(rows) - cache.counts["rejected"]
    assert len(cache.rejected) == cache.counts["rejected"] == 15
    assert cache.rejected["detail"].str.len().min() > 5


def ids_and_texts(cache: FeatureCache, indices: np.ndarray) -> tuple[list[str], list[str]]:
    return cache.rows["id"].iloc[indices].tolist(), cache.rows["text"].iloc[indices].tolist()


def test_audio_keys_differ_for_equal_length_and_pad_value(tmp_path, rows, encoded, speech):
    endings = [np.concatenate([speech(8_000), 0.1 * speech(8_000, seed)]) for seed in (1, 2, 3)]
    for n, ending in zip((0, 6, 7), endings, strict=True):
        rows[n] = replace(rows[n], audio=encoded(ending))
    rows[8] = replace(rows[8], audio=rows[6].audio)
    cache = curated(tmp_path / "c", Outlined(rows), unique_audio=True)
    similar = cache.rows[cache.rows["id"].isin(["test-0", "train-6", "train-7"])]
    assert similar["pad_value"].nunique() == similar["frames"].nunique() == 1
    assert reasons(cache) == {"train-8": "duplicate_audio"}


def test_curation_is_deterministic(tmp_path, rows, encoded, speech):
    source = Outlined(planted(rows, encoded, speech)[0])
    settings = {"leaks": "drop", "max_per_speaker": 2, "unique_audio": True}
    first, second = (curated(tmp_path / name, source, **settings) for name in "ab")
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == {
        path.name: path.read_bytes() for path in second.folder.iterdir()
    }
    assert curated(tmp_path / "c", source, **settings, seed=12).rows["id"].tolist() != first.rows["id"].tolist()


def test_no_training_clip_left_raises(tmp_path, rows):
    with pytest.raises(LabError, match=r"at least one training clip.*26 were dropped, the first as votes: "):
        curated(tmp_path / "c", Outlined([replace(r, meta={"up_votes": "0"}) for r in rows]), min_up_votes=1)


def test_duplicate_of_a_dropped_id_raises(tmp_path, rows):
    twin = [*rows, replace(rows[9], meta={"up_votes": "0"}), replace(rows[9], meta={"up_votes": "0"})]
    with pytest.raises(LabError, match="ids must be unique"):
        curated(tmp_path / "c", Outlined(twin), min_up_votes=1)


def test_corpus_without_training_rows_is_accepted(tmp_path, rows):
    assert len(curated(tmp_path / "c", Outlined(rows[:4])).rows) == 4


# --- rows held out elsewhere ------------------------------------------------------------------------------------------


def test_rows_of_a_held_out_table_are_dropped(tmp_path, rows):
    table = tmp_path / "test.tsv"
    table.write_text('client_id\tpath\tsentence\ntrain 1\tx.mp3\t"Hej\nannan\ty.mp3\tmening nummer 7\n', "utf-8")
    cache = curated(tmp_path / "c", Outlined(rows), leaks="drop", held_out=[str(table)])
    speakers = {row.id for row in rows if row.speaker == "train 1"}
    assert reasons(cache) == {**dict.fromkeys(speakers, "leak_speaker"), "train-7": "leak_sentence"}
    assert "test.tsv line 2" in cache.rejected["detail"][0]


@pytest.mark.parametrize(("column", "train"), [("split", "train"), ("Split", "Training"), ("SPLIT", " TRAIN ")])
def test_held_out_table_ignores_its_training_rows(tmp_path, column, train):
    table = tmp_path / "transcripts.csv"
    table.write_text(f'text,{column}\n"Mening nummer 6.",{train}\n"Mening nummer 7.",dev\n', "utf-8")
    assert list(load_held_out([str(table)], 80).sentences) == ["mening nummer 7"]


def test_held_out_table_of_training_rows_is_logged(tmp_path):
    table = tmp_path / "transcripts.csv"
    table.write_text("text,split\nHej.,training\n", "utf-8")
    lines = record_log()
    assert not load_held_out([str(table)], 80).sentences
    assert "holds out nothing" in lines[0]


def test_held_out_cache_drops_equal_audio(tmp_path, rows, sounds):
    other = [Example("x", "test", "Något helt annat.", sounds[12], "kajsa"), Example("y", "train", "Ja.", sounds[13])]
    curated(tmp_path / "other", Outlined(other))
    cache = curated(tmp_path / "c", Outlined(rows), leaks="drop", held_out=[str(tmp_path / "other")])
    assert reasons(cache) == {"train-12": "leak_audio"}
    assert cache.rejected["detail"].tolist() == ["the same audio is in other, test row x"]
    with pytest.raises(LabError, match="80 mel bands"):
        load_held_out([str(tmp_path / "other")], 128)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("gone.tsv", None, "curation.held_out: gone.tsv must be a readable file"),
        ("test.txt", "sentence\nHej\n", "must be one of .csv"),
        ("test.tsv", "path\tlength\na\t1\n", "must have a column.*got path, length"),
        ("test.tsv", "", "is empty"),
        ("test.csv", "text\n\x86\n", "must be UTF-8"),
    ],
)
def test_unusable_held_out_table_is_a_one_line_error(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(LabError, match=complaint) as error:
        load_held_out([str(tmp_path / name)], 80)
    assert "\n" not in str(error.value)


# --- label errors -----------------------------------------------------------------------------------------------------


def transcribe_with_errors(cache: FeatureCache, indices: np.ndarray) -> list[str]:
    """Return the references, but for three clips other words, nothing, and one letter less."""
    other = {"train-4": "Något annat sägs här.", "train-5": "...", "train-6": "Mening numer 6."}
    rows = cache.rows.iloc[indices]
    return [other.get(name, text) for name, text in zip(rows["id"], rows["text"], strict=True)]


def test_label_errors_are_repaired_with_hypotheses(tmp_path, rows):
    curation = {"max_label_cer": 0.3, "label_errors": "repair"}
    cache = curated(tmp_path, Outlined(rows), transcribe=transcribe_with_errors, **curation)
    uncurated = curated(tmp_path / "whole", Outlined(rows))
    assert reasons(cache) == {"train-5": "label_error"}  # what was heard in it cannot be trained on
    assert cache.repaired.to_dict("records") == [
        {"id": "train-4", "before": "Mening nummer 4.", "after": "Något annat sägs här."}
    ]
    assert cache.curation[-1] == {"step": "label_error", "before": 30, "after": 29, "dropped": 1, "changed": 1}
    now = dict(zip(cache.rows["id"], cache.rows["text"], strict=True))
    before = dict(zip(uncurated.rows["id"], uncurated.rows["text"], strict=True))
    assert {name: text for name, text in now.items() if text != before[name]} == {"train-4": "Något annat sägs här."}
    for opened in (cache, caches.open_cache(cache.folder)):
        for row, text in enumerate(opened.rows["text"]):
            assert opened.labels(row) == [*map(ord, text)]


@pytest.mark.parametrize("kind", [Outlined, Listed])
@pytest.mark.parametrize("leaks", ["drop", "refuse", "ignore"])
def test_repair_to_a_held_out_sentence_is_dropped(tmp_path, rows, kind, leaks):
    """One sentence is in the test split, one in a table, the third is not held out."""
    table = tmp_path / "held.tsv"
    table.write_text("sentence\nDet regnar i Lund.\n", "utf-8")
    other = {"train-4": "MENING nummer 1!", "train-5": "det regnar, i Lund", "train-6": "Något helt annat sägs."}
    rows = [replace(row, text="Helt fel text här nu.") if row.id in other else row for row in rows]

    def transcribe(cache: FeatureCache, indices: np.ndarray) -> list[str]:
        rows = cache.rows.iloc[indices]
        return [other.get(name, text) for name, text in zip(rows["id"], rows["text"], strict=True)]

    settings = {"max_label_cer": 0.3, "label_errors": "repair", "leaks": leaks, "held_out": [str(table)]}
    cache = curated(tmp_path / "c", kind(rows), transcribe=transcribe, **settings)
    repaired = set(cache.repaired["id"])
    if leaks == "ignore":
        assert repaired == {*other} and not reasons(cache)
        return
    assert repaired == {"train-6"}
    assert reasons(cache) == {"train-4": "label_error", "train-5": "label_error"}
    first, second = cache.rejected.sort_values("id")["detail"]
    assert first.endswith("heard 'MENING nummer 1!', which is in test row test-1")
    assert second.endswith("which is in held.tsv line 2")


def test_no_repairs_write_no_table(tmp_path, rows):
    cache = curated(tmp_path, Outlined(rows), transcribe=transcribe_with_errors, max_label_cer=0.3)
    assert set(reasons(cache)) == {"train-4", "train-5"}
    assert not (cache.folder / "repaired.csv").exists() and not len(cache.repaired)


def test_held_out_rows_are_never_repaired(tmp_path, rows):
    indices = []

    def transcribe(cache: FeatureCache, rows: np.ndarray) -> list[str]:
        indices.extend(cache.rows["split"].iloc[rows])
        return ["Helt andra ord."] * len(rows)

    cache = curated(tmp_path, Outlined(rows), transcribe=transcribe, max_label_cer=0.3, label_errors="repair")
    assert set(indices) == {"train"}
    assert set(cache.rows["text"][cache.rows["split"] == "train"]) == {"Helt andra ord."}
    assert not cache.rows["text"][cache.rows["split"] != "train"].str.contains("Helt").any()


# --- identity ---------------------------------------------------------------------------------------------------------


def identity(recipe: Recipe, weights: Path | None = None) -> dict:
    return corpus.identity(recipe, lambda: ModelRef("m", weights, "folder", "1"))


def test_default_settings_add_nothing_to_identity():
    assert identity(load()) == {}
    assert identity(load("tour", {"curation.label_model": "x"})) == {}


OTHER = {
    "marks": "remove",
    "leaks": "drop",
    "label_errors": "repair",
    "balance_by": "accent",
    "min_level_dbfs": -50.0,
    "max_clipped_share": 0.1,
    "max_silence_share": 0.1,
    "unique_sentences": True,
    "unique_audio": True,
    "full_stop": True,
    "non_speech_share": 0.1,
}
ELSEWHERE = ("held_out", "max_label_cer", "label_model", "corrections")
FLAT = [name.removeprefix("curation.") for name in setting_names() if name.startswith("curation.")]


@pytest.mark.parametrize("name", [name for name in FLAT if name not in ELSEWHERE])
def test_identity_changes_with_every_setting(name):
    default = getattr(load().curation, name)
    value = OTHER.get(name, default if isinstance(default, bool | str) else default + 1)
    assert identity(load("tour", {f"curation.{name}": value})) == {
        f"curation.{name}": value,
        "code.curation": corpus.CODE,
    }


def test_identity_changes_with_label_model_and_held_out(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    recipe = load("tour", {"curation.max_label_cer": 0.5})
    first = identity(recipe, tmp_path)
    weights.write_bytes(b"2")
    second = identity(recipe, tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == ["curation.label_model.weights_sha256"]
    table = tmp_path / "test.tsv"
    table.write_text("sentence\nHej\n", "utf-8")
    recipe = load("tour", {"curation.held_out": [str(table)]})
    first = identity(recipe)
    table.write_text("sentence\nHejdå\n", "utf-8")
    assert identity(recipe) != first
    assert str(tmp_path) not in json.dumps(first)
    table.unlink()
    with pytest.raises(LabError, match="neither a table nor a finished cache"):
        identity(recipe)


# --- pipeline ---------------------------------------------------------------------------------------------------------


def test_stage_records_curation_counts(toy_settings, tmp_path):
    recipe = toy_settings({"curation.max_per_speaker": 1, "source.train": 60})
    cache = feature_pipeline.run(recipe, runs=tmp_path)
    assert counts(cache)["speaker_cap"] == (80, 68)
    assert cache.counts == {"train": 48, "validation": 8, "test": 12, "rejected": 12}
    assert json.loads((cache.folder / "manifest.json").read_text("utf-8"))["curation"] == cache.curation
    assert recipe_runs.read_stages(recipe, tmp_path)["features"]["curation"] == cache.curation


def test_toy_tour_keeps_all_rows(toy_cache):
    assert not [name for name in toy_cache.identity if "curation" in name]
    assert {row["dropped"] for row in toy_cache.curation} == {0}
    assert len(toy_cache.rows) == 68


def test_outline_synthesises_no_audio(monkeypatch, tmp_path, rows):
    from pipelines.features.sources.folder import FolderSource
    from pipelines.features.sources.synthetic import espeak
    from pipelines.features.sources.synthetic.tour import TourSource

    tour = TourSource(4, 2, 2)
    uncurated = list(tour.examples())
    monkeypatch.setattr(espeak, "synthesise", lambda *arguments: pytest.fail("no audio is asked for"))
    assert list(tour.outline()) == [
        Example(each.id, each.split, each.text, b"", each.speaker, each.meta) for each in uncurated
    ]
    (tmp_path / "a.txt").write_text("Hej.", "utf-8")
    (tmp_path / "a.wav").write_bytes(rows[0].audio)
    folder = FolderSource(str(tmp_path))
    assert list(folder.outline()) == list(folder.examples())


def test_held_out_values_keep_their_first_row():
    held = HeldOut()
    held.add("first", "anna", "Hej.", "1")
    held.add("second", "anna", "hej", "1")
    assert (held.speakers, held.sentences, held.audio) == ({"anna": "first"}, {"hej": "first"}, {"1": "first"})
