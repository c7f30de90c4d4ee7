from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.speech.recordings import segmentation
from pipelines.speech.recordings.detection import CHUNK_SAMPLES, AnySound
from pipelines.speech.recordings.segmentation import windows

SECOND = 16_000


class Scripted:
    """Speech where the samples are not zero; it sees each chunk by itself."""

    def reset(self):
        pass

    def probabilities(self, samples):
        return (np.abs(samples.reshape(-1, CHUNK_SAMPLES)).max(axis=1) > 0).astype(np.float32)


def spoken(n_samples: int, *spans: tuple[float, float], seed: int = 0) -> np.ndarray:
    """Noise in the spans (seconds), zeros elsewhere."""
    samples = np.zeros(n_samples, dtype=np.float32)
    for start_s, end_s in spans:
        piece = slice(int(start_s * SECOND), int(end_s * SECOND))
        samples[piece] = np.random.default_rng(seed).standard_normal(len(samples[piece])) * 0.1
    return samples


def cut(samples: np.ndarray, step: int = 30 * SECOND, **settings):
    settings = {"longest_s": 30.0} | settings
    blocks = [samples[at : at + step] for at in range(0, len(samples), step)]
    return list(windows(blocks, Scripted(), **settings))


def test_each_stretch_is_a_window_with_padding():
    found = cut(spoken(20 * SECOND, (2.0, 4.0), (7.0, 9.5), (15.0, 15.5)))
    starts, ends = [window.start_s for window in found], [window.end_s for window in found]
    assert starts == pytest.approx([1.8, 6.8, 14.8], abs=0.04)
    assert ends == pytest.approx([4.2, 9.7, 15.7], abs=0.04)


def test_short_pause_joins_and_click_is_not_speech():
    found = cut(spoken(12 * SECOND, (2.0, 4.0), (4.2, 6.0), (9.0, 9.05)))
    assert len(found) == 1
    assert (found[0].start_s, found[0].end_s) == pytest.approx((1.8, 6.2), abs=0.04)


def test_silence_between_close_stretches_is_used_once():
    first, second = cut(spoken(6 * SECOND, (1.0, 2.0), (2.35, 3.5)))
    assert first.end_s > 2.1
    assert second.start_s == first.end_s


def test_stretches_are_joined_up_to_the_limit():
    speech = spoken(60 * SECOND, (1, 5), (6, 10), (11, 15), (16, 20), (40, 44))
    found = cut(speech, joined_s=10.0)
    assert [(round(w.start_s), round(w.end_s)) for w in found] == [(1, 10), (11, 20), (40, 44)]


def test_pending_window_is_released_during_silence():
    speech = spoken(300 * SECOND, (1, 5))
    blocks = (speech[at : at + SECOND] for at in range(0, len(speech), SECOND))
    found, seen = None, 0
    cutter = segmentation.WindowCutter(Scripted(), 30.0, 30.0)
    for block in blocks:
        seen += 1
        for window in cutter.feed(block):
            found = (seen, window)
        assert len(cutter.buffer) <= 35 * SECOND, "memory grows with the silence"
    assert found
    assert found[0] < 35


def test_long_stretch_is_cut_at_its_quietest_moment():
    samples = spoken(25 * SECOND, (0, 25))
    samples[int(8.6 * SECOND) : int(8.8 * SECOND)] *= 0.01
    first, *others = cut(samples, longest_s=10.0)
    assert 8.6 < first.end_s < 8.8
    assert others[0].start_s == first.end_s
    for joined_s in (0.0, 10.0):
        found = cut(samples, longest_s=10.0, joined_s=joined_s)
        assert [window.is_cut for window in found] == [True] * (len(found) - 1) + [False]


def test_pause_between_windows_is_no_cut():
    found = cut(spoken(25 * SECOND, (0, 8.8), (9.1, 20)), longest_s=12.0, joined_s=12.0)
    assert [window.is_cut for window in found] == [False, False]
    assert found[0].end_s == found[1].start_s


def test_silence_and_empty_input_have_no_windows():
    assert cut(np.zeros(40 * SECOND, dtype=np.float32)) == []
    assert cut(np.zeros(0, dtype=np.float32)) == []


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 40 * SECOND),
    spans=st.lists(st.tuples(st.floats(0, 40), st.floats(0.05, 15)), max_size=8),
    step=st.sampled_from([CHUNK_SAMPLES // 2, 4_000, 16_001, 30 * SECOND]),
    longest_s=st.sampled_from([4.0, 7.5, 30.0]),
    joined=st.booleans(),
)
@example(n=1, spans=[], step=4_000, longest_s=4.0, joined=False)
@example(n=16 * SECOND, spans=[(0.0, 15.0), (15.0, 1.0)], step=4_000, longest_s=4.0, joined=True)
def test_each_speech_sample_is_in_one_window(n, spans, step, longest_s, joined):
    samples = spoken(n, *[(start, start + length) for start, length in spans])
    settings = {"longest_s": longest_s, "joined_s": longest_s if joined else 0.0}
    found = cut(samples, step, **settings)
    ends = 0.0
    kept = np.zeros(n, dtype=bool)
    for window in found:
        begin = round(window.start_s * SECOND)
        assert window.start_s >= ends - 1e-9
        assert 0 < len(window.samples) <= longest_s * SECOND
        assert np.array_equal(window.samples, samples[begin : begin + len(window.samples)])
        kept[begin : begin + len(window.samples)] = True
        ends = window.end_s
    lost = np.abs(samples) > 0
    lost &= ~kept
    # only clicks, shorter than a tenth of a second, may be left out
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lost.astype(np.int8), [0]])))
    runs = [(b - a) / SECOND for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert all(run <= 0.1 + CHUNK_SAMPLES / SECOND for run in runs)
    assert [w.start_s for w in cut(samples, **settings)] == [w.start_s for w in found], "the blocks' length shows"


def test_without_silero_everything_is_speech():
    samples = spoken(70 * SECOND, (0, 70))
    found = list(windows([samples], AnySound(), longest_s=30.0))
    assert np.array_equal(np.concatenate([window.samples for window in found]), samples)
    assert all(20 < len(window.samples) / SECOND <= 30 for window in found[:-1])
