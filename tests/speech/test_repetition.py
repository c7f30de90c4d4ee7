from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.speech import repetition


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("nej nej nej", False),
        ("det var en gång en gumma som bodde i ett hus", False),
        ("ja ja ja ja ja", False),
        ("Nej, nej, nej, nej, nej, nej!", False),
        ("självklart " * 6, False),
        ("Hon sa att vi skulle gå nu. Nej nej nej nej nej nej, sa jag, det går inte.", False),
        ("ja " * 9, True),
        ("och så vidare och så vidare och så vidare och så vidare och så vidare", True),
        ("nej nej nej nej nej nej " + "tack så mycket " * 8, True),
        ("tack så mycket " * 5, True),
        ("Och då. " * 30, True),
        ("a b c d e f g " * 12, True),
    ],
)
def test_repeating_transcripts_are_detected(text, expected):
    assert repetition.is_repeating(text) is expected


@pytest.mark.parametrize(("duration_s", "expected"), [(0.5, True), (1.0, False), (2.5, False), (30.0, False)])
def test_one_word_is_a_loop_if_it_does_not_fit_the_time(duration_s, expected):
    assert repetition.is_repeating("nej nej nej nej nej nej", duration_s) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ett två tre", "ett två tre"),
        ("vi ses vi ses vi ses vi ses i morgon", "vi ses"),
        ("Jag sa nej Nej nej nej och gick", "Jag sa nej"),
        ("", ""),
    ],
)
def test_text_is_cut_after_the_first_occurrence(text, expected):
    assert repetition.without_repeats(text) == expected


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_cut_text_is_a_prefix_without_runs(words):
    text = " ".join(words)
    cut = repetition.without_repeats(text)
    assert text.startswith(cut)
    assert not repetition.has_run(cut.split())
    assert (cut == text) == (not repetition.has_run(words))
