"""Texts beside long recordings: every format as lines with times, and one clear line for a malformed one."""

import pytest

from pipelines.features.sources.aligned import texts
from pipelines.infra.errors import LabError

SHORT_GRID = (
    'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n4\n<exists>\n1\n"IntervalTier"\n"ord"\n0\n4\n2\n'
    '0\n1.5\n""\n1.5\n4\n"Säg ""hej"" 2 gånger."\n'
)
LONG_GRID = (
    'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 4\ntiers? <exists>\nsize = 1\nitem []:\n'
    '    item [1]:\n        class = "IntervalTier"\n        name = "ord"\n        xmin = 0\n        xmax = 4\n'
    "        intervals: size = 2\n        intervals [1]:\n            xmin = 0\n            xmax = 1.5\n"
    '            text = ""\n        intervals [2]:\n            xmin = 1.5\n            xmax = 4\n'
    '            text = "Säg ""hej"" 2 gånger."\n'
)
ELAN = (
    '<?xml version="1.0" encoding="UTF-8"?><ANNOTATION_DOCUMENT><TIME_ORDER>'
    '<TIME_SLOT TIME_SLOT_ID="a" TIME_VALUE="1500"/><TIME_SLOT TIME_SLOT_ID="b" TIME_VALUE="4000"/></TIME_ORDER>'
    '<TIER PARTICIPANT="Anna"><ANNOTATION><ALIGNABLE_ANNOTATION TIME_SLOT_REF1="a" TIME_SLOT_REF2="b">'
    "<ANNOTATION_VALUE>Hej då.</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER></ANNOTATION_DOCUMENT>"
)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.srt", "1\n00:00:01,500 --> 00:00:04,000\n<i>Hej</i>\n- då.\n\n2\n", [("Hej då.", 1.5, 4, "")]),
        ("a.srt", "\ufeff1\r\n0:01,5 --> 0:04,0\r\n{\\an8}Hej då.\r\n", [("Hej då.", 1.5, 4, "")]),
        (
            "a.vtt",
            "WEBVTT\n\nNOTE Hej\n\nid\n00:01.500 --> 00:04.000 align:start\n<v.loud Anna>Hej &amp; <c>då</c>.</v>\n",
            [("Hej & då.", 1.5, 4, "Anna")],
        ),
        ("a.vtt", "WEBVTT\n\n00:01.500 --> 00:04.000\n<v A &amp; B>Hej", [("Hej", 1.5, 4, "A & B")]),
        ("a.vtt", "WEBVTT\n\n00:01.500 --> 00:04.000\n<v A>Hej\n<v B>Nej\n", [("Hej Nej", 1.5, 4, "")]),
        (
            "a.txt",
            "Hej då. Vem\när det?\n\nJag\n",
            [(text, None, None, "") for text in ("Hej då.", "Vem är det?", "Jag")],
        ),
        (
            "a.txt",
            "”Hej då.” Hon gick. (Nu!) Ja",
            [(text, None, None, "") for text in ("”Hej då.”", "Hon gick.", "(Nu!)", "Ja")],
        ),
        ("a.srt", "0:01,5 --> 0:04,0\nHej<br>då<br/>du\n", [("Hej då du", 1.5, 4, "")]),
        ("a.srt", "0:01,5 --> 0:04,0\nHej 2\n2\n0:05,0 --> 0:06,0\n3\n", [("Hej 2", 1.5, 4, ""), ("3", 5, 6, "")]),
        ("a.txt", "en rad utan punkt\n" * 80, [("en rad utan punkt", None, None, "")] * 80),
        ("a.srt", "0:01,5 --> 0:04,0\n[Musik]\n\n0:01,5 --> 0:04,0\n[skratt] Hej\n", [("[skratt] Hej", 1.5, 4, "")]),
        ("a.txt", "1.5\t4\tHej då.\n\\\t100\t200\n5\t6\t\n", [("Hej då.", 1.5, 4, "")]),
        ("a.TextGrid", SHORT_GRID, [('Säg "hej" 2 gånger.', 1.5, 4, "")]),
        ("a.TextGrid", LONG_GRID, [('Säg "hej" 2 gånger.', 1.5, 4, "")]),
        ("a.TextGrid", LONG_GRID.replace("2 gånger", "[2] gånger"), [('Säg "hej" [2] gånger.', 1.5, 4, "")]),
        ("a.eaf", ELAN, [("Hej då.", 1.5, 4, "Anna")]),
    ],
)
def test_every_format_gives_its_lines(tmp_path, name, content, lines):
    (tmp_path / name).write_text(content, "utf-8")
    assert [(one.text, one.start_s, one.end_s, one.speaker) for one in texts.read(tmp_path / name)] == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.srt", "1\n00:00:01 -> 00:00:04\nHej\n", "no line with a letter"),
        ("a.srt", "1\n1 --> 2\nHej\n", r"a\.srt:2: a cue's times"),
        ("a.srt", "1\n00:00:04,000 --> 00:00:01,000\nHej\n", r"a\.srt:2: a line must end after"),
        ("a.txt", "1\t2\tHej\nx\n", r"a\.txt:2: a label"),
        ("a.txt", "Hej " * 400, "at most 1,000 characters"),
        ("a.TextGrid", "hej", "must begin with ooTextFile"),
        ("a.TextGrid", SHORT_GRID.replace("4\n2\n", "4\n9\n"), "as many values"),
        ("a.eaf", "<a>", r"a\.eaf:1: an ELAN file must be XML"),
        ("a.eaf", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "no document type"),
        ("a.eaf", ELAN.replace("1500", "snart"), "must be milliseconds"),
    ],
)
def test_malformed_text_gives_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(LabError, match=message) as error:
        texts.read(tmp_path / name)
    assert "\n" not in str(error.value)


ROLLING_VTT = """WEBVTT
Kind: captions
Language: sv

00:00:00.160 --> 00:00:02.230 align:start position:0%
~
nu<00:00:00.400><c> kokar</c><00:00:00.900><c> vi</c><00:00:01.200><c> gröt</c>

00:00:02.230 --> 00:00:02.240 align:start position:0%
nu kokar vi gröt
~

00:00:02.240 --> 00:00:04.550 align:start position:0%
nu kokar vi gröt
med<00:00:02.600><c> mjölk</c><00:00:03.100><c> och</c><00:00:03.300><c> salt</c>

00:00:04.550 --> 00:00:04.560 align:start position:0%
med mjölk och salt
~

00:00:04.560 --> 00:00:07.000 align:start position:0%
med mjölk och salt
[Musik]

00:00:07.000 --> 00:00:07.010 align:start position:0%
[Musik]
~

00:00:07.010 --> 00:00:09.000 align:start position:0%
[Musik]
med<00:00:07.200><c> mjölk</c><00:00:08.100><c> och</c><00:00:08.300><c> salt</c>
""".replace("~", " ")
"""In the style of captions that a video site makes: a row stays on the screen while the next one is spoken."""


def test_rolling_captions_are_read_once(tmp_path):
    path = tmp_path / "a.vtt"
    path.write_text(ROLLING_VTT, "utf-8")
    assert [(line.text, line.start_s) for line in texts.read(path)] == [
        ("nu kokar vi gröt", 0.16),
        ("med mjölk och salt", 2.24),
        ("med mjölk och salt", 7.01),  # said again
    ]


def test_rolling_rows_of_srt_are_read_once(tmp_path):
    said = ["god morgon", "ja", "ja", "vi börjar", "med lite sång", "och sedan fika"]
    rows = [said[:1], *(said[n : n + 2] for n in range(len(said) - 1))]
    cues = [f"{n}\n00:00:{2 * n:02},000 --> 00:00:{2 * n + 2:02},000\n" + "\n".join(row) for n, row in enumerate(rows)]
    (tmp_path / "a.srt").write_text("\n\n".join(cues), "utf-8")
    assert [line.text for line in texts.read(tmp_path / "a.srt")] == said


def test_words_said_twice_stay_in_other_subtitles(tmp_path):
    said = ["Ja.", "Ja.", "Ja.", "Ja.", "Vi går.", "Vart då?", "Hem.", "Nu?", "Genast."]
    cues = [f"{n}\n00:00:{2 * n:02},000 --> 00:00:{2 * n + 1:02},000\n{text}\n" for n, text in enumerate(said)]
    (tmp_path / "a.srt").write_text("\n".join(cues), "utf-8")
    assert [line.text for line in texts.read(tmp_path / "a.srt")] == said
