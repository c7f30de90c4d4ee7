from __future__ import annotations

import itertools
import json
import re

import pydantic
import pytest

from pipelines.inference import subtitles
from pipelines.inference.transcript import Segment, Transcript, Word, join_texts


def transcript(*segments: tuple[float, float, str]) -> Transcript:
    made = tuple(Segment(a, b, text, tuple(Word(word, 0.5) for word in text.split())) for a, b, text in segments)
    return Transcript(" ".join(segment.text for segment in made), 10.0, 0.5, made)


def test_srt_is_numbered_and_timed():
    told = subtitles.srt(transcript((0.0, 1.5, "Hej på dig!"), (3_661.25, 3_662.0, "Åäö.")))
    assert told == ("1\n00:00:00,000 --> 00:00:01,500\nHej på dig!\n\n2\n01:01:01,250 --> 01:01:02,000\nÅäö.\n\n")


def test_vtt_has_header_decimal_points_and_no_markup():
    told = subtitles.vtt(transcript((0.0, 1.5, "a < b & c > d")))
    assert told == "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &lt; b &amp; c &gt; d\n\n"


ANNA, ERIK = Segment(0, 2, "Hej hå", speaker="Anna"), Segment(1, 1.5, "Ja & <nej>", speaker="Erik")
INTERVIEW = Transcript(join_texts((ANNA, ERIK)), 3.0, 0.1, (ANNA, ERIK))


def test_speakers_are_named_in_every_format():
    assert INTERVIEW.text == subtitles.text(INTERVIEW).strip() == "Anna: Hej hå\nErik: Ja & <nej>"
    assert subtitles.srt(INTERVIEW) == "1\n00:00:00,000 --> 00:00:02,000\nAnna: Hej hå\nErik: Ja & <nej>\n\n"
    cue = "<v Anna>Anna: Hej hå</v>\n<v Erik>Erik: Ja &amp; &lt;nej&gt;</v>"
    assert subtitles.vtt(INTERVIEW) == f"WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n{cue}\n\n"
    table = [line.split("\t") for line in subtitles.tsv(INTERVIEW).splitlines()]
    assert table == [
        ["start", "end", "text", "speaker"],
        ["0", "2000", "Hej hå", "Anna"],
        ["1000", "1500", "Ja & <nej>", "Erik"],
    ]
    segments = subtitles.as_dict(INTERVIEW, "sv")["segments"]
    assert [(one["speaker"], one["text"]) for one in segments] == [("Anna", " Hej hå"), ("Erik", " Ja & <nej>")]


def test_words_are_underlined_one_after_another():
    one = timed((0.5, 1.5, "Hej hå!"))
    style = subtitles.Style(highlight_words=True)
    cues = ["0,500 --> 00:00:01,000\n<u>Hej</u> hå!", "1,000 --> 00:00:01,500\nHej <u>hå!</u>"]
    blocks = [f"{number}\n00:00:0{cue}" for number, cue in zip("12", cues, strict=True)]
    assert subtitles.srt(one, style).strip().split("\n\n") == blocks
    assert "\nHej <u>hå!</u>\n" in subtitles.vtt(one, style)


def test_tsv_is_that_of_whisper():
    assert (
        subtitles.tsv(transcript((0.5, 1.5, "Hej"), (2, 3, "hå")))
        == "start\tend\ttext\n500\t1500\tHej\n2000\t3000\thå\n"
    )


def test_text_has_one_line_per_segment():
    assert subtitles.text(transcript((0, 1, "ett"), (2, 3, "två"))) == "ett\ntvå\n"
    silent = Transcript("", 3.0, 0.1)
    assert [write(silent) for write in (subtitles.text, subtitles.srt)] == ["", ""]
    assert subtitles.vtt(silent) == "WEBVTT\n\n"
    assert json.loads(subtitles.verbose_json(silent))["segments"] == []


# ---- other people's programs: implemented from their documentation


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class SdkWord(_Strict):
    word: str
    start: float
    end: float


class SdkSegment(_Strict):
    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class SdkTranscription(_Strict):
    """What the AI SDK and OpenAI's clients require of verbose_json."""

    task: str
    text: str
    language: str
    duration: float
    segments: list[SdkSegment]
    words: list[SdkWord] | None = None


def timed(*segments: tuple[float, float, str]) -> Transcript:
    """Return a transcript whose words share the time of their segment equally."""
    parts = []
    for start, end, text in segments:
        words = text.split()
        edges = [round(start + (end - start) * n / len(words), 3) for n in range(len(words) + 1)]
        times = zip(words, itertools.pairwise(edges), strict=True)
        parts.append(Segment(start, end, text, tuple(Word(word, 0.5, a, b) for word, (a, b) in times)))
    return Transcript(" ".join(part.text for part in parts), 10.0, 0.5, tuple(parts))


def stamp(time_s: float, mark: str) -> str:
    assert time_s >= 0
    hours, rest = divmod(round(time_s * 1000), 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


def whisper_cues(result: dict, highlight: bool) -> list[tuple[float, float, str]]:
    """The cues of openai-whisper's subtitle writers: of segments, or of words if the first segment has them.

    With `highlight` each word is a cue of its own in which it is underlined, and the gaps are cues, too.
    """
    cues = []
    for segment in result["segments"]:
        if "words" not in result["segments"][0]:
            cues.append((segment["start"], segment["end"], segment["text"].strip().replace("-->", "->")))
            continue
        words = [word["word"] for word in segment["words"]]
        if not highlight:
            cues.append((segment["words"][0]["start"], segment["words"][-1]["end"], "".join(words).strip()))
            continue
        last = segment["words"][0]["start"]
        for n, word in enumerate(segment["words"]):
            if word["start"] > last:
                cues.append((last, word["start"], "".join(words).strip()))
            line = [re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", one) if i == n else one for i, one in enumerate(words)]
            cues.append((word["start"], word["end"], "".join(line).strip()))
            last = word["end"]
    return cues


def read_cues(text: str, mark: str) -> list[tuple[float, float, str]]:
    """Parse srt (`mark` is a comma) or vtt strictly: numbers, order, positive durations, one blank line after a cue."""
    if mark == ".":
        assert text.startswith("WEBVTT\n\n")
        text = text.removeprefix("WEBVTT\n\n")
    assert not text or text.endswith("\n\n")
    cues, clock = [], rf"(\d\d+):([0-5]\d):([0-5]\d){re.escape(mark)}(\d{{3}})"
    for number, block in enumerate(text.split("\n\n")[:-1], 1):
        head, *lines = block.split("\n")
        if mark == ",":
            assert head == str(number)
            head, *lines = lines
        times = re.fullmatch(rf"{clock} --> {clock}", head)
        values = [int(group) for group in times.groups()]
        start, end = (h * 3600 + m * 60 + s + ms / 1000 for h, m, s, ms in (values[:4], values[4:]))
        assert start < end, "webvtt and players refuse a cue of no duration"
        assert lines and all(line.strip() for line in lines) and "-->" not in "".join(lines)
        assert not cues or start >= cues[-1][0]
        cues.append((start, end, "\n".join(lines)))
    return cues


SEGMENTS = [(0.5, 1.5, "Hej hå"), (2.0, 61.25, "Det var en gång"), (61.25, 62.0, "slut.")]


@pytest.mark.parametrize("make", [transcript, timed])
def test_verbose_json_has_the_fields_of_openai(make):
    result = json.loads(subtitles.verbose_json(make(*SEGMENTS)))
    SdkTranscription.model_validate_json(json.dumps(result))
    assert (result["task"], result["language"], result["duration"]) == ("transcribe", "swedish", 10.0)
    assert result["text"] == "Hej hå Det var en gång slut."
    assert "".join(segment["text"] for segment in result["segments"]) == f" {result['text']}"
    first = result["segments"][0]
    assert (first["id"], first["seek"], first["start"], first["end"]) == (0, 50, 0.5, 1.5)
    assert (first["confidence"], first["word_confidences"]) == (0.5, [0.5, 0.5])
    has_times = make is timed
    assert ("words" in result) == has_times
    assert all(("words" in segment) == has_times for segment in result["segments"])
    if has_times:
        assert first["words"][1] == {"word": " hå", "start": 1.0, "end": 1.5, "probability": 0.5}
        assert [word["word"] for word in result["words"]] == result["text"].split()


@pytest.mark.parametrize("highlight", [False, True])
@pytest.mark.parametrize("make", [transcript, timed])
def test_whispers_own_writers_read_the_json(make, highlight):
    result = json.loads(subtitles.verbose_json(make(*SEGMENTS)))
    cues = whisper_cues(result, highlight)
    plain = [re.sub("</?u>", "", text) for _, _, text in cues]
    is_by_word = highlight and make is timed
    assert plain == [text for _, _, text in SEGMENTS for _ in range(len(text.split()) if is_by_word else 1)]
    if is_by_word:
        assert cues[1] == (1.0, 1.5, "Hej <u>hå</u>")
    for mark in (",", "."):
        blocks = [f"{stamp(a, mark)} --> {stamp(b, mark)}\n{text}\n\n" for a, b, text in cues]
        text = "".join(f"{n}\n{block}" for n, block in enumerate(blocks, 1)) if mark == "," else "".join(blocks)
        assert len(read_cues(text if mark == "," else f"WEBVTT\n\n{text}", mark)) == len(cues)
    rows = [f"{round(1000 * s['start'])}\t{round(1000 * s['end'])}\t{s['text'].strip()}" for s in result["segments"]]
    assert rows[0] == "500\t1500\tHej hå"
    assert [s["text"].strip() for s in result["segments"]] == [text for _, _, text in SEGMENTS]


def test_transcript_without_words_has_empty_lists():
    silent = Transcript("", 3.0, 0.1)
    assert "words" not in subtitles.as_dict(silent, "sv")
    result = subtitles.as_dict(silent, "no", word_times=True)
    assert (result["language"], result["segments"], result["words"]) == ("norwegian", [], [])
    SdkTranscription.model_validate(result)
