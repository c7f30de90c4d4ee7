from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.speech.audio import AudioError, Waveform
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel, extract, extract_light, extractor, mel_filters

EDGES = (
    1,
    2,
    159,
    160,
    161,
    199,
    200,
    201,
    202,
    400,
    401,
    479_599,
    479_600,
    479_601,
    479_799,
    479_800,
    479_801,
    479_999,
    480_000,
)


def stock(samples: np.ndarray, n_mels: int = 80) -> np.ndarray:
    """What Whisper's own extractor makes: float32 [n_mels, 3000]."""
    out = extractor(n_mels)(samples, sampling_rate=16_000, padding="max_length", return_tensors="np")
    return out["input_features"][0]


def trimmed(samples: np.ndarray, n_mels: int = 80) -> LogMel:
    return extract(Waveform(samples), n_mels)


def noise(n_samples: int, peak: float) -> np.ndarray:
    return (peak * np.random.default_rng(n_samples).uniform(-1, 1, n_samples)).astype(np.float32)


@pytest.mark.parametrize("n_samples", EDGES)
@pytest.mark.parametrize("peak", [0.9, 1e-3])
def test_edges_rebuild_the_stock_tensor(n_samples, peak):
    samples = noise(n_samples, peak)
    assert np.abs(trimmed(samples).padded() - stock(samples)).max() <= 5e-7


@settings(max_examples=25, deadline=None)
@given(n_samples=st.integers(1, 480_000), peak=st.floats(1e-6, 1))
@example(n_samples=16_000, peak=1e-2)
def test_any_length_and_loudness_rebuilds_the_stock_tensor(n_samples, peak):
    samples = noise(n_samples, peak)
    assert np.abs(trimmed(samples).padded() - stock(samples)).max() <= 5e-7


@pytest.mark.parametrize("n_samples", [1, 150, 300, 16_000, 479_900])
def test_digital_silence_rebuilds_the_stock_tensor(n_samples):
    samples = np.zeros(n_samples, np.float32)
    assert np.array_equal(trimmed(samples).padded(), stock(samples))


@pytest.mark.parametrize("n_samples", [8_001, 33_333, 64_000, 150_123, 400_000])
@pytest.mark.parametrize("peak", [0.7, 0.003])
def test_speech_is_rebuilt_bit_for_bit(speech, n_samples, peak):
    """But for the last bit of a few values: a matrix product may sum a shorter clip in another order."""
    samples = speech(n_samples, seed=n_samples, peak=peak)
    difference = np.abs(trimmed(samples).padded() - stock(samples))
    assert np.mean(difference == 0) > 0.999
    assert difference.max() <= 2.4e-7


def test_128_bands_rebuild_the_stock_tensor(speech):
    samples = speech(40_000)
    assert trimmed(samples, 128).frames.shape[1] == 128
    assert np.abs(trimmed(samples, 128).padded() - stock(samples, 128)).max() <= 5e-7


@pytest.mark.parametrize("n_samples", [400, 64_000, 479_900])
def test_float16_frames_are_close(speech, n_samples):
    log_mel = trimmed(speech(n_samples))
    halved = LogMel(log_mel.frames.astype(np.float16), log_mel.pad_value)
    assert halved.padded().dtype == np.float32
    assert 0 < np.abs(halved.padded() - stock(speech(n_samples))).max() <= 5e-4


@pytest.mark.parametrize(
    ("n_samples", "n_frames"), [(1, 2), (120, 2), (121, 3), (280, 3), (281, 4), (16_000, 102), (479_800, 3_000)]
)
def test_frames_that_a_real_sample_reaches_are_kept(n_samples, n_frames):
    frames = trimmed(noise(n_samples, 0.5)).frames
    assert frames.shape == (n_frames, 80)
    assert frames.dtype == np.float32
    assert frames.flags.c_contiguous


def test_clip_of_4_s_takes_a_seventh_of_the_bytes(speech):
    frames = trimmed(speech(64_000)).frames
    padded_bytes = FULL_FRAMES * 80 * 4
    assert frames.nbytes * 7 <= padded_bytes
    assert frames.astype(np.float16).nbytes * 14 <= padded_bytes


def test_padding_to_any_length_is_a_prefix(speech):
    log_mel = trimmed(speech(64_000))
    assert np.array_equal(log_mel.padded(800), log_mel.padded()[:, :800])
    with pytest.raises(ValueError):
        log_mel.padded(len(log_mel.frames) - 1)


@pytest.mark.parametrize(("n_samples", "reason"), [(0, "empty"), (480_001, "too_long"), (10**6, "too_long")])
def test_empty_and_too_long_clips_are_refused(n_samples, reason):
    with pytest.raises(AudioError) as error:
        trimmed(np.zeros(n_samples, np.float32))
    assert error.value.reason == reason


def test_extract_does_not_change_its_input(speech):
    samples = speech(16_000)
    before = samples.copy()
    trimmed(samples)
    assert np.array_equal(samples, before)


def test_stock_extractor_is_built_once():
    assert extractor(80) is extractor(80) is not extractor(128)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_filters_equal_the_stock_ones_bit_for_bit(n_mels):
    assert np.array_equal(mel_filters(n_mels), extractor(n_mels).mel_filters)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 480_000), seed=st.integers(0, 3), peak=st.sampled_from([1e-4, 0.05, 1.0]))
@example(n=1, seed=0, peak=1.0)
@example(n=480_000, seed=0, peak=1.0)
@example(n=479_999, seed=1, peak=0.05)
def test_extract_light_equals_extract_within_rounding(n, seed, peak):
    samples = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    samples *= peak / np.abs(samples).max()
    light, stock = (make(Waveform(samples)) for make in (extract_light, extract))
    assert light.frames.shape == stock.frames.shape
    assert light.frames.dtype == np.float32
    assert np.abs(light.frames - stock.frames).max() < 2e-5
    assert abs(light.pad_value - stock.pad_value) < 2e-5


def test_extract_light_equals_extract_on_silence_and_errors(speech):
    for samples in (np.zeros(16_000, np.float32), speech(64_000)):
        light, stock = (make(Waveform(samples), 128) for make in (extract_light, extract))
        assert np.abs(light.frames - stock.frames).max() < 2e-5
    for n, reason in ((0, "empty"), (480_001, "too_long")):
        with pytest.raises(AudioError) as caught:
            extract_light(Waveform(np.zeros(n, np.float32)))
        assert caught.value.reason == reason
