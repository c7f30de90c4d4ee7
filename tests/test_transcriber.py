from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines import decoding, lab, models
from pipelines.audio import AudioError, Waveform
from pipelines.errors import LabError
from pipelines.features import FULL_SAMPLES
from pipelines.transcriber import Transcriber, windows

SECOND = 16_000


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(toy_model):
    """As a tuned model is: at the length of the clip."""
    return Transcriber(
        dataclasses.replace(models.resolve(str(toy_model)), context="clip"), device="cpu", max_new_tokens=16
    )


@pytest.fixture(scope="module")
def stock(toy_model):
    """As a base model is: always 30 s."""
    return Transcriber(models.resolve(str(toy_model)), device="cpu", max_new_tokens=16)


@pytest.fixture
def frames(monkeypatch):
    """The frames that each call of the decoder was given; it hears `part 0`, `part 1`, ..."""
    seen = []

    def decode(model, processor, features, **settings):
        seen.append(features.shape[2])
        return [f"part {len(seen) - 1}" if len(seen) != 2 else ""]

    monkeypatch.setattr(decoding, "decode", decode)
    return seen


# ---- windows


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 5 * FULL_SAMPLES), seed=st.integers(0, 3))
@example(n=0, seed=0)
@example(n=1, seed=0)
@example(n=FULL_SAMPLES, seed=0)
@example(n=FULL_SAMPLES + 1, seed=0)
def test_windows_lose_and_double_no_sample(n, seed):
    samples = np.random.default_rng(seed).standard_normal(n, dtype=np.float32)
    pieces = windows(samples)
    assert np.array_equal(np.concatenate([*pieces, samples[:0]]), samples)
    assert all(0 < len(piece) <= FULL_SAMPLES for piece in pieces)
    assert all(len(piece) > 24 * SECOND for piece in pieces[:-1])


def test_what_fits_is_not_cut():
    samples = np.ones(FULL_SAMPLES, dtype=np.float32)
    assert [len(piece) for piece in windows(samples)] == [FULL_SAMPLES]
    assert windows(samples[:0]) == []


@pytest.mark.parametrize("pause_s", [25.2, 27.0, 29.4])
def test_a_cut_falls_into_the_pause(speech, pause_s):
    samples = speech(40 * SECOND) + np.float32(0.05)
    pause = slice(int(pause_s * SECOND), int((pause_s + 0.3) * SECOND))
    samples[pause] = 0
    # an earlier pause lies outside the five seconds that are searched
    samples[10 * SECOND : 11 * SECOND] = 0
    first, rest = windows(samples)
    assert pause.start < len(first) < pause.stop
    assert first[-400] == rest[400] == 0


def test_the_quietest_moment_is_taken_where_there_is_no_pause():
    samples = np.random.default_rng(0).standard_normal(35 * SECOND).astype(np.float32)
    samples[28 * SECOND : 28 * SECOND + 4_000] *= 0.2
    assert 28 * SECOND < len(windows(samples)[0]) < 28 * SECOND + 4_000


def test_windows_of_a_recording_follow_each_other(speech):
    recording = speech(95 * SECOND)
    pieces = windows(recording)
    ends = np.cumsum([len(piece) for piece in pieces])
    assert len(pieces) == 4
    assert all(25 * SECOND < len(piece) <= FULL_SAMPLES for piece in pieces[:-1])
    # each cut is the quietest of its own window, not of the first
    for start, end in zip([0, *ends[:-2]], ends[:-1], strict=True):
        tail = recording[start + 25 * SECOND : start + 30 * SECOND].reshape(-1, 1_600)
        quietest = np.square(tail, dtype=np.float64).sum(axis=1).argmin()
        assert end == start + 25 * SECOND + quietest * 1_600 + 800


# ---- transcripts


def test_65_seconds_are_three_windows_and_one_text(toy, speech, frames):
    heard = toy.transcribe(Waveform(speech(65 * SECOND)))
    assert heard.text == "part 0 part 2"
    assert heard.audio_s == 65
    assert 0 < heard.elapsed_s < 60
    assert len(frames) == 3
    assert all(2_500 <= count <= 3_000 for count in frames[:2])
    assert 6_500 <= sum(frames) <= 6_500 + 3 * 16
    assert all(count % 2 == 0 for count in frames)


def test_65_seconds_are_heard_by_a_real_decoder(toy, speech):
    recording = speech(65 * SECOND)
    parts = [toy.transcribe(Waveform(piece)).text for piece in windows(recording)]
    assert toy.transcribe(Waveform(recording)).text == " ".join(part for part in parts if part)
    assert any(parts)


def test_a_model_hears_at_the_length_it_was_trained_at(toy, stock, speech, frames):
    for transcriber in (toy, stock):
        transcriber.transcribe(Waveform(speech(2 * SECOND)))
    assert frames == [208, 3_000]


def test_the_app_hears_what_the_evaluation_hears(toy, toy_cache, toy_settings):
    """The same clips through the audio file and through the feature cache."""
    rows = toy_cache.split("test")
    options = {"language": "sv", "batch_frames": 1, "max_new_tokens": 16}
    cached = decoding.decode_rows(toy.model, toy.processor, toy_cache, rows, **options)
    heard = [toy.transcribe(clip.audio).text for clip in lab.samples(toy_settings(), n=12)]
    assert heard == cached
    assert len(set(heard)) > 3


def test_bytes_a_path_and_a_waveform_are_the_same_recording(toy, speech, encoded, tmp_path):
    content = encoded(speech(3 * SECOND), subtype="FLOAT")
    (tmp_path / "clip.wav").write_bytes(content)
    recordings = [content, tmp_path / "clip.wav", str(tmp_path / "clip.wav"), Waveform(speech(3 * SECOND))]
    heard = [toy.transcribe(recording) for recording in recordings]
    assert len({transcript.text for transcript in heard}) == 1
    assert [transcript.audio_s for transcript in heard] == [3] * 4


def test_what_is_no_recording_is_refused_with_its_reason(toy, speech, encoded, tmp_path, frames):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio")
    for recording, reason in {
        tmp_path / "nowhere.wav": "missing",
        tmp_path / "empty.wav": "empty",
        tmp_path / "text.wav": "unreadable",
        b"": "empty",
        b"RIFF": "unreadable",
        encoded(np.full(SECOND, np.nan, dtype=np.float32), subtype="FLOAT"): "not_finite",
    }.items():
        with pytest.raises(AudioError) as caught:
            toy.transcribe(recording)
        assert caught.value.reason == reason
    with pytest.raises(AudioError) as caught:
        toy.transcribe(encoded(speech(3 * SECOND)), max_duration_s=2)
    assert caught.value.reason == "too_long"
    assert frames == []


def test_an_unknown_language_is_one_line(toy_model):
    with pytest.raises(LabError) as caught:
        Transcriber(models.resolve(str(toy_model)), "qq", device="cpu").transcribe(
            Waveform(np.ones(SECOND, np.float32))
        )
    assert "qq" in str(caught.value)
    assert "\n" not in str(caught.value)
