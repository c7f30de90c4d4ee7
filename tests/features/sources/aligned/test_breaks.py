"""Subtitles whose shift changes, and other texts that are not those of the whole recording."""

import random

import numpy as np
import pytest

from pipelines.features.sources.aligned import matching
from pipelines.features.sources.aligned.hypotheses import DecodedWindow
from pipelines.features.sources.aligned.texts import Line
from pipelines.features.sources.synthetic import tour_text

N = 120
SENTENCES = tour_text.hand_sentences()[:N]
WORD_S, PAUSE_S = 0.4, 0.6


def recorded(shift_s, drift=1.0, right=1.0):
    """Sentences as lines with stated times, as windows with a share of right letters, and their real times."""
    rng = random.Random(0)
    lines, windows, real_s, now_s = [], [], [], 10.0
    for n, text in enumerate(SENTENCES):
        words = text.split()
        starts_s = [now_s + WORD_S * i + rng.gauss(0, 0.05) for i in range(len(words))]
        end_s = now_s + WORD_S * len(words)
        heard = ["".join(c if rng.random() < right else rng.choice("aeimnorst") for c in word) for word in words]
        windows.append(DecodedWindow(now_s, end_s, [[now_s, end_s]], heard, starts_s))
        lines.append(Line(text, drift * now_s + shift_s(n), drift * end_s + shift_s(n)))
        real_s.append((now_s, end_s))
        now_s = end_s + PAUSE_S
    return lines, windows, np.array(real_s)


SHIFTS = {
    "one break": lambda n: 2 + 20 * (n >= 80),
    "two breaks": lambda n: 2 + 20 * (n >= 40) + 20 * (n >= 80),
    "a cut in the subtitles": lambda n: 22 - 20 * (n >= 80),
    "a second file that begins at 0": lambda n: 2 - 230 * (n >= 70),
    "a short part": lambda n: 2 + 20 * (n >= 110),
    "a small shift": lambda n: 2 + 1.5 * (n >= 80),
}


@pytest.mark.parametrize("right", [1.0, 0.8])
@pytest.mark.parametrize("drift", [1.0, 1.03])
@pytest.mark.parametrize("shift_s", SHIFTS.values(), ids=SHIFTS)
def test_lines_beside_a_break_have_exact_times(shift_s, drift, right):
    lines, windows, real_s = recorded(shift_s, drift, right)
    predicted = matching.predict(lines, windows)
    distances_s = np.abs(predicted.times_s - real_s).max(axis=1)
    assert predicted.is_exact.mean() > 0.95
    assert distances_s[predicted.is_exact].max() < 0.3


def test_line_between_two_sections_may_be_in_either():
    lines, windows, real_s = recorded(SHIFTS["one break"])
    for n in (79, 80):
        windows[n] = DecodedWindow(windows[n].start_s, windows[n].end_s, windows[n].stretches, [], [])
    predicted = matching.predict(lines, windows)
    assert np.flatnonzero(~predicted.is_exact).tolist() == [79, 80]
    assert (predicted.times_s[79:81, 0] < real_s[79:81, 0] + 0.2).all()
    assert (predicted.times_s[79:81, 1] > real_s[79:81, 1] - 0.2).all()


def test_lines_far_outside_all_matches_are_not_exact():
    lines, windows, _ = recorded(lambda n: 2.0)
    predicted = matching.predict(lines, windows[:80])
    assert predicted.is_exact[:80].all()
    assert not predicted.is_exact[100:].any()


def test_label_of_zero_length_does_not_fail_the_fit():
    lines, windows, _ = recorded(lambda n: 12.0)
    long = Line(" ".join(SENTENCES[:6]), 0.0, 0.0)
    predicted = matching.predict([long, *lines[6:]], windows)
    assert predicted.is_exact[1:].mean() > 0.95


def test_times_that_vary_from_cue_to_cue_are_not_exact():
    rng = random.Random(1)
    lines, windows, _ = recorded(lambda n: rng.gauss(0, 2.0))
    assert not matching.predict(lines, windows).is_exact.any()


def test_break_too_small_to_find_leaves_no_wrong_exact_time():
    lines, windows, real_s = recorded(lambda n: 2 + 0.8 * (n >= 108), right=0.7)
    predicted = matching.predict(lines, windows)
    distances_s = np.abs(predicted.times_s - real_s).max(axis=1)
    assert distances_s[predicted.is_exact].max() < 0.35


@pytest.mark.parametrize("drift", [1.0, 1.03])
def test_condensed_text_has_one_shift(drift):
    lines, windows, real_s = recorded(lambda n: 2.0, drift)
    condensed = [Line(" ".join(line.text.split()[::2]), line.start_s, line.end_s) for line in lines[::2]]
    kept = [line for pair in zip(condensed, lines[1::2], strict=True) for line in pair]
    predicted = matching.predict(kept, windows)
    assert predicted.is_exact.all()
    assert np.abs(predicted.times_s - real_s).max() < 0.3


def test_manuscript_begins_later_and_skips_a_chapter():
    lines, windows, real_s = recorded(lambda n: 0.0)
    numbers = [*range(15, 60), *range(80, N)]
    predicted = matching.predict([Line(lines[n].text) for n in numbers], windows)
    assert not predicted.is_exact.any()
    starts_s = real_s[numbers, 0]
    assert np.abs(predicted.times_s[:, 0] - starts_s).max() < 2.5
