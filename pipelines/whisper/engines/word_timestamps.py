"""Word timestamps from cross-attention and dynamic time warping, as in openai/whisper, `timing.py`.

The weights of the alignment heads are normalised over the tokens, smoothed over time by a median filter and averaged
over the heads. The cheapest monotonic path through tokens and time assigns encoder positions to tokens.
"""

from __future__ import annotations

import numpy as np

from pipelines.whisper.log_mel import FRAMES_PER_POSITION, POSITION_S

_MEDIAN_WIDTH = 7
"""Positions under the median filter: `medfilt_width` in openai/whisper."""


def word_starts(cross_attention: np.ndarray, n_prompt: int, n_frames: int, firsts: list[int]) -> list[float]:
    """Return the start of each word in seconds.

    `cross_attention` float [heads, n_prompt + tokens, positions], `firsts`: the index of each word's first token. Only
    the first `n_frames` frames of the window are not padding.
    """
    # a token's row is the attention that predicts the next token: the prompt's last row predicts the first one
    positions = first_positions(cross_attention[:, n_prompt - 1 :, : -(-n_frames // FRAMES_PER_POSITION)])
    return [positions[n] * POSITION_S for n in firsts]


def first_positions(cross_attention: np.ndarray) -> list[int]:
    """Return the first encoder position of each token; `cross_attention` float [heads, tokens, positions]."""
    weights = cross_attention / cross_attention.sum(axis=-1, keepdims=True)
    weights = (weights - weights.mean(axis=1, keepdims=True)) / (weights.std(axis=1, keepdims=True) + 1e-9)
    tokens, positions = warping_path(-_median_filtered(weights).mean(axis=0))
    return [int(positions[np.argmax(tokens == token)]) for token in range(cross_attention.shape[1])]


def _median_filtered(weights: np.ndarray) -> np.ndarray:
    """Replace each position's weight by the median of its neighbourhood; the edges are reflected."""
    margin = _MEDIAN_WIDTH // 2
    if weights.shape[-1] <= margin:
        return weights
    padded = np.pad(weights, ((0, 0), (0, 0), (margin, margin)), mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN_WIDTH, axis=-1), axis=-1)


def warping_path(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the cheapest path from the first to the last cell of `cost` float [n, m].

    Steps go down, right or both. Whole anti-diagonals are computed at a time, so that NumPy does the loop.
    """
    n, m = cost.shape
    cost = np.nan_to_num(cost)  # of attention that overflowed: any path is as good
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        total[i, j] = cost[i - 1, j - 1] + np.minimum(np.minimum(total[i - 1, j - 1], total[i - 1, j]), total[i, j - 1])
    i, j, path = n, m, [(n, m)]
    while (i, j) != (1, 1):
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda cell: total[cell])
        path.append((i, j))
    rows, columns = np.array(path[::-1]).T - 1
    return rows, columns
