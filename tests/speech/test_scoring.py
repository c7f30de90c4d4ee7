from __future__ import annotations

import json

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.infra.errors import LabError
from pipelines.speech.intervals import Units, group
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


@pytest.mark.parametrize(
    ("speakers", "who"),
    [
        (None, "speakers unknown"),
        (["", None, float("nan")] * 4, "speakers unknown"),
        (["x"] * 12, "1 speaker"),
        (["x", ""] * 6, "speakers unknown"),
    ],
)
def test_one_or_no_known_speaker_gives_clip_intervals(speakers, who):
    result = score(["a b"] * 12, ["a b", "a b", "a c"] * 4, speakers)
    assert result.over == "clips" and result.ci95[0] < result.wer < result.ci95[1]
    assert f" over clips, n = 12, {who})" in str(result)
    assert result.units.caveat == f"{who}: intervals are over clips and say nothing about other speakers"


def test_clips_of_equal_wer_have_no_interval():
    result = score(["a b"] * 17, ["a c"] * 17, ["me"] * 17)
    assert (result.ci95, result.cer_ci95) == (None, None)
    assert str(result).startswith("WER 0.500 (95 % no interval, n = 17, 1 speaker)")


def test_few_speakers_of_equal_wer_have_no_interval():
    result = score(["a b"] * 6, ["a b", "a c"] * 3, ["x", "x", "y", "y", "z", "z"])
    assert (result.ci95, result.over, result.speakers) == (None, "speakers", 3)
    assert "(95 % no interval, n = 6, 3 speakers)" in str(result)
    assert "unreliable" in result.units.caveat


@pytest.mark.parametrize(
    ("old", "text"),
    [
        ({"n": 17, "speakers": 17}, "0.100 to 0.200 over clips"),
        ({"n": 17, "speakers": 1}, "no interval"),
        ({"n": 17, "speakers": 7}, "0.100 to 0.200"),
    ],
)
def test_scores_of_older_versions_claim_no_certainty(old, text):
    assert Units.of(old).interval((0.1, 0.2)) == text


def test_score_resamples_speakers():
    references, hypotheses = ["a b c d"] * 40, (["a b c d"] * 4 + ["a x x d"] * 4) * 5
    speakers = [f"s{i // 4}" for i in range(40)]
    by_speaker, by_utterance = score(references, hypotheses, speakers), score(references, hypotheses)
    assert (by_speaker.speakers, by_utterance.speakers) == (10, 0)
    assert by_speaker.ci95[1] - by_speaker.ci95[0] > 1.4 * (by_utterance.ci95[1] - by_utterance.ci95[0])
    assert by_speaker.ci95[0] < by_speaker.wer < by_speaker.ci95[1]


def test_unknown_speakers_beside_known_ones_are_one_block():
    blocks, units = group(["x", "x", "", None, "y"], 5)
    assert (units.over, units.speakers, len({*blocks})) == ("speakers", 2, 3)
    assert blocks[2] == blocks[3]


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        (["a", "b"], ["a", None], "the transcript None at position 1: write an empty string"),
        (["a", float("nan")], ["a", "b"], "the reference nan at position 1: remove that row"),
    ],
)
def test_text_that_is_no_string_is_a_one_line_error(references, hypotheses, message):
    with pytest.raises(LabError, match=message):
        score(references, hypotheses)


@pytest.mark.parametrize(
    ("references", "speakers", "message"), [(["a", "b"], ["x"], "1 speakers"), (["a"], ["x", "y"], "2 speakers")]
)
def test_wrong_number_of_speakers_is_refused(references, speakers, message):
    with pytest.raises(LabError, match=message):
        score(references, references, speakers)


def test_score_prints_and_serialises():
    result = score(["a b"], ["a c"], ["x"])
    assert str(result) == "WER 0.500 (95 % no interval, n = 1, 1 speaker), CER 0.333"
    assert json.loads(json.dumps(result.as_dict()))["wer"] == 0.5
