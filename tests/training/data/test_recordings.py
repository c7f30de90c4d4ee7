"""Windows of clips from long recordings: in their true order, with the text that really precedes them."""

from __future__ import annotations

import collections
import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pipelines.features.sources import Example
from pipelines.features.sources.mix import MixSource, Part
from pipelines.speech.recordings.pieces import piece_name
from pipelines.training import components
from pipelines.training import run as training_run
from pipelines.training.data import recordings
from pipelines.training.data.packing import Window, WindowOptions, WindowSampler
from pipelines.training.data.recordings import RecordingSampler
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = np.random.default_rng(3).integers(90, 900, size=200)
EVERY_S, CLIP_S = 5.0, 4.0


def rows_of_recordings(counts: dict[str, int], n_loose: int = 0) -> pd.DataFrame:
    """Return shuffled training rows: clips of recordings, one every 5 s, and clips of unknown place."""
    rows = [
        (piece_name(name, EVERY_S * n, EVERY_S * n + CLIP_S), f"{EVERY_S * n:.2f}")
        for name, count in counts.items()
        for n in range(count)
    ]
    rows += [(f"loose{n}", None) for n in range(n_loose)]
    frame = pd.DataFrame(rows, columns=["id", "start_s"]).assign(split="train")
    return frame.sample(frac=1, random_state=5).reset_index(drop=True)


def order_of(toy_cache, rows: pd.DataFrame) -> recordings.Order | None:
    cache = replace(toy_cache, rows=rows)
    return recordings.order_of(cache, cache.split("train"))


@pytest.fixture
def sampler(toy_cache):
    """Return `sampler(rows, share, ...)`, with clips of 4 s."""

    def build(rows: pd.DataFrame, share: float, *, with_epoch: bool = False, seed: int = 1, **options):
        lengths, of_windows = np.full(len(rows), int(CLIP_S * 100)), WindowOptions(share, **options)
        order = order_of(toy_cache, rows)
        return RecordingSampler(lengths, 8, 5, seed, order=order, options=of_windows, with_epoch=with_epoch)

    return build


def drawn(sampler: WindowSampler, epoch: int) -> list[list]:
    sampler.set_epoch(epoch)
    return list(sampler)


def windows_of(batches: list) -> list[Window]:
    return [window for batch in batches if isinstance(batch[0], Window) for window in batch]


def places_of(rows: pd.DataFrame, clips: list[int]) -> list[tuple[str, float]]:
    return [(name.partition("@")[0], float(start_s)) for name, start_s in rows.loc[clips, ["id", "start_s"]].to_numpy()]


# ---- the order of the clips


def test_clips_follow_each_other_up_to_a_gap_or_another_split(toy_cache):
    spans = [("a", 0, 4), ("a", 5, 9), ("a", 11, 12), ("a", 14.1, 16), ("a", 17, 18), ("a", 18.1, 19), ("b", 19, 21)]
    splits = ["train"] * 4 + ["test"] + ["train"] * 2
    ids = [piece_name(*span) for span in spans]
    rows = pd.DataFrame({"id": ids, "start_s": [f"{span[1]:.2f}" for span in spans], "split": splits})
    order = order_of(toy_cache, rows.iloc[::-1].reset_index(drop=True))
    assert order.recording[::-1].tolist() == [0, 0, 0, 0, 0, 1]
    assert np.argsort(order.rank).tolist() == [5, 4, 3, 2, 1, 0]
    assert [5 - n if n >= 0 else None for n in order.previous[::-1]] == [None, 0, 1, None, None, None]


def test_clips_of_a_mix_keep_their_place(toy_cache):
    rows = rows_of_recordings({"a@b.mp3": 3, "c.mp3": 2})

    class Talks:
        def examples(self, splits):
            return (Example(row.id, "train", "Hej", b"", meta={"start_s": row.start_s}) for row in rows.itertuples())

    mixed = [*MixSource((Part("one", Talks()), Part("two", Talks()))).examples(("train",))]
    frame = pd.DataFrame({"id": [one.id for one in mixed], "start_s": [one.meta["start_s"] for one in mixed]})
    order = order_of(toy_cache, frame.assign(split="train"))
    assert sorted(collections.Counter(order.recording.tolist()).values()) == [2, 2, 3, 3]
    for n, before in enumerate(order.previous):
        start_s = float(frame["start_s"][n])
        assert (before == -1) == (start_s == 0)
        if before >= 0:
            assert frame["id"][before].rpartition("@")[0] == frame["id"][n].rpartition("@")[0]
            assert float(frame["start_s"][before]) == start_s - EVERY_S


@pytest.mark.parametrize("start_s", [None, "3.00"])
def test_other_rows_have_no_place(toy_cache, start_s):
    rows = rows_of_recordings({"a": 3}).assign(start_s=start_s)
    assert order_of(toy_cache, rows) is None
    assert order_of(toy_cache, rows.drop(columns="start_s")) is None
    assert order_of(toy_cache, rows_of_recordings({"a": 1, "b": 1}, 4)) is None


# ---- the draw


def test_draw_of_clips_without_place_stays_the_same():
    """The digests are those of the version before recordings had an order."""
    for fill, with_epoch, expected in (("full", False, "f4574decc9937e52"), ("random", True, "7d2b35289d17f962")):
        options = WindowOptions(0.5, fill, 0.5, 0.5)
        sampler, epochs = WindowSampler(LENGTHS, 8, 5, 1, options=options, with_epoch=with_epoch), []
        for epoch in range(3):
            batches = drawn(sampler, epoch)
            epochs.append(
                [
                    [[one.clips, one.timestamps, one.before] if isinstance(one, Window) else one for one in batch]
                    for batch in batches
                ]
            )
        assert hashlib.sha256(json.dumps(epochs).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("fill", ["full", "random"])
@pytest.mark.parametrize("n_loose", [0, 60])
def test_each_epoch_has_each_clip_once_in_equal_batches(sampler, share, fill, n_loose):
    rows = rows_of_recordings({"a": 70, "b": 29, "c": 1, "d": 40}, n_loose)
    made = sampler(rows, share, fill=fill)
    plain = WindowSampler(made.lengths, 8, 5, 1, options=made.options)
    for epoch in range(4):
        batches = drawn(made, epoch)
        joined = [clip for window in windows_of(batches) for clip in window.clips]
        apart = [clip for batch in batches if not isinstance(batch[0], Window) for clip in batch]
        assert collections.Counter(joined + apart) == collections.Counter(range(len(rows)))
        assert len(batches) == len(made) == len(plain)
        assert len(joined) == made.n_joined and len(windows_of(batches)) == made.n_windows
        sizes = sorted(len(window.clips) for window in windows_of(batches))
        assert sizes == sorted(len(window.clips) for window in windows_of(drawn(plain, epoch)))


@pytest.mark.parametrize("fill", ["full", "random"])
def test_windows_and_their_prompts_are_consecutive_clips(sampler, fill):
    rows = rows_of_recordings({"a": 90, "b": 60, "c": 50})
    made, n_prompts = sampler(rows, 0.3, fill=fill, prompt=1.0, timestamps=0.5), 0
    for epoch in range(5):
        for window in windows_of(drawn(made, epoch)):
            (name, start_s), *_ = first = places_of(rows, window.clips)
            assert first == [(name, start_s + EVERY_S * n) for n in range(len(first))]
            before = places_of(rows, window.before)
            n_before = min(7, round(start_s / EVERY_S))  # 30 s hold seven clips of 4 s
            assert before == [(name, start_s - EVERY_S * n) for n in range(n_before, 0, -1)]
            n_prompts += bool(before)
    assert n_prompts


def test_only_windows_without_room_have_clips_of_two_recordings(sampler):
    rows = rows_of_recordings({f"talk{n}": 10 for n in range(40)})
    for share, most in ((0.2, 0.0), (1.0, 0.9)):
        windows = [window for epoch in range(3) for window in windows_of(drawn(sampler(rows, share), epoch))]
        names = [{name for name, _ in places_of(rows, window.clips)} for window in windows]
        assert np.mean([len(one) > 1 for one in names]) <= most


def test_clips_of_unknown_place_are_joined_with_others_at_random(sampler):
    rows = rows_of_recordings({"a": 60}, n_loose=100)
    made, pairs = sampler(rows, 0.4, prompt=1.0), []
    for epoch in range(6):
        for window in windows_of(drawn(made, epoch)):
            is_loose = rows.loc[window.clips, "start_s"].isna()
            assert is_loose.all() or not is_loose.any()
            if is_loose.all():
                pairs += zip(window.clips, window.clips[1:])
                assert rows.loc[window.before, "start_s"].isna().all() and not {*window.before} & {*window.clips}
    assert len(pairs) > 50 and len({*pairs}) > 0.9 * len(pairs)


def test_clips_at_borders_are_joined_half_as_often_at_least(sampler):
    rows = rows_of_recordings({f"talk{n}": 25 for n in range(4)}, n_loose=20)
    made, counts = sampler(rows, 0.3, fill="random"), np.zeros(len(rows))
    for epoch in range(400):
        for window in windows_of(drawn(made, epoch)):
            counts[window.clips] += 1
    assert counts.sum() == 400 * made.n_joined
    assert 0.4 < counts.min() / counts.mean() and counts.max() / counts.mean() < 1.5


def test_only_seed_and_epoch_decide_the_draw(sampler):
    rows, options = rows_of_recordings({"a": 60, "b": 60}, 20), {"fill": "random", "timestamps": 0.5, "prompt": 0.5}
    one, other, third = (sampler(rows, 0.3, seed=seed, **options) for seed in (1, 1, 2))
    np.random.seed(9)
    list(one)
    epochs = [drawn(one, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] and epochs != [drawn(third, epoch) for epoch in range(3)]
    assert drawn(other, 2) == epochs[2], "a run that resumes in the third epoch"
    numbered = drawn(sampler(rows, 0.3, with_epoch=True, **options), 2)
    assert {clip[0] for window in windows_of(numbered) for clip in (*window.clips, *window.before)} == {2}
    assert [[clip for _, clip in one.clips] for one in windows_of(numbered)] == [
        one.clips for one in windows_of(epochs[2])
    ]


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [(0, 4, 0), (3, 4, 2), (5, 4, 6), (7, 3, 7), (4, 7, 4)],
    ids=["within", "left", "right", "to the border", "longer than any"],
)
def test_window_is_moved_into_one_recording(start, size, expected):
    row = np.repeat([0, 1], [6, 6])
    assert recordings.within_recordings(np.array([start]), np.array([size]), row).tolist() == [expected]


def test_window_between_two_others_is_not_moved():
    row = np.repeat([0, 1], [6, 6])
    starts, sizes = np.array([1, 4, 8]), np.array([3, 4, 4])
    assert recordings.within_recordings(starts, sizes, row).tolist() == [1, 4, 8]


# ---- in a training


def test_training_takes_the_order_and_names_its_version(toy_settings, toy_cache, toy_model):
    base, train = whisper_model.resolve(str(toy_model)), toy_cache.split("train")
    rows = toy_cache.rows.assign(start_s=None)
    for n, row in enumerate(train):
        rows.loc[row, ["id", "start_s"]] = piece_name("talk.mp3", EVERY_S * n, EVERY_S * n + 4), f"{EVERY_S * n:.2f}"
    placed = replace(toy_cache, rows=rows)
    plain, windows = toy_settings(), toy_settings({"training.window_share": 0.5, "training.window_prompt": 1.0})
    assert type(components.sampler_of(windows, toy_cache)) is WindowSampler
    of_recipe = components.sampler_of(windows, placed)
    assert {step for one in windows_of(drawn(of_recipe, 0)) for step in np.diff(one.clips).tolist()} == {1}
    for recipe, cache, version in ((plain, placed, None), (windows, toy_cache, None), (windows, placed, "1")):
        assert training_run.run_identity(recipe, cache, base).get("code.recordings") == version
