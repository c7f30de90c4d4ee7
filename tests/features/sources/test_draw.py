"""Splits that are drawn: by speakers where there are enough, else by sentences, and none of them empty."""

from __future__ import annotations

import pytest

from pipelines.features.sources import SPLITS
from pipelines.features.sources.draw import Draw, draw_splits
from pipelines.speech import text


def drawn(speakers: list[str], seed: int, texts: list[str] | None = None) -> Draw:
    texts = texts or [f"Mening nummer {n // 2}{'.' * (n % 2)}" for n in range(len(speakers))]  # each twice
    return draw_splits(speakers, [f"clips/{n:03}" for n in range(len(speakers))], texts, seed)


def places(values: list[str], draw: Draw) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for value, split in zip(values, draw.splits, strict=True):
        found.setdefault(text.normalise(value), set()).add(split)
    return found


@pytest.mark.parametrize("n_speakers", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("seed", [1, 7, 13])
def test_few_or_no_speakers_share_no_sentence(n_speakers, seed):
    speakers = [f"s{n * 31 % n_speakers}" if n_speakers else "" for n in range(60)]
    draw = drawn(speakers, seed)
    assert {*draw.splits} == {*SPLITS}
    if draw.units == "speakers":  # three or more may happen to fill all splits
        assert n_speakers > 2 and all(len(found) == 1 for found in places(speakers, draw).values())
        return
    if draw.units == "sentences":  # 30 sentences, each twice: 10 % are six clips
        assert min(draw.splits.count(split) for split in SPLITS) >= 6
    texts = [f"Mening nummer {n // 2}" for n in range(60)]
    assert all(len(found) == 1 for found in places(texts, draw).values())
    assert draw.shared_speakers == {one for one, found in places(speakers, draw).items() if one and len(found) > 1}


@pytest.mark.parametrize("n_speakers", [6, 7, 12])
def test_enough_speakers_leave_no_split_empty(n_speakers):
    speakers = [f"s{n % n_speakers}" for n in range(60)]
    for seed in range(30):
        draw = drawn(speakers, seed)
        assert ({*draw.splits}, draw.units, draw.shared_speakers) == ({*SPLITS}, "speakers", frozenset())
        assert all(len(found) == 1 for found in places(speakers, draw).values())


def test_parts_of_one_recording_are_drawn_by_sentence():
    draw = draw_splits([""] * 30, ["long"] * 30, [f"Mening nummer {n}." for n in range(30)], 7)
    assert (draw.units, {*draw.splits}) == ("sentences", {*SPLITS})


def test_commands_of_one_speaker_are_drawn_by_file():
    draw = drawn(["me"] * 90, 7, ["ja", "nej", "stopp"] * 30)
    assert (draw.units, {*draw.splits}, draw.shared_speakers) == ("files", {*SPLITS}, {"me"})


@pytest.mark.parametrize(("n", "n_splits"), [(1, 1), (2, 2), (3, 3)])
def test_very_few_clips_fill_train_first(n, n_splits):
    for seed in range(9):
        splits = {*drawn(["me"] * n, seed, ["en", "två", "tre"][:n]).splits}
        assert "train" in splits and len(splits) == n_splits
