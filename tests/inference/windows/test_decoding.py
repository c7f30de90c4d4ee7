"""Windows whose text ends before their speech does."""

import numpy as np
import pytest

from pipelines.inference.windows.decoding import WindowDecoder, remaining
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings.segmentation import Window
from pipelines.whisper import log_mel as features
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions

TWO = ((10.0, 12.0), (12.4, 14.0))
"""Two sentences in a window from 10 to 14 s."""


def window(stretches=TWO):
    noise = np.random.default_rng(0).standard_normal(4 * SAMPLE_RATE_HZ).astype(np.float32) * 0.1
    return Window(noise, 10.0, stretches)


class Sentences:
    """An engine that writes one sentence of a window, with its end as a timestamp if asked."""

    n_mels, can_align = 80, True

    def __init__(self, *hypotheses, starts=(0.0,)):
        self.left, self.starts, self.durations_s = list(hypotheses), list(starts), []

    def log_mel(self, waveform):
        self.durations_s.append(len(waveform.samples) / SAMPLE_RATE_HZ)
        return features.extract_light(waveform)

    def decode(self, windows, options=None, temperature=0.0):
        return [self.left.pop(0) for _ in windows]

    def word_starts(self, windows, frames, texts):
        return [self.starts for _ in texts]


def said(text, end_s=None):
    return Hypothesis(text, -0.1, 9, tuple((word, -0.1) for word in text.split()), 0.0, end_s)


def decode(engine, options, stretches=TWO):
    decoder = WindowDecoder(engine, True, 3000, drops_silence=False)
    (parts,) = decoder.decode([window(stretches)], options, lambda: None)
    return [(part.accepted.hypothesis.text, part.window.start_s, part.window.speech) for part in parts]


def test_window_continues_after_its_last_timestamp():
    engine = Sentences(said("Det snöar.", 2.1), said("Kom in!", 1.6))
    assert decode(engine, DecodingOptions()) == [
        ("Det snöar.", 10.0, ((10.0, 12.0),)),
        ("Kom in!", 12.4, ((12.4, 14.0),)),
    ]
    assert engine.durations_s == pytest.approx([4.0, 1.6])


@pytest.mark.parametrize(
    ("end_s", "rest"),
    [(2.1, 12.4), (2.7, 12.4), (3.2, 13.2), (3.8, None), (4.0, None), (0.1, None), (None, None)],
)
def test_rest_begins_at_the_nearest_speech(end_s, rest):
    left = remaining(window(), said("Det snöar.", end_s))
    assert left is None if rest is None else left.start_s == pytest.approx(rest)


def test_window_with_one_stretch_continues_inside_it():
    left = remaining(window(((10.0, 14.0),)), said("Det snöar.", 1.5))
    assert (left.start_s, len(left.samples)) == (11.5, int(2.5 * SAMPLE_RATE_HZ))


def test_short_text_without_timestamps_continues_at_unwritten_speech():
    engine = Sentences(said("Det snöar."), said("Kom in nu."), starts=(0.1, 0.9))
    texts = decode(engine, DecodingOptions(timestamps=False))
    assert [text for text, *_ in texts] == ["Det snöar.", "Kom in nu."]


def test_short_text_continues_within_speech_without_a_pause():
    engine = Sentences(said("Det snöar."), said("Kom in nu, sa hon till oss."), starts=(0.1, 0.9))
    parts = decode(engine, DecodingOptions(timestamps=False), ((10.0, 14.0),))
    assert [(text, round(start_s, 2)) for text, start_s, _ in parts] == [
        ("Det snöar.", 10.0),
        ("Kom in nu, sa hon till oss.", 11.6),
    ]


def test_text_with_words_in_all_speech_is_not_continued():
    engine = Sentences(said("Det snöar nu."), starts=(0.1, 0.9, 2.6))
    assert len(decode(engine, DecodingOptions(timestamps=False))) == 1


def test_word_that_seems_to_begin_before_its_speech_is_kept():
    """Attention may place the first word in the silence before it: nothing is unwritten, and no word is lost."""
    engine = Sentences(said("Hej där."), starts=(0.05, 1.0))
    texts = decode(engine, DecodingOptions(timestamps=False), ((10.2, 10.9), (11.0, 11.6)))
    assert [text for text, *_ in texts] == ["Hej där."]


def test_text_of_usual_length_is_not_aligned():
    engine = Sentences(said("Det snöar ordentligt i hela Jämtland i dag, sa hon."), starts=(0.0,))
    assert len(decode(engine, DecodingOptions(timestamps=False))) == 1


def test_window_that_never_advances_ends():
    """A model that always writes the same early timestamp."""
    engine = Sentences(*[said("Hej", 0.4)] * 20)
    assert 1 < len(decode(engine, DecodingOptions(), ((10.0, 14.0),))) <= 10
