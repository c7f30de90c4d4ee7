"""Cues of random transcripts: the limits always hold, no word is lost, and others' parsers read the files."""

from __future__ import annotations

import html
import itertools
import random
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.inference import subtitles
from pipelines.inference.subtitles import Style, cues
from pipelines.inference.subtitles.lines import divide_word
from pipelines.inference.transcript import Segment, Transcript, Word, join_texts
from pipelines.infra.errors import LabError

WORDS = "Det var en gång en gumma, som bodde i ett litet hus. Hon, och katten; var -- borta! a<b & --> 你好".split()
WORDS.append("Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft")


def random_segments(rng: random.Random, speaker: str, has_times: bool) -> list[Segment]:
    """Return segments in order, some adjacent, with words of every speed, also of no duration."""
    segments, time_s = [], rng.choice([0.0, rng.uniform(0, 5_000)])
    for _ in range(rng.randrange(6)):
        time_s += rng.choice([0.0, 0.01, 0.07, 0.3, rng.uniform(0, 9)])
        texts, start_s, words = rng.choices(WORDS, k=rng.randrange(1, 40)), time_s, []
        for text in texts:
            end_s = time_s + rng.choice([0.0, 0.05, 0.3, rng.uniform(0, 1), rng.uniform(0, 9)])
            words.append(Word(text, 0.5, *((time_s, end_s) if has_times else ())))
            time_s = end_s + rng.choice([0.0, 0.0, 0.05])
        segments.append(Segment(start_s, time_s, " ".join(texts), tuple(words), speaker=speaker))
    return segments


def random_transcript(seed: int) -> Transcript:
    rng = random.Random(seed)
    speakers = rng.choice([[""], [""], ["Anna", "Erik"], ["Left", "A name that is longer than half of a line"]])
    segments = [one for speaker in speakers for one in random_segments(rng, speaker, rng.random() < 0.5)]
    segments.sort(key=lambda one: one.start_s)
    return Transcript(join_texts(segments), max([3.0, *(one.end_s for one in segments)]), 0.1, tuple(segments))


def n_ms(clock: str) -> int:
    hours, minutes, seconds, milliseconds = map(int, re.split("[:.,]", clock))
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds


def letters(text: str) -> str:
    return re.sub(r"\s", "", text).replace("-->", "->")


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(10, 60), st.integers(1, 4))
def test_random_cues_keep_every_limit(seed, width, count):
    transcript, style = random_transcript(seed), Style(width, count)
    divided = cues.divide(transcript, style)
    for cue in divided:
        lines = [" ".join(part.texts[a:b]) for part in cue.parts for a, b in part.lines]
        assert len(lines) <= count and all(len(line) <= width for line in lines)
        assert 0 < cue.end_ms - cue.start_ms <= 7_000
    for cue, following in itertools.pairwise(divided):
        gap = following.start_ms - cue.end_ms
        assert gap == 0 or gap >= 80
        if gap:  # there was time: it is shown long enough
            assert cue.end_ms - cue.start_ms >= min(max(cue.reading_ms, 1_000), 7_000 - 80)
    for speaker in {segment.speaker for segment in transcript.segments}:
        said = "".join(one.text for one in transcript.segments if one.speaker == speaker)
        label = cues._shortened(speaker, width)
        shown = "".join(w.text for cue in divided for part in cue.parts if part.speaker == label for w in part.words)
        assert letters(shown) == letters(said)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.booleans())
def test_parsers_of_others_read_every_file(seed, highlight):
    srt = pytest.importorskip("srt", reason="pip install -r tests/requirements.txt")
    webvtt = pytest.importorskip("webvtt", reason="pip install -r tests/requirements.txt")
    transcript, style = random_transcript(seed), Style(highlight_words=highlight)
    files = subtitles.srt(transcript, style), subtitles.vtt(transcript, style)
    read = list(srt.parse(files[0], ignore_errors=False))
    assert [one.index for one in read] == list(range(1, len(read) + 1))
    captions = list(webvtt.from_string(files[1]))
    assert [n_ms(one.start) for one in captions] == [round(1000 * cue.start.total_seconds()) for cue in read]
    assert [n_ms(one.end) for one in captions] == [round(1000 * cue.end.total_seconds()) for cue in read]
    for caption, cue in zip(captions, read, strict=True):
        assert html.unescape(caption.text).replace("-->", "->") == re.sub("</?u>", "", cue.content)
        assert cue.content.count("\n") < 2


def test_strict_reader_finds_the_same_cues():
    for seed in range(25):
        transcript = random_transcript(seed)
        text = subtitles.srt(transcript)
        assert not text or text.endswith("\n\n")
        blocks = text.split("\n\n")[:-1]
        for number, (block, cue) in enumerate(zip(blocks, cues.divide(transcript), strict=True), 1):
            head, times, *lines = block.split("\n")
            assert head == str(number) and lines and "-->" not in "".join(lines)
            assert [n_ms(clock) for clock in times.split(" --> ")] == [cue.start_ms, cue.end_ms]


def lines_of(text: str, end_s: float, start_s: float = 0.0, audio_s: float = 100.0) -> list[tuple[int, int, str]]:
    transcript = Transcript(text, audio_s, 0.1, (Segment(start_s, end_s, text),))
    blocks = subtitles.srt(transcript).strip().split("\n\n")
    cells = (block.split("\n", 2) for block in blocks)
    return [(*map(n_ms, times.split(" --> ")), text) for _, times, text in cells]


def test_cues_and_lines_end_at_clauses():
    text = (
        "Hon gick ut för att hämta vatten, men en dag var brunnen tom. Hon satte sig på trappan och tänkte länge på "
        "vad hon skulle göra. Katten sov i det lilla köket hela den långa och varma dagen."
    )
    assert [lines for _, _, lines in lines_of(text, 12.0)] == [
        "Hon gick ut för att hämta vatten,\nmen en dag var brunnen tom.",
        "Hon satte sig på trappan\noch tänkte länge på vad hon skulle göra.",
        "Katten sov i det lilla köket\nhela den långa och varma dagen.",
    ]


def test_fast_cue_stays_into_the_pause():
    text = "x" * 20 + " " + "y" * 19  # 40 characters
    assert lines_of(text, 1.0) == [(0, 2_000, text)]
    assert lines_of(text, 1.0, audio_s=1.5) == [(0, 1_500, text)]
    assert lines_of("Ja.", 0.2) == [(0, 1_000, "Ja.")]


@pytest.mark.parametrize(("gap_s", "end_ms"), [(0.05, 2_050), (0.079, 2_079), (0.08, 2_000), (3.0, 2_000)])
def test_short_gap_is_closed(gap_s, end_ms):
    segments = (Segment(0.0, 2.0, "Hej på dig, du gamla."), Segment(2.0 + gap_s, 6.0, "Hej själv, du unga. " * 3))
    assert cues.divide(Transcript("", 9.0, 0.1, segments))[0].end_ms == end_ms


def test_short_segments_share_a_cue_if_they_follow_closely():
    texts = ["Ja.", "Nej.", "Kanske det."]
    close = [Segment(0.4 * n, 0.4 * n + 0.4, text) for n, text in enumerate(texts)]
    assert len(cues.divide(Transcript("", 9.0, 0.1, tuple(close)))) == 1
    far = tuple(replace(one, start_s=5 * one.start_s, end_s=5 * one.start_s + 0.4) for one in close)
    assert len(cues.divide(Transcript("", 9.0, 0.1, far))) == 3


def test_word_longer_than_a_line_is_divided():
    assert [lines for _, _, lines in lines_of("åäö" * 20, 3.0)] == ["åäö" * 14 + "\n" + "åäö" * 6]


@pytest.mark.parametrize(
    ("letter", "n_in_line"),
    [
        ("e\u0301", 21),  # with a combining accent
        ("\U0001f469\u200d\U0001f680", 14),  # an astronaut: two emoji and a joiner
        ("\U0001f44d\U0001f3fd", 21),  # with a skin colour
        ("\u2764\ufe0f", 21),  # with a variation selector
        ("\U0001f1f8\U0001f1ea", 21),  # a flag
        ("a" + "\u0301" * 99, 0.42),  # no room: it is cut
    ],
)
def test_long_word_is_divided_between_letters_as_shown(letter, n_in_line):
    word = "!" + letter * 50 if n_in_line == 21 else letter * 50
    parts = divide_word(word, 42)
    assert "".join(parts) == word and max(map(len, parts)) <= 42
    if n_in_line >= 1:
        assert all(part.removeprefix("!").replace(letter, "") == "" for part in parts)


def test_word_times_decide_where_a_cue_begins():
    texts = (
        "Hon satte sig på trappan och tänkte länge. " + "Sedan kom katten hem till huset igen efter maten."
    ).split()
    words = tuple(Word(text, 0.5, n / 10 + 3 * (n > 7), (n + 1) / 10 + 3 * (n > 7)) for n, text in enumerate(texts))
    divided = cues.divide(Transcript("", 9.0, 0.1, (Segment(0.0, 5.0, " ".join(texts), words),)))
    assert [cue.start_ms for cue in divided] == [0, 3_800]


def test_speakers_at_once_are_shown_together_or_in_turn():
    anna = Segment(0.0, 4.0, "Det var en gång en gumma som bodde i ett litet hus i skogen.", speaker="Anna")
    erik = Segment(1.0, 1.5, "Jaha.", speaker="Erik")
    short = replace(anna, text="Det var en gång.", end_s=2.0)
    (together,) = cues.divide(Transcript("", 9.0, 0.1, (short, erik)))
    assert [part.speaker for part in together.parts] == ["Anna", "Erik"]
    assert (together.start_ms, together.end_ms) == (0, 2_000)
    first, second = cues.divide(Transcript("", 9.0, 0.1, (anna, erik)))
    assert first.end_ms == second.start_ms == first.reading_ms
    assert second.end_ms - second.start_ms == 1_000


@pytest.mark.parametrize("style", [{"max_line_width": 9}, {"max_line_count": 0}, {"max_line_width": -1}])
def test_impossible_style_is_one_line(style):
    with pytest.raises(LabError, match="at least 10 characters and at least one line"):
        Style(**style)


def test_thousand_words_are_divided_quickly():
    segments = [one for n in range(40) for one in random_segments(random.Random(n), "", True)]
    texts = [word for one in segments for word in one.words][:1_000]
    words = tuple(replace(word, start_s=0.4 * n, end_s=0.4 * n + 0.4) for n, word in enumerate(texts))
    text = " ".join(word.text for word in words)
    started = time.process_time()
    cues.divide(Transcript(text, 400.0, 1.0, (Segment(0.0, 400.0, text, words),)))
    assert time.process_time() - started < 1.0
