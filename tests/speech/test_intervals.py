"""Coverage of the bootstrap intervals by simulation: small by default, full size with the `slow` marker."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.speech import intervals
from pipelines.speech.intervals import bootstrap_ci95
from pipelines.speech.scoring import score

FULL = 500


def trials(full: int = FULL) -> pytest.MarkDecorator:
    """Parametrise `n_trials`: a quick simulation, and the full one in the slow tier."""
    return pytest.mark.parametrize("n_trials", [100, pytest.param(full, marks=pytest.mark.slow)])


def margin(n_trials: int, full: int = FULL) -> float:
    """Two standard errors of a coverage of 95 % in `n_trials`, less those in the full simulation."""
    return 2 * (0.95 * 0.05) ** 0.5 * (n_trials**-0.5 - full**-0.5)


def simulate_edits(rng: np.random.Generator, n_speakers: int, clustered: bool) -> tuple[np.ndarray, ...]:
    """Return edits, words and blocks at a true rate of 0.2, 5 utterances a speaker; `clustered`: a rate per speaker."""
    blocks = np.repeat(np.arange(n_speakers), 5)
    rates = rng.choice([0.05, 0.35], n_speakers) if clustered else np.full(n_speakers, 0.2)
    words = rng.integers(4, 12, len(blocks))
    return rng.binomial(words, rates[blocks]), words, blocks


def simulate_test_set(rng: np.random.Generator, n_speakers: int, alpha: float = 4, beta: float = 12) -> tuple:
    """Return edits, words and blocks of 10 utterances a speaker with Beta-distributed error rates (mean 0.25)."""
    blocks = np.repeat(np.arange(n_speakers), 10)
    words = rng.integers(4, 12, len(blocks))
    return rng.binomial(words, rng.beta(alpha, beta, n_speakers)[blocks]), words, blocks


def coverage(bounds: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in bounds]))


@trials()
@pytest.mark.parametrize("clustered", [False, True])
def test_interval_covers_the_truth_in_95_of_100(clustered, n_trials):
    rng = np.random.default_rng(0)
    bounds = [bootstrap_ci95(*simulate_edits(rng, 40, clustered), samples=300, seed=trial) for trial in range(n_trials)]
    assert 0.92 - margin(n_trials) <= coverage(bounds, 0.2) <= 0.98 + margin(n_trials)


@trials()
@pytest.mark.parametrize("n_speakers", [6, 16, 32])
def test_blocks_keep_coverage_with_few_speakers(n_speakers, n_trials):
    rng = np.random.default_rng(n_speakers)
    sets = [simulate_test_set(rng, n_speakers) for _ in range(n_trials)]
    draw = {"samples": 300, "seed": 1}
    covered = coverage([bootstrap_ci95(*edits, **draw) for edits in sets], 0.25)
    assert 0.92 - margin(n_trials) <= covered <= 0.98 + margin(n_trials)
    without_blocks = [bootstrap_ci95(edits, words, np.arange(len(edits)), **draw) for edits, words, _ in sets]
    assert coverage(without_blocks, 0.25) < 0.8


@trials()
def test_plain_percentiles_cover_too_seldom(n_trials):
    """Why `bootstrap_ci95` widens them: the same resamples of six speakers, without correction."""
    rng, bounds = np.random.default_rng(6), []
    for _ in range(n_trials):
        utterances = simulate_test_set(rng, 6)
        edits, words = (np.bincount(utterances[2], utterances[i]) for i in (0, 1))
        drawn = rng.integers(6, size=(300, 6))
        bounds.append(np.percentile(edits[drawn].sum(1) / words[drawn].sum(1), [2.5, 97.5]))
    assert coverage(bounds, 0.25) < 0.9


@trials(400)
@pytest.mark.parametrize(("n_speakers", "least"), [(8, 0.84), (16, 0.88), (40, 0.90)])
def test_skewed_error_rates_lower_the_coverage(n_speakers, least, n_trials):
    """As `bootstrap_ci95` documents: most speakers near 0, some with half of all words wrong."""
    rng = np.random.default_rng(n_speakers)
    sets = [simulate_test_set(rng, n_speakers, 0.5, 4.5) for _ in range(n_trials)]
    covered = coverage([bootstrap_ci95(*edits, samples=300, seed=1) for edits in sets], 0.1)
    assert least - margin(n_trials, 400) <= covered <= 0.97 + margin(n_trials, 400)


def test_blocks_widen_the_interval_when_errors_cluster():
    edits, words, blocks = simulate_edits(np.random.default_rng(1), 40, clustered=True)
    by_utterance = bootstrap_ci95(edits, words, np.arange(len(edits)), samples=1_000, seed=0)
    by_speaker = bootstrap_ci95(edits, words, blocks, samples=1_000, seed=0)
    assert by_speaker[1] - by_speaker[0] > 1.4 * (by_utterance[1] - by_utterance[0])


def test_seed_decides_the_interval():
    edits = simulate_edits(np.random.default_rng(1), 40, clustered=False)
    first, again, other = (bootstrap_ci95(*edits, samples=200, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("speakers", [None, ["a", "b", "b", "c", "d"] * 8])
def test_chunked_draws_give_the_same_interval(monkeypatch, speakers):
    references = [f"ord {n} och ett till" for n in range(40)]
    hypotheses = ["ord och ett annat" if n % 3 else "" for n in range(40)]
    at_once = score(references, hypotheses, speakers)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 100)
    assert score(references, hypotheses, speakers) == at_once
