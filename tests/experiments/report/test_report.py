from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import soundfile

from pipelines.experiments import report
from pipelines.experiments.report import calibration, clips, confusions, inventions, page, slices
from pipelines.features.curation import quality
from pipelines.infra import redact
from pipelines.recipes.data_settings import SourceSettings
from pipelines.speech import repetition, text
from pipelines.speech.alignment import align
from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel


def steps(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    found = align(reference.split(), hypothesis.split())
    return [(step.kind, " ".join(step.reference), " ".join(step.hypothesis)) for step in found]


def table(*pairs: tuple[str, str], **columns) -> pd.DataFrame:
    """Return predictions with one row per (reference, hypothesis); `columns` replace defaults."""
    told = {
        "id": [f"clip-{n}" for n in range(len(pairs))],
        "speaker": [f"s{n % 3}" for n in range(len(pairs))],
        "duration_s": [2.0] * len(pairs),
        "reference": [said for said, _ in pairs],
        "hypothesis": [written for _, written in pairs],
        "wer": [float(said != written) for said, written in pairs],
        "logprob": [-0.5] * len(pairs),
        "tokens": [5] * len(pairs),
        "unseen_words": [0] * len(pairs),
        "unseen_errors": [0] * len(pairs),
    }
    return pd.DataFrame({**told, **columns})


# ---- which word became which


def test_alignment_has_every_kind_of_step():
    assert steps("jag bor här", "jag bor här") == [("equal", word, word) for word in ("jag", "bor", "här")]
    assert steps("jag bor här", "jag har bor") == [
        ("equal", "jag", "jag"),
        ("insertion", "", "har"),
        ("equal", "bor", "bor"),
        ("deletion", "här", ""),
    ]
    assert steps("det var en hund", "det var n hund") == [
        ("equal", "det", "det"),
        ("equal", "var", "var"),
        ("substitution", "en", "n"),
        ("equal", "hund", "hund"),
    ]
    assert steps("ett nytt sjukhus i dag", "ett nytt sjuk hus idag") == [
        ("equal", "ett", "ett"),
        ("equal", "nytt", "nytt"),
        ("split", "sjukhus", "sjuk hus"),
        ("join", "i dag", "idag"),
    ]
    assert steps("kvällsmatbord", "kväll s mat bord") == [("split", "kvällsmatbord", "kväll s mat bord")]
    assert ("substitution", "på", "po") in steps("gå på tur", "gå po"), "words that are alike, where errors are as many"
    assert steps("", "ja") == [("insertion", "", "ja")]
    assert steps("ja", "") == [("deletion", "ja", "")]
    assert steps("", "") == []


def test_compound_is_aligned_only_with_equal_letters():
    assert [kind for kind, *_ in steps("stora sjukhus brinner", "tora sjuk hus binner")] == [
        "substitution",
        "split",
        "substitution",
    ]
    assert "split" not in [kind for kind, *_ in steps("sjukhus", "sjuk huset")]
    assert "split" not in [kind for kind, *_ in steps("sjukhus", "hus sjuk")]


def test_errors_without_compounds_equal_levenshtein():
    import jiwer

    rng = np.random.default_rng(3)
    for _ in range(200):
        ours, theirs = ([*rng.choice(list("abcd"), rng.integers(1, 9))] for _ in range(2))
        expected = jiwer.process_words(" ".join(ours), " ".join(theirs))
        errors = sum(step.is_error for step in align(ours, theirs, pieces=1))
        assert errors == expected.substitutions + expected.insertions + expected.deletions
        assert [word for step in align(ours, theirs) for word in step.reference] == ours
        assert [word for step in align(ours, theirs) for word in step.hypothesis] == theirs


# ---- confusions


def confused(*pairs: tuple[str, str]) -> dict:
    return confusions.confusions(report.alignments(table(*pairs)))


def test_confusions_are_sorted_by_frequency():
    found = confused(("hej på dig", "hej po dig"), ("gå på tur", "gå po"), ("ja", "ja ja"), ("nej", "hej"))
    assert found["substitutions"] == [
        {"reference": "på", "hypothesis": "po", "count": 2},
        {"reference": "nej", "hypothesis": "hej", "count": 1},
    ]
    assert found["deletions"] == [{"reference": "tur", "hypothesis": "", "count": 1}]
    assert found["insertions"] == [{"reference": "", "hypothesis": "ja", "count": 1}]


def test_letters_are_counted_in_similar_words():
    found = confused(
        ("Får får får?", "far får for"),  # å as a, right, as o
        ("äpplet", "eplet"),  # ä as e
        ("höst", "hst"),  # ö left out
        ("båt", "tidningen"),  # another word altogether: no letter stands for another
        ("gått", "got"),  # half of the letters differ: counted
    )
    letters = {told["letter"]: told for told in found["letters"]}
    assert letters["å"] == {"letter": "å", "said": 4, "right": 1, "taken_for": {"o": 2, "a": 1}}
    assert letters["ä"] == {"letter": "ä", "said": 1, "right": 0, "taken_for": {"e": 1}}
    assert letters["ö"] == {"letter": "ö", "said": 1, "right": 0, "taken_for": {"": 1}}
    assert found["dots"]["count"] == 1, "far for får; for is another vowel"


def test_compounds_are_counted_with_wer_without_them():
    found = confused(("ett nytt sjukhus", "ett nytt sjuk hus"), ("i dag är det sol", "idag är de sol"))["compounds"]
    assert (found["splits"], found["joins"]) == (1, 1)
    assert found["wer_without"] == pytest.approx(1 / 8)
    assert found["examples"][0] == {"reference": "i dag", "hypothesis": "idag", "count": 1}


# ---- inventions


@pytest.mark.parametrize(
    ("said", "written", "kinds"),
    [
        ("hej på dig", "hej på dig", []),
        ("hej på dig", "hej po dej", []),
        ("hej på dig", "", ["empty"]),
        ("hej på dig", "tack för att ni tittade", ["invented"]),  # no word in common, other letters
        ("hej på dig", "hey po dej", []),  # no word in common either, but much the same letters
        ("hej på dig", "hej på dig och välkommen till sverige", ["invented"]),  # 7 words for 3
        ("hej på dig", "hej på dig du där", []),
        ("ett två tre fyra fem sex sju", "ett två tre fyra fem sex sju och så vidare", []),  # 10 for 7
        ("ja", "ja ja ja ja", ["invented", "repeating"]),
        ("ja ja ja", "ja ja ja", []),  # that is what was said
        ("hej", "hej hej", []),
        ("han kom hem sent i går", "han kom han kom han kom hem", ["repeating"]),
        ("a b c d e f g", "a b a b a c a b", []),
    ],
)
def test_inventions_are_classified(said: str, written: str, kinds: list[str]):
    import jiwer

    cer = jiwer.cer(said, written)
    assert inventions.kinds(said, written, cer) == kinds


def test_compressible_text_counts_as_repeating():
    varied = "det var en gång en liten flicka som bodde i skogen med sin mormor"
    assert repetition.compression_ratio(varied) < 1.5
    looped = " ".join(f"{varied} {n}" for n in range(5))  # no run: a number stands between
    assert repetition.compression_ratio(looped) > repetition.MAX_COMPRESSION_RATIO
    assert inventions.kinds(looped, looped, 0.0) == ["repeating"]
    assert inventions.kinds(varied, varied, 0.0) == []


# ---- calibration


def test_calibrated_model_has_no_calibration_error():
    logprobs = np.log([0.95, 0.95, 0.95, 0.95, 0.25, 0.25, 0.25, 0.25])
    errors, words = np.array([0, 0, 0, 1, 4, 0, 8, 4]), np.full(8, 4)
    found = calibration.calibration(logprobs, errors, words)
    low, high = found["bins"]
    assert (low["low"], low["high"], low["n"], low["right"], low["words_right"]) == (0.2, 0.3, 4, 0.25, 0.0)
    assert (high["low"], high["n"], high["right"], high["words_right"]) == (0.9, 4, 0.75, 15 / 16)
    assert found["ece"] == pytest.approx((0.0 + 0.2) / 2)
    assert found["ece_words"] == pytest.approx((0.25 + abs(0.95 - 15 / 16)) / 2)
    assert found["right"] == 0.5
    assert found["mean_confidence"] == pytest.approx(0.6)
    points = {point["coverage"]: point for point in found["coverage"]}
    assert list(points) == [n / 8 for n in range(1, 9)]
    assert points[0.5]["wer"] == 1 / 16
    assert points[0.5]["confidence"] == pytest.approx(0.95)
    assert points[1.0]["wer"] == 17 / 32


def test_coverage_starts_with_most_confident_utterances():
    found = calibration.calibration(np.log([0.2, 1.0, 0.6]), np.array([3, 0, 1]), np.array([3, 3, 3]))
    assert [round(point["wer"], 3) for point in found["coverage"]] == [0, 0.167, 0.444]
    assert [part["high"] for part in found["bins"]] == [0.3, 0.7, 1.0]


# ---- slices


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_snr_equals_waveform_snr(speech, n_mels: int):
    rng, seconds = np.random.default_rng(2), 4
    pauses = np.repeat([1.0, 0.0, 1.0, 0.0], seconds * 4_000).astype(np.float32)
    for noise in (0.1, 0.01, 0.001):
        samples = speech(seconds * 16_000) * pauses + noise * rng.standard_normal(seconds * 16_000).astype(np.float32)
        of_samples = quality.snr_db(quality.frame_powers(samples))
        of_log_mel = slices.snr_db(log_mel.extract(Waveform(samples.astype(np.float32)), n_mels))
        assert of_log_mel == pytest.approx(of_samples, abs=1.5)


def test_slice_columns_come_from_the_cache(toy_cache):
    rows = toy_cache.split("test")
    found = slices.columns(toy_cache, rows)
    said = toy_cache.rows["text"].iloc[rows].tolist()
    known = {
        word for line in toy_cache.rows["text"].iloc[toy_cache.split("train")] for word in text.normalise(line).split()
    }
    assert slices.vocabulary(toy_cache) == known
    unseen = [sum(word not in known for word in text.normalise(line).split()) for line in said]
    assert found["unseen_words"].tolist() == unseen
    assert 0 < sum(count > 0 for count in unseen)
    assert found["words"].tolist() == ["some unseen" if count else "all seen" for count in unseen]
    seconds = toy_cache.rows["duration_s"].iloc[rows]
    assert [("under 2 s" == name) for name in found["duration"]] == [value < 2 for value in seconds]
    assert len(found) == len(rows)


def test_slices_are_ordered_and_scored():
    pairs = [("ett två", "ett två"), ("ett två", "ett"), ("ett två", ""), ("ett två", "ett två")]
    found = slices.table(
        table(
            *pairs,
            duration=["8 to 15 s", "2 to 4 s", "under 2 s", "2 to 4 s"],
            snr=["30 dB and more", "under 10 dB", "10 to 20 dB", "10 to 20 dB"],
            gender=["", "male", "female", "male"],
        )
    )
    of = dict(list(found.groupby("slice")))
    assert of["duration"]["value"].tolist() == ["under 2 s", "2 to 4 s", "8 to 15 s"]
    assert of["duration"]["wer"].tolist() == [1.0, 0.25, 0.0]
    assert of["snr"]["value"].tolist() == ["under 10 dB", "10 to 20 dB", "30 dB and more"]
    assert of["gender"]["value"].tolist() == ["", "female", "male"]
    assert of["gender"]["n"].tolist() == [1, 1, 2]
    assert of["gender"]["speakers"].tolist() == [1, 1, 2]
    scored = found.dropna()
    assert (scored["low"] <= scored["wer"]).all() and (scored["wer"] <= scored["high"]).all()
    assert found[found["n"] == 1]["low"].isna().all(), "one clip has no interval"


def test_seen_and_unseen_words_are_scored_separately():
    known = {"en", "hund", "springer"}
    predictions = table(("en hund springer", "en hund"), ("en lodjur springer", "en lodur springer"))
    aligned = report.alignments(predictions)
    lost = slices.unseen_errors(aligned, known)
    assert lost.tolist() == [0, 1]
    predictions = predictions.assign(unseen_words=[0, 1], unseen_errors=lost)
    seen, unseen = slices.seen_and_unseen(predictions, np.array([1, 1]))
    assert (seen["words"], seen["count"], seen["rate"], seen["n"]) == ("seen", 5, 1 / 5, 2)
    assert (unseen["words"], unseen["count"], unseen["rate"], unseen["n"]) == ("unseen", 1, 1.0, 1)
    assert len(slices.seen_and_unseen(table(("en hund", "en hund")), np.array([0]))) == 1


# ---- the whole, and its page


@pytest.fixture(scope="module")
def told() -> dict:
    score = {"wer": 0.5, "ci95": [0.25, 0.75], "cer": 0.2, "substitutions": 1, "insertions": 2, "deletions": 3}
    score |= {"words": 12, "n": 4, "speakers": 3, "normalised": True, "over": "speakers"}
    return {
        "model": "/somebody/models/tiny @ 1234",
        "quantisation": None,
        "split": "test",
        "language": "sv",
        "test_set": "0123456789abcdef",
        "normaliser": "1",
        "lineage": {"base": "openai/whisper-tiny @ 1", "settings": {"source": {"path": "~/secret place/clips"}}},
        "score": score,
        "raw": score,
        "caveats": ["3 speakers: they are few"],
    }


SPEED = {"decoding_seconds": 2.0, "device": "2 CPU threads", "threads": 2}
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> \' " {{ facts }}'


def facts_of(told: dict, *pairs: tuple[str, str], **columns) -> tuple[dict, pd.DataFrame]:
    predictions = table(*pairs, **columns)
    return report.facts(predictions, told, SPEED), predictions


def test_report_json_has_exactly_the_documented_keys(told):
    facts, _ = facts_of(told, ("hej på dig", "hej po dig"), ("gott nytt år", "gott nytt år"), gender=["f", "m"])
    promised = (
        "format model quantisation split language utterances speakers audio_seconds test_set normaliser lineage score "
        "caveats raw slices words worst confusions inventions calibration speed definitions"
    )
    assert facts.keys() == {*promised.split()}
    assert all(name in report.__doc__ for name in facts)
    assert {name: set(facts[name]) for name in ("confusions", "inventions", "calibration", "speed")} == {
        "confusions": {"substitutions", "deletions", "insertions", "dots", "letters", "compounds"},
        "inventions": {"invented", "repeating", "empty"},
        "calibration": {"mean_confidence", "right", "ece", "ece_words", "bins", "coverage"},
        "speed": {"decoding_seconds", "real_time_factor", "times_real_time", "device", "threads"},
    }
    assert set(facts["slices"][0]) == {"slice", "value", "wer", "low", "high", "n", "speakers", "over"}
    assert set(facts["worst"][0]) == {
        "id", "speaker", "reference", "hypothesis", "wer", "duration_s", "confidence"
    }  # fmt: skip
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts, "nothing but plain JSON"
    assert facts["speed"]["real_time_factor"] == 0.5
    assert facts["speed"]["times_real_time"] == 2.0
    assert facts["worst"][0]["id"] == "clip-0"
    assert len(facts["worst"]) == 1, "what is right is not among the worst"
    assert facts["inventions"]["invented"] == {"count": 0, "rate": 0.0, "examples": []}


def test_report_contains_no_local_path(told):
    facts, _ = facts_of(told, ("hej", "hej"))
    assert facts["model"] == "tiny @ 1234"
    assert facts["lineage"]["settings"]["source"]["path"] == "clips"
    assert redact.redact_values(["D:\\data\\clips\\", "/a/b/", "hub://me/x", "runs/tour", "å/ä", 3, None]) == [
        "clips",
        "b",
        "hub://me/x",
        "runs/tour",
        "å/ä",
        3,
        None,
    ]


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("file:///srv/anna/x", "x"),
        ("model (q8) @ /srv/anna", "model (q8) @ anna"),
        ("of '/srv/anna/x', not ~/y/z", "of 'x', not z"),
        ("base=C:\\Data\\anna\\x", "base=x"),
        ("path:/srv/anna/my clips/x (q8)", "path:x (q8)"),
        ("at /a/b/ (q8)", "at b (q8)"),
        ("/srv/anna (work)/x", "x"),
        ("see https://host/a/b", "see https://host/a/b"),
        ("openai/whisper-tiny @ 12, hub://me/x/y", "openai/whisper-tiny @ 12, hub://me/x/y"),
        ("km / h, 24/7, och/eller, </s>, ./x, ../y", "km / h, 24/7, och/eller, </s>, ./x, ../y"),
    ],
)
def test_absolute_paths_within_strings_are_cut(value, left):
    assert redact.redact_values({"told": [value]}) == {"told": [left]}


def page_of(told: dict, *pairs: tuple[str, str], missing_audio: str = "", **columns) -> str:
    facts, predictions = facts_of(told, *pairs, **columns)
    return page.render(facts, predictions["wer"], {"clip-0": "data:audio/flac;base64,AAAA"}, missing_audio)


def test_hostile_text_is_escaped_in_the_page(told):
    pairs = [("hej på dig", HOSTILE), (HOSTILE, "hej"), ("hej", "hej")]
    told = {**told, "model": HOSTILE, "lineage": {HOSTILE: HOSTILE}}
    ids = [HOSTILE, "b", "c"]
    made = page_of(told, *pairs, id=ids, speaker=ids, gender=ids, missing_audio=HOSTILE)
    assert "<script" not in made
    assert "<img" not in made
    assert "&lt;script&gt;" in made
    assert "{{ facts }}" in made, "no text is a template either"
    assert not re.search(r"<[^>]*\sonerror", made)


def test_page_is_complete_and_needs_no_network(told):
    made = page_of(told, ("hej på dig", "hej po"), ("hej", "hej"), snr=["under 10 dB", "10 to 20 dB"])
    assert not re.search(r"(?:https?:)?//[a-z]", made.lower()), "no address"
    assert not re.search(r"<(?:script|link|iframe|object|embed|base|form)\b|@import|url\((?!#)", made.lower())
    sources = re.findall(r'(?:src|href)="([^"]*)"', made)
    assert {source for source in sources if not source.startswith(("#", "data:audio/flac;base64,"))} == {
        "report.json",
        "predictions.csv",
    }
    assert "default-src 'none'" in made
    pictures = re.findall(r"<svg [^>]*>", made)
    assert len(pictures) == 3
    assert all('role="img"' in one and re.search(r'aria-label="[^"]{20,}"', one) for one in pictures)
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(ids) == len(set(ids)), "pictures do not take each other's parts"
    assert re.search(r"<title>tiny @ 1234 on test</title>", made)
    assert "prefers-color-scheme: dark" in made
    assert "currentColor" in made


def test_page_of_a_model_without_errors(told):
    made = page_of(told, ("hej", "hej"), ("ja", "ja"))
    assert "No utterance has a wrong word" in made


def test_page_names_the_model_that_wrote_pseudo_labels(told):
    labelled = [{"model": "anna <b> @ 12", "clips": 7, "hours": 0.5}]
    made = page_of({**told, "lineage": {"pseudo_labels": labelled}}, ("hej", "hej"))
    assert (
        "7 of its training clips (0.50 hours) have pseudo-labels: anna &lt;b&gt; @ 12 wrote their transcripts" in made
    )
    assert "pseudo-labels" not in page_of(told, ("hej", "hej"))


def test_page_shows_largest_values_of_a_long_slice(told):
    pairs = [("hej", "hej")] * 30
    made = page_of(told, *pairs, accent=[f"accent {n:02d}" for n in range(28)] + ["accent 27"] * 2)
    assert "16 more values" in made
    assert "accent 27" in made, "the largest stays"


# ---- sound


def embedded(source: dict, ids: list[str], split: str = "test") -> tuple[dict[str, str], str]:
    return clips.embedded(SourceSettings.model_validate(source), "sv", split, ids)


def test_clip_audio_is_read_from_the_source(toy_cache, toy_settings):
    ids = toy_cache.rows["id"].iloc[toy_cache.split("test")[:2]].tolist()
    found, missing_audio = clips.embedded(toy_settings().source, "sv", "test", ids)
    assert (list(found), missing_audio) == (ids, "")
    samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(found[ids[1]].partition(",")[2])))
    assert rate_hz == 16_000
    row = toy_cache.rows[toy_cache.rows["id"] == ids[1]].iloc[0]
    assert len(samples) / rate_hz == pytest.approx(row["duration_s"], abs=0.02)
    assert np.abs(samples).max() > 0.05


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"kind": "hub", "path": "google/fleurs"}, "read over the network"),
        ({"kind": "mozilla", "dataset": "abc"}, "read over the network"),
        ({"kind": "folder", "path": "not/there"}, "not available"),
        ({"kind": "mix", "parts": [{"name": "a", "kind": "hub", "path": "google/fleurs"}]}, "read over the network"),
    ],
)
def test_unavailable_source_gives_reason_instead_of_audio(source: dict, why: str):
    found, missing_audio = embedded(source, ["x"])
    assert found == {}
    assert why in missing_audio
    assert "not/there" not in missing_audio


def test_large_or_broken_audio_is_left_out(encoded, speech, tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.wav").write_bytes(encoded(speech(16_000 * (3 if name == "b" else 1))))
    (tmp_path / "c.wav").write_bytes(b"not audio")
    rows = "".join(f"{name}.wav,hej,test\n" for name in "abc")
    (tmp_path / "transcripts.csv").write_text("path,text,split\n" + rows)
    source = {"kind": "folder", "path": str(tmp_path)}
    ids = ["b", "a", "c", "gone"]
    every, missing_audio = embedded(source, ids)
    assert set(every) == {"a", "b"}
    assert "cannot be decoded" in missing_audio
    monkeypatch.setattr(clips, "MAX_BYTES", len(every["a"]) + 10)
    assert set(embedded(source, ids)[0]) == {"a"}, "the first has no room"
