from __future__ import annotations

import numpy as np
import pytest

from pipelines.features.clips import Rejected
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.curation.quality import (
    Limits,
    clipped_share,
    edge_silence_share,
    frame_powers,
    level_dbfs,
    snr_db,
)
from pipelines.features.sources import Example
from pipelines.speech.audio import Waveform

SECOND = 16_000


def sine(n: int = SECOND, peak: float = 1.0) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * 440 * np.arange(n) / SECOND)).astype(np.float32)


def bursts(noise_db: float, seed: int = 0) -> np.ndarray:
    """Three seconds, half of them sine, half pauses, over white noise `noise_db` below the sine."""
    t = np.arange(3 * SECOND)
    voice = sine(3 * SECOND, 0.5) * (t // 4_000 % 2)
    noise = np.random.default_rng(seed).standard_normal(len(t)) * np.sqrt(0.125 / 10 ** (noise_db / 10))
    return (voice + noise).astype(np.float32)


def reason(samples: np.ndarray, n_letters: int = 12, **limits) -> str:
    with pytest.raises(Rejected) as error:
        Limits(**limits).check(Waveform(samples), n_letters)
    assert "\n" not in error.value.detail
    return error.value.reason


def test_default_limits_accept_everything():
    assert not Limits().active
    for samples in (np.zeros(1, np.float32), np.ones(SECOND, np.float32), bursts(-20)):
        Limits().check(Waveform(samples), 0)


def test_level_limit():
    assert level_dbfs(np.ones(SECOND, np.float32)) == 0
    assert level_dbfs(sine(peak=0.1)) == pytest.approx(-23.01, abs=0.01)
    assert level_dbfs(np.zeros(SECOND, np.float32)) == pytest.approx(-90)
    assert reason(sine(peak=0.01), min_level_dbfs=-40) == "quiet"
    Limits(min_level_dbfs=-40).check(Waveform(sine(peak=0.02)), 12)


def test_clipping_limit():
    assert clipped_share(np.clip(sine(peak=2), -1, 1)) == pytest.approx(2 / 3, abs=0.01)
    assert clipped_share(sine(peak=0.98)) == 0
    assert clipped_share(-np.ones(5, np.float32)) == 1
    assert reason(np.clip(sine(peak=2), -1, 1), max_clipped_share=0.1) == "clipped"
    Limits(max_clipped_share=0).check(Waveform(sine(peak=0.9)), 12)


def test_edge_silence_counts_and_pauses_do_not():
    speech, gap = sine(peak=0.5), np.zeros(SECOND // 2, np.float32)
    for samples, share in (
        (speech, 0),
        (np.concatenate([gap, speech]), 1 / 3),
        (np.concatenate([gap, speech, gap]), 1 / 2),
        (np.concatenate([speech, gap, speech]), 0),
        (np.concatenate([gap + 0.004, speech]), 0),
        (np.concatenate([gap + 0.003, speech]), 1 / 3),
    ):
        assert edge_silence_share(frame_powers(samples)) == pytest.approx(share, abs=0.02)
    assert reason(np.concatenate([gap, speech]), max_silence_share=0.3) == "silence"
    Limits(max_silence_share=0.35).check(Waveform(np.concatenate([gap, speech])), 12)
    assert edge_silence_share(frame_powers(np.zeros(SECOND, np.float32))) == 0


@pytest.mark.parametrize("true_db", [10, 20, 30])
def test_snr_estimate_follows_true_snr(true_db):
    assert snr_db(frame_powers(bursts(true_db))) == pytest.approx(true_db, abs=2)


def test_snr_of_silence_and_constant_signals():
    assert snr_db(frame_powers(sine())) == pytest.approx(0, abs=0.2)  # no pause: nothing to tell noise by
    assert snr_db(frame_powers(np.zeros(10, np.float32))) == 0
    assert 60 < snr_db(frame_powers(bursts(200))) < 90  # digital silence in the pauses is not infinitely good
    assert reason(bursts(5), min_snr_db=10) == "noisy"
    Limits(min_snr_db=10).check(Waveform(bursts(15)), 12)


def test_speaking_rate_limits():
    assert reason(sine(), n_letters=3, min_chars_per_s=4) == "slow_speech"
    assert reason(sine(), n_letters=31, max_chars_per_s=30) == "fast_speech"
    Limits(min_chars_per_s=4, max_chars_per_s=30).check(Waveform(sine()), 4)
    Limits(min_chars_per_s=4, max_chars_per_s=30).check(Waveform(sine()), 30)


def test_clip_shorter_than_a_frame_is_measured():
    everything = Limits(1, 1e9, -100, 0.5, 0.5, 0.0)
    everything.check(Waveform(sine(100, 0.5)), 12)


@pytest.mark.parametrize(("split", "accepted"), [("train", False), ("validation", True), ("test", True)])
def test_limits_apply_to_training_clips_only(encoded, split, accepted):
    clip_filter = ClipFilter(lambda text: [1], 80, 0.1, 30.0, 1e-3, Limits(max_chars_per_s=5.0))
    example = Example("a", split, "Hej på dig!", encoded(sine(peak=0.5)))
    if accepted:
        assert clip_filter.create_clip(example).text == "Hej på dig!"
        return
    with pytest.raises(Rejected) as error:
        clip_filter.create_clip(example)
    assert error.value.reason == "fast_speech"
    assert "8.0 characters/s" in error.value.detail  # letters alone: no space, no sign


@pytest.mark.parametrize(
    ("text", "accepted"),
    [("Hej på dig", "Hej på dig."), ("Klart!", "Klart!"), ("Kvart i 4", "Kvart i 4."), ("Vad sa …", "Vad sa …")],
)
def test_full_stop_is_added_to_training_transcripts(encoded, text, accepted):
    clip_filter = ClipFilter(lambda text: [len(text)], 80, 0.1, 30.0, 1e-3, full_stop=True)
    clip = clip_filter.create_clip(Example("a", "train", text, encoded(sine(peak=0.5))))
    assert (clip.text, clip.labels) == (accepted, [len(accepted)])
    assert clip_filter.create_clip(Example("a", "test", text, encoded(sine(peak=0.5)))).text == text
