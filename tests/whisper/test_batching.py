from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.build import BuildOptions, build
from pipelines.features.cache import FeatureCache
from pipelines.features.clips import Clip
from pipelines.features.sources import Example
from pipelines.speech.audio import Waveform
from pipelines.whisper.batching import (
    IGNORED,
    BucketSampler,
    ClipDataset,
    Collator,
    bucketed,
    padded_frames,
    sorted_batches,
)
from pipelines.whisper.log_mel import FULL_FRAMES, extract, extractor

ROOT = Path(__file__).parents[2]
SECONDS = (1.0, 0.31, 2.5, 0.05, 1.7)


def lengths_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 3_001, n)


def padding(lengths: np.ndarray, batches: list[np.ndarray]) -> int:
    return sum(int(lengths[batch].max()) * len(batch) for batch in batches) - int(lengths.sum())


@pytest.fixture(scope="module")
def sounds(speech) -> list[np.ndarray]:
    return [speech(int(16_000 * seconds), seed) for seed, seconds in enumerate(SECONDS)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, sounds) -> FeatureCache:
    def admit(example: Example) -> Clip:
        number = int(example.id)
        return Clip(example, "x", list(range(5, 7 + number)), extract(Waveform(sounds[number])), SECONDS[number])

    rows = [Example(str(i), "train", "x", b"") for i in range(len(SECONDS))]
    return build(
        tmp_path_factory.mktemp("batches") / "c",
        rows,
        admit,
        {"features.dtype": "float32", "features.n_mels": 80},
        BuildOptions(shard_clips=2),
    )


@settings(deadline=None)
@given(n=st.integers(0, 400), batch_size=st.integers(1, 40), bucket_batches=st.integers(1, 12), epoch=st.integers(0, 5))
def test_epoch_holds_each_index_once(n, batch_size, bucket_batches, epoch):
    sampler = BucketSampler(lengths_of(n), batch_size, bucket_batches, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    assert len(sampler) == len(batches)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(type(index) is int for batch in batches for index in batch)


@pytest.mark.slow
def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in bucketed(lengths_of(50), 4, 3, seed, epoch)]

    np.random.seed(1)
    first = order(3, 0)
    np.random.seed(2)
    assert order(3, 0) == first
    assert len({str(order(*which)) for which in ((3, 0), (3, 1), (3, 2), (4, 0), (0, 3), (1, 3))}) == 6
    script = (
        "import numpy as np; from pipelines.whisper.batching import bucketed; "
        "lengths = np.random.default_rng(0).integers(2, 3001, 50);"
        "print([batch.tolist() for batch in bucketed(lengths, 4, 3, 3, 0)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "9"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert other == str(first)


def test_sampler_follows_its_epoch():
    sampler = BucketSampler(lengths_of(50), 4, 3, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_buckets_reduce_padding():
    lengths = lengths_of(1_600)
    unsorted = padding(lengths, bucketed(lengths, 8, 1, seed=0, epoch=0))
    assert padding(lengths, bucketed(lengths, 8, 20, seed=0, epoch=0)) < 0.1 * unsorted


def test_batches_are_not_ordered_by_length():
    lengths = lengths_of(1_600)
    longest = [lengths[batch].max() for batch in bucketed(lengths, 8, 200, seed=0, epoch=0)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.25


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 3_000), max_size=200), max_frames=st.integers(3_000, 30_000))
def test_decoding_batches_cover_all_rows_within_the_budget(lengths, max_frames):
    lengths = np.array(lengths, dtype=np.int64)
    batches = sorted_batches(lengths, max_frames)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * padded_frames(int(lengths[batch].max())) <= max_frames for batch in batches)
    in_order = [int(lengths[i]) for batch in batches for i in batch]
    assert in_order == sorted(in_order, reverse=True)


def test_decoding_batches_fill_the_budget():
    assert [len(batch) for batch in sorted_batches(np.full(100, 400), 24_000)] == [60, 40]


def test_clip_above_the_budget_is_a_batch_alone():
    assert [batch.tolist() for batch in sorted_batches(np.array([2_000, 100]), 1_000)] == [[0], [1]]


@pytest.mark.parametrize(("longest", "padded"), [(1, 8), (8, 8), (9, 16), (401, 408), (2_993, 3_000), (3_000, 3_000)])
def test_padded_frames_is_the_next_multiple_of_8(longest, padded):
    assert padded_frames(longest) == padded


def test_full_context_batch_equals_the_stock_extractor(cache, sounds):
    stock = extractor()(
        sounds, sampling_rate=16_000, padding="max_length", return_tensors="np", return_attention_mask=True
    )
    batch = Collator(cache, full_context=True)([0, 1, 2, 3, 4])
    assert np.abs(batch["input_features"].numpy() - stock["input_features"]).max() <= 5e-7
    assert batch["input_features"].shape == (5, 80, FULL_FRAMES)


def test_short_batch_is_a_prefix_of_the_full_one(cache):
    short, full = Collator(cache)([3, 1]), Collator(cache, full_context=True)([3, 1])
    longest = max(len(cache.log_mel(row).frames) for row in (3, 1))
    frames = short["input_features"].shape[2]
    assert longest <= frames == padded_frames(longest) < longest + 8
    assert np.array_equal(short["input_features"], full["input_features"][:, :, :frames])


@pytest.mark.parametrize("full_context", [False, True])
def test_mask_covers_real_frames_only(cache, full_context):
    batch = Collator(cache, full_context=full_context)([2, 0, 3])
    assert batch["attention_mask"].shape == (3, batch["input_features"].shape[2])
    for mask, row in zip(batch["attention_mask"].tolist(), (2, 0, 3), strict=True):
        real = len(cache.log_mel(row).frames)
        assert mask == [1] * real + [0] * (len(mask) - real)


def test_labels_are_padded_with_the_ignored_value(cache):
    batch = Collator(cache)([2, 0])
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [5, 6, IGNORED, IGNORED]]
    assert IGNORED == -100


def test_batch_has_the_models_dtypes(cache):
    types = {name: str(tensor.dtype) for name, tensor in Collator(cache)([0]).items()}
    assert types == {"input_features": "torch.float32", "attention_mask": "torch.int64", "labels": "torch.int64"}


def test_dataset_returns_rows_by_position(cache):
    rows = ClipDataset(cache, np.array([4, 2]))
    assert len(rows) == 2
    assert [rows[0], rows[1]] == [4, 2]
    assert type(rows[0]) is int


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_returns_every_row_once(cache, workers):
    from torch.utils.data import DataLoader

    rows = np.arange(5)
    sampler = BucketSampler(cache.rows["frames"].to_numpy(), 2, 2, seed=0)
    loader = DataLoader(
        ClipDataset(cache, rows), batch_sampler=sampler, collate_fn=Collator(cache), num_workers=workers
    )
    ends = [labels[labels != IGNORED][-1].item() - 6 for batch in loader for labels in batch["labels"]]
    assert sorted(ends) == [0, 1, 2, 3, 4]
