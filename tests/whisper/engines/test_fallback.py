"""Which of several attempts at a window is accepted."""

import pytest

from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.engines import fallback

LOOP = "och sen " * 30


def accept(*attempts, **options):
    """Return text, temperature and number of attempts; `attempts` are texts and log-probabilities in turn."""
    hypotheses = [Hypothesis(text, logprob, 5, tuple((w, logprob) for w in text.split())) for text, logprob in attempts]
    tried = []

    def decode(temperature):
        tried.append(temperature)
        return hypotheses[len(tried)]

    accepted = fallback.accept(hypotheses[0], decode, DecodingOptions(**options), 5.0)
    return accepted.hypothesis.text, accepted.temperature, tried


def test_good_text_is_accepted_at_once():
    assert accept(("hej då", -0.3)) == ("hej då", 0.0, [])


@pytest.mark.parametrize("first", [("hej då", -1.4), (LOOP, -0.1)])
def test_failed_text_is_decoded_again_until_one_is_good(first):
    assert accept(first, first, ("god natt", -0.5)) == ("god natt", 0.4, [0.2, 0.4])


def test_likeliest_text_that_does_not_repeat_is_the_last_resort():
    attempts = [(LOOP, -0.1), ("en", -1.5), ("två", -1.2), ("tre", -1.9)]
    assert accept(*attempts, temperatures=(0.0, 0.3, 0.6, 0.9)) == ("två", 0.6, [0.3, 0.6, 0.9])


def test_text_that_always_repeats_is_cut_after_its_phrase():
    assert accept((LOOP, -0.1), (LOOP, -0.1), temperatures=(0.0, 0.5)) == ("och sen", 0.5, [0.5])


def test_single_temperature_has_no_fallback():
    assert accept(("hej då", -3.0), temperatures=(0.0,)) == ("hej då", 0.0, [])


def test_thresholds_are_options():
    assert accept(("hej då", -1.4), min_logprob=-2.0)[2] == []
    assert accept((LOOP, -0.1), ("bra", -0.1), max_compression_ratio=2.0)[2] == [0.2]


def test_silence_is_improbable_text_where_no_speech_is_probable():
    options = DecodingOptions()
    assert fallback.is_silence(Hypothesis("tack", -1.2, 3, no_speech=0.8), options)
    assert not fallback.is_silence(Hypothesis("tack", -0.5, 3, no_speech=0.8), options)
    assert not fallback.is_silence(Hypothesis("tack", -1.2, 3, no_speech=0.4), options)
