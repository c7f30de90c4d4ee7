"""Windows of clips that were cut from long recordings, in their true order.

The sources `aligned` and `unlabelled` record where a clip lies in its recording, also within a mix. Such clips are
joined in the order in which they were spoken, and the prompt of a window is the text before it in the recording. There
is no prompt at the start of a recording, after a clip of another split, or after more than MAX_GAP_S without a clip.

Every epoch lays the recordings in a row in random order, with the clips of unknown place after them, and puts the
windows at random positions in that row. A window that would cross the end of a recording is moved if there is room;
else it has clips of two. So the first and last clips of recordings are joined about half as often as others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipelines.features.cache import FeatureCache
from pipelines.recipes.settings import Recipe
from pipelines.speech.recordings.pieces import PIECE_NAME
from pipelines.training.data.packing import Window, WindowSampler
from pipelines.whisper.log_mel import FULL_FRAMES

CODE = "1"
"""Version of the draw: raised when the same clips would become other windows."""
MAX_GAP_S = 2.0
"""Longest time between two clips of which the first is still the text before the second. The aligner reports speech
without a text from 2 s on."""
_NONE = -1


@dataclass(frozen=True)
class Order:
    """Where training clips lie in their recordings; each array is int64 [n_clips]."""

    recording: np.ndarray
    """Number of the clip's recording; -1: not known."""
    rank: np.ndarray
    """Position of the clip among all, by recording and time; -1: not known."""
    previous: np.ndarray
    """Index of the clip that was spoken just before; -1: none."""


def order_of(cache: FeatureCache, rows: np.ndarray) -> Order | None:
    """Return the order of the clips in `rows` of a cache; None if no recording has two of them."""
    if "start_s" not in cache.rows:
        return None
    parts = cache.rows["id"].str.extract(PIECE_NAME)
    positions = parts[parts["start_s"] == cache.rows["start_s"]].astype({"start_s": float, "end_s": float})
    positions = positions.sort_values(["recording", "start_s"], kind="stable")
    index_of = pd.Series(np.arange(len(rows)), rows)
    placed = positions[positions.index.isin(rows)]
    if len(placed) == placed["recording"].nunique():
        return None
    before = positions.shift()
    follows = (positions["recording"] == before["recording"]) & (positions["start_s"] - before["end_s"] <= MAX_GAP_S)
    previous_rows = pd.Series(positions.index, positions.index).shift().where(follows)  # of any split
    indices = index_of[placed.index].to_numpy()
    recording, rank, previous = (np.full(len(rows), _NONE) for _ in range(3))
    recording[indices] = pd.factorize(placed["recording"])[0]
    rank[indices] = np.arange(len(placed))
    previous[indices] = previous_rows[placed.index].map(index_of).fillna(_NONE).astype(int)
    return Order(recording, rank, previous)


def are_used(recipe: Recipe, cache: FeatureCache) -> bool:
    """Return whether a training on this cache joins clips in the order of their recordings."""
    return bool(recipe.training.window_share and order_of(cache, cache.split("train")))


class RecordingSampler(WindowSampler):
    """WindowSampler whose windows hold clips in the `order` of their recordings.

    Seed and epoch decide the draw, and every epoch has as many windows and batches as that of a WindowSampler.
    """

    def __init__(self, *args: Any, order: Order, **options: Any):
        super().__init__(*args, **options)
        self.order = order

    def _draw(self, epoch: int, rng: np.random.Generator) -> tuple[list[Window], np.ndarray]:
        clips, previous = self._laid_out(rng)
        cut, timestamps, prompt = self._cut(np.arange(self.n_joined), epoch)
        sizes = rng.permutation([*map(len, cut)])
        n_between = np.sort(rng.integers(0, len(clips) - self.n_joined + 1, len(sizes)))
        starts = n_between + np.cumsum(sizes) - sizes
        starts = within_recordings(starts, sizes, self.order.recording[clips])
        parts = [clips[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        windows = [
            Window(self._clips(parts[n], epoch), has_times, self._before(parts[n], previous, epoch) if prompted else ())
            for n, has_times, prompted in zip(rng.permutation(len(parts)), timestamps, prompt, strict=True)
        ]
        return windows, np.setdiff1d(clips, np.concatenate(parts))

    def _laid_out(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return all clips in a row, cut at a random one so that each is as likely to be joined, and `previous`.

        Before a clip of unknown place is a random other one, as in a WindowSampler.
        """
        recording, n = self.order.recording, len(self.order.recording)
        unknown = recording == _NONE
        rank = np.where(unknown, rng.permutation(n), self.order.rank)
        shuffled = np.append(rng.permutation(recording.max() + 1), n)  # the last is that of recording -1
        clips = np.lexsort((rank, shuffled[recording]))
        previous, loose = self.order.previous.copy(), clips[unknown[clips]]
        previous[loose[1:]] = loose[:-1]
        return np.roll(clips, rng.integers(n)), previous

    def _before(self, window: np.ndarray, previous: np.ndarray, epoch: int) -> list[Any]:
        """Return the clips that were spoken before a window: up to 30 s, or one."""
        before: list[int] = []
        clip = previous[window[0]]
        while clip != _NONE and (not before or self.lengths[[clip, *before]].sum() <= FULL_FRAMES):
            before.insert(0, int(clip))
            clip = previous[clip]
        return self._clips(np.array(before, dtype=np.int64), epoch)


def within_recordings(starts: np.ndarray, sizes: np.ndarray, recording: np.ndarray) -> np.ndarray:
    """Return the starts of windows, moved by the fewest clips so that each has one recording, where there is room.

    `starts` and `sizes` int [n_windows] in clips, in order and without overlap; `recording` int [n_clips] is the row.
    """
    borders = np.flatnonzero(np.diff(recording)) + 1
    moved, end = starts.copy(), 0
    for n, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        limit = int(starts[n + 1]) if n + 1 < len(starts) else len(recording)
        crossed = _inside(borders, start, size)
        if len(crossed):
            tried = sorted((int(crossed[0]) - size, int(crossed[-1])), key=lambda one: abs(one - start))
            fit = [one for one in tried if end <= one <= limit - size and not len(_inside(borders, one, size))]
            moved[n] = fit[0] if fit else start
        end = int(moved[n]) + size
    return moved


def _inside(borders: np.ndarray, start: int, size: int) -> np.ndarray:
    """Return the borders between the clips of a window."""
    return borders[np.searchsorted(borders, start, side="right") : np.searchsorted(borders, start + size)]
