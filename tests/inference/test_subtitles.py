from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.inference import subtitles
from pipelines.inference.transcript import Segment, Transcript, Word

WORDS = "Det var en gång en gumma som bodde i ett litet hus långt inne i den djupa skogen med sin katt".split()


def transcript(*segments: tuple[float, float, str]) -> Transcript:
    made = tuple(Segment(a, b, text, tuple(Word(word, 0.5) for word in text.split())) for a, b, text in segments)
    return Transcript(" ".join(segment.text for segment in made), 10.0, 0.5, made)


def test_srt_is_numbered_and_timed():
    told = subtitles.srt(transcript((0.0, 1.5, "Hej på dig!"), (3_661.25, 3_662.0, "Åäö.")))
    assert told == ("1\n00:00:00,000 --> 00:00:01,500\nHej på dig!\n\n2\n01:01:01,250 --> 01:01:02,000\nÅäö.\n\n")


def test_vtt_has_header_decimal_points_and_no_markup():
    told = subtitles.vtt(transcript((0.0, 1.5, "a < b & c > d")))
    assert told == "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &lt; b &amp; c &gt; d\n\n"


def test_text_has_one_line_per_segment():
    assert subtitles.text(transcript((0, 1, "ett"), (2, 3, "två"))) == "ett\ntvå\n"
    silent = Transcript("", 3.0, 0.1)
    assert [write(silent) for write in (subtitles.text, subtitles.srt)] == ["", ""]
    assert subtitles.vtt(silent) == "WEBVTT\n\n"
    assert json.loads(subtitles.verbose_json(silent))["segments"] == []


def test_verbose_json_has_the_fields_of_openai_clients():
    told = json.loads(subtitles.verbose_json(transcript((0.5, 1.5, "Hej hå"))))
    assert told["text"] == "Hej hå"
    assert told["duration"] == 10.0
    assert told["language"] == "sv"
    (segment,) = told["segments"]
    assert (segment["id"], segment["start"], segment["end"], segment["text"]) == (0, 0.5, 1.5, "Hej hå")
    assert segment["confidence"] == 0.5
    assert [word["word"] for word in segment["words"]] == ["Hej", "hå"]


@given(st.lists(st.sampled_from(WORDS), max_size=80), st.floats(0.1, 30), st.floats(0, 4_000))
def test_cues_contain_every_word_once_in_order(words, duration_s, start_s):
    segment = Segment(start_s, start_s + duration_s, " ".join(words))
    cues = subtitles.split_into_cues(segment)
    assert " ".join(lines for _, _, lines in cues).split() == words
    assert all(len(lines.split("\n")) <= 2 for _, _, lines in cues)
    assert all(len(line) <= subtitles.LINE_CHARS for _, _, lines in cues for line in lines.split("\n"))
    if cues:
        assert cues[0][0] == start_s
        assert cues[-1][1] == pytest.approx(start_s + duration_s)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(cues))


def test_word_longer_than_a_line_is_on_its_own_line():
    cues = subtitles.split_into_cues(Segment(0, 2, f"ett {'långt' * 12} ord"))
    assert [line for _, _, lines in cues for line in lines.split("\n")] == ["ett", "långt" * 12, "ord"]


def test_long_segment_has_several_cues():
    cues = subtitles.split_into_cues(Segment(0, 28, " ".join(WORDS * 2)))
    assert len(cues) >= 4
    assert all(end - start < 10 for start, end, _ in cues)
