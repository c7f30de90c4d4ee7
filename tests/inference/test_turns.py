"""Live audio: its decoding, and its turns."""

from __future__ import annotations

import base64
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.inference.turns import ALAW, PCM, ULAW, AudioDecoder, Mark, TurnCutter, TurnSettings
from pipelines.speech.recordings import detection


@pytest.fixture(autouse=True)
def any_sound_is_speech(monkeypatch):
    monkeypatch.setattr(detection, "open_detector", detection.AnySound)


def cutter(context="clip", longest_s=3.0, **settings) -> TurnCutter:
    model = SimpleNamespace(ref=SimpleNamespace(context=context), longest_s=longest_s)
    return TurnCutter(model, TurnSettings(**settings))


def sound(*parts: float) -> np.ndarray:
    """Sound and silence in turn, in seconds."""
    return np.concatenate([np.full(int(s * 16_000), 0.5 * (n % 2 == 0), np.float32) for n, s in enumerate(parts)])


def marks(events) -> list[Mark]:
    return [event.mark for event in events]


def test_turn_ends_after_its_silence():
    turns = cutter(silence_s=0.5, padding_s=0.2)
    assert marks(turns.feed(sound(1.0, 0.4))) == [Mark.STARTED, Mark.WINDOW]
    (stopped,) = turns.feed(sound(0.0, 0.4))
    assert stopped.mark is Mark.STOPPED and stopped.time_s == pytest.approx(1.2, abs=0.04)


def test_pause_shorter_than_the_silence_is_within_a_turn():
    events = cutter(silence_s=1.0).feed(sound(1.0, 0.6, 1.0, 1.5))
    assert marks(events) == [Mark.STARTED, Mark.WINDOW, Mark.WINDOW, Mark.STOPPED]


def test_model_of_long_windows_gets_one_window_per_turn():
    events = cutter("full", 30.0, silence_s=1.0).feed(sound(1.0, 0.6, 1.0, 1.5))
    assert marks(events) == [Mark.STARTED, Mark.WINDOW, Mark.STOPPED]
    assert events[1].window.end_s - events[1].window.start_s == pytest.approx(2.9, abs=0.1)


def test_blocks_of_any_length_give_the_same_turns():
    samples = sound(1.0, 0.8, 0.7, 0.8, 4.0, 1.0)
    whole = cutter().feed(samples)
    parts = cutter()
    pieces = [event for at in range(0, len(samples), 1_237) for event in parts.feed(samples[at : at + 1_237])]
    assert marks(pieces) == marks(whole)
    assert [event.time_s for event in pieces] == pytest.approx([event.time_s for event in whole], abs=0.15)


def test_long_speech_is_cut_into_windows_of_one_turn():
    turns = cutter(longest_s=2.0)
    events = turns.feed(sound(7.0)) + turns.finish()
    assert marks(events)[0] is Mark.STARTED and marks(events)[-1] is Mark.STOPPED
    windows = [event.window for event in events if event.window]
    assert all(len(window.samples) <= 2.0 * 16_000 for window in windows)
    assert sum(len(window.samples) for window in windows) == pytest.approx(7.0 * 16_000, abs=1)


def test_finish_ends_the_turn_and_times_go_on():
    turns = cutter(padding_s=0.0)
    turns.feed(sound(1.0))
    assert marks(turns.finish()) == [Mark.WINDOW, Mark.STOPPED]
    assert turns.finish() == []
    started = turns.feed(sound(0.0, 0.5, 1.0))[0]
    assert started.time_s == pytest.approx(1.5, abs=0.04)


def test_clear_forgets_the_open_turn():
    turns = cutter()
    turns.feed(sound(1.0))
    turns.clear()
    assert turns.finish() == []


def test_higher_threshold_needs_clearer_speech(monkeypatch):
    unsure = SimpleNamespace(reset=lambda: None, probabilities=lambda s: np.full(len(s) // 512, 0.6, np.float32))
    monkeypatch.setattr(detection, "open_detector", lambda: unsure)
    assert marks(cutter(threshold=0.5).feed(sound(1.0))) == [Mark.STARTED]
    assert cutter(threshold=0.7).feed(sound(1.0)) == []


def encode(samples: np.ndarray) -> str:
    return base64.b64encode((samples * 32_767).astype("<i2").tobytes()).decode()


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 24_000, 44_100])
def test_parts_are_decoded_like_the_whole(rate_hz):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz)
    decoder = AudioDecoder(PCM, rate_hz)
    parts = [decoder.decode(encode(part)) for part in np.array_split(tone, 7)] + [decoder.flush()]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    samples = np.concatenate(parts)
    assert samples.dtype == np.float32 and len(samples) == 16_000
    assert np.abs(samples - expected)[500:-500].max() < 0.01
    assert len(decoder.flush()) == 0


@pytest.mark.parametrize(("encoding", "silent", "loud"), [(ULAW, b"\xff", b"\x00\x80"), (ALAW, b"\xd5", b"\x2a\xaa")])
def test_telephone_encodings_are_decoded(encoding, silent, loud):
    decoder = AudioDecoder(encoding, 8_000)
    samples = np.concatenate([decoder.decode(base64.b64encode(silent * 800).decode()), decoder.flush()])
    assert len(samples) == 1_600 and np.abs(samples).max() < 0.001
    square = (loud[:1] * 8 + loud[1:] * 8) * 50
    samples = np.concatenate([decoder.decode(base64.b64encode(square).decode()), decoder.flush()])
    assert np.abs(samples).max() > 0.9


@pytest.mark.parametrize(
    ("part", "reason"), [("!!", "not base64"), ("AAA", "not base64"), ("AA==", "half a sample"), (None, "a string")]
)
def test_part_that_is_no_audio_is_refused(part, reason):
    with pytest.raises(ValueError, match=reason):
        AudioDecoder(PCM, 24_000).decode(part)


def test_empty_part_is_no_audio():
    assert len(AudioDecoder(PCM, 16_000).decode("")) == 0
