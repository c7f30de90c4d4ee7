from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.speech.text import clean, normalise

UNUSUAL_TEXT = st.one_of(
    st.text(),
    st.text(
        alphabet=st.sampled_from(
            "HTWYJaåÅé\u030a\u0301\u0331\u0308\"'”«»’-. \n\0\u00ad\u200b\ufeff\ufe0f1²❤ΣσİIßẞ\u1100\u1161"
        )
    ),
)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    ("text", "cleaned", "normalised"),
    [
        ("Räksmörgås på kafé.", "Räksmörgås på kafé.", "räksmörgås på kafé"),
        ("ÅÄÖÉ åäöé", "ÅÄÖÉ åäöé", "åäöé åäöé"),
        ("\u212bngström", "Ångström", "ångström"),
    ],
)
def test_swedish_letters_survive_in_every_form(form, text, cleaned, normalised):
    assert clean(unicodedata.normalize(form, text)) == cleaned
    assert normalise(unicodedata.normalize(form, text)) == normalised


def test_letters_that_differ_in_marks_differ():
    assert len({normalise(word) for word in ("hal", "hål", "häl", "hål")}) == 3


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Hej \t på\ndig ", "Hej på dig"),
        ("Hej\u00a0du", "Hej du"),
        ("\ufeffHej\0du\u200b", "Hej du"),
        ("Hej\x96du", "Hej du"),
        ('"Hej du."', "Hej du."),
        ("”Hej”", "Hej"),
        ("«Hej»", "Hej"),
        ("“Hej”", "Hej"),
        ("»Hej»", "Hej"),
        ("' Hej '", "Hej"),
        ('"Hej" sa "du"', '"Hej" sa "du"'),
        ('Han sa "hej"', 'Han sa "hej"'),
        ('"', '"'),
        ('""', ""),
        ("", ""),
        ("Hej!  Vad, du? 3,5 % – ja…", "Hej! Vad, du? 3,5 % – ja…"),
        ("jord\u00adgubbe", "jordgubbe"),
    ],
)
def test_clean_keeps_words_and_punctuation(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Hej, på DIG!", "hej på dig"),
        ("12,5 kr", "12 5 kr"),
        ("år 2024", "år 2024"),
        ("e-post", "e post"),
        ("S:t Eriks", "s t eriks"),
        ("”Hej” – sa’n", "hej sa n"),
        ("¿?!…", ""),
        ("", ""),
        ("\0Hej\u200bdu", "hej du"),
        ("a_b", "a b"),
        ("Straße", "straße"),
        ("Hej ❤\ufe0f!", "hej"),
        ("jord\u00adgubbe", "jordgubbe"),
        ("H\u0331a", "\u1e96a"),
        ("X\u030ay", "x\u030ay"),
    ],
)
def test_normalise_keeps_letters_and_digits(text, normalised):
    assert normalise(text) == normalised


@given(UNUSUAL_TEXT)
@example("H\u0331")
@example("a\u00ad\u030a")
@example("❤\ufe0f")
def test_clean_and_normalise_are_idempotent(text):
    assert clean(clean(text)) == clean(text)
    assert normalise(normalise(text)) == normalise(text)


@given(UNUSUAL_TEXT.filter(lambda text: "Σ" not in text))  # whose lower case depends on what follows
@example("a\u00ad\u030a")
def test_cleaning_does_not_change_the_normalised_text(text):
    assert normalise(clean(text)) == normalise(text)


@given(UNUSUAL_TEXT)
def test_results_are_composed_and_single_spaced(text):
    for result in (clean(text), normalise(text)):
        assert result == " ".join(result.split()) == unicodedata.normalize("NFC", result)
    assert all(any(unicodedata.category(char)[0] in "LN" for char in word) for word in normalise(text).split())
    assert not any(unicodedata.category(char) == "Cc" for char in clean(text))


def test_normalise_is_idempotent_for_every_character():
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if not unicodedata.is_normalized("NFC", char.lower()) or char.isupper():
            assert normalise(normalise(char)) == normalise(char)
