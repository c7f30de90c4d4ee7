from __future__ import annotations

import json

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import LabError
from pipelines.scoring import count_edits, difference, interval, score

WORDS = st.lists(st.sampled_from(["hej", "på", "dig", "å", "ä", "ett"]), max_size=6).map(" ".join)


def test_by_hand():
    """Substituted: katten/hatten. Deleted: där. Inserted: en. 3 edits in 7 words."""
    found = score(["katten sitter där borta", "vi ser sol"], ["hatten sitter borta", "vi ser en sol"])
    assert (found.substitutions, found.deletions, found.insertions, found.words, found.n) == (1, 1, 1, 7, 2)
    assert found.wer == pytest.approx(3 / 7)
    assert found.cer == pytest.approx((1 + 4 + 3) / (23 + 10))  # k/h, "där ", "en "


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer", "cer"),
    [
        ("ja", "ja", 0, 0),
        ("ja", "", 1, 1),
        ("ja", "nej nej nej", 3, 5),
        ("hål", "hal", 1, 1 / 3),
        ("a b", "ab", 1, 1 / 3),
    ],
)
def test_single_utterances(reference, hypothesis, wer, cer):
    found = score([reference], [hypothesis])
    assert (found.wer, found.cer) == (pytest.approx(wer), pytest.approx(cer))


def test_normalised_and_raw():
    reference, hypothesis = ["Hej, på dig!"], ["hej på  dig"]
    assert score(reference, hypothesis).wer == 0
    assert score(reference, hypothesis).normalised
    raw = score(reference, hypothesis, normalised=False)
    assert raw.wer == pytest.approx(2 / 3)
    assert not raw.normalised


def test_composed_and_decomposed_letters_are_the_same():
    assert score(["ha\u030al"], ["hål"]).wer == 0


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=8))
def test_as_jiwer_scores_the_joined_lists(pairs):
    references, hypotheses = map(list, zip(*pairs, strict=True))
    found = score(references, hypotheses, samples=100)
    assert found.wer == pytest.approx(jiwer.wer(references, hypotheses))
    assert found.cer == pytest.approx(jiwer.cer(references, hypotheses))


def test_edits_by_utterance():
    edits = count_edits(["a b c", "d"], ["a x c", "d e f"])
    assert edits.word_edits.tolist() == [1, 2]
    assert edits.words.tolist() == [3, 1]
    assert edits.word_edits.dtype == np.int64


def simulate(rng: np.random.Generator, speakers: int, clustered: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edits, words and blocks of 5 utterances a speaker, at a true rate of 0.2; `clustered`: a rate per speaker."""
    blocks = np.repeat(np.arange(speakers), 5)
    rates = rng.choice([0.05, 0.35], speakers) if clustered else np.full(speakers, 0.2)
    words = rng.integers(4, 12, len(blocks))
    return rng.binomial(words, rates[blocks]), words, blocks


@pytest.mark.parametrize("clustered", [False, True])
def test_the_interval_covers_the_truth_in_95_of_100(clustered):
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(500):
        low, high = interval(*simulate(rng, 40, clustered), samples=300, seed=trial)
        hits += low <= 0.2 <= high
    assert 0.91 <= hits / 500 <= 0.98


def test_speakers_as_blocks_widen_the_interval_when_errors_cluster():
    edits, words, blocks = simulate(np.random.default_rng(1), 40, clustered=True)
    alone = interval(edits, words, np.arange(len(edits)), samples=1_000, seed=0)
    by_speaker = interval(edits, words, blocks, samples=1_000, seed=0)
    assert by_speaker[1] - by_speaker[0] > 1.4 * (alone[1] - alone[0])


def test_a_difference_by_hand():
    better, worse = (count_edits(["a b c d", "e f"], heard) for heard in (["a b c d", "e"], ["a b c x", "f"]))
    delta, (low, high) = difference(better, worse)
    assert delta == pytest.approx(-1 / 6)
    assert (low, high) == (pytest.approx(-1 / 4), 0)
    assert difference(worse, better)[0] == pytest.approx(1 / 6)


def test_what_is_hard_for_both_does_not_blur_a_difference():
    """Speakers differ widely, and one system makes one error more in each utterance of ten words: exactly +0.1."""
    rng = np.random.default_rng(2)
    hard = np.repeat(rng.integers(0, 9, 30), 5)
    texts, speakers = [" ".join("abcdefghij")] * 150, [f"s{i // 5}" for i in range(150)]
    heard = {extra: [" ".join("x" * (n + extra) + "abcdefghij"[n + extra :]) for n in hard] for extra in (0, 1)}
    delta, (low, high) = difference(*(count_edits(texts, heard[extra]) for extra in (1, 0)), speakers)
    assert (delta, low, high) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    alone = score(texts, heard[0], speakers)
    assert alone.ci95[1] - alone.ci95[0] > 0.1


def test_different_references_are_not_compared():
    with pytest.raises(LabError, match="same references in the same order"):
        difference(count_edits(["a b"], ["a b"]), count_edits(["a"], ["a"]))


def test_score_draws_speakers():
    references, hypotheses = ["a b c d"] * 40, (["a b c d"] * 4 + ["a x x d"] * 4) * 5
    speakers = [f"s{i // 4}" for i in range(40)]
    together, apart = score(references, hypotheses, speakers), score(references, hypotheses)
    assert (together.speakers, apart.speakers) == (10, 40)
    assert together.ci95[1] - together.ci95[0] > 1.4 * (apart.ci95[1] - apart.ci95[0])
    assert together.ci95[0] < together.wer < together.ci95[1]


def test_unknown_speakers_are_alone():
    assert score(["a"] * 5, ["a"] * 5, ["x", "x", "", "", "y"]).speakers == 4


def test_the_seed_decides_the_interval():
    edits, words, blocks = simulate(np.random.default_rng(1), 40, clustered=False)
    assert interval(edits, words, blocks, samples=200, seed=1) == interval(edits, words, blocks, samples=200, seed=1)
    assert interval(edits, words, blocks, samples=200, seed=1) != interval(edits, words, blocks, samples=200, seed=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], []), "0 references"),
        ((["a"], []), "1 references and 0 transcripts"),
        ((["a"], ["a", "b"]), "2 transcripts"),
        ((["a", "?!"], ["a", "b"]), "without a word"),
        (([""], ["a"]), "without a word"),
        ((["a", "b"], ["a", "b"], ["x"]), "1 speakers"),
        ((["a"], ["a"], ["x", "y"]), "2 speakers"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, words):
    with pytest.raises(LabError, match=words):
        score(*arguments)


def test_a_score_prints_and_travels():
    found = score(["a b"], ["a c"], ["x"])
    assert str(found) == "WER 0.500 (95 % 0.500-0.500, n = 1, 1 speakers), CER 0.333"
    assert json.loads(json.dumps(found.as_dict()))["wer"] == 0.5
