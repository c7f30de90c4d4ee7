"""Lines placed in the speech of a recording, and the groups that are refused without asking the model."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.features.sources.aligned import passages, places
from pipelines.features.sources.aligned.hypotheses import DecodedWindow, Recording
from pipelines.features.sources.aligned.matching import Prediction
from pipelines.features.sources.aligned.texts import Line
from pipelines.whisper.engines.forced import ForcedLine

EVERY_S, SPOKEN_S = 3.0, 2.0
LETTERS = 24


def recording(n):
    """A recording of `n` stretches of two seconds, padded by 0.1 s."""
    stretches = [[EVERY_S * i - 0.1, EVERY_S * i + SPOKEN_S + 0.1] for i in range(1, n + 1)]
    return Recording([DecodedWindow(2.0, EVERY_S * (n + 1), stretches, [], [])], EVERY_S * (n + 1))


def lines_at(*starts_s, letters=LETTERS, spoken_s=SPOKEN_S):
    """Lines of equal length with their times, as subtitles state them."""
    lines = [Line("a" * letters, start_s, start_s + spoken_s) for start_s in starts_s]
    return lines, Prediction(np.array([[line.start_s, line.end_s] for line in lines]), np.ones(len(lines), dtype=bool))


def accept_all(path, start_s, end_s, texts):
    return [ForcedLine(0.0, -0.5, -1.0)] * len(texts)


def passages_of(n, lines, predicted, force=accept_all):
    return list(passages.find_passages(Path("a.wav"), recording(n), lines, predicted, force, -9.0))


@pytest.mark.parametrize("late_s", [-0.3, 0.0, 0.3])
def test_line_takes_the_stretch_that_its_times_name(late_s):
    found = passages_of(3, *lines_at(*(EVERY_S * i + late_s for i in (1, 2, 3))))
    assert [(round(one.start_s, 3), round(one.end_s, 3), one.reason) for one in found] == [
        (3.0, 5.0, ""), (6.0, 8.0, ""), (9.0, 11.0, "")
    ]  # fmt: skip


def test_speech_without_line_stays_outside_its_neighbours():
    found = passages_of(3, *lines_at(3.0, 9.0))
    assert [one.start_s for one in found if not one.reason] == [3.0, 9.0]
    assert [(one.reason, one.text) for one in found if one.reason] == [("no_match", "")]


def test_line_that_holds_too_little_of_its_speech_is_refused():
    found = passages_of(1, *lines_at(3.0, spoken_s=1.0, letters=LETTERS // 2))
    assert [one.reason for one in found] == ["no_match"]
    assert "have no line" in found[0].detail


@pytest.mark.parametrize(("text", "reason"), [("a" * 16, "paraphrased"), ("a" * 18, ""), ("aaaaaaaaaaaaaaa 250", "")])
def test_text_with_few_letters_for_its_sound_is_refused(text, reason):
    lines, predicted = lines_at(3.0, 6.0, 9.0, 12.0)
    lines[1] = Line(text, 6.0, 8.0)
    found = {one.text: one.reason for one in passages_of(4, lines, predicted)}
    assert found[text] == reason
    assert found["a" * LETTERS] == ""


def test_lines_of_one_stretch_are_one_clip():
    found = passages_of(1, *lines_at(3.0, 4.0, spoken_s=1.0, letters=LETTERS // 2))
    assert [(one.start_s, one.end_s, one.text.count(" ")) for one in found] == [(3.0, 5.0, 1)]


def test_short_line_joins_the_next_but_not_a_distant_one():
    window = DecodedWindow(0.0, 20.0, [[1.0, 1.6], [2.0, 4.2], [15.0, 15.6], [18.0, 20.2]], [], [])
    placed = [places.Placed(Line("a"), start_s, start_s + 0.4) for start_s in (1.1, 2.1, 15.1, 18.1)]
    found = [len(group.lines) for group in places.grouped(placed, [window])]
    assert found == [2, 1, 1]


def test_model_refuses_a_text_of_which_one_token_is_not_said():
    def force(path, start_s, end_s, texts):
        return [ForcedLine(0.0, -1.0, -9.5 if start_s == 3.0 else -8.5)] * len(texts)

    found = passages_of(2, *lines_at(3.0, 6.0), force)
    assert {one.start_s: one.reason for one in found} == {3.0: "paraphrased", 6.0: ""}


@pytest.mark.parametrize(("spoken_s", "reason"), [(6.0, "wrong_language"), (4.5, "no_match")])
def test_long_speech_without_line_names_its_language(spoken_s, reason):
    window = DecodedWindow(2.0, 12.0, [[3.0, 3.0 + spoken_s]], ["hello"], [3.0])
    asked = []

    def detect_other(path, start_s, end_s):
        asked.append((start_s, end_s))
        return "English (probability 0.93)"

    predicted = Prediction(np.zeros((0, 2)), np.zeros(0, dtype=bool))
    (found,) = passages.find_passages(
        Path("a.wav"), Recording([window], 12.0), [], predicted, accept_all, -9.0, detect_other
    )
    assert found.reason == reason
    assert ("sounds like English" in found.detail) == (reason == "wrong_language") == bool(asked)


@pytest.mark.parametrize(("logprob", "reason"), [(-5.0, "wrong_language"), (-3.0, "paraphrased")])
def test_only_a_line_that_does_not_fit_is_asked_for_its_language(logprob, reason):
    def force(path, start_s, end_s, texts):
        return [ForcedLine(0.0, logprob, -20.0)] * len(texts)

    window = DecodedWindow(2.0, 12.0, [[2.9, 9.1]], [], [])
    lines, predicted = lines_at(3.0, spoken_s=6.0)
    found = passages.find_passages(
        Path("a.wav"), Recording([window], 12.0), lines, predicted, force, -9.0, lambda *part: "English"
    )
    assert [one.reason for one in found] == [reason]


def test_text_beyond_the_decoder_is_too_long():
    found = passages_of(
        1, *lines_at(3.0, 4.0, spoken_s=1.0), lambda path, start_s, end_s, texts: accept_all(path, 0, 0, "a")
    )
    assert [(one.reason, "positions" in one.detail) for one in found] == [("too_long", True)]


def test_stretch_that_is_shorter_than_its_padding_is_too_short():
    window = DecodedWindow(2.0, 3.2, [[3.0, 3.2]], [], [])
    lines, predicted = lines_at(3.0, spoken_s=0.2)
    found = passages.find_passages(Path("a.wav"), Recording([window], 3.2), lines, predicted, accept_all, -9.0)
    assert [one.reason for one in found] == ["too_short"]


def test_only_the_line_without_exact_times_is_placed_by_the_model():
    asked = []

    def force(path, start_s, end_s, texts):
        asked.append(texts)
        return [ForcedLine(EVERY_S * (n + 1) - 2.0, -0.5, -1.0) for n in range(len(texts))]

    lines, predicted = lines_at(3.3, 5.0, 9.3)
    lines = [Line(text * LETTERS, line.start_s, line.end_s) for text, line in zip("abc", lines, strict=True)]
    predicted.is_exact[1] = False
    placed = places.place(Path("a.wav"), recording(3).windows, lines, predicted, force)
    assert [one.start_s for one in placed] == [3.3, 6.0, 9.3]
    assert asked == [[line.text for line in lines]], "its neighbours are spoken in the same window"
