"""When words were said, by where the decoder's heads that follow the sound look: as OpenAI times words.

openai/whisper, `timing.py`: weights normalised over the tokens, smoothed over time by a median, averaged over heads;
then the cheapest way through tokens and time that never goes back (dynamic time warping).
"""

from __future__ import annotations

import numpy as np

POSITION_S = 0.02
"""One place of the encoder: two frames."""
_MEDIAN = 7


def first_positions(cross_attention: np.ndarray) -> list[int]:
    """For each token the first place at which it is heard: `cross_attention` float [heads, tokens, places], weights."""
    weights = cross_attention / cross_attention.sum(axis=-1, keepdims=True)
    weights = (weights - weights.mean(axis=1, keepdims=True)) / (weights.std(axis=1, keepdims=True) + 1e-9)
    tokens, places = warped(-_smoothed(weights).mean(axis=0))
    return [int(places[np.argmax(tokens == token)]) for token in range(cross_attention.shape[1])]


def _smoothed(weights: np.ndarray) -> np.ndarray:
    """The median of each place and its neighbours."""
    aside = _MEDIAN // 2
    if weights.shape[-1] <= aside:
        return weights
    padded = np.pad(weights, ((0, 0), (0, 0), (aside, aside)), mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN, axis=-1), axis=-1)


def warped(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way from the first to the last cell of `cost` float [n, m], by steps down, right or both.

    Returns the rows and the columns of its cells. Diagonal after diagonal, so that NumPy does the work.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        total[i, j] = cost[i - 1, j - 1] + np.minimum(np.minimum(total[i - 1, j - 1], total[i - 1, j]), total[i, j - 1])
    i, j, way = n, m, [(n, m)]
    while (i, j) != (1, 1):
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda cell: total[cell])
        way.append((i, j))
    rows, columns = np.array(way[::-1]).T - 1
    return rows, columns
