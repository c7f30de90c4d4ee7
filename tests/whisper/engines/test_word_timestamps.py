"""When words begin: the cheapest way through tokens and time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.whisper.engines import word_timestamps


def slow(cost: np.ndarray) -> float:
    """What the cheapest way costs, cell by cell."""
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            total[i, j] = cost[i - 1, j - 1] + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
    return total[n, m]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10_000))
def test_warping_path_is_cheapest_and_monotonic(n: int, m: int, seed: int):
    cost = np.random.default_rng(seed).standard_normal((n, m))
    rows, columns = word_timestamps.warping_path(cost)
    assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, n - 1, m - 1)
    steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
    assert steps <= {(0, 1), (1, 0), (1, 1)}
    assert cost[rows, columns].sum() == pytest.approx(slow(cost))


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_tokens_start_where_attention_peaks(noise: float):
    begins = [0, 12, 20, 41]
    cross_attention = np.random.default_rng(1).random((3, 4, 60)) * noise + 1e-4
    for token, (begin, end) in enumerate(zip(begins, [*begins[1:], 60], strict=True)):
        cross_attention[:, token, begin:end] += 1.0 / (end - begin)
    told = word_timestamps.first_positions(cross_attention)
    assert told == pytest.approx(begins, abs=2)


def test_short_window_is_not_filtered():
    assert word_timestamps.first_positions(np.full((1, 2, 3), 1 / 3)) in ([0, 1], [0, 2], [0, 0])
