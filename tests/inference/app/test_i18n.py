"""Texts of the page in two languages."""

import string

import pytest

from pipelines.inference.app import i18n
from pipelines.inference.app.i18n import TEXTS


def leaves(texts, path=()):
    """Yield (path, text) of every text in the dictionary."""
    for name, value in texts.items():
        yield from leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]


def test_both_languages_have_the_same_keys_and_fields():
    english, swedish = (dict(leaves(TEXTS[tag])) for tag in ("en", "sv"))
    assert english.keys() == swedish.keys()
    for path, text in english.items():
        fields = {name for _, name, _, _ in string.Formatter().parse(text) if name}
        assert {name for _, name, _, _ in string.Formatter().parse(swedish[path]) if name} == fields, path
    equal = {path[0] for path, text in english.items() if text == swedish[path]}
    assert equal <= {"model"}, "left untranslated"


@pytest.mark.parametrize(
    ("header", "tag"),
    [
        ("sv-SE,sv;q=0.9,en;q=0.8", "sv"),
        ("en-GB,sv;q=0.9", "en"),
        ("fi,sv;q=0.5,en;q=0.3", "sv"),
        ("da;q=0.9, SV", "sv"),
        ("sv;q=0", "en"),
        ("sv;q=nonsense", "en"),
        ("", "en"),
        ("*," * 5_000 + "sv", "en"),
    ],
)
def test_language_follows_accept_language(header, tag):
    assert i18n.choose_language(header) == tag
