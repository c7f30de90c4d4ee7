"""Group clips of similar length into batches, in an order given by seed and epoch, and pad them as Whisper does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

if TYPE_CHECKING:
    import pandas as pd
    import torch


IGNORED = -100
"""Label value that the loss ignores: `ignore_index` of torch's cross entropy."""
_FRAME_MULTIPLE = 8
"""Batches are padded to a multiple of this: even, as the convolution's stride requires, and efficient on GPUs."""


def bucketed(lengths: np.ndarray, batch_size: int, bucket_batches: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of one epoch, int64 [batch_size] each: every index once, similar lengths together.

    The indices are shuffled and cut into pools of `bucket_batches` batches. Each pool is sorted by length and cut into
    batches, and all batches are shuffled. The order depends on `seed` and `epoch` only, not on global random state. The
    last batch of a pool may be smaller; none is dropped.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    pool = batch_size * bucket_batches
    batches = []
    for start in range(0, len(shuffled), pool):
        indices = shuffled[start : start + pool]
        if bucket_batches > 1:
            indices = indices[np.argsort(lengths[indices], kind="stable")]
        batches += [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class ClipFeatures(Protocol):
    """Features and labels by row number: the part of a FeatureCache that batching and decoding read."""

    rows: pd.DataFrame

    def log_mel(self, row: int) -> LogMel:
        """Return the trimmed log-mel of a row."""

    def labels(self, row: int) -> list[int]:
        """Return the label token ids of a row."""


class BucketSampler:
    """A batch sampler over `bucketed`, whose order depends on its seed and epoch only."""

    def __init__(self, lengths: np.ndarray, batch_size: int, bucket_batches: int, seed: int):
        self.batch_size, self.bucket_batches, self.seed, self.epoch = batch_size, bucket_batches, seed, 0
        self.lengths = lengths
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        pool = self.batch_size * self.bucket_batches
        pools, rest = divmod(len(self.lengths), pool)
        return pools * self.bucket_batches + -(-rest // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in bucketed(self.lengths, self.batch_size, self.bucket_batches, self.seed, self.epoch):
            yield batch.tolist()


def sorted_batches(lengths: np.ndarray, max_frames: int) -> list[np.ndarray]:
    """Return batches of indices for decoding: longest clips first, at most `max_frames` frames each with padding.

    `lengths` int [n] in frames. A clip longer than `max_frames` is a batch alone.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = padded_frames(int(lengths[order[start]]))
        size = max(1, max_frames // longest)
        batches.append(order[start : start + size])
        start += size
    return batches


def padded_frames(longest: int) -> int:
    """Return the frames of a batch whose longest clip has `longest`: the next multiple of 8, at most 3000."""
    return min(FULL_FRAMES, -(-longest // _FRAME_MULTIPLE) * _FRAME_MULTIPLE)


class ClipDataset:
    """A map-style dataset of a cache's row numbers; the collator of the DataLoader reads the rows."""

    def __init__(self, cache: ClipFeatures, rows: np.ndarray):
        self.cache, self.rows = cache, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> int:
        return int(self.rows[position])


class Collator:
    """Converts row numbers to a batch.

    `input_features` float32 [B, n_mels, T]; `attention_mask` int64 [B, T], 1 for real frames, so that SpecAugment masks
    only those; `labels` int64 [B, L] padded with IGNORED. T is `padded_frames` of the longest clip, or 3000 with
    `full_context`. Each clip is padded with the value that Whisper's extractor has after its end (pad_value).
    """

    def __init__(self, cache: ClipFeatures, *, full_context: bool = False):
        self.cache, self.full_context = cache, full_context

    def __call__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.log_mel(row) for row in rows], [self.labels(row) for row in rows])

    def log_mel(self, row: int) -> LogMel:
        """Return the features of one clip; subclasses augment them here."""
        return self.cache.log_mel(row)

    def labels(self, row: int) -> list[int]:
        """Return the label ids of one clip; subclasses draw them here."""
        return self.cache.labels(row)

    def collate(
        self, log_mels: Sequence[LogMel], labels: Sequence[list[int]], *, full_context: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return the batch of these clips; `full_context` applies to this batch only."""
        import torch

        lengths = [len(log_mel.frames) for log_mel in log_mels]
        frames = FULL_FRAMES if self.full_context or full_context else padded_frames(max(lengths))
        longest = max(map(len, labels))
        return {
            "input_features": torch.from_numpy(np.stack([log_mel.padded(frames) for log_mel in log_mels])),
            "attention_mask": torch.tensor([[1] * n + [0] * (frames - n) for n in lengths]),
            "labels": torch.tensor([ids + [IGNORED] * (longest - len(ids)) for ids in labels]),
        }
