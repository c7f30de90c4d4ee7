"""Annotations with several tiers: which of them hold the text, and what is refused."""

import pytest

from pipelines.features.sources.aligned import texts
from pipelines.infra.errors import LabError

WORDS = [(0, 0.4, "vi"), (0.4, 0.9, "går"), (0.9, 1.5, ""), (1.5, 2.0, "hem"), (2.0, 2.6, "nu")]
PHONES = [
    *[(0, 0.2, "v"), (0.2, 0.4, "iː"), (0.4, 0.6, "ɡ"), (0.6, 0.8, "oː"), (0.8, 0.9, "r"), (0.9, 1.5, "")],
    *[(1.5, 1.7, "h"), (1.7, 1.8, "ɛ"), (1.8, 2.0, "mː"), (2.0, 2.2, "n"), (2.2, 2.6, "ʉː")],
]
JOINED = [("vi går", 0, 0.9), ("hem nu", 1.5, 2.6)]
SENTENCE = [(0, 2.6, "Vi går hem nu."), (2.6, 3, "")]


def later(units, s=5.0):
    return [(start + s, end + s, text) for start, end, text in units]


def grid(path, **tiers):
    """Write a TextGrid, in Praat's short form."""
    rows = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "0", "9", "<exists>", str(len(tiers))]
    for name, units in tiers.items():
        rows += ['"IntervalTier"', f'"{name}"', "0", "9", str(len(units))]
        rows += [f'{start}\n{end}\n"{text}"' for start, end, text in units]
    path.write_text("\n".join(rows), "utf-8")
    return path


@pytest.mark.parametrize(
    ("tiers", "lines"),
    [
        ({"words": WORDS, "phones": PHONES}, [(*line, "") for line in JOINED]),
        ({"fon": PHONES, "x": WORDS, "yttrande": SENTENCE}, [("Vi går hem nu.", 0, 2.6, "")]),
        ({"words": WORDS}, [(*line, "") for line in JOINED]),
        (
            {
                "Anna - words": WORDS,
                "Anna - phones": PHONES,
                "Bo - words": later(WORDS[:2]),
                "Bo - phones": later(PHONES[:5]),
            },
            [*((*line, "Anna") for line in JOINED), ("vi går", 5, 5.9, "Bo")],
        ),
        ({"ORT-MAU": WORDS, "KAN-MAU": WORDS[:1] + WORDS[1:], "MAU": PHONES}, [(*line, "") for line in JOINED]),
        (
            {"ämne": [(0, 9, "hem")], "text": [*SENTENCE, *later(SENTENCE)]},
            [("Vi går hem nu.", 0, 2.6, ""), ("Vi går hem nu.", 5, 7.6, "")],
        ),
        (
            {"Anna": [(0, 8, "Det var en gång en katt.")], "Bo": [(2, 2.5, "Jaha.")]},
            [("Det var en gång en katt.", 0, 8, "Anna"), ("Jaha.", 2, 2.5, "Bo")],
        ),
        (
            {"Mas": [(0, 4, "Det var en gång en katt.")], "Bo": later(SENTENCE), "ämne": [(0, 9, "katt")]},
            [("Det var en gång en katt.", 0, 4, "Mas"), ("Vi går hem nu.", 5, 7.6, "Bo")],
        ),
        ({"text": [(0, 2.6, "Vi <p:> går hem nu.")]}, [("Vi går hem nu.", 0, 2.6, "")]),
        ({"Anna": SENTENCE, "Bo": []}, [("Vi går hem nu.", 0, 2.6, "Anna")]),
    ],
)
def test_tiers_of_the_same_speech_give_one_text(tmp_path, tiers, lines):
    found = texts.read(grid(tmp_path / "a.TextGrid", **tiers))
    assert [(one.text, one.start_s, one.end_s, one.speaker) for one in found] == lines


def test_note_names_tiers_used_and_left_out(tmp_path):
    notes = []
    texts.read(grid(tmp_path / "a.TextGrid", words=WORDS, phones=PHONES), notes.append)
    texts.read(grid(tmp_path / "b.TextGrid", words=WORDS), notes.append)
    assert notes == ["a.TextGrid: text from the tiers 'words'; left out: 'phones'"]


def test_long_speech_of_words_without_a_pause_is_divided(tmp_path):
    words = [(0.5 * n, 0.5 * n + 0.5, "hej") for n in range(60)]
    lines = texts.read(grid(tmp_path / "a.TextGrid", words=words))
    assert [line.text.count("hej") for line in lines] == [20, 20, 20]


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (
            {"sv": SENTENCE, "en": [(0, 2.6, "We are going home now.")]},
            "tiers 'sv', 'en' with units of the same length",
        ),
        ({"phones": PHONES}, "a tier of words or sentences, got 'phones'"),
    ],
)
def test_tiers_that_cannot_be_decided_are_one_line(tmp_path, tiers, message):
    with pytest.raises(LabError, match=message) as error:
        texts.read(grid(tmp_path / "a.TextGrid", **tiers))
    assert "\n" not in str(error.value)


def elan(path, *tiers):
    """Write an ELAN file of utterances of 2 s. A tier: its name, its parent and its values, in lists if divided."""
    slots = "".join(f'<TIME_SLOT TIME_SLOT_ID="t{n}" TIME_VALUE="{2000 * n}"/>' for n in range(9))
    parts = []
    for name, parent, values in tiers:
        rows = []
        for n, value in enumerate(values):
            for m, text in enumerate(value if isinstance(value, list) else [value]):
                attributes = f'ANNOTATION_ID="{name}{n}.{m}" ' + (
                    f'ANNOTATION_REF="{parent}{n}.0"' if parent else f'TIME_SLOT_REF1="t{n}" TIME_SLOT_REF2="t{n + 1}"'
                )
                kind = "REF_ANNOTATION" if parent else "ALIGNABLE_ANNOTATION"
                value_row = f"<ANNOTATION_VALUE>{text}</ANNOTATION_VALUE>"
                rows.append(f"<ANNOTATION><{kind} {attributes}>{value_row}</{kind}></ANNOTATION>")
        relation = f'PARENT_REF="{parent}"' if parent else 'PARTICIPANT="Anna"'
        parts.append(f'<TIER TIER_ID="{name}" {relation}>{"".join(rows)}</TIER>')
    path.write_text(
        f"<ANNOTATION_DOCUMENT><TIME_ORDER>{slots}</TIME_ORDER>{''.join(parts)}</ANNOTATION_DOCUMENT>", "utf-8"
    )
    return path


TEXT = ["Hej på dig.", "Vi går hem."]
LINES = [("Hej på dig.", 0, 2, "Anna"), ("Vi går hem.", 2, 4, "Anna")]


@pytest.mark.parametrize(
    "tiers",
    [
        [("ref", "", ["utt001", "utt002"]), ("tx", "ref", TEXT)],
        [("turn", "", ["", ""]), ("tx", "turn", TEXT)],
        [("tx", "", TEXT), ("ft", "tx", ["Hello there.", "We go home."])],
        [("tx", "", ["Hej på dig.", "Vi går hem."]), ("ft", "tx", ["Hello there.", ""])],
        [("ref", "", ["1", "2"]), ("tx", "ref", TEXT), ("wd", "tx", [one.split() for one in TEXT])],
        [("ref", "", ["1", "2"]), ("wd", "ref", [one.split() for one in TEXT])],
    ],
)
def test_elan_text_replaces_a_parent_of_references(tmp_path, tiers):
    found = texts.read(elan(tmp_path / "a.eaf", *tiers))
    assert [(one.text, one.start_s, one.end_s, one.speaker) for one in found] == LINES


def test_elan_references_with_two_texts_are_refused(tmp_path):
    tiers = [("ref", "", ["1", "2"]), ("tx", "ref", TEXT), ("ft", "ref", ["Hello there.", "We go home."])]
    with pytest.raises(LabError, match="tiers 'tx', 'ft'") as error:
        texts.read(elan(tmp_path / "a.eaf", *tiers))
    assert "\n" not in str(error.value)
