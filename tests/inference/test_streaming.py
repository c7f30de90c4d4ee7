from __future__ import annotations

import itertools

import numpy as np

from pipelines.inference.streaming import Stream, _common_prefix
from pipelines.inference.transcript import Segment
from tests.speech.recordings.test_segmentation import SECOND, Scripted, spoken


class Ear:
    """Decodes a window to one word for each half second of it; the last one is still half a word."""

    def __init__(self):
        self.lengths: list[float] = []

    def __call__(self, windows):
        self.lengths += [len(window.samples) / SECOND for window in windows]
        return [Segment(w.start_s, w.end_s, self.heard(len(w.samples) / SECOND)) for w in windows]

    @staticmethod
    def heard(seconds: float) -> str:
        return " ".join([f"ord{n}" for n in range(int(seconds / 0.5))] + [f"o{seconds:.2f}"])


def fed(samples, step_s=0.25, **settings):
    ear = Ear()
    stream = Stream(ear, Scripted(), **{"longest_s": 30.0, **settings})
    step = int(step_s * SECOND)
    told = [stream.feed(samples[at : at + step]) for at in range(0, len(samples), step)]
    return [*told, stream.end()], ear


def test_words_settle_when_two_decodings_agree():
    told, _ = fed(spoken(6 * SECOND, (1.0, 4.0)))
    texts = [partial.text for partial in told]
    assert texts[0] == ""
    first = next(n for n, partial in enumerate(told) if partial.text)
    assert told[first].audio_s <= 2.0, "half a second of speech is enough for a first word"
    assert told[first].settled == ""
    assert any(partial.settled for partial in told)
    assert not told[-1].settled
    assert not told[-1].open
    assert len(told[-1].segments) == 1


def test_settled_words_of_an_open_stretch_stay():
    told, _ = fed(spoken(12 * SECOND, (1.0, 9.0)))
    for before, after in itertools.pairwise(told):
        if after.segments == before.segments and after.settled:
            assert after.settled.split()[: len(before.settled.split())] == before.settled.split()


def test_finished_stretch_is_decoded_as_a_whole():
    told, _ear = fed(spoken(14 * SECOND, (1, 3), (6, 8), (10, 12)))
    counts = [len(partial.segments) for partial in told]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    for before, after in itertools.pairwise(told):
        assert after.segments[: len(before.segments)] == before.segments
    assert told[-1].text == " ".join(segment.text for segment in told[-1].segments)


def test_open_stretch_is_decoded_at_intervals():
    _, often = fed(spoken(8 * SECOND, (1, 7)), step_s=0.1, every_s=0.5)
    _, seldom = fed(spoken(8 * SECOND, (1, 7)), step_s=0.1, every_s=2.0)
    assert 10 <= len(often.lengths) <= 14
    assert len(seldom.lengths) <= 5


def test_silence_is_not_decoded():
    told, ear = fed(np.zeros(60 * SECOND, dtype=np.float32))
    assert ear.lengths == []
    assert told[-1].text == ""


def test_partial_has_latency_and_audio_duration():
    told, _ = fed(spoken(5 * SECOND, (1, 3)))
    assert told[-1].audio_s == 5
    assert all(0 <= partial.latency_s < 5 for partial in told)


def test_common_prefix():
    assert _common_prefix(["a", "b", "c"], ["a", "b", "d", "e"]) == ["a", "b"]
    assert _common_prefix([], ["a"]) == []
    assert _common_prefix(["a"], ["a", "b"]) == ["a"]
