from __future__ import annotations

import numpy as np
import pytest

from benchmarks import sounds
from benchmarks.sounds import at_peak
from pipelines.features.sources.synthetic import espeak
from pipelines.inference.streaming import Stream
from pipelines.inference.transcript import Segment
from pipelines.speech import audio
from pipelines.speech.recordings import detection
from pipelines.speech.recordings.detection import CHUNK_SAMPLES, AnySound, Levelled, Silero
from pipelines.speech.recordings.segmentation import windows

SECOND = 16_000


@pytest.fixture(scope="module")
def voice():
    """Eight seconds of a synthetic voice, and the position of its sentence: (samples, start_s, end_s)."""
    sentence = "Vi åker till landet på lördag om det inte regnar."
    spoken = audio.decode(espeak.synthesise(sentence, "sv+m3", 150, 50)).samples
    samples = np.random.default_rng(0).standard_normal(8 * SECOND).astype(np.float32) * np.float32(0.001)
    samples[2 * SECOND : 2 * SECOND + len(spoken)] += spoken
    return samples, 2.0, 2 + len(spoken) / SECOND


def find(samples: np.ndarray):
    pytest.importorskip("silero_vad")
    return list(windows([samples], detection.open_detector(), longest_s=60.0))


@pytest.mark.parametrize("dbfs", [-3, -30, -40, -50])
def test_voice_is_detected_at_every_level(voice, dbfs):
    samples, start_s, end_s = voice
    found = find(at_peak(samples, dbfs))
    assert found[0].start_s == pytest.approx(start_s, abs=0.4)
    assert found[-1].end_s == pytest.approx(end_s, abs=0.4)


@pytest.mark.parametrize(
    "sound", [one for one in sounds.non_speech() if len(one.samples) <= 4 * SECOND], ids=lambda s: s.name
)
def test_sound_without_speech_has_no_window(sound):
    assert find(sound.samples) == []
    if sound.samples.any():
        assert find(at_peak(sound.samples, -45)) == []


@pytest.mark.parametrize("word", ["ja", "nej", "ett"])
@pytest.mark.parametrize("dbfs", [-3, -45])
def test_short_word_is_detected(word, dbfs):
    samples = at_peak(sounds.word_sound(word), dbfs)
    assert len(samples) < 0.5 * SECOND
    for before_s, after_s in ((0, 0), (1.5, 1)):
        (window,) = find(np.pad(samples, (int(before_s * SECOND), int(after_s * SECOND))))
        assert window.start_s == pytest.approx(max(before_s - 0.2, 0), abs=0.1)


def test_constant_offset_does_not_hide_speech(voice):
    samples, start_s, _ = voice
    (first, *_) = find(at_peak(samples, -40) + np.float32(0.2))
    assert first.start_s == pytest.approx(start_s, abs=0.4)


def test_quiet_speech_is_detected_live(voice):
    pytest.importorskip("silero_vad")
    samples = at_peak(voice[0], -45)
    stream = Stream(
        lambda found: [Segment(w.start_s, w.end_s, "tal") for w in found], detection.open_detector(), longest_s=30.0
    )
    for at in range(0, len(samples), SECOND // 4):
        stream.feed(samples[at : at + SECOND // 4])
    assert [segment.start_s for segment in stream.end().segments] == [pytest.approx(2.0, abs=0.4)]


class Recorded:
    """A detector that keeps what it receives."""

    def __init__(self):
        self.samples: list[np.ndarray] = []

    def reset(self):
        self.samples.clear()

    def probabilities(self, samples):
        self.samples.append(samples)
        return np.zeros(len(samples) // CHUNK_SAMPLES, dtype=np.float32)


def test_gain_does_not_depend_on_block_lengths(voice):
    samples = at_peak(voice[0][: 200 * CHUNK_SAMPLES], -40)
    one, other = Levelled(Recorded()), Levelled(Recorded())
    one.probabilities(samples)
    for piece in np.split(samples, 20):
        other.probabilities(piece)
    assert np.array_equal(np.concatenate(one.detector.samples), np.concatenate(other.detector.samples))
    assert np.abs(one.detector.samples[0]).max() == pytest.approx(0.5, abs=0.05)


def test_very_loud_samples_stay_finite():
    levelled = Levelled(Recorded())
    levelled.probabilities(np.tile(np.array([3e38, -3e38], dtype=np.float32), CHUNK_SAMPLES))
    assert np.abs(levelled.detector.samples[0]).max() == pytest.approx(0.5)


def test_without_silero_only_silence_is_no_speech():
    samples = np.repeat(np.array([0.0, 1e-4, 0.01, 0.5], dtype=np.float32), CHUNK_SAMPLES)
    assert AnySound().probabilities(samples).tolist() == [0, 0, 1, 1]


def test_silero_on_a_block_equals_chunk_by_chunk(voice):
    silero_vad = pytest.importorskip("silero_vad")
    import torch

    samples = np.tile(voice[0], 2)[: 480 * CHUNK_SAMPLES]
    model = silero_vad.load_silero_vad()
    with torch.inference_mode():
        in_a_row = [float(model(chunk, SECOND)) for chunk in torch.from_numpy(samples).reshape(-1, 1, CHUNK_SAMPLES)]
    detector = Silero()
    at_once = detector.probabilities(samples)
    assert at_once == pytest.approx(in_a_row, abs=1e-4)
    assert max(in_a_row) > 0.9
    # and so are several blocks: the detector remembers
    detector.reset()
    pieces = np.concatenate([detector.probabilities(piece) for piece in np.split(samples, 4)])
    assert pieces == pytest.approx(in_a_row, abs=1e-4)
