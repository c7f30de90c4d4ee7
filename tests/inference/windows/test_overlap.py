"""Speech without a pause, cut into windows that overlap."""

import numpy as np
import pytest

from pipelines.inference.windows import overlap
from pipelines.inference.windows.decoding import Decoded
from pipelines.inference.windows.overlap import TimedWord
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings.segmentation import Window
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.engines.fallback import Accepted


def window(start_s, end_s, is_cut=True):
    n = round((end_s - start_s) * SAMPLE_RATE_HZ)
    first = round(start_s * SAMPLE_RATE_HZ)
    return Window(np.arange(first, first + n, dtype=np.float32), start_s, ((start_s, end_s),), is_cut)


def test_windows_that_touch_overlap_by_a_second():
    first, second, third = overlap.overlapped([window(0, 10), window(10, 18), window(19, 21)])
    assert (first.start_s, len(first.samples)) == (0, 11 * SAMPLE_RATE_HZ)
    assert (second.start_s, len(second.samples)) == (9.0, 9 * SAMPLE_RATE_HZ)
    assert second.samples[0] == 9 * SAMPLE_RATE_HZ
    assert (third.start_s, len(third.samples)) == (19, 2 * SAMPLE_RATE_HZ)
    assert [one.speech for one in (first, second, third)] == [((0, 10),), ((10, 18),), ((19, 21),)]


def test_windows_around_a_short_pause_do_not_overlap():
    windows = [window(0, 10, is_cut=False), window(10, 18)]
    assert [len(one.samples) for one in overlap.overlapped(windows)] == [len(one.samples) for one in windows]


def words(text):
    """Return the words of `det@1.5 är@2.0`."""
    return [TimedWord(word, float(start)) for word, start in (part.split("@") for part in text.split())]


@pytest.mark.parametrize(
    ("a", "b", "kept"),
    [
        # both have the word at the cut: it is written once, and whole
        ("en@8.1 lång@9.2 promenad@9.9 i@10.8", "lång@9.3 promenad@10.0 i@10.9 solen@11.2", "en lång promenad i solen"),
        # a word that the second window has only the end of
        ("hon@9.0 undersökte@9.4", "sökte@9.1 boken@10.3", "hon undersökte boken"),
        # no word in common: the cut decides
        ("två@9.5 fel@10.4", "tva@9.6 rätt@10.4", "två rätt"),
        # the same word far apart is another word
        ("ja@8.2 det@9.8", "är@10.1 ja@10.9", "ja det är ja"),
        # other punctuation and capitals
        ("slut.@9.7 På@10.2", "på@10.3 måndag@10.8", "slut. På måndag"),
    ],
)
def test_each_word_at_the_seam_is_written_once(a, b, kept):
    left, right = words(a), words(b)
    end, start = overlap.seam(left, right, 10.0)
    assert " ".join(word.text for word in left[:end] + right[start:]) == kept


def decoded(text, start_s):
    hypothesis = Hypothesis(text, -0.1, 5, tuple((word, -0.1) for word in text.split()))
    return Decoded(window(start_s, start_s + 11), None, Accepted(hypothesis))


def test_parts_share_their_words():
    starts = {"det är en lång": [8.0, 9.0, 9.6, 10.2], "en lång promenad": [9.6, 10.2, 10.9]}
    windows = [window(0, 10), window(10, 20)]
    parts = [[decoded("det är en lång", 0)], [decoded("en lång promenad", 9)]]
    (first,), (second,) = overlap.share_words(windows, parts, lambda part: starts[part.accepted.hypothesis.text])
    assert first.accepted.hypothesis.text + " | " + second.accepted.hypothesis.text == "det är en lång | promenad"
    assert (first.starts, second.starts) == ([8.0, 9.0, 9.6, 10.2], [10.9])
    assert [word for word, _ in second.accepted.hypothesis.words] == ["promenad"]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([window(0, 10), window(11, 20)], ["ett två", "två tre"]),
        ([window(0, 10), window(10, 20)], ["ett två", "tre"]),  # by the numbers of characters
    ],
)
def test_words_without_times_are_shared_by_characters(windows, expected):
    parts = [[decoded("ett två", 0)], [decoded("två tre", 9)]]
    shared = overlap.share_words(windows, parts, lambda part: [])
    assert [part.accepted.hypothesis.text for (part,) in shared] == expected
