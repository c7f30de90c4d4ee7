"""Channels of a recording: crosstalk becomes silence, and speech of the channel's own speaker stays."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from pipelines.speech import audio, channels
from pipelines.speech.audio import AudioError, DamagedAudio

RATE_HZ = 16_000
SECOND = RATE_HZ


def babble(seed: int, seconds: float, level: float = 0.1) -> np.ndarray:
    """Return noise whose level changes like that of speech: syllables, words and short pauses."""
    rng = np.random.default_rng(seed)
    n = int(seconds * 10)
    envelope = rng.uniform(0.05, 1, n) ** 2 * (rng.uniform(size=n) > 0.2)
    envelope = np.interp(np.arange(int(seconds * SECOND)) / (SECOND / 10), np.arange(n), envelope)
    return (level * envelope * rng.standard_normal(len(envelope))).astype(np.float32)


def room(sound: np.ndarray, gain_db: float, seed: int = 0) -> np.ndarray:
    """Return a sound as another microphone of a room receives it: 5 ms later, with reverberation of 0.1 s."""
    rng = np.random.default_rng(seed)
    response = rng.standard_normal(3200) * np.exp(-np.arange(3200) / 500)
    response = np.concatenate([np.zeros(80), response / np.sqrt(np.square(response).sum())])
    n = len(sound) + len(response)
    convolved = np.fft.irfft(np.fft.rfft(sound, n) * np.fft.rfft(response, n), n)[: len(sound)]
    return (10 ** (gain_db / 20) * convolved).astype(np.float32)


def turns(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return two speakers who take turns: the first from 1 to 8 s and 17 to 24 s, the second from 9 to 16 s."""
    left, right = np.zeros(25 * SECOND, np.float32), np.zeros(25 * SECOND, np.float32)
    for sound, start_s in ((left, 1), (right, 9), (left, 17)):
        sound[start_s * SECOND : (start_s + 7) * SECOND] = babble(seed + start_s, 7)
    return left, right


def energy(sound: np.ndarray, start_s: float, end_s: float) -> float:
    return float(np.square(sound[int(start_s * SECOND) : int(end_s * SECOND)], dtype=np.float64).sum())


@pytest.mark.parametrize("gain_db", [-10, -15, -20, -30])
def test_crosstalk_is_silenced_and_own_speech_stays(gain_db):
    left, right = turns()
    noise = np.random.default_rng(0).standard_normal((len(left), 2)).astype(np.float32) * 2e-4
    both = np.stack([left + room(right, gain_db, 1), right + room(left, gain_db, 2)], axis=1) + noise
    for number, own, other in ((0, [(1, 8), (17, 24)], [(9, 16)]), (1, [(9, 16)], [(1, 8), (17, 24)])):
        kept = channels.without_crosstalk(both, number, RATE_HZ)
        for start, end in own:
            assert energy(kept, start, end) > 0.99 * energy(both[:, number], start, end)
        for start, end in other:
            assert energy(kept, start + 0.3, end - 0.3) < 0.05 * energy(both[:, number], start + 0.3, end - 0.3)


@pytest.mark.parametrize("gain_db", [0, -6, -10, -15])
def test_independent_quieter_speech_is_kept(gain_db):
    quiet = babble(2, 25) * np.float32(10 ** (gain_db / 20))
    both = np.stack([babble(1, 25), quiet], axis=1)
    assert energy(channels.without_crosstalk(both, 1, RATE_HZ), 0, 25) > 0.95 * energy(quiet, 0, 25)


def test_quiet_word_within_crosstalk_is_kept():
    left = babble(1, 25)
    own = np.zeros_like(left)
    own[10 * SECOND : 11 * SECOND] = babble(5, 1, 0.05)
    both = np.stack([left, own + room(left, -25)], axis=1)
    kept = channels.without_crosstalk(both, 1, RATE_HZ)
    assert energy(kept, 10, 11) > 0.9 * energy(both[:, 1], 10, 11)
    assert energy(kept, 1, 9) < 0.05 * energy(both[:, 1], 1, 9)


def test_recording_without_crosstalk_is_unchanged():
    left, right = turns()
    for number, own in enumerate((left, right)):
        assert np.array_equal(channels.without_crosstalk(np.stack([left, right], axis=1), number, RATE_HZ), own)
    for n in (0, 1, 100):
        assert len(channels.without_crosstalk(np.zeros((n, 3), np.float32), 1, 44_100)) == n


def test_channels_are_counted_and_compared(encoded):
    left, right = turns()
    for columns, n, are_same in (
        ([left], 1, True),
        ([left, left], 2, True),
        ([left, -0.9 * left], 2, True),
        ([left, right], 2, False),
        ([left, 0 * left], 2, False),
        ([left, 0.05 * left], 2, False),
        ([0 * left, 0 * left], 2, False),
        ([left, left, right], 3, False),
    ):
        found = channels.examine(encoded(np.stack(columns, axis=1)))
        assert (found.n, found.are_same) == (n, are_same)
        assert found.duration_s == 25.0


def test_channel_is_read_in_blocks_at_any_rate(encoded):
    left, right = turns()
    both = np.stack([left, right], axis=1)
    content = encoded(both, 44_100, subtype="FLOAT")
    for number in (0, 1):
        blocks = list(audio.blocks(channels.select(content, number), block_s=2.0))
        alone = np.concatenate(list(audio.blocks(encoded(both[:, number], 44_100, subtype="FLOAT"), block_s=2.0)))
        assert max(map(len, blocks)) <= 2 * SECOND + 1
        assert np.abs(np.concatenate(blocks) - alone).max() < 1e-6


def test_damage_and_bad_samples_are_reported(encoded):
    content = encoded(np.stack(turns(), axis=1))
    with pytest.raises(DamagedAudio, match="after 12.5 s"):
        list(audio.blocks(channels.select(content[: len(content) // 2], 1)))
    assert channels.examine(content[: len(content) // 2]).n == 2
    bad = np.stack(turns(), axis=1)
    bad[5, 1] = np.nan
    with pytest.raises(AudioError, match="not_finite"):
        channels.examine(encoded(bad, subtype="FLOAT"))
    with pytest.raises(AudioError, match="too_long"):
        channels.examine(content, max_duration_s=10)


@pytest.mark.slow
def test_ffmpeg_keeps_every_channel(tmp_path, encoded):
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")
    tones = [np.sin(np.arange(2 * SECOND) * 2 * np.pi * 200 * n / RATE_HZ) * 0.3 for n in (1, 2, 3)]
    (tmp_path / "three.wav").write_bytes(encoded(np.stack(tones, axis=1).astype(np.float32)))
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "three.wav", "-c:a", "flac", tmp_path / "three.mka"]
    subprocess.run(command, check=True)
    assert channels.examine(tmp_path / "three.mka").n == 3
    for number, tone in enumerate(tones):
        samples = np.concatenate(list(audio.blocks(channels.select(tmp_path / "three.mka", number))))
        assert np.abs(samples - tone).max() < 1e-3
