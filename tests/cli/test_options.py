"""Options that name fields of DecodingOptions."""

import pytest

from pipelines.cli.options import decoding_changes
from pipelines.infra.errors import LabError
from pipelines.recipes import languages

NONE = dict.fromkeys(("beam_size", "patience", "length_penalty", "vocabulary", "task")) | dict.fromkeys(
    ("temperature", "prompt", "hotwords", "suppress_tokens"), ""
)


def test_no_options_change_nothing():
    assert decoding_changes(NONE) == {}


def test_options_become_decoding_options(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffÅgesta\n\n Elfwing \n", "utf-8")
    changes = decoding_changes(
        {
            **NONE, "beam_size": 3, "temperature": "0, 0.4", "hotwords": "Umeå, Åre", "suppress_tokens": "5,7",
            "vocabulary": tmp_path / "names.txt", "prompt": "Hej", "task": "translate",
        }
    )  # fmt: skip
    assert changes == {
        "beam_size": 3, "temperatures": (0.0, 0.4), "hotwords": ("Umeå", "Åre", "Ågesta", "Elfwing"),
        "suppress_tokens": (5, 7), "prompt": "Hej", "task": "translate",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": "hot"}, "--temperature must be numbers, separated by commas, got 'hot'"),
        ({"temperature": "1.5"}, "temperature must be one or more numbers from 0 to 1"),
        ({"temperature": "nan"}, "temperature must be one or more numbers from 0 to 1"),
        ({"suppress_tokens": "1.5"}, "--suppress-tokens must be whole numbers"),
        ({"suppress_tokens": "-1"}, "suppress_tokens must be token ids from 0"),
        ({"beam_size": 0}, "beam_size must be a whole number from 1 to 32, got 0"),
        ({"prompt": "hej \ud800"}, "prompt must be text that UTF-8 can encode"),
        ({"hotwords": "x\udfff"}, "hotwords must be text that UTF-8 can encode"),
        ({"patience": float("nan")}, "patience must be a number from 0.1 to 10"),
        ({"task": "sing"}, "task must be one of transcribe, translate, got 'sing'"),
    ],
)
def test_wrong_value_is_refused_before_a_model_is_loaded(changes, message):
    with pytest.raises(LabError, match=message.replace("(", r"\(")):
        decoding_changes({**NONE, **changes})


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_vocabulary_is_one_line(tmp_path, content):
    path = tmp_path / "names.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(LabError, match="--vocabulary must be a text file with a word in each line"):
        decoding_changes({**NONE, "vocabulary": path})


def test_transcribe_passes_auto_on_to_the_transcriber():
    assert [languages.parse_or_auto(text) for text in ("AUTO", "", "sv-SE", "Danish")] == ["auto", "", "sv", "da"]
