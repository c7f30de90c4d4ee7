"""HTML fragments of the page."""

import pytest

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.app import html
from pipelines.inference.app.i18n import ENGLISH
from pipelines.inference.streaming import Partial
from pipelines.inference.transcript import Segment, Word
from pipelines.whisper.model import ModelRef
from tests.inference.app.app_fakes import (
    FakeTranscriber,
)


def test_unsure_words_are_marked_and_escaped():
    words = (Word("Hej", 0.93), Word("<b>&dig</b>", 0.21))
    fragment = html.segment_list((Segment(61.5, 63.0, "Hej <b>&dig</b>", words),), ENGLISH, "da")
    assert '<mark title="Confidence 21%">&lt;b&gt;&amp;dig&lt;/b&gt;</mark>' in fragment
    assert "<mark" not in fragment.split("Hej")[0]
    assert "<b>" not in fragment
    assert "<time>1:01.5</time>" in fragment
    assert 'data-start="61.500" data-end="63.000"' in fragment
    assert fragment.startswith("<details open>")
    assert ENGLISH["unsure"] in fragment


def test_details_without_unsure_words_are_folded():
    fragment = html.segment_list((Segment(0, 1, "Hej", (Word("Hej", 0.93),)),), ENGLISH, "da")
    assert fragment.startswith("<details><summary>")
    assert ENGLISH["sure"] in fragment
    assert html.segment_list((), ENGLISH, "da") == ""


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00.0"), (59.96, "1:00.0"), (61.5, "1:01.5"), (605.04, "10:05.0")]
)
def test_format_time_carries_over(seconds, expected):
    assert html.format_time(seconds) == expected


def test_comparison_marks_words_of_only_one_transcript():
    fragment = html.comparison(("base", "Båten gor klockan <sju>."), ("tuned", "båten går klockan"), ENGLISH, "da")
    assert fragment.count("<mark>") == 3
    for word in ("gor", "&lt;sju&gt;.", "går"):
        assert f"<mark>{word}</mark>" in fragment
    assert ENGLISH["differs"] in fragment
    same = html.comparison(("base", "Hej!"), ("tuned", "hej"), ENGLISH, "da")
    assert "<mark>" not in same
    assert ENGLISH["same"] in same
    assert ENGLISH["no_words"] in html.comparison(("base", ""), ("tuned", "hej"), ENGLISH, "da")


def test_unsettled_words_are_in_a_span():
    fragment = html.live_transcript(Partial((Segment(0, 1, "<Hej>"),), "på", "dig &", 2.0, 0.31), ENGLISH, "da")
    assert fragment.startswith('<p lang="da">')
    assert "&lt;Hej&gt; på <span>dig &amp;</span>" in fragment
    assert "2.0 s of speech; delay of the text: <b>0.3</b> s" in fragment


def test_model_card_shows_the_score_and_no_path(tmp_path):
    score = {"wer": 0.2541, "ci95": [0.2212, 0.29], "n": 160, "speakers": 12}
    ref = FakeTranscriber(
        tmp_path / "train-9" / "model", base=f"{tmp_path}/whisper-x @ 12ab", test=score, quantisation="q8"
    ).ref
    page = html.model_card(inference_pipeline.model_info(ref), "newest", ENGLISH)
    assert "WER 0.254 (95 % 0.221–0.290, n = 160, 12 speakers; by transformers)" in page
    assert "(q8)" in page
    assert "train-9" in page
    assert "whisper-x @ 12ab" in page
    assert str(tmp_path) not in page
    assert ENGLISH["why"]["newest"] in page


@pytest.mark.parametrize(
    ("score", "text"),
    [
        ({"n": 17, "speakers": 1, "over": "clips"}, "(95 % 0.200–0.300 over clips, n = 17, 1 speaker; by"),
        ({"n": 17, "speakers": 0, "over": "clips"}, "(95 % 0.200–0.300 over clips, n = 17, speakers unknown; by"),
        ({"n": 17, "speakers": 17}, "(95 % 0.200–0.300 over clips, n = 17, speakers unknown; by"),
        ({"n": 17, "speakers": 1}, "(95 % no interval, n = 17, 1 speaker; by"),
    ],
)
def test_model_card_labels_intervals_over_clips(tmp_path, score, text):
    ref = FakeTranscriber(tmp_path / "model", base="x", test={"wer": 0.25, "ci95": [0.2, 0.3], **score}).ref
    assert text in html.model_card(inference_pipeline.model_info(ref), "newest", ENGLISH)


def test_model_card_without_score_is_escaped(tmp_path):
    ref = ModelRef("<script>alert(1)", tmp_path, "hub", "1")
    assert ENGLISH["not_scored"] in html.model_card(inference_pipeline.model_info(ref), "base", ENGLISH)
    assert "<script" not in html.model_card(inference_pipeline.model_info(ref), "base", ENGLISH)
