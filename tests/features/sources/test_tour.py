"""The tour corpus: sentences, plan and audio."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import pickle
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.features.sources import SPLITS, read_ahead
from pipelines.features.sources.synthetic import espeak, tour, tour_grammar, tour_text
from pipelines.features.sources.synthetic.tour import TourSource, plan
from pipelines.features.sources.synthetic.tour_text import grammar_sentences, grammar_size, hand_sentences, normalise
from pipelines.infra.errors import LabError

ROOT = Path(__file__).resolve().parents[3]
needs_espeak = pytest.mark.skipif(find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed")


def by_split(attribute: str) -> dict[str, set[str]]:
    return {split: {getattr(line, attribute) for line in plan() if line.split == split} for split in SPLITS}


def assert_disjoint(groups: dict[str, set[str]]) -> None:
    union = set().union(*groups.values())
    assert sum(map(len, groups.values())) == len(union)


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Sentences


def test_hand_sentences_are_many_and_distinct():
    texts = hand_sentences()
    assert len(texts) >= 720
    assert len({normalise(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    "texts", [hand_sentences, lambda: grammar_sentences(grammar_size(), 3)], ids=["hand", "grammar"]
)
def test_every_sentence_can_be_scored(texts):
    for text in texts():
        assert 2 <= len(text.split()) <= 10, text
        assert not any(character.isdigit() for character in text), text
        assert text[0].isupper() and text[-1] in ".?!" and "  " not in text, text
        assert unicodedata.is_normalized("NFC", text), text


def test_swedish_letters_are_common():
    letters = Counter("".join(hand_sentences()).lower())
    assert min(letters[letter] for letter in "åäö") > 200


def test_grammar_is_disjoint_from_hand_written_sentences():
    texts = [normalise(text) for text in grammar_sentences(grammar_size(), 7)]
    assert len(texts) >= 3000
    assert len(set(texts)) == len(texts)
    assert set(texts).isdisjoint(map(normalise, hand_sentences()))


def test_grammar_omits_hand_written_sentences(monkeypatch):
    taken = grammar_sentences(1, 7)[0]
    size = grammar_size()
    monkeypatch.setattr(tour_text, "hand_sentences", lambda: [taken.upper().replace(".", "!")])
    tour_text._frames.cache_clear()
    try:
        assert taken not in grammar_sentences(grammar_size(), 7)
        assert grammar_size() in range(size - 1, size + len(hand_sentences()))
    finally:
        monkeypatch.undo()
        tour_text._frames.cache_clear()


def test_grammar_takes_turns_between_frames():
    frames = tour_text._frames()
    drawn = set(grammar_sentences(len(frames), 7))
    assert all(drawn & set(frame) for frame in frames)


def test_grammar_depends_on_its_seed_alone():
    assert grammar_sentences(50, 1) == grammar_sentences(80, 1)[:50]
    assert grammar_sentences(50, 1) != grammar_sentences(50, 2)


@pytest.mark.parametrize("count", [-1, 1_000_000])
def test_grammar_count_out_of_range_raises(count):
    with pytest.raises(LabError, match=str(count)):
        grammar_sentences(count, 7)


@pytest.mark.parametrize(
    ("value", "word"),
    [(7, "sju"), (19, "nitton"), (20, "tjugo"), (48, "fyrtioåtta"), (120, "hundratjugo"), (342, "trehundrafyrtiotvå")],
)
def test_number_words(value, word):
    assert tour_grammar.number_word(value) == word


# Plan


def test_plan_has_requested_sizes_and_unique_ids():
    assert Counter(line.split for line in plan()) == {"train": 960, "validation": 120, "test": 160}
    assert len({line.id for line in plan()}) == 1240
    assert plan()[0].id == "tour-train-00001"


def test_plan_never_repeats_a_sentence():
    assert len({normalise(line.text) for line in plan()}) == 1240


def test_splits_share_no_speaker_no_variant_and_no_sentence():
    assert_disjoint(by_split("speaker"))
    assert_disjoint(by_split("variant"))
    assert_disjoint({split: set(map(normalise, texts)) for split, texts in by_split("text").items()})


def test_held_out_splits_have_enough_speakers_of_both_genders():
    assert len(by_split("speaker")["test"]) >= 12
    assert len(by_split("variant")["test"]) >= 3
    assert len(by_split("speaker")["validation"]) >= 8
    assert all(genders == {"female", "male"} for genders in by_split("gender").values())


def test_speaker_has_one_variant_and_small_jitter():
    speakers: dict[str, list[tour.Utterance]] = {}
    for line in plan():
        speakers.setdefault(line.speaker, []).append(line)
    for name, lines in speakers.items():
        assert {line.variant for line in lines} == {f"sv+{name.split('-')[0]}"}
        rates, pitches = {line.rate_wpm for line in lines}, {line.pitch for line in lines}
        assert 1 < len(rates) and max(rates) - min(rates) <= 2 * tour.RATE_JITTER_WPM
        assert 1 < len(pitches) and max(pitches) - min(pitches) <= 2 * tour.PITCH_JITTER


def test_splits_cover_comparable_rates_and_pitches():
    for split in SPLITS:
        lines = [line for line in plan() if line.split == split]
        rates, pitches = [line.rate_wpm for line in lines], [line.pitch for line in lines]
        assert 130 <= min(rates) < 150 and 170 < max(rates) <= 190
        assert 35 <= min(pitches) < 45 and 57 < max(pitches) <= 67


def test_held_out_splits_are_mostly_hand_written():
    origins = Counter((line.split, line.origin) for line in plan())
    assert origins["test", "hand"] == 112 and origins["validation", "hand"] == 84
    assert origins["train", "hand"] >= 400 and origins["train", "grammar"] > 0
    hand = {normalise(text) for text in hand_sentences()}
    assert all((normalise(line.text) in hand) == (line.origin == "hand") for line in plan())


@pytest.mark.slow
def test_plan_depends_on_seed_and_not_on_process():
    code = (
        "import hashlib; from pipelines.features.sources.synthetic.tour import plan; "
        "print(hashlib.sha256(repr(plan()).encode()).hexdigest())"
    )
    assert in_a_new_process(code) == hashlib.sha256(repr(plan()).encode()).hexdigest()
    assert [line.text for line in plan(seed=8)] != [line.text for line in plan()]


def test_small_plan_is_valid():
    assert [line.id for line in plan(1, 1, 1)] == ["tour-train-00001", "tour-validation-00001", "tour-test-00001"]


@pytest.mark.parametrize("sizes", [{"train": 0}, {"validation": -3}, {"test": 0}])
def test_empty_split_raises(sizes):
    with pytest.raises(LabError, match=f"at least 1 sentence in {next(iter(sizes))}"):
        plan(**sizes)


@pytest.mark.parametrize(("sizes", "message"), [({"test": 5000}, "lower them"), ({"train": 100_000}, "got [0-9]+")])
def test_too_many_sentences_is_a_one_line_error(sizes, message):
    with pytest.raises(LabError, match=message) as caught:
        plan(**sizes)
    assert "\n" not in str(caught.value)


def test_planning_needs_no_espeak(monkeypatch):
    monkeypatch.setattr(espeak, "_loader", lambda: pytest.fail("planning loaded espeak-ng"))
    tour._plan.cache_clear()
    assert len(plan(20, 5, 5)) == 30


def test_unknown_split_raises_before_synthesis():
    with pytest.raises(LabError, match="dev"):
        TourSource(4, 2, 2).examples(("train", "dev"))


# Speech


@needs_espeak
def test_examples_have_planned_fields_and_a_wav():
    soundfile = pytest.importorskip("soundfile")
    source = TourSource(train=8, validation=4, test=8)
    examples = list(source.examples())
    assert [example.id for example in examples] == [line.id for line in source.plan()]
    for example, line in zip(examples, source.plan(), strict=True):
        samples, rate_hz = soundfile.read(io.BytesIO(example.audio))
        assert samples.ndim == 1 and rate_hz == espeak.SAMPLE_RATE_HZ
        assert 0.4 <= len(samples) / rate_hz <= 8
        assert 0.05 < abs(samples).max() <= 1
        assert (example.text, example.split, example.speaker) == (line.text, line.split, line.speaker)
        assert example.meta == {
            "gender": line.gender,
            "variant": line.variant,
            "rate_wpm": str(line.rate_wpm),
            "pitch": str(line.pitch),
            "origin": line.origin,
        }


@needs_espeak
def test_audio_is_synthesised_on_access(monkeypatch):
    example = next(TourSource(4, 3, 2).examples(("test",)))
    again, speak = pickle.loads(pickle.dumps(example)), vars(example)["sound"]
    synthesised = []
    monkeypatch.setitem(vars(example), "sound", lambda: synthesised.append(1) or speak())
    assert (example.split, example.id, again.id, synthesised) == ("test", "tour-test-00001", "tour-test-00001", [])
    assert example.audio == again.audio
    assert len(synthesised) == 1


@needs_espeak
def test_examples_read_ahead_are_the_same_in_order():
    examples = list(TourSource(4, 3, 2).examples())
    ahead = list(read_ahead(examples, n=2))
    assert [vars(one) for one in ahead] == [
        {**{name: value for name, value in vars(one).items() if name != "sound"}, "audio": one.audio}
        for one in examples
    ]


def test_error_of_an_example_read_ahead_comes_in_its_turn():
    def fail() -> bytes:
        raise LabError("espeak-ng failed")

    good = tour.SpokenExample("a", "train", "hej", b"wav")
    ahead = read_ahead([good, good, tour.SpokenExample("b", "train", "hej", fail), good], n=3)
    assert [next(ahead).audio, next(ahead).audio] == [b"wav", b"wav"]
    with pytest.raises(LabError, match="espeak-ng failed"):
        next(ahead)


@needs_espeak
def test_bytes_do_not_depend_on_earlier_synthesis():
    lines = plan(6, 4, 4)
    first = [espeak.synthesise(line.text, line.variant, line.rate_wpm, line.pitch) for line in lines]
    again = [espeak.synthesise(line.text, line.variant, line.rate_wpm, line.pitch) for line in reversed(lines)]
    assert first == again[::-1]
    assert len(set(first)) == len(first)


@pytest.mark.slow
@needs_espeak
def test_bytes_are_equal_in_a_new_process():
    here = {variant: espeak.synthesise("Älgen åt äpplen.", variant, 150, 50) for variant in espeak.VARIANTS}
    started = int(time.time())
    while int(time.time()) == started:  # espeak-ng would seed its breath noise with the second of the day
        time.sleep(0.02)
    code = (
        "import hashlib, json; from pipelines.features.sources.synthetic import espeak; print(json.dumps({"
        "v: hashlib.sha256(espeak.synthesise('Älgen åt äpplen.', v, 150, 50)).hexdigest() "
        "for v in reversed(espeak.VARIANTS)}))"
    )
    there = json.loads(in_a_new_process(code))
    assert there == {variant: hashlib.sha256(wav).hexdigest() for variant, wav in here.items()}


@needs_espeak
def test_bytes_are_equal_if_library_stays_loaded(monkeypatch):
    import espeakng_loader

    expected = espeak.synthesise("Det regnar på tvären.", "sv+f3", 160, 45)
    children = []
    run_child = espeak._wav_from_child
    monkeypatch.setattr(
        espeak, "_wav_from_child", lambda *arguments: children.append(arguments) or run_child(*arguments)
    )
    held = ctypes.CDLL(espeakng_loader.get_library_path())
    held.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8000)
    try:
        assert espeak.synthesise("Det regnar på tvären.", "sv+f3", 160, 45) == expected
        assert len(children) == 1
    finally:
        held.espeak_Terminate()
        espeak._unload(held)


@needs_espeak
def test_every_argument_changes_the_audio():
    wavs = [
        espeak.synthesise("Vi ses utanför porten.", variant, rate_wpm, pitch)
        for variant, rate_wpm, pitch in [("sv+f1", 150, 50), ("sv+m1", 150, 50), ("sv+f1", 190, 50), ("sv+f1", 150, 60)]
    ]
    assert len(set(wavs)) == 4
    assert len(wavs[2]) < 0.9 * len(wavs[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Hej på dig.", "sv+f9", 150, 50), "sv\\+f9"),
        (("Hej på dig.", "sv+f1", 5000, 50), "5000"),
        (("Hej på dig.", "sv+f1", 150, 100), "100"),
        ((" ", "sv+f1", 150, 50), "empty"),
    ],
)
def test_invalid_espeak_arguments_raise(arguments, message):
    with pytest.raises(LabError, match=message):
        espeak.synthesise(*arguments)


def test_missing_package_error_names_requirement(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(LabError, match="espeakng-loader>=0.2.4"):
        espeak.synthesise("Hej på dig.", "sv+f1", 150, 50)
    with pytest.raises(LabError, match="espeakng-loader>=0.2.4"):
        espeak.version()


@needs_espeak
def test_missing_espeak_data_raises(monkeypatch, tmp_path):
    import espeakng_loader

    # espeak-ng falls back to other places, this one first, and would speak with whatever data lies there.
    monkeypatch.setenv("ESPEAK_DATA_PATH", espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path / "absent"))
    with pytest.raises(LabError, match="did not start with its data"):
        espeak.synthesise("Hej på dig.", "sv+f1", 150, 50)


@needs_espeak
def test_identity_changes_with_the_corpus():
    identity = TourSource(20, 5, 5).identity()
    assert identity["kind"] == "tour" and identity["seed"] == "7" and identity["train"] == "20"
    assert identity["espeak"] == espeak.version()
    assert all(isinstance(value, str) for value in identity.values())
    assert identity == TourSource(20, 5, 5).identity()
    other_seed, other_size = TourSource(20, 5, 5, seed=8).identity(), TourSource(20, 5, 6).identity()
    assert len({i["plan_sha256"] for i in (identity, other_seed, other_size)}) == 3
