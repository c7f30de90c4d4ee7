"""Differences between systems, and scores over several seeds: simulations are full size with the `slow` marker."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.infra.errors import LabError
from pipelines.speech.edits import Edits, count_edits
from pipelines.speech.scoring import difference, difference_over_seeds, score, score_over_seeds

Recipe = list[Edits]


def trials(small: int, full: int) -> pytest.MarkDecorator:
    """Parametrise `n_trials`: a quick simulation, and the full one in the slow tier."""
    return pytest.mark.parametrize("n_trials", [small, pytest.param(full, marks=pytest.mark.slow)])


def margin(n_trials: int, full: int, share: float = 0.95) -> float:
    """Two standard errors of an observed `share` in `n_trials`, less those in the full simulation."""
    return 2 * (share * (1 - share)) ** 0.5 * (n_trials**-0.5 - full**-0.5)


def coverage(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def mean_width(results: list) -> float:
    return float(np.mean([one.ci95[1] - one.ci95[0] for one in results]))


def edits_of(*errors: int, words: int = 10) -> Edits:
    """Return edits of utterances with `errors` substitutions each."""
    substitutions, zeros = np.array(errors, dtype=np.int64), np.zeros(len(errors), dtype=np.int64)
    return Edits(substitutions, zeros, zeros, np.full(len(errors), words), zeros, zeros)


def simulate_recipes(rng: np.random.Generator, n_speakers: int, runs: int, seed_deviation: float) -> list[Recipe]:
    """Return the runs of two recipes of equal true WER on the same speakers, 8 utterances of ten words each.

    A recipe does better on some speakers than on others, and each of its runs is better or worse on all of them.
    """
    rates, recipes = rng.beta(4, 12, n_speakers), []
    for _ in range(2):
        recipe_effect = rng.normal(0, 0.03, n_speakers)
        run_rates = [np.clip(rates + recipe_effect + rng.normal(0, seed_deviation), 0, 1) for _ in range(runs)]
        recipes.append([edits_of(*rng.binomial(10, np.repeat(rate, 8))) for rate in run_rates])
    return recipes


def speaker_names(n_speakers: int) -> list[str]:
    return [f"s{i // 8}" for i in range(n_speakers * 8)]


# ---- two models


def test_difference_matches_a_count_by_hand():
    """Of two utterances each better by one word, all signs: ++ and -- are as far from 0, two of four."""
    better, worse = (count_edits(["a b c d", "e f"], texts) for texts in (["a b c d", "e"], ["a b c x", ""]))
    result = difference(better, worse)
    assert result.delta == pytest.approx(-2 / 6)
    assert (result.p, result.speakers, result.seeds) == (0.5, 0, (1, 1))
    assert result.ci95[0] < -1 / 2 < -1 / 4 < result.ci95[1]  # wider than the two utterances
    mirrored = difference(worse, better)
    assert (mirrored.delta, mirrored.p) == (-result.delta, result.p)
    assert str(result).startswith("ΔWER -0.333 (95 % ")
    assert str(result).endswith(" over clips, p = 0.5 over clips, speakers unknown)")
    assert json.loads(json.dumps(result.as_dict()))["p"] == 0.5


def test_shared_difficulty_cancels_in_a_difference():
    """Speakers differ widely, and one system makes one error more in each utterance of ten words: exactly +0.1."""
    rng = np.random.default_rng(2)
    errors = np.repeat(rng.integers(0, 9, 30), 5)
    texts, speakers = [" ".join("abcdefghij")] * 150, [f"s{i // 5}" for i in range(150)]
    hypotheses = {more: [" ".join("x" * (n + more) + "abcdefghij"[n + more :]) for n in errors] for more in (0, 1)}
    result = difference(*(count_edits(texts, hypotheses[more]) for more in (1, 0)), speakers)
    assert (result.delta, *result.ci95) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    assert result.p == 2 / 2**30
    alone = score(texts, hypotheses[0], speakers)
    assert alone.ci95[1] - alone.ci95[0] > 0.1


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10),
    n_speakers=st.integers(2, 7),
)
def test_p_counts_all_sign_assignments(pairs, n_speakers):
    names = [f"s{i % n_speakers}" for i in range(len(pairs))]  # with one speaker each utterance is a unit
    gains = [sum(a - b for (a, b), name in zip(pairs, names) if name == speaker) for speaker in sorted(set(names))]
    sums = [sum(sign * gain for sign, gain in zip(signs, gains)) for signs in product((1, -1), repeat=len(gains))]
    expected = np.mean([abs(one) >= abs(sum(gains)) for one in sums])
    result = difference(edits_of(*(a for a, _ in pairs)), edits_of(*(b for _, b in pairs)), names, samples=100)
    assert result.p == pytest.approx(expected)


def test_five_speakers_never_show_a_difference():
    assert difference(edits_of(0, 0, 0, 0, 0), edits_of(9, 9, 9, 9, 9)).p == 2 / 2**5


def test_p_of_equal_systems_is_1_on_a_large_test_set():
    rng = np.random.default_rng(3)
    errors = rng.integers(0, 9, 5_000)
    assert difference(edits_of(*errors), edits_of(*errors), samples=100).p == 1
    assert difference(edits_of(*errors), edits_of(*rng.permutation(errors)), samples=100).p > 0.01


@trials(100, 400)
def test_p_of_equal_systems_is_uniform(n_trials):
    rng, names = np.random.default_rng(4), speaker_names(16)
    pairs = [simulate_recipes(rng, 16, 1, 0.0) for _ in range(n_trials)]
    results = [difference(*ours, *theirs, names, samples=200) for ours, theirs in pairs]
    for level in (0.05, 0.2, 0.5):  # within three standard errors of the binomial
        share = np.mean([one.p < level for one in results])
        assert abs(share - level) <= 3 * np.sqrt(level * (1 - level) / n_trials)
    covered = coverage([one.ci95 for one in results], 0)
    assert 0.92 - margin(n_trials, 400) <= covered <= 0.98 + margin(n_trials, 400)


@trials(100, 200)
def test_p_over_utterances_gives_false_alarms(n_trials):
    rng = np.random.default_rng(5)
    pairs = [simulate_recipes(rng, 16, 1, 0.0) for _ in range(n_trials)]
    p_values = [difference(*ours, *theirs, samples=100).p for ours, theirs in pairs]
    assert np.mean(np.array(p_values) < 0.05) > 0.1


def test_different_references_are_not_compared():
    with pytest.raises(LabError, match="same references in the same order"):
        difference(count_edits(["a b"], ["a b"]), count_edits(["a"], ["a"]))
    with pytest.raises(LabError, match="same references in the same order"):
        score_over_seeds([edits_of(1, 2), edits_of(1, 2, words=9)])


# ---- two recipes


def test_single_runs_give_the_difference_of_two_models():
    names = speaker_names(16)
    (ours,), (theirs,) = simulate_recipes(np.random.default_rng(6), 16, 1, 0.02)
    plain = difference(ours, theirs, names)
    assert difference_over_seeds([ours], [theirs], names) == plain
    # equal runs add no variance
    repeated = difference_over_seeds([ours, ours], [theirs, theirs], names)
    assert repeated.seeds == (2, 2)
    assert (repeated.delta, repeated.ci95) == (plain.delta, plain.ci95)
    assert repeated.p == pytest.approx(plain.p)


@trials(80, 200)
@pytest.mark.parametrize("runs", [2, 4])
def test_seed_variance_is_not_a_difference_of_recipes(runs, n_trials):
    """Comparing one run of each recipe raises far too many false alarms; several runs do not."""
    rng, names = np.random.default_rng(runs), speaker_names(20)
    pairs = [simulate_recipes(rng, 20, runs, 0.04) for _ in range(n_trials)]
    single = [difference(ours[0], theirs[0], names, samples=100) for ours, theirs in pairs]
    assert np.mean([one.p < 0.05 for one in single]) > 0.2
    results = [difference_over_seeds(*recipes, names, samples=200) for recipes in pairs]
    assert np.mean([one.p < 0.05 for one in results]) <= 0.08 + margin(n_trials, 200)
    assert coverage([one.ci95 for one in results], 0) >= 0.92 - margin(n_trials, 200)


@trials(40, 120)
def test_other_recipes_narrow_the_interval_of_a_difference(n_trials):
    """Two seeds of two recipes estimate the variance badly; ten recipes narrow the interval and keep its coverage."""
    rng, names = np.random.default_rng(9), speaker_names(20)
    series = [[recipe for _ in range(5) for recipe in simulate_recipes(rng, 20, 2, 0.04)] for _ in range(n_trials)]
    alone = [difference_over_seeds(*recipes[:2], names, samples=200) for recipes in series]
    pooled = [difference_over_seeds(*recipes[:2], names, others=recipes[2:], samples=200) for recipes in series]
    assert coverage([one.ci95 for one in pooled], 0) >= 0.91 - margin(n_trials, 120)
    assert np.mean([one.p < 0.05 for one in pooled]) <= 0.09 + margin(n_trials, 120)
    assert mean_width(pooled) < 0.75 * mean_width(alone)


def test_a_real_difference_of_recipes_is_detected():
    rng, names = np.random.default_rng(7), speaker_names(20)
    ours, theirs = simulate_recipes(rng, 20, 3, 0.005)
    worse = [edits_of(*np.minimum(run.word_edits + rng.integers(0, 4, 160), 10)) for run in theirs]
    result = difference_over_seeds(ours, worse, names)
    assert result.p < 0.01
    assert result.ci95[1] < 0
    assert "3 against 3 runs" in str(result)


@pytest.mark.parametrize(("ours", "theirs"), [([], [edits_of(1)]), ([edits_of(1)], []), ([], [])])
def test_a_side_without_runs_is_refused(ours, theirs):
    with pytest.raises(LabError, match="at least one run of each"):
        difference_over_seeds(ours, theirs)


# ---- the score of a recipe


@trials(80, 200)
def test_score_over_seeds_covers_speakers_and_seeds(n_trials):
    names, rng = speaker_names(20), np.random.default_rng(8)
    recipes = [simulate_recipes(rng, 20, 3, 0.05)[0] for _ in range(n_trials)]
    results = [score_over_seeds(runs, names, samples=200) for runs in recipes]
    assert coverage([one.ci95 for one in results], 0.25) >= 0.92 - margin(n_trials, 200)
    single = [score_over_seeds(runs[:1], names, samples=200) for runs in recipes]
    assert coverage([one.ci95 for one in single], 0.25) < 0.88
    assert results[0].wer == pytest.approx(np.mean(results[0].wers))
    assert (len(results[0].wers), results[0].speakers) == (3, 20)
    assert "3 runs, 20 speakers" in str(results[0])


@trials(50, 150)
def test_other_recipes_narrow_the_interval_of_a_score(n_trials):
    names, rng = speaker_names(20), np.random.default_rng(9)
    series = [[simulate_recipes(rng, 20, 2, 0.05)[0] for _ in range(6)] for _ in range(n_trials)]
    alone = [score_over_seeds(recipes[0], names, samples=200) for recipes in series]
    pooled = [score_over_seeds(recipes[0], names, others=recipes[1:], samples=200) for recipes in series]
    assert coverage([one.ci95 for one in pooled], 0.25) >= 0.92 - margin(n_trials, 150)
    assert mean_width(pooled) < 0.6 * mean_width(alone)


def test_score_over_one_run_equals_score():
    texts, hypotheses, names = ["a b c", "d e", "f"], ["a x c", "d e", ""], ["x", "y", "z"]
    plain, over_seeds = score(texts, hypotheses, names), score_over_seeds([count_edits(texts, hypotheses)], names)
    assert (over_seeds.wer, over_seeds.ci95, over_seeds.speakers) == (plain.wer, plain.ci95, plain.speakers)
