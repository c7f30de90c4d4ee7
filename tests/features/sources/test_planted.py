"""The planted corpus: every fault matches its label, and the held-out splits have none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.curation import corpus, quality
from pipelines.features.curation.leaks import HeldOut
from pipelines.features.sources import Example
from pipelines.features.sources.registry import open_source
from pipelines.features.sources.synthetic.planted import FAULTS, FaultRates, PlantedSource, add_noise, clip
from pipelines.infra.errors import LabError
from pipelines.recipes import load
from pipelines.speech import audio, text

needs_espeak = pytest.mark.skipif(find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed")
SHIPPED = [name for name in recipes.names() if name.startswith("planted-")]
RATES = FaultRates(label_swap=0.2, label_word=0.1, noise=0.1, clipping=0.1, duplicate=0.15, leak=0.16)
SMALL = PlantedSource(100, 8, 32, faults=RATES, men=0.8)


def rows(source: PlantedSource = SMALL, split: str = "train") -> list[Example]:
    return [example for example in source.outline() if example.split == split]


def of(fault: str) -> list[Example]:
    return [row for row in rows() if row.meta["planted"] == fault]


def test_fault_rates_are_exact_and_exclusive():
    counts = Counter(row.meta["planted"] for row in rows())
    assert counts == {
        "": 19,
        "label_swap": 20,
        "label_word": 10,
        "noise": 10,
        "clipping": 10,
        "duplicate": 15,
        **dict.fromkeys(("leak_speaker", "leak_sentence", "leak_audio", "leak_renamed"), 4),
    }
    assert set(counts) == {"", *FAULTS}


def test_more_faults_than_clips_raise():
    with pytest.raises(LabError, match="at most 1 in all, got 1.2"):
        PlantedSource(50, 4, 8, faults=FaultRates(label_swap=0.6, noise=0.6)).plan()
    with pytest.raises(LabError, match="must leave clips that can be copied"):
        PlantedSource(50, 4, 8, faults=FaultRates(duplicate=1.0)).plan()
    with pytest.raises(LabError, match="two clips or none"):
        PlantedSource(10, 4, 8, faults=FaultRates(label_swap=0.1)).plan()


def test_held_out_splits_are_clean_for_any_faults():
    for split in ("validation", "test"):
        clean = rows(replace(SMALL, faults=FaultRates(), men=0.5), split)
        assert rows(split=split) == clean
        assert all(row.text == row.meta["spoken"] and not row.meta["planted"] for row in clean)
    assert len({row.speaker for row in rows(split="test")}) == 32


def test_corpus_without_faults_is_clean():
    clean = PlantedSource(100, 8, 32)
    assert all(row.text == row.meta["spoken"] and not row.meta["planted"] for row in rows(clean))
    assert len({text.normalise(row.text) for row in clean.outline()}) == 140
    assert not {row.speaker for row in rows(clean)} & {row.speaker for row in rows(clean, "test")}


def test_swapped_transcripts_are_those_of_other_clips():
    swapped = of("label_swap")
    assert Counter(row.text for row in swapped) == Counter(row.meta["spoken"] for row in swapped)
    assert all(row.text != row.meta["spoken"] for row in swapped)


def test_label_word_changes_one_word():
    sizes = set()
    for row in of("label_word"):
        told, said = (text.normalise(words).split() for words in (row.text, row.meta["spoken"]))
        assert told != said
        sizes.add(len(told) - len(said))
    assert sizes <= {-1, 0, 1} and len(sizes) > 1


def test_duplicate_follows_original_with_same_audio():
    seen: dict[tuple, str] = {}
    for line in (line for line in SMALL.plan() if line.said.split == "train"):
        said = line.said
        sound = (said.text, said.variant, said.rate_wpm, said.pitch)
        if line.fault == "duplicate":
            assert seen[sound] == ""
        elif line.fault not in ("leak_audio", "leak_sentence"):
            assert sound not in seen
        seen.setdefault(sound, line.fault)


def test_leaks_come_from_the_test_split():
    test = rows(split="test")
    speakers, sentences = {row.speaker for row in test}, {row.text: row for row in test}
    assert all(row.speaker in speakers and row.meta["spoken"] not in sentences for row in of("leak_speaker"))
    for row in of("leak_sentence"):
        assert row.speaker not in speakers and row.meta["spoken"] in sentences and row.text != row.meta["spoken"]
    for row in of("leak_audio"):
        assert row.speaker not in speakers and row.text not in sentences
        same = ("variant", "rate_wpm", "pitch", "spoken")
        assert [row.meta[name] for name in same] == [sentences[row.meta["spoken"]].meta[name] for name in same]
    for row in of("leak_renamed"):
        assert row.speaker not in speakers and row.speaker.removeprefix("unknown-") in speakers


def test_men_fraction_is_exact():
    clean = replace(SMALL, faults=FaultRates())
    assert Counter(row.meta["gender"] for row in rows(clean)) == {"male": 80, "female": 20}


def test_plan_is_a_function_of_the_settings():
    assert SMALL.plan() == replace(SMALL).plan()
    assert replace(SMALL, seed=8).plan() != SMALL.plan()
    assert replace(SMALL, seed=8).identity()["plan_sha256"] != SMALL.identity()["plan_sha256"]


def test_file_sentences_are_used_in_training_only(tmp_path: Path):
    held_out = rows(PlantedSource(3, 4, 8), "test")[0].text
    path = tmp_path / "lines.txt"
    path.write_text(
        f"{held_out.upper()}\nFör kort\nDet första är här.\nDET FÖRSTA är här\nDet andra är där.\n", "utf-8"
    )
    source = PlantedSource(2, 4, 8, sentences=str(path))
    assert sorted(text.normalise(row.text) for row in rows(source)) == ["det andra är där", "det första är här"]
    assert rows(source, "test") == rows(PlantedSource(2, 4, 8), "test")
    assert str(tmp_path) not in str(source.identity())
    with pytest.raises(LabError, match="3 different lines of 3 to 12 words, .* holds 2: lower source.train"):
        PlantedSource(3, 4, 8, sentences=str(path)).plan()
    with pytest.raises(LabError, match="must name a UTF-8 text file"):
        PlantedSource(3, 4, 8, sentences=str(tmp_path / "absent")).plan()


def test_noise_snr_is_within_range(speech):
    clean = speech(32_000).astype(np.float64)
    for seed in range(8):
        mixed = add_noise(clean, np.random.default_rng(seed))
        assert np.abs(mixed).max() <= 1
        gain = (mixed @ clean) / (clean @ clean)
        snr_db = 10 * np.log10(np.square(gain * clean).mean() / np.square(mixed - gain * clean).mean())
        assert -6 < snr_db < 6


def test_clip_reaches_the_clipped_share(speech):
    samples = clip(speech(32_000))
    assert np.abs(samples).max() == 1.0
    assert 0.1 < quality.clipped_share(samples) <= 0.25


@needs_espeak
def test_planted_noise_and_clipping_are_audible():
    few = replace(SMALL, train=30, test=8)
    sounds: dict[str, set] = {}
    same: dict[str, set] = {}
    for example in few.examples(("train",)):
        samples = audio.decode(example.audio).samples
        sounds.setdefault(example.meta["planted"], set()).add(round(quality.clipped_share(samples), 2))
        same.setdefault(example.meta["spoken"] + example.speaker, set()).add(audio.fingerprint(example.audio))
    assert min(sounds["clipping"]) > 0.05
    assert all(max(shares) < 0.05 for fault, shares in sounds.items() if fault != "clipping")
    assert all(len(samples) == 1 for samples in same.values())


# --- the truth stays out of sight -------------------------------------------------------------------------------------


class Blind:
    """The corpus with its true labels removed or replaced by wrong ones."""

    def __init__(self, source: PlantedSource, truth: str | None):
        self.source, self.truth = source, truth

    def outline(self):
        for row in self.source.outline():
            meta = {name: value for name, value in row.meta.items() if name not in ("planted", "spoken")}
            yield replace(row, meta=meta if self.truth is None else {**meta, "planted": self.truth, "spoken": "x"})


@pytest.mark.parametrize("truth", [None, "", "label_swap"])
def test_curation_does_not_read_planted_column(truth):
    options = {"leaks": "drop", "unique_sentences": True, "balance_by": "gender", "max_per_speaker": 3}
    settings = load("tour", {f"curation.{name}": value for name, value in options.items()}).curation
    seeing = corpus.survey(settings, SMALL, HeldOut())
    assert len(seeing.dropped) > 20
    assert corpus.survey(settings, Blind(SMALL, truth), HeldOut()).dropped == seeing.dropped


def test_only_fault_detection_reads_spoken_column():
    package = Path(feature_pipeline.__file__).parents[1]
    readers = {
        path.name
        for path in package.rglob("*.py")
        if any(f'"{column}"' in path.read_text("utf-8") for column in ("spoken",))
    }
    assert readers == {"planted.py", "fault_detection.py"}


# --- the recipes ------------------------------------------------------------------------------------------------------


def test_planted_recipes_share_held_out_splits():
    held_out = {
        tuple((row.id, row.text) for row in open_source(load(name).source).outline() if row.split != "train")
        for name in SHIPPED
    }
    assert len(SHIPPED) == 12
    assert len(held_out) == 1


def test_planted_recipes_differ_only_in_their_topic():
    free = {"planted-lr": {"learning_rate"}, "planted-lora": {"learning_rate"}, "planted-frozen": {"learning_rate"}}
    base = load("planted-raw").training
    for name in SHIPPED:
        training = load(name).training
        changed = {
            setting for setting in type(base).model_fields if getattr(base, setting) != getattr(training, setting)
        }
        assert changed == free.get(name, set())


def test_more_test_voices_change_no_other_sentence():
    source = PlantedSource(100, 8, 224, faults=RATES, men=0.8)
    many = replace(source, test=784, test_voices=112)
    test, before = rows(many, "test"), rows(source, "test")
    spoken = Counter(row.speaker for row in test)
    assert len(spoken) == 112 and set(spoken.values()) == {7}
    assert {row.text for row in test} == {row.text for row in before} and len({row.id for row in test}) == 784
    assert len({(row.text, row.speaker) for row in test}) == 784, "no voice speaks a sentence twice"
    assert [row.text for row in rows(many, "validation")] == [row.text for row in rows(source, "validation")]

    kinds, clean = zip(*(_kinds_and_clean_rows(one) for one in (many, source)), strict=True)
    assert kinds[0] == kinds[1] and clean[0] == clean[1]


@pytest.mark.parametrize(("voices", "test"), [(36, 160), (84, 106), (112, 784), (160, 400)])
def test_no_test_voice_speaks_a_sentence_twice(voices, test):
    lines = PlantedSource(24, 4, test, test_voices=voices).plan()
    spoken = [(line.said.text, line.speaker) for line in lines if line.said.split == "test"]
    assert len({*spoken}) == len(spoken) == test


def _kinds_and_clean_rows(source: PlantedSource) -> tuple[list[str], list[tuple[str, str]]]:
    train = rows(source)
    return [row.meta["planted"] for row in train], [(row.id, row.text) for row in train if not row.meta["planted"]]
