"""Pseudo-labels of single windows: which are accepted, and the reason for every other."""

import math

import pytest

from pipelines.features.sources.unlabelled import labels
from pipelines.features.sources.unlabelled.labels import Limits
from pipelines.whisper.confidence import Calibration

LIMITS = Limits(min_confidence=0.7, max_disagreement=0.1, language="sv")


def window(text="hej på dig du", p=0.9, tokens=6):
    words = [[word, math.log(p)] for word in text.split()]
    return {"start_s": 1.0, "end_s": 3.0, "text": text, "logprob": math.log(p), "tokens": tokens, "words": words}


@pytest.mark.parametrize(
    ("record", "options", "reason"),
    [
        (window(), {}, ""),
        (window(), {"other": window("Hej, på dig du!"), "language": "sv"}, ""),
        (window(p=0.69), {}, "low_confidence"),
        (window(""), {}, "no_speech"),
        (window("..."), {}, "no_speech"),
        (window("hej " * 40), {}, "repetition"),
        (window(tokens=224), {}, "repetition"),
        (window(), {"language": "da"}, "wrong_language"),
        (window(), {"other": window("hej på dig nu")}, ""),
        (window(), {"other": window("hej på mig nu")}, "models_disagree"),
        (window(), {"other": window("")}, "models_disagree"),
        (window(), {"gaps": [[2.5, 9.0]]}, "damaged"),
        (window(), {"gaps": [[3.0, 9.0]]}, ""),
    ],
)
def test_label_is_accepted_or_has_its_reason(record, options, reason):
    found = labels.label(record, Calibration(), LIMITS, **options)
    assert found.reason == reason
    assert bool(found.detail) == bool(reason)


def test_confidence_is_the_calibrated_mean_of_the_words():
    record = window("a b")
    record["words"] = [["a", math.log(0.9)], ["b", math.log(0.5)]]
    assert labels.confidence(record, Calibration()) == pytest.approx(0.7)
    lower = Calibration(slope=1.0, intercept=-1.0, words=100)
    expected = [1 / (1 + math.exp(1 - math.log(p / (1 - p)))) for p in (0.9, 0.5)]
    assert labels.confidence(record, lower) == pytest.approx(sum(expected) / 2)
    assert labels.confidence({**record, "words": []}, Calibration()) == pytest.approx(0.9)  # the whole text's
