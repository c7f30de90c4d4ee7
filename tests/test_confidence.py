from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import confidence
from pipelines.confidence import Calibration


def drawn(n: int, slope: float, intercept: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Words whose being right follows the two numbers."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(0.7, n)
    right = rng.random(n) < 1 / (1 + np.exp(-(slope * logprobs + intercept)))
    return logprobs, right


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (2.5, 1.5), (0.6, -1.0)])
def test_the_fit_finds_the_numbers_that_made_the_data(slope, intercept):
    found = confidence.fit(*drawn(40_000, slope, intercept))
    assert found.slope == pytest.approx(slope, abs=0.1)
    assert found.intercept == pytest.approx(intercept, abs=0.1)
    assert found.words == 40_000


def test_a_model_that_promises_too_much_is_brought_down_on_words_it_was_not_fitted_to():
    fitted = confidence.fit(*drawn(3_000, 1.2, -0.8))
    logprobs, right = drawn(3_000, 1.2, -0.8, seed=1)
    mended = np.array([fitted(logprob) for logprob in logprobs])
    before = confidence.expected_error(np.exp(logprobs), right)
    after = confidence.expected_error(mended, right)
    assert before > 0.15
    assert after < 0.04
    assert fitted.ece < fitted.ece_before


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_words_that_are_all_right_or_all_wrong_promise_no_certainty(share):
    found = confidence.fit(-np.random.default_rng(0).random(200), np.full(200, bool(share)))
    told = [found(-0.01), found(-1.0)]
    assert all(0.9 < value < 1 if share else 0 < value < 0.1 for value in told)


def test_too_few_words_fit_nothing():
    found = confidence.fit(np.full(49, -0.1), np.ones(49, dtype=bool))
    assert found == Calibration()
    assert found(-0.5) == pytest.approx(np.exp(-0.5))


@given(st.floats(0, 5), st.floats(-5, 5), st.floats(-100, 0), st.floats(0, 10))
def test_surer_is_never_less_right_and_all_is_a_probability(slope, intercept, logprob, more):
    for calibration in (Calibration(), Calibration(slope, intercept, 100)):
        low, high = calibration(logprob), calibration(min(logprob + more, 0.0))
        assert 0 <= low <= high <= 1


def test_a_manifest_tells_the_numbers_or_nothing():
    fitted = confidence.fit(*drawn(500, 1.5, 0.3))
    again = Calibration.of({"confidence": fitted.as_dict()})
    assert again(-0.4) == pytest.approx(fitted(-0.4), abs=1e-3)
    assert again.words == 500
    for facts in ({}, {"confidence": None}, {"confidence": {}}):
        assert Calibration.of(facts) == Calibration()


def test_words_are_right_where_the_alignment_says_so():
    references = ["Hej på dig, Åke!", "Tyst.", "nu"]
    heard = [
        [("Hej", -0.1), ("då", -1.0), ("på", -0.2), ("dej", -0.9), ("Åke.", -0.3)],
        [],
        [("nu", -0.05), ("nu", -2.0), ("–", -3.0)],
    ]
    logprobs, right = confidence.judged(references, heard)
    assert logprobs.tolist() == [-0.1, -1.0, -0.2, -0.9, -0.3, -0.05, -2.0]
    assert right.tolist()[:5] == [True, False, True, False, True]
    assert sum(right.tolist()[5:]) == 1


def test_a_word_that_the_normaliser_splits_is_its_parts():
    logprobs, right = confidence.judged(["tv avgift"], [[("tv-avgift", -0.5)]])
    assert logprobs.tolist() == [-0.5, -0.5]
    assert right.tolist() == [True, True]


def test_words_where_nothing_was_said_are_wrong():
    assert confidence.judged([""], [[("tack", -0.2)]])[1].tolist() == [False]
