from __future__ import annotations

import json
from itertools import product

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.infra.errors import LabError
from pipelines.speech import scoring
from pipelines.speech.scoring import (
    Edits,
    count_edits,
    difference,
    difference_over_seeds,
    interval,
    score,
    score_over_seeds,
)

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


def simulate_voices(rng: np.random.Generator, speakers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As the tour's test set: 10 utterances a speaker, whose rate is drawn round 0.25 with a deviation of 0.1."""
    blocks = np.repeat(np.arange(speakers), 10)
    words = rng.integers(4, 12, len(blocks))
    return rng.binomial(words, rng.beta(4, 12, speakers)[blocks]), words, blocks


def coverage(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


@pytest.mark.parametrize("clustered", [False, True])
def test_the_interval_covers_the_truth_in_95_of_100(clustered):
    rng = np.random.default_rng(0)
    found = [interval(*simulate(rng, 40, clustered), samples=300, seed=trial) for trial in range(500)]
    assert 0.92 <= coverage(found, 0.2) <= 0.98


@pytest.mark.parametrize("speakers", [6, 16, 32])
def test_it_covers_with_few_speakers_too_and_drawing_utterances_would_not(speakers):
    rng = np.random.default_rng(speakers)
    sets = [simulate_voices(rng, speakers) for _ in range(500)]
    draw = {"samples": 300, "seed": 1}
    assert 0.92 <= coverage([interval(*told, **draw) for told in sets], 0.25) <= 0.98
    assert coverage([interval(e, w, np.arange(len(e)), **draw) for e, w, _ in sets], 0.25) < 0.8


def test_the_percentiles_alone_would_cover_too_seldom():
    """Why `interval` widens them: the same resamples of six speakers, as they come."""
    rng, found = np.random.default_rng(6), []
    for _ in range(500):
        edits, words = (np.bincount(told[2], told[i]) for told in [simulate_voices(rng, 6)] for i in (0, 1))
        drawn = rng.integers(6, size=(300, 6))
        found.append(np.percentile(edits[drawn].sum(1) / words[drawn].sum(1), [2.5, 97.5]))
    assert coverage(found, 0.25) < 0.9


@pytest.mark.parametrize(("speakers", "least"), [(8, 0.84), (16, 0.88), (40, 0.90)])
def test_where_a_few_speakers_are_far_worse_than_the_others_it_covers_less(speakers, least):
    """As `interval` says: most speakers near 0, some at half of all words wrong."""
    rng, found = np.random.default_rng(speakers), []
    blocks = np.repeat(np.arange(speakers), 10)
    for _ in range(400):
        words = rng.integers(4, 12, len(blocks))
        edits = rng.binomial(words, rng.beta(0.5, 4.5, speakers)[blocks])
        found.append(interval(edits, words, blocks, samples=300, seed=1))
    assert least <= coverage(found, 0.1) <= 0.97


def test_no_rate_is_below_0_and_one_speaker_tells_nothing_of_others():
    found = score(["a b"] * 3, ["a b", "a b", "a c"], ["x", "y", "z"])
    assert (found.ci95[0], found.cer_ci95[0]) == (0, 0)
    assert found.ci95[1] > found.wer + 0.4
    alone = score(["a b"] * 3, ["a b", "a b", "a c"], ["x", "x", "x"])
    assert alone.ci95 == (alone.wer, alone.wer)


def test_speakers_as_blocks_widen_the_interval_when_errors_cluster():
    edits, words, blocks = simulate(np.random.default_rng(1), 40, clustered=True)
    alone = interval(edits, words, np.arange(len(edits)), samples=1_000, seed=0)
    by_speaker = interval(edits, words, blocks, samples=1_000, seed=0)
    assert by_speaker[1] - by_speaker[0] > 1.4 * (alone[1] - alone[0])


def test_a_difference_by_hand():
    """Of two utterances each better by one word, all signs: ++ and -- are as far from 0, two of four."""
    better, worse = (count_edits(["a b c d", "e f"], heard) for heard in (["a b c d", "e"], ["a b c x", ""]))
    found = difference(better, worse)
    assert found.delta == pytest.approx(-2 / 6)
    assert (found.p, found.speakers, found.seeds) == (0.5, 2, (1, 1))
    assert found.ci95[0] < -1 / 2 < -1 / 4 < found.ci95[1]  # wider than the two utterances: two tell next to nothing
    mirrored = difference(worse, better)
    assert (mirrored.delta, mirrored.p) == (-found.delta, found.p)
    assert str(found).startswith("ΔWER -0.333 (95 % ")
    assert str(found).endswith("p = 0.5, 2 speakers)")
    assert json.loads(json.dumps(found.as_dict()))["p"] == 0.5


def test_what_is_hard_for_both_does_not_blur_a_difference():
    """Speakers differ widely, and one system makes one error more in each utterance of ten words: exactly +0.1."""
    rng = np.random.default_rng(2)
    hard = np.repeat(rng.integers(0, 9, 30), 5)
    texts, speakers = [" ".join("abcdefghij")] * 150, [f"s{i // 5}" for i in range(150)]
    heard = {extra: [" ".join("x" * (n + extra) + "abcdefghij"[n + extra :]) for n in hard] for extra in (0, 1)}
    found = difference(*(count_edits(texts, heard[extra]) for extra in (1, 0)), speakers)
    assert (found.delta, *found.ci95) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    assert found.p == 2 / 2**30
    alone = score(texts, heard[0], speakers)
    assert alone.ci95[1] - alone.ci95[0] > 0.1


def errors(*counts: int, words: int = 10) -> Edits:
    """Edits of utterances of ten words, so many errors in each."""
    made, none = np.array(counts, dtype=np.int64), np.zeros(len(counts), dtype=np.int64)
    return Edits(made, none, none, np.full(len(counts), words), none, none)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10), speakers=st.integers(1, 7)
)
def test_p_counts_all_signs(pairs, speakers):
    names = [f"s{i % speakers}" for i in range(len(pairs))]
    gains = [sum(a - b for (a, b), name in zip(pairs, names) if name == who) for who in sorted(set(names))]
    sums = [sum(sign * gain for sign, gain in zip(signs, gains)) for signs in product((1, -1), repeat=len(gains))]
    expected = np.mean([abs(one) >= abs(sum(gains)) for one in sums])
    found = difference(errors(*(a for a, _ in pairs)), errors(*(b for _, b in pairs)), names, samples=100)
    assert found.p == pytest.approx(expected)


def test_five_speakers_never_show_a_difference():
    assert difference(errors(0, 0, 0, 0, 0), errors(9, 9, 9, 9, 9)).p == 2 / 2**5


def test_equal_systems_have_p_1_and_a_large_test_set_is_no_burden():
    rng = np.random.default_rng(3)
    many = rng.integers(0, 9, 5_000)
    assert difference(errors(*many), errors(*many), samples=100).p == 1
    assert difference(errors(*many), errors(*rng.permutation(many)), samples=100).p > 0.01


def two_systems(rng: np.random.Generator, speakers: int, runs: int, between_seeds: float) -> list[list[Edits]]:
    """Two recipes of one true WER on the same voices, 8 utterances of ten words each. A recipe does better on some
    voices than on others, and each of its runs is better or worse everywhere."""
    voices, sides = rng.beta(4, 12, speakers), []
    for _ in range(2):
        liked = rng.normal(0, 0.03, speakers)
        rates = [np.clip(voices + liked + rng.normal(0, between_seeds), 0, 1) for _ in range(runs)]
        sides.append([errors(*rng.binomial(10, np.repeat(rate, 8))) for rate in rates])
    return sides


def test_without_a_difference_p_is_uniform_and_its_interval_holds_0():
    rng, names = np.random.default_rng(4), [f"s{i // 8}" for i in range(16 * 8)]
    found = [difference(*ours, *theirs, names, samples=200) for ours, theirs in pairs_of(rng, 400, 16, 1, 0.0)]
    for level in (0.05, 0.2, 0.5):  # within three standard errors of the binomial
        share = np.mean([one.p < level for one in found])
        assert abs(share - level) <= 3 * np.sqrt(level * (1 - level) / len(found))
    assert 0.92 <= coverage([one.ci95 for one in found], 0) <= 0.98


def test_drawing_utterances_would_find_differences_that_are_none():
    found = [difference(*a, *b, samples=100).p for a, b in pairs_of(np.random.default_rng(5), 200, 16, 1, 0.0)]
    assert np.mean(np.array(found) < 0.05) > 0.1


def pairs_of(rng: np.random.Generator, count: int, *how) -> list[list[list[Edits]]]:
    return [two_systems(rng, *how) for _ in range(count)]


def test_one_run_on_each_side_is_the_difference_of_two_models():
    names = [f"s{i // 8}" for i in range(16 * 8)]
    (ours,), (theirs,) = two_systems(np.random.default_rng(6), 16, 1, 0.02)
    assert difference_over_seeds([ours], [theirs], names) == difference(ours, theirs, names)
    # runs that do not differ add no chance of theirs
    again = difference_over_seeds([ours, ours], [theirs, theirs], names)
    assert again.seeds == (2, 2)
    assert (again.delta, again.ci95) == (difference(ours, theirs, names).delta, difference(ours, theirs, names).ci95)
    assert again.p == pytest.approx(difference(ours, theirs, names).p)


@pytest.mark.parametrize("runs", [2, 4])
def test_seeds_that_matter_are_no_difference_between_recipes(runs):
    """One run of each recipe is taken for a difference far too often; several, with their spread, are not."""
    rng, names = np.random.default_rng(runs), [f"s{i // 8}" for i in range(20 * 8)]
    sides = pairs_of(rng, 200, 20, runs, 0.04)
    assert np.mean([difference(ours[0], theirs[0], names, samples=100).p < 0.05 for ours, theirs in sides]) > 0.2
    found = [difference_over_seeds(*side, names, samples=200) for side in sides]
    assert np.mean([one.p < 0.05 for one in found]) <= 0.08
    assert coverage([one.ci95 for one in found], 0) >= 0.92


def test_other_recipes_tell_what_a_seed_changes():
    """Two seeds of two recipes say little of it; with ten recipes the interval is narrow, and covers as it should."""
    rng, names = np.random.default_rng(9), [f"s{i // 8}" for i in range(20 * 8)]
    recipes = [[side for pair in pairs_of(rng, 5, 20, 2, 0.04) for side in pair] for _ in range(120)]
    alone = [difference_over_seeds(*known[:2], names, samples=200) for known in recipes]
    pooled = [difference_over_seeds(*known[:2], names, others=known[2:], samples=200) for known in recipes]
    assert 0.91 <= coverage([one.ci95 for one in pooled], 0)
    assert np.mean([one.p < 0.05 for one in pooled]) <= 0.09
    width = [np.mean([one.ci95[1] - one.ci95[0] for one in found]) for found in (pooled, alone)]
    assert width[0] < 0.75 * width[1]


def test_a_difference_between_recipes_is_still_seen():
    rng, names = np.random.default_rng(7), [f"s{i // 8}" for i in range(20 * 8)]
    ours, theirs = two_systems(rng, 20, 3, 0.005)
    worse = [errors(*np.minimum(run.word_edits + rng.integers(0, 4, 160), 10)) for run in theirs]
    found = difference_over_seeds(ours, worse, names)
    assert found.p < 0.01
    assert found.ci95[1] < 0
    assert "3 against 3 runs" in str(found)


def test_the_score_of_a_recipe_holds_speakers_and_seeds():
    names, rng = [f"s{i // 8}" for i in range(20 * 8)], np.random.default_rng(8)
    recipes = [two_systems(rng, 20, 3, 0.05)[0] for _ in range(200)]
    found = [score_over_seeds(runs, names, samples=200) for runs in recipes]
    assert 0.92 <= coverage([one.ci95 for one in found], 0.25)
    alone = [score_over_seeds(runs[:1], names, samples=200) for runs in recipes]
    assert coverage([one.ci95 for one in alone], 0.25) < 0.88
    assert found[0].wer == pytest.approx(np.mean(found[0].wers))
    assert (len(found[0].wers), found[0].speakers) == (3, 20)
    assert "3 runs, 20 speakers" in str(found[0])


def test_two_seeds_alone_say_little_and_other_recipes_tell_what_a_seed_changes():
    names, rng = [f"s{i // 8}" for i in range(20 * 8)], np.random.default_rng(9)
    recipes = [[two_systems(rng, 20, 2, 0.05)[0] for _ in range(6)] for _ in range(150)]
    alone = [score_over_seeds(known[0], names, samples=200) for known in recipes]
    pooled = [score_over_seeds(known[0], names, others=known[1:], samples=200) for known in recipes]
    assert 0.92 <= coverage([one.ci95 for one in pooled], 0.25)
    width = [np.mean([one.ci95[1] - one.ci95[0] for one in found]) for found in (pooled, alone)]
    assert width[0] < 0.6 * width[1]


def test_one_run_scores_as_score_does():
    texts, heard, names = ["a b c", "d e", "f"], ["a x c", "d e", ""], ["x", "y", "z"]
    plain, runs = score(texts, heard, names), score_over_seeds([count_edits(texts, heard)], names)
    assert (runs.wer, runs.ci95, runs.speakers) == (plain.wer, plain.ci95, plain.speakers)


def test_different_references_are_not_compared():
    with pytest.raises(LabError, match="same references in the same order"):
        difference(count_edits(["a b"], ["a b"]), count_edits(["a"], ["a"]))
    with pytest.raises(LabError, match="same references in the same order"):
        score_over_seeds([errors(1, 2), errors(1, 2, words=9)])


@pytest.mark.parametrize(("ours", "theirs"), [([], [errors(1)]), ([errors(1)], []), ([], [])])
def test_no_run_is_one_line(ours, theirs):
    with pytest.raises(LabError, match="at least one run of each"):
        difference_over_seeds(ours, theirs)


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


@pytest.mark.parametrize("speakers", [None, ["a", "b", "b", "c", "d"] * 8])
def test_resamples_that_are_drawn_in_parts_are_the_same(monkeypatch, speakers):
    told = [f"ord {n} och ett till" for n in range(40)], ["ord och ett annat" if n % 3 else "" for n in range(40)]
    whole = score(*told, speakers)
    monkeypatch.setattr(scoring, "_DRAWN_AT_ONCE", 100)
    assert score(*told, speakers) == whole
