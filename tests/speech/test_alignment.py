"""Alignment of words, and the marks of those that differ."""

from __future__ import annotations

import pytest

from pipelines.speech import alignment


@pytest.mark.parametrize(
    ("reference", "hypothesis", "shown"),
    [
        ("Hej på dig.", "Hej på dig!", "Hej på dig!"),
        ("Hej på dig.", "hej då dig", "hej [då] dig"),
        ("Hej på dig.", "Hej dig.", "Hej […] dig."),
        ("Hej på dig.", "Hej på på dig.", "Hej [på] på dig."),
        ("Kvällsmat nu.", "Kvälls mat nu.", "[Kvälls mat] nu."),
        ("Hej.", "<b>hej", "[b] hej"),
        ("Hej.", "", "[…]"),
        ("Hej.", 99 * "he", f"[{16 * 'he'}…]"),
        ("Tre till fyra.", "Tre – fyra", "tre […] fyra"),
    ],
)
def test_words_that_differ_are_marked(reference: str, hypothesis: str, shown: str):
    marked = alignment.marked(reference, hypothesis)
    assert marked.replace(f"<mark style='{alignment._MARK}'>", "[").replace("</mark>", "]") == shown
