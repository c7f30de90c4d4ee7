from __future__ import annotations

import json

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.infra.errors import LabError
from pipelines.speech.scoring import score

SENTENCES = st.lists(st.sampled_from(["hej", "på", "dig", "å", "ä", "ett"]), max_size=6).map(" ".join)


def test_score_matches_a_count_by_hand():
    """Substituted: katten/hatten. Deleted: där. Inserted: en. 3 edits in 7 words."""
    result = score(["katten sitter där borta", "vi ser sol"], ["hatten sitter borta", "vi ser en sol"])
    counts = (result.substitutions, result.deletions, result.insertions, result.words, result.n)
    assert counts == (1, 1, 1, 7, 2)
    assert result.wer == pytest.approx(3 / 7)
    assert result.cer == pytest.approx((1 + 4 + 3) / (23 + 10))  # k/h, "där ", "en "


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer", "cer"),
    [
        ("ja", "ja", 0, 0),
        ("ja", "", 1, 1),
        ("ja", "nej nej nej", 3, 5),
        ("hål", "hal", 1, 1 / 3),
        ("a b", "ab", 1, 1 / 3),
    ],
)
def test_score_of_single_utterances(reference, hypothesis, wer, cer):
    result = score([reference], [hypothesis])
    assert (result.wer, result.cer) == (pytest.approx(wer), pytest.approx(cer))


def test_normalisation_ignores_case_and_punctuation():
    references, hypotheses = ["Hej, på dig!"], ["hej på  dig"]
    assert score(references, hypotheses).wer == 0
    assert score(references, hypotheses).normalised
    raw = score(references, hypotheses, normalised=False)
    assert raw.wer == pytest.approx(2 / 3)
    assert not raw.normalised


def test_decomposed_letters_equal_composed_ones():
    assert score(["ha\u030al"], ["hål"]).wer == 0


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(SENTENCES.filter(bool), SENTENCES), min_size=1, max_size=8))
def test_score_equals_jiwer_on_all_utterances(pairs):
    references, hypotheses = map(list, zip(*pairs, strict=True))
    result = score(references, hypotheses, samples=100)
    assert result.wer == pytest.approx(jiwer.wer(references, hypotheses))
    assert result.cer == pytest.approx(jiwer.cer(references, hypotheses))


def test_interval_of_an_error_rate_is_not_negative():
    result = score(["a b"] * 3, ["a b", "a b", "a c"], ["x", "y", "z"])
    assert (result.ci95[0], result.cer_ci95[0]) == (0, 0)
    assert result.ci95[1] > result.wer + 0.4


def test_interval_of_one_speaker_is_a_point():
    result = score(["a b"] * 3, ["a b", "a b", "a c"], ["x", "x", "x"])
    assert result.ci95 == (result.wer, result.wer)


def test_score_resamples_speakers():
    references, hypotheses = ["a b c d"] * 40, (["a b c d"] * 4 + ["a x x d"] * 4) * 5
    speakers = [f"s{i // 4}" for i in range(40)]
    by_speaker, by_utterance = score(references, hypotheses, speakers), score(references, hypotheses)
    assert (by_speaker.speakers, by_utterance.speakers) == (10, 40)
    assert by_speaker.ci95[1] - by_speaker.ci95[0] > 1.4 * (by_utterance.ci95[1] - by_utterance.ci95[0])
    assert by_speaker.ci95[0] < by_speaker.wer < by_speaker.ci95[1]


def test_unknown_speakers_count_separately():
    assert score(["a"] * 5, ["a"] * 5, ["x", "x", "", "", "y"]).speakers == 4


@pytest.mark.parametrize(
    ("references", "speakers", "message"), [(["a", "b"], ["x"], "1 speakers"), (["a"], ["x", "y"], "2 speakers")]
)
def test_wrong_number_of_speakers_is_refused(references, speakers, message):
    with pytest.raises(LabError, match=message):
        score(references, references, speakers)


def test_score_prints_and_serialises():
    result = score(["a b"], ["a c"], ["x"])
    assert str(result) == "WER 0.500 (95 % 0.500-0.500, n = 1, 1 speakers), CER 0.333"
    assert json.loads(json.dumps(result.as_dict()))["wer"] == 0.5
