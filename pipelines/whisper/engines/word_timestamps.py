"""Word timestamps from cross-attention and dynamic time warping, as in openai/whisper, `timing.py`.

The weights of the alignment heads are normalised over the tokens, smoothed over time by a median filter and averaged
over the heads. The cheapest monotonic path through tokens and time assigns encoder positions to tokens.
"""

from __future__ import annotations

import numpy as np

from pipelines.whisper.log_mel import FRAMES_PER_POSITION, POSITION_S

_MEDIAN_WIDTH = 7
"""Positions under the median filter: `medfilt_width` in openai/whisper."""
_MEDIAN_NETWORK = (
    (0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6), (2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4),
)  # fmt: skip
"""Pairs of seven values to put in order, one after another, so that the median comes into the middle (Devillard, "Fast
median search", 1998): four times as fast as np.median."""


def word_starts(cross_attention: np.ndarray, n_prompt: int, n_frames: int, firsts: list[int]) -> list[float]:
    """Return the start of each word in seconds.

    `cross_attention` float [heads, n_prompt + tokens, positions], `firsts`: the index of each word's first token. Only
    the first `n_frames` frames of the window are not padding.
    """
    positions = first_positions(attention_of_text(cross_attention, n_prompt, n_frames))
    return [positions[n] * POSITION_S for n in firsts]


def attention_of_text(cross_attention: np.ndarray, n_prompt: int, n_frames: int) -> np.ndarray:
    """Return the rows that write the text and the end, float [heads, tokens + 1, positions that are not padding].

    A token's row is the attention that predicts the next token: the prompt's last row predicts the first one.
    """
    return cross_attention[:, n_prompt - 1 :, : -(-n_frames // FRAMES_PER_POSITION)]


def first_positions(cross_attention: np.ndarray) -> list[int]:
    """Return the first encoder position of each token; `cross_attention` float [heads, tokens, positions]."""
    weights = cross_attention / cross_attention.sum(axis=-1, keepdims=True)
    weights = (weights - weights.mean(axis=1, keepdims=True)) / (weights.std(axis=1, keepdims=True) + 1e-9)
    tokens, positions = warping_path(-_median_filtered(weights).mean(axis=0))
    return [int(positions[np.argmax(tokens == token)]) for token in range(cross_attention.shape[1])]


def _median_filtered(weights: np.ndarray) -> np.ndarray:
    """Replace each position's weight by the median of its neighbourhood; the edges are reflected."""
    margin, n_positions = _MEDIAN_WIDTH // 2, weights.shape[-1]
    if n_positions <= margin:
        return weights
    padded = np.pad(weights, ((0, 0), (0, 0), (margin, margin)), mode="reflect")
    neighbours = [padded[..., n : n + n_positions] for n in range(_MEDIAN_WIDTH)]
    for low, high in _MEDIAN_NETWORK:
        a, b = neighbours[low], neighbours[high]
        neighbours[low], neighbours[high] = np.minimum(a, b), np.maximum(a, b)
    return neighbours[margin]


def warping_path(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the cheapest path from the first to the last cell of `cost` float [n, m].

    Steps go down, right or both. A path enters a row at some column and runs to the right, so a row's totals are the
    row's cumulative costs plus the least, so far, of what entering at a column costs more than these.
    """
    cost = np.nan_to_num(cost.astype(np.float64))  # of attention that overflowed: any path is as good
    sums = np.cumsum(cost, axis=1)
    total = sums.copy()
    for i in range(1, len(cost)):
        entry = total[i - 1].copy()
        entry[1:] = np.minimum(entry[1:], total[i - 1, :-1]) - sums[i, :-1]
        total[i] += np.minimum.accumulate(entry)
    return _traced(total)


def _traced(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the path to the last cell of `total` float [n, m], the cost of the cheapest path to each cell."""
    totals = total.tolist()
    i, j = len(totals) - 1, len(totals[0]) - 1
    path = [(i, j)]
    while i or j:
        if not i:
            j -= 1
        elif not j:
            i -= 1
        else:
            diagonal, up, left = totals[i - 1][j - 1], totals[i - 1][j], totals[i][j - 1]
            i, j = (i - 1, j - 1) if diagonal <= min(up, left) else (i - 1, j) if up <= left else (i, j - 1)
        path.append((i, j))
    rows, columns = np.array(path[::-1]).T
    return rows, columns
