"""Checks of a take: clipping, level, noise, silence, rate, and what a model hears."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.collection.record.checks import MAX_DIFFERENCE, check_take, difference_of
from pipelines.features.sources.synthetic import espeak, planted
from pipelines.infra import feedback_log
from pipelines.speech import audio
from pipelines.speech.audio import Waveform

SENTENCE = "Vi ska åka till Stockholm på måndag."


@pytest.fixture(scope="module")
def spoken():
    """SENTENCE as float32 [n], 16 kHz, with a peak of 0.5."""
    samples = audio.decode(espeak.synthesise(SENTENCE, "sv+m3", 150, 50)).samples
    return (0.5 * samples / np.abs(samples).max()).astype(np.float32)


def problems(samples, sentence=SENTENCE, **options):
    return check_take(Waveform(samples.astype(np.float32)), sentence, **options).problems


def silence(seconds):
    return np.zeros(int(16_000 * seconds))


CHANGES = {
    (): lambda x: x,
    ("clipped",): lambda x: np.clip(6 * x, -1, 1),
    ("quiet",): lambda x: x / 100,
    ("noisy",): lambda x: x + 0.05 * np.random.default_rng(0).standard_normal(len(x)),
    ("silence",): lambda x: np.concatenate([silence(2), x]),
    ("no_speech",): lambda x: silence(3),
}


@pytest.mark.parametrize("expected", CHANGES, ids=lambda expected: " ".join(expected) or "good")
def test_each_problem_is_found_alone(spoken, expected):
    assert problems(CHANGES[expected](spoken)) == expected


def test_silence_after_speech_is_found_in_noise(spoken):
    noise = 0.002 * np.random.default_rng(0).standard_normal(len(spoken) + 32_000)
    assert "silence" in problems(np.concatenate([spoken, silence(2)]) + noise)


def test_planted_clipping_is_found(spoken):
    assert "clipped" in problems(planted.clip(spoken))


@pytest.mark.parametrize(("sentence", "expected"), [("Ja", "slow"), (f"{SENTENCE} " * 3, "fast")])
def test_rate_is_compared_with_the_sentence(spoken, sentence, expected):
    assert problems(spoken, sentence) == (expected,)


def test_take_without_speech_cannot_be_kept(spoken):
    assert not check_take(Waveform(np.zeros(16_000, np.float32)), SENTENCE).can_be_kept
    assert check_take(Waveform(spoken / 100), SENTENCE).can_be_kept


@pytest.mark.parametrize(
    ("hypothesis", "expected"),
    [
        ("Vi ska åka till Stockholm på måndag", ()),
        ("vis kåka til stokholm pom onda", ()),
        ("Hon köper bröd och ost på torget.", ("mismatch",)),
        ("", ("mismatch",)),
    ],
)
def test_only_a_clear_mismatch_is_a_problem(spoken, hypothesis, expected):
    assert problems(spoken, transcribe=lambda waveform: hypothesis) == expected


def test_broken_model_does_not_stop_recording(spoken):
    check = check_take(Waveform(spoken), SENTENCE, lambda waveform: 1 / 0)
    assert (check.problems, check.hypothesis, check.difference) == ((), None, None)


def test_threshold_separates_transcripts_of_an_untuned_model():
    """The figures of MAX_DIFFERENCE, on log_base.csv."""
    rows = feedback_log.read(Path(__file__).parents[3] / "log_base.csv")
    right = [difference_of(row["reference"], row["output"]) for row in rows]
    others = [(rows[i - shift]["reference"], row["output"]) for shift in (7, 40, 90) for i, row in enumerate(rows)]
    wrong = [difference_of(*pair) for pair in others]
    assert np.mean(np.array(right) > MAX_DIFFERENCE) <= 0.08
    assert np.mean(np.array(wrong) > MAX_DIFFERENCE) >= 0.93


def test_difference_of_equal_and_empty_texts():
    assert difference_of("Hej!", "hej") == 0
    assert difference_of("Hej!", "") == difference_of("Hej", "oboka tåg" * 9) == 1
