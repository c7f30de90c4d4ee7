"""Varied training clips: held against the same variation of real waveforms; the same for one seed, epoch and row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.recipes import load
from pipelines.speech.audio import Waveform
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training.data.augmentation import (
    AugmentingCollator,
    EpochClips,
    EpochSampler,
    Variation,
    at_speed,
    masked,
    with_gain,
    with_noise,
)
from pipelines.training.run import TrainingRun
from pipelines.whisper.batching import BucketSampler, Collator
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel, extract
from pipelines.whisper.model import ModelRef

EVERYTHING = Variation(speed=0.1, gain_db=6, noise_share=0.5, time_masks=2, mel_masks=2)


@pytest.fixture(scope="module")
def voice(speech) -> np.ndarray:
    return speech(40_000)


@pytest.fixture(scope="module")
def clip(voice) -> LogMel:
    return extract(Waveform(voice))


def of(samples: np.ndarray) -> np.ndarray:
    return extract(Waveform(samples.astype(np.float32))).frames


# --- held against real waveforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain_db", [-12.0, 6.0])
def test_gain_is_exact(voice, clip, gain_db):
    assert np.abs(with_gain(clip.frames, gain_db) - of(voice * 10 ** (gain_db / 20))).max() < 1e-5


def test_gain_is_clamped_at_the_extractors_floor(voice, clip):
    soft = with_gain(clip.frames, -200)
    assert soft.min() == -1.5
    assert np.abs(soft - of(voice * 1e-10)).max() < 1e-5


@pytest.mark.parametrize("snr_db", [5.0, 15.0, 30.0])
def test_noise_matches_that_of_a_noisy_waveform(voice, clip, snr_db):
    rng = np.random.default_rng(9)  # not the seed of the voice, which has noise of its own
    noise = rng.standard_normal(len(voice)) * np.sqrt(np.mean(voice**2) / 10 ** (snr_db / 10))
    real, ours = of(voice + noise), with_noise(clip.frames, snr_db, rng)
    assert abs((ours - real).mean()) < 0.015
    assert np.abs(ours.mean(axis=0) - real.mean(axis=0)).max() < 0.05  # in every band
    assert ours[:5].std() == pytest.approx(real[:5].std(), rel=0.3)
    assert np.abs(clip.frames - real).mean() > 3 * abs((ours - real).mean())


@pytest.mark.parametrize("rate", [0.9, 1.1, 1.3])
def test_speed_is_closer_to_resampling_than_to_stretching(voice, clip, rate):
    import soxr

    real, ours = of(soxr.resample(voice, 16_000 * rate, 16_000)), at_speed(clip.frames, rate)
    n = min(len(real), len(ours))
    assert abs(len(real) - len(ours)) <= 2
    stretched = clip.frames[np.clip(np.round(np.arange(n) * rate).astype(int), 0, len(clip.frames) - 1)]
    error, without = np.abs(ours[:n] - real[:n]).mean(), np.abs(stretched - real[:n]).mean()
    assert error < 0.12
    assert error < 0.6 * without


def test_speed_of_one_changes_nothing(clip):
    assert np.abs(at_speed(clip.frames, 1.0) - clip.frames).max() < 1e-5


def test_slowed_clip_is_silent_above_its_bandwidth():
    slow = at_speed(np.ones((100, 80), np.float32), 0.8)
    assert slow.shape == (125, 80)
    assert (slow[:, -4:] == -1).all()  # 80 dB below the maximum
    assert (slow[:, :70] == 1).all()
    assert (at_speed(np.ones((100, 80), np.float32), 1.25) == 1).all()


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_are_stretches_of_the_mean_of_limited_width():
    frames = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    kept, widths = frames.copy(), set()
    for seed in range(60):
        out = masked(frames, 1, 8, 0, 5, np.random.default_rng(seed))
        rows = np.flatnonzero((out != frames).any(axis=1))
        widths.add(len(rows))
        assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1)) if len(rows) else True
        assert (out[rows] == frames.mean()).all()
    assert widths == set(range(9))
    out = masked(frames, 0, 8, 1, 5, np.random.default_rng(3))
    bands = np.flatnonzero((out != frames).all(axis=0))
    assert 0 < len(bands) <= 5
    assert (out[:, bands] == frames.mean()).all()
    assert np.array_equal(frames, kept)


def test_masks_wider_than_the_clip_are_accepted():
    masked(np.zeros((1, 2), np.float32), 3, 40, 3, 40, np.random.default_rng(0))


# --- what decides -----------------------------------------------------------------------------------------------------


def test_only_seed_epoch_and_row_decide(clip):
    first = EVERYTHING.apply(clip, 1, 7)
    np.random.seed(0)  # global state is to have no say
    again = EVERYTHING.apply(clip, 1, 7)
    assert np.array_equal(first.frames, again.frames)
    assert first.pad_value == again.pad_value
    others = [EVERYTHING.apply(clip, 2, 7), EVERYTHING.apply(clip, 1, 8)]
    others.append(Variation(**{**EVERYTHING.__dict__, "seed": 18}).apply(clip, 1, 7))
    assert not any(np.array_equal(first.frames, other.frames) for other in others)


def test_one_setting_does_not_change_draws_of_another(clip):
    faster, louder = Variation(speed=0.2).apply(clip, 0, 3), Variation(speed=0.2, gain_db=3).apply(clip, 0, 3)
    assert len(faster.frames) == len(louder.frames)
    shift = louder.frames - faster.frames
    assert np.ptp(shift) < 1e-5
    assert abs(shift.mean()) > 1e-3


def test_default_settings_change_nothing(clip):
    assert not Variation(**load().augment.model_dump())
    same = Variation().apply(clip, 3, 5)
    assert np.array_equal(same.frames, clip.frames)
    assert same.pad_value == clip.pad_value


@pytest.mark.parametrize(
    "setting", [{"speed": 0.1}, {"gain_db": 3}, {"noise_share": 1.0}, {"time_masks": 1}, {"mel_masks": 1}], ids=str
)
def test_each_setting_alone_changes_the_clip(clip, setting):
    variation = Variation(**setting)
    assert variation
    varied = [variation.apply(clip, 0, row) for row in range(8)]
    unlike = [v for v in varied if v.frames.shape != clip.frames.shape or not np.array_equal(v.frames, clip.frames)]
    assert len(unlike) >= 6


def test_half_the_clips_get_noise(clip):
    noisy = [np.abs(Variation(noise_share=0.5).apply(clip, 0, row).frames - clip.frames).max() > 0 for row in range(80)]
    assert 25 < sum(noisy) < 55


def test_pad_value_follows_the_augmented_clip(clip):
    for row in range(5):
        varied = Variation(gain_db=10, noise_share=0.5, speed=0.1).apply(clip, 0, row)
        assert varied.pad_value == pytest.approx(max(varied.frames.max() - 2, -1.5))
    assert Variation(time_masks=3, time_mask_share=0.5).apply(clip, 0, 1).pad_value == clip.pad_value


def test_a_slow_clip_keeps_its_end():
    frames = np.zeros((2_950, 80), np.float32)
    frames[-30:] = 1
    for row in range(6):
        slow = Variation(speed=0.5).apply(LogMel(frames, -1.0), 0, row).frames
        assert len(slow) <= FULL_FRAMES
        assert slow[-3:, 40].min() > 0.9


def test_float16_cache_is_augmented(clip):
    halved = LogMel(clip.frames.astype(np.float16), clip.pad_value)
    varied = EVERYTHING.apply(halved, 0, 0)
    assert varied.frames.dtype == np.float32
    assert np.isfinite(varied.frames).all()


# --- in training ------------------------------------------------------------------------------------------------------


def test_epoch_sampler_draws_the_plain_samplers_batches():
    lengths = np.random.default_rng(0).integers(10, 300, 47)
    plain, drawn = BucketSampler(lengths, 5, 3, seed=1), EpochSampler(lengths, 5, 3, seed=1)
    assert len(plain) == len(drawn)
    for epoch in (0, 3):
        plain.set_epoch(epoch)
        drawn.set_epoch(epoch)
        assert list(drawn) == [[(epoch, index) for index in batch] for batch in plain]


def test_collator_pairs_augmented_clips_with_their_labels(toy_cache):
    rows = toy_cache.split("train")
    drawn = [EpochClips(toy_cache, rows)[(2, position)] for position in (4, 1)]
    assert drawn == [(2, int(rows[4])), (2, int(rows[1]))]
    batch = AugmentingCollator(toy_cache, EVERYTHING)(drawn)
    plain = Collator(toy_cache)([row for _, row in drawn])
    assert np.array_equal(batch["labels"], plain["labels"])
    for i, (epoch, row) in enumerate(drawn):
        expected = EVERYTHING.apply(toy_cache.log_mel(row), epoch, row)
        frames = batch["input_features"].shape[-1]
        assert np.array_equal(batch["input_features"][i], expected.padded(frames))
        assert batch["attention_mask"][i].sum() == len(expected.frames)
    same = AugmentingCollator(toy_cache, Variation())(drawn)
    assert all(np.array_equal(same[name], plain[name]) for name in plain)


def test_only_active_augmentations_are_in_the_identity(toy_settings, toy_cache, toy_model):
    base = ModelRef("toy", toy_model, "folder", "1")
    plain = training_run.run_identity(toy_settings(), toy_cache, base)
    assert not [name for name in plain if "augment." in name]
    varied = training_run.run_identity(toy_settings({"augment.gain_db": 6}), toy_cache, base)
    assert {name: varied[name] for name in varied.keys() - plain.keys()} == {
        "augment.gain_db": 6.0,
        "code.augmentation": "1",
    }


@pytest.mark.slow
def test_augmented_run_is_equal_with_loader_workers(toy_settings, toy_cache, tmp_path):
    settings = {
        "training.steps": 4,
        "training.eval_every": 4,
        "augment.speed": 0.1,
        "augment.noise_share": 0.5,
        "evaluation.max_new_tokens": 2,
    }
    losses = []
    for changed in ({}, {"training.workers": 2}, {"augment.seed": 5}):
        recipe = toy_settings({**settings, **changed})
        ref = ModelRef("toy", Path(recipe.model.base), "folder", "1")
        model = training_loop.train(TrainingRun(recipe, toy_cache, ref, tmp_path / str(len(losses))))
        losses.append([row["loss"] for row in model.history if "loss" in row])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
