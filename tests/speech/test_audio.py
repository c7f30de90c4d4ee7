from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.infra.errors import shortened
from pipelines.speech import audio
from pipelines.speech.audio import AudioError, Waveform, decode, from_array
from pipelines.speech.decoders import ffmpeg, libsndfile

RATES = (8_000, 16_000, 22_050, 44_100, 48_000, 96_000)
FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "PCM_U8"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("MP3", "MPEG_LAYER_III"),
]


def tone(rate_hz: int, seconds: float = 1.0, peak: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)).astype(np.float32)


def rejection_reason(source, **settings) -> str:
    with pytest.raises(AudioError) as error:
        decode(source, **settings)
    assert "\n" not in str(error.value)
    assert str(error.value) == shortened(f"{error.value.reason}: {error.value.detail}")
    return error.value.reason


def assert_tone(waveform: Waveform, peak: float = 0.5) -> None:
    assert waveform.samples.dtype == np.float32
    assert waveform.samples.ndim == 1
    assert waveform.duration_s == pytest.approx(1.0, abs=0.08)  # mp3 adds its own padding
    middle = waveform.samples[4_000:12_000]
    spectrum = np.abs(np.fft.rfft(middle)) / len(middle) * 2
    assert np.argmax(spectrum) == 220  # bins of 2 Hz
    assert spectrum[220] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("rate_hz", RATES)
@pytest.mark.parametrize(("format", "subtype"), FORMATS, ids=lambda value: value)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_decodes_at_every_rate(encoded, format, subtype, rate_hz, channels):
    if format == "MP3" and rate_hz > 48_000:
        pytest.skip("there is no mp3 above 48 kHz")
    sound = tone(rate_hz) if channels == 1 else np.stack([tone(rate_hz, peak=0.8), tone(rate_hz, peak=0.2)], axis=1)
    assert_tone(decode(encoded(sound, rate_hz, format, subtype)))


@pytest.mark.parametrize(("subtype", "step"), [("PCM_16", 2**-15), ("PCM_24", 2**-23), ("FLOAT", 0)])
def test_16_khz_mono_is_exact(encoded, subtype, step):
    sound = tone(16_000)
    assert np.abs(decode(encoded(sound, subtype=subtype)).samples - sound).max() <= step


def test_bytes_and_paths_decode_to_the_same_samples(encoded, tmp_path):
    data, path = encoded(tone(44_100), 44_100, "FLAC"), tmp_path / "å 1.flac"
    path.write_bytes(data)
    samples = decode(data).samples
    assert np.array_equal(decode(path).samples, samples)
    assert np.array_equal(decode(str(path)).samples, samples)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "float32", "float64"])
def test_integer_arrays_are_scaled_to_full_scale(dtype):
    scale = np.iinfo(dtype).max if dtype.startswith("int") else 1
    samples = from_array((tone(16_000) * scale).astype(dtype), 16_000).samples
    assert samples.dtype == np.float32
    assert np.abs(samples - tone(16_000)).max() < (0.02 if dtype == "int8" else 1e-4)


def test_channels_are_averaged():
    sound = np.stack([tone(16_000), tone(16_000, peak=0.1)], axis=1)
    assert np.abs(from_array(sound, 16_000).samples - tone(16_000, peak=0.3)).max() < 1e-6


NOISE = 0.003 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)


@pytest.mark.parametrize(
    "channels",
    [
        [tone(16_000), -tone(16_000)],
        [0.5 * -tone(16_000), tone(16_000)],
        [tone(16_000) + NOISE, -tone(16_000) + NOISE[::-1]],
        [tone(16_000), -tone(16_000), 0 * NOISE],
    ],
    ids=["inverted", "weaker", "noisy", "three"],
)
def test_channels_that_cancel_give_a_loud_one(channels, encoded):
    sound = np.stack(channels, axis=1)
    loudest = sound[:, np.abs(sound).mean(axis=0).argmax()]
    for samples in (decode(encoded(sound, subtype="FLOAT")).samples, np.concatenate([*audio.blocks(encoded(sound))])):
        assert min(np.abs(samples - sign * loudest).max() for sign in (1, -1)) < 0.03


def test_same_channel_of_cancelling_ones_in_all_blocks(encoded):
    left = np.concatenate([tone(16_000), 0.9 * tone(16_000)])
    sound = np.stack([left, -np.concatenate([0.9 * tone(16_000), tone(16_000)])], axis=1)
    samples = np.concatenate([*audio.blocks(encoded(sound), block_s=1.0)])
    assert np.abs(samples - left).max() < 1e-3


def test_unrelated_and_silent_channels_are_averaged():
    rng = np.random.default_rng(0)
    for sound in (rng.uniform(-0.5, 0.5, (16_000, 2)), np.stack([tone(16_000), np.zeros(16_000)], axis=1)):
        assert np.abs(from_array(sound, 16_000).samples - sound.mean(axis=1)).max() < 1e-6


@pytest.mark.parametrize(
    "data",
    [
        b"hej, this is text\n" * 50,
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(200),
        b"RIFF",
        b"\0",
        np.random.default_rng(0).bytes(5_000),
        b"fLaC" + bytes(100),
        b"OggS" + bytes(100),
        b"ID3\x04" + bytes(100),
        b"<html><body>404</body></html>",
    ],
)
def test_other_content_is_unreadable(data):
    assert rejection_reason(data) == "unreadable"


def test_missing_and_empty_files_are_rejected(tmp_path, encoded):
    (tmp_path / "empty.wav").touch()
    assert rejection_reason(tmp_path / "nowhere.wav") == "missing"
    assert rejection_reason(tmp_path) == "missing"
    assert rejection_reason(tmp_path / "empty.wav") == rejection_reason(b"") == "empty"
    assert rejection_reason(encoded(np.zeros(0, np.float32))) == "empty"


def test_impossible_file_names_are_rejected():
    assert rejection_reason("x" * 5_000 + ".wav") in ("missing", "unreadable")
    assert rejection_reason("x\0.wav") in ("missing", "unreadable")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38, -3e4])
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_samples_off_the_scale_are_rejected(encoded, bad, rate_hz):
    sound = tone(rate_hz)
    sound[500] = bad
    assert rejection_reason(encoded(sound, rate_hz, subtype="FLOAT")) == "not_finite"


def test_a_single_sample_is_decoded(encoded):
    assert len(decode(encoded(np.array([0.5], np.float32))).samples) == 1


@pytest.mark.parametrize("rate_hz", [48_000, 96_000])
def test_a_clip_shorter_than_one_16_khz_sample_is_empty(encoded, rate_hz):
    assert rejection_reason(encoded(np.array([0.5], np.float32), rate_hz)) == "empty"


@pytest.mark.parametrize(("format", "subtype"), FORMATS, ids=lambda value: value)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files_are_never_whole(encoded, format, subtype, share):
    data = encoded(tone(16_000), 16_000, format, subtype)
    data = data[: int(share * len(data))]
    assert rejection_reason(data) in ("unreadable", "empty", "damaged")
    samples = []
    with pytest.raises(AudioError):
        samples.extend(audio.blocks(data))
    n_samples = sum(map(len, samples))
    if format != "OGG":  # here the sound is a single page, of which nothing is read
        assert n_samples >= (share - 0.4) * 16_000
    assert n_samples <= 17_500


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_samples_or_a_reason(encoded, data):
    format, subtype = data.draw(st.sampled_from(FORMATS))
    sound = bytearray(encoded(tone(16_000, 0.1), 16_000, format, subtype))
    for _ in range(data.draw(st.integers(1, 8))):
        sound[data.draw(st.integers(0, min(200, len(sound) - 1)))] = data.draw(st.integers(0, 255))
    try:
        with mock.patch.object(ffmpeg, "is_installed", return_value=False):  # starting it takes most of the time
            waveform = decode(bytes(sound), max_duration_s=30)
    except AudioError:
        return
    assert len(waveform.samples)
    assert np.isfinite(waveform.samples).all()
    assert waveform.samples.dtype == np.float32


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3"])
def test_duration_is_checked_in_the_header(encoded, monkeypatch, format):
    data = encoded(tone(8_000, 2.0), 8_000, format)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: pytest.fail("was decoded"))
    assert rejection_reason(data, max_duration_s=1.5) == "too_long"


@pytest.mark.parametrize(("rate_hz", "channels"), [(384_001, 1), (16_000, 17)])
def test_implausible_header_is_unreadable(encoded, monkeypatch, rate_hz, channels):
    """At 2 GHz, hours of compressed silence would count as one second."""
    data = encoded(np.zeros((2_000, channels), np.float32), rate_hz)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: pytest.fail("was decoded"))
    assert rejection_reason(data) == "unreadable"
    with pytest.raises(AudioError, match="unreadable"):
        list(audio.blocks(data))


def test_many_channels_shorten_the_blocks(encoded, monkeypatch):
    monkeypatch.setattr(libsndfile, "_MAX_BLOCK_VALUES", 16_000)
    sound = np.repeat(tone(16_000)[:, None], 16, axis=1)
    blocks = list(audio.blocks(encoded(sound, 16_000, subtype="FLOAT")))
    assert [len(block) for block in blocks] == [1_000] * 16 + [0]
    assert np.allclose(np.concatenate(blocks), tone(16_000), atol=1e-6)


def test_exactly_the_allowed_duration_is_accepted(encoded):
    data = encoded(tone(44_100), 44_100)
    assert len(decode(data, max_duration_s=1.0).samples) == 16_000
    assert rejection_reason(data, max_duration_s=0.999) == "too_long"


def test_duration_of_an_array_is_checked():
    with pytest.raises(AudioError, match="too_long"):
        from_array(tone(8_000, 2.0), 8_000, max_duration_s=1.9)


def test_fingerprint_depends_on_the_content_only(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")
    os.mkfifo(tmp_path / "pipe.wav")
    assert audio.fingerprint(b"sound") == audio.fingerprint(tmp_path / "a.wav") != audio.fingerprint(b"other")
    assert len(audio.fingerprint(b"sound")) == 16
    assert audio.fingerprint(tmp_path / "gone.wav") == audio.fingerprint(tmp_path) == b""
    assert audio.fingerprint(tmp_path / "pipe.wav") == b""
    assert rejection_reason(tmp_path / "pipe.wav") == "missing"


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_bytes_and_files_decode_equally_without_memfd(encoded, tmp_path, monkeypatch, kind):
    data = encoded(tone(44_100), 44_100, kind)
    (tmp_path / "a").write_bytes(data)
    samples = decode(data).samples
    assert np.array_equal(decode(tmp_path / "a").samples, samples)
    monkeypatch.delattr(os, "memfd_create", raising=False)  # as on macOS and Windows
    assert np.array_equal(decode(data).samples, samples)
