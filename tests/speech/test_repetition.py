from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.speech import repetition


@pytest.mark.parametrize(
    ("text", "so"),
    [
        ("", False),
        ("nej nej nej", False),
        ("det var en gång en gumma som bodde i ett hus", False),
        ("ja ja ja ja ja", True),
        ("tack så mycket " * 5, True),
        ("Och då. " * 30, True),
        ("a b c d e f g " * 12, True),
    ],
)
def test_what_goes_round_in_circles(text, so):
    assert repetition.is_repeating(text) is so


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ett två tre", "ett två tre"),
        ("vi ses vi ses vi ses vi ses i morgon", "vi ses"),
        ("Jag sa nej Nej nej nej och gick", "Jag sa nej"),
        ("", ""),
    ],
)
def test_a_circle_is_cut_after_its_first_round(text, kept):
    assert repetition.without_repeats(text) == kept


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_what_is_cut_has_no_circle_left_and_begins_as_before(words):
    text = " ".join(words)
    kept = repetition.without_repeats(text)
    assert text.startswith(kept)
    assert not repetition.has_run(kept.split())
    assert (kept == text) == (not repetition.has_run(words))
