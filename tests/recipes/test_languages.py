"""Names and codes of languages as Whisper's codes."""

import pytest

from pipelines import recipes
from pipelines.infra.errors import LabError
from pipelines.recipes import languages


@pytest.mark.parametrize(
    ("written", "code"),
    [
        *((text, "sv") for text in ("sv", "SV", "sv-SE", "sv_se", "sv_SE.UTF-8", "Swedish", " swedish\n", "svenska")),
        *((text, "sv") for text in ("<|sv|>", "swe", "sv-Latn-SE")),
        *((text, "no") for text in ("nb", "nb-NO", "no", "Norwegian", "norsk", "Bokmål")),
        *((text, "nn") for text in ("nn", "nn-NO", "Nynorsk")),
        ("haitian  Creole", "ht"),
        ("Mandarin", "zh"),
        ("zh-Hans-CN", "zh"),
        ("yue", "yue"),
        ("haw", "haw"),
        ("fil_ph", "tl"),
    ],
)
def test_language_in_any_notation_is_whispers_code(written, code):
    assert languages.parse(written) == languages.parse_optional(written) == code


@pytest.mark.parametrize("written", ["xx", "s", "klingon", "Swedish, Danish", "sv,da", "default", "se" * 10_000, "\n;"])
def test_unknown_language_is_one_short_line(written):
    assert languages.find(written) == ""
    with pytest.raises(LabError, match="a code or an English name such as sv or Swedish") as caught:
        languages.parse_optional(written)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_blank_and_auto_name_no_language():
    assert [languages.parse_optional(text) for text in ("", " ")] == ["", ""]
    with pytest.raises(LabError, match="got 'AUTO'"):
        languages.parse_optional("AUTO")
    for text, complaint in (("", "must be one of"), ("auto", "must be one of"), ("swedich", "near it: swedish")):
        with pytest.raises(LabError, match=complaint):
            languages.parse(text)


def test_table_is_that_of_whispers_tokenizer():
    whisper = pytest.importorskip("transformers.models.whisper.tokenization_whisper")
    assert languages.NAMES == whisper.LANGUAGES
    assert {name: languages.find(name) for name in whisper.TO_LANGUAGE_CODE} == whisper.TO_LANGUAGE_CODE


def test_recipe_in_any_notation_has_the_same_digest():
    plain = recipes.load("tour")
    for written in ("Swedish", "sv-SE", "SV"):
        recipe = recipes.load("tour", {"language": written})
        assert recipe == plain
        assert recipes.digest(recipe.settings()) == recipes.digest(plain.settings())
