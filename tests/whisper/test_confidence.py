from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.whisper import confidence
from pipelines.whisper.confidence import Calibration


def drawn(n: int, slope: float = 1.0, intercept: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Words whose being right follows the two numbers, on the logit; by themselves the model keeps its word."""
    rng = np.random.default_rng(seed)
    logprobs = np.log(rng.beta(3.0, 0.8, n).clip(1e-6, 1 - 1e-6))
    own = logprobs - np.log(-np.expm1(logprobs))
    return logprobs, rng.random(n) < 1 / (1 + np.exp(-(slope * own + intercept)))


def errors(fitted: Calibration, logprobs: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Expected calibration error of the model's own probabilities, and of the fitted ones."""
    mended = np.array([fitted(logprob) for logprob in logprobs])
    return confidence.expected_error(np.exp(logprobs), right), confidence.expected_error(mended, right)


@pytest.mark.parametrize(("slope", "intercept"), [(1.4, 0.3), (2.5, 1.5), (0.6, -1.0)])
def test_fit_recovers_slope_and_intercept(slope, intercept):
    found = confidence.fit(*drawn(40_000, slope, intercept))
    assert found.slope == pytest.approx(slope, abs=0.1)
    assert found.intercept == pytest.approx(intercept, abs=0.1)
    assert found.words == 40_000


@pytest.mark.parametrize("n", [200, *(pytest.param(n, marks=pytest.mark.slow) for n in (700, 3_000))])
def test_fit_does_not_harm_a_calibrated_model(n):
    """Held to words that nothing was fitted to; a hundredth is what so few words leave open."""
    worse = []
    for seed in range(20):
        before, after = errors(confidence.fit(*drawn(n, seed=seed)), *drawn(20_000, seed=100 + seed))
        worse.append(after - before)
    assert np.mean(worse) < 0.01
    assert np.median(worse) == pytest.approx(0, abs=1e-9), "most often nothing is changed"


@pytest.mark.parametrize(("slope", "intercept"), [(1.2, -1.5), (0.5, 0.0), (1.0, 1.2)])
def test_fit_corrects_a_miscalibrated_model_on_new_words(slope, intercept):
    fitted = confidence.fit(*drawn(3_000, slope, intercept))
    before, after = errors(fitted, *drawn(20_000, slope, intercept, seed=1))
    assert before > 0.05
    assert after < 0.02
    assert fitted.ece == pytest.approx(after, abs=0.02), "what is told of it holds for other words"
    assert fitted.ece_before == pytest.approx(before, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_uniform_validation_words_give_no_certainty(share):
    found = confidence.fit(-np.random.default_rng(0).random(200), np.full(200, bool(share)))
    told = [found(-0.01), found(-1.0)]
    assert all(0.9 < value < 1 if share else 0 < value < 0.1 for value in told)


def test_too_few_words_give_the_default_calibration():
    found = confidence.fit(np.full(49, -0.1), np.ones(49, dtype=bool))
    assert found == Calibration()
    assert found(-0.5) == pytest.approx(np.exp(-0.5))


@given(st.floats(0, 5), st.floats(-5, 5), st.floats(-100, 0), st.floats(0, 10))
def test_calibration_is_monotonic_and_a_probability(slope, intercept, logprob, more):
    fitted = (Calibration(slope, intercept, 100, scale=scale) for scale in ("logit", "logprob"))
    for calibration in (Calibration(), *fitted):
        low, high = calibration(logprob), calibration(min(logprob + more, 0.0))
        assert 0 <= low <= high <= 1


def test_calibration_survives_the_manifest():
    fitted = confidence.fit(*drawn(500, 1.5, 0.8))
    again = Calibration.of({"confidence": json.loads(json.dumps(fitted.as_dict()))})
    assert again(-0.4) == pytest.approx(fitted(-0.4), abs=1e-3)
    assert again.words == 500
    for facts in ({}, {"confidence": None}, {"confidence": {}}):
        assert Calibration.of(facts) == Calibration()


def test_old_calibrations_apply_to_the_logprob():
    told = {"slope": 1.9841, "intercept": 2.5319, "words": 659, "ece_before": 0.071, "ece": 0.0725}
    assert Calibration.of({"confidence": told})(-0.7) == pytest.approx(1 / (1 + np.exp(-(1.9841 * -0.7 + 2.5319))))
    unfitted = {"slope": 1.0, "intercept": 0.0, "words": 0, "ece_before": 0.0, "ece": 0.0}
    assert Calibration.of({"confidence": unfitted})(-0.7) == pytest.approx(np.exp(-0.7))


def test_words_are_marked_by_the_alignment():
    references = ["Hej på dig, Åke!", "Tyst.", "nu"]
    heard = [
        [("Hej", -0.1), ("då", -1.0), ("på", -0.2), ("dej", -0.9), ("Åke.", -0.3)],
        [],
        [("nu", -0.05), ("nu", -2.0), ("–", -3.0)],
    ]
    logprobs, right = confidence.mark_words(references, heard)
    assert logprobs.tolist() == [-0.1, -1.0, -0.2, -0.9, -0.3, -0.05, -2.0]
    assert right.tolist()[:5] == [True, False, True, False, True]
    assert sum(right.tolist()[5:]) == 1


def test_split_words_count_as_their_parts():
    logprobs, right = confidence.mark_words(["tv avgift"], [[("tv-avgift", -0.5)]])
    assert logprobs.tolist() == [-0.5, -0.5]
    assert right.tolist() == [True, True]


def test_words_of_an_empty_reference_are_wrong():
    assert confidence.mark_words([""], [[("tack", -0.2)]])[1].tolist() == [False]
