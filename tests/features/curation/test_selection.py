from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from pipelines.features.curation.selection import (
    CLIP_STEPS,
    ORDER,
    Count,
    Votes,
    balance,
    clip_step_counts,
    duplicate_sentences,
    non_speech,
    select,
    speaker_cap,
    text_count,
)
from pipelines.features.sources import Example


def row(number: int, split: str = "train", text: str = "", speaker: str = "", **meta: str) -> Example:
    return Example(f"{split}-{number}", split, text or f"Mening nummer {number}.", b"", speaker, meta)


def run(rows: list[Example], *steps):
    return select(lambda: iter(rows), steps)


def test_no_steps_drop_nothing():
    assert run([row(1)]).dropped == {}
    assert run([row(1)]).counts == []


@pytest.mark.parametrize(
    ("votes", "accepted"),
    [
        ({"up_votes": "2", "down_votes": "0"}, True),
        ({"up_votes": "1", "down_votes": "0"}, False),
        ({"up_votes": "9", "down_votes": "1"}, True),
        ({"up_votes": "9", "down_votes": "2"}, False),
        ({"up_votes": "2.0"}, True),
        ({"up_votes": "many"}, True),
        ({"down_votes": "2"}, False),
        ({}, True),
    ],
    ids=str,
)
def test_votes_drop_rows_outside_limits(votes, accepted):
    assert (not run([row(1, **votes)], Votes(2, 1)).dropped) == accepted
    assert not run([row(1, "test", **votes)], Votes(2, 1)).dropped
    assert not run([row(1, up_votes="2", down_votes="99")], Votes(2, -1)).dropped


@pytest.mark.parametrize(("share", "kept"), [(0.01, 1), (0.2, 2), (0.5, 5)])
def test_rows_without_speech_are_limited_to_their_share(share, kept):
    silent = [replace(row(number), text=" ") for number in range(10, 15)]
    rows = [row(number) for number in range(8)] + silent + [replace(row(1, "test"), text="")]
    dropped = run(rows, non_speech(share, seed=3)).dropped
    assert len(dropped) == 5 - kept
    assert dropped.keys() <= {example.id for example in silent}


def test_duplicate_sentences_of_a_speaker_are_dropped():
    rows = [
        row(1, text="Hej på dig!", speaker="anna"),
        row(2, text="hej, på dig", speaker="anna"),
        row(3, text="Hej på dig!", speaker="bo"),
        row(4, text="Hej på dig!"),
        row(5, text="Hej på dig!"),
        row(6, "test", text="Hej på dig!", speaker="anna"),
        row(7, text="Hej på då!", speaker="anna"),
        row(8, text="Hej på dig.", speaker="anna"),
    ]
    result = run(rows, duplicate_sentences())
    assert {name: drop.detail for name, drop in result.dropped.items()} == dict.fromkeys(
        ("train-2", "train-8"), "the same as train-1"
    )
    assert result.counts == [Count("duplicate_sentence", 8, 6, 2)]


def groups(rows: list[Example], dropped) -> Counter:
    return Counter(row.meta.get("gender", "") for row in rows if row.split == "train" and row.id not in dropped)


@pytest.mark.parametrize(("ratio", "male"), [(1.0, 10), (1.5, 15), (100.0, 60)])
def test_balance_reduces_larger_group_to_ratio(ratio, male):
    rows = [row(n, gender="male") for n in range(60)] + [row(100 + n, gender="female") for n in range(10)]
    rows += [row(200 + n) for n in range(30)] + [row(n, "test", gender="male") for n in range(20)]
    result = run(rows, balance("gender", ratio, seed=1))
    assert groups(rows, result.dropped) == {"male": male, "female": 10, "": 30}
    assert {drop.reason for drop in result.dropped.values()} <= {"balance"}


def test_balance_depends_on_seed_and_not_on_order():
    rows = [row(n, gender="male") for n in range(60)] + [row(100, gender="female"), row(101, gender="female")]
    accepted = {seed: set(run(rows, balance("gender", 5, seed)).dropped) for seed in (1, 2)}
    assert set(run(rows[::-1], balance("gender", 5, 1)).dropped) == accepted[1]
    assert accepted[1] != accepted[2]


def test_new_row_displaces_at_most_one_row():
    rows = [row(n, speaker="anna") for n in range(50)]
    before = set(run(rows, speaker_cap(10, 1)).dropped)
    after = set(run([*rows, row(50, speaker="anna")], speaker_cap(10, 1)).dropped) - {"train-50"}
    assert before <= after
    assert len(after) - len(before) <= 1


def test_speaker_cap_limits_training_rows():
    rows = [row(n, speaker="anna") for n in range(9)] + [row(n, speaker="bo") for n in range(20, 22)]
    rows += [row(n) for n in range(30, 39)] + [row(n, "validation", speaker="anna") for n in range(5)]
    result = run(rows, speaker_cap(3, 1))
    assert Counter(name for name in result.dropped if name.startswith("validation")) == {}
    assert len(result.dropped) == 6
    assert result.counts == [Count("speaker_cap", 25, 19, 6)]


def test_steps_run_on_rows_left_by_previous_step():
    rows = [row(n, gender="male", up_votes="0" if n < 5 else "3") for n in range(8)] + [row(9, gender="female")]
    result = run(rows, Votes(1, -1), balance("gender", 1, 1))
    assert result.counts == [Count("votes", 9, 4, 5), Count("balance", 4, 2, 2)]
    assert len(result.dropped) == 7
    assert result.rows()[0] == {
        "id": "train-0",
        "split": "train",
        "reason": "votes",
        "detail": "0 for it, at least 1 wanted",
    }


def test_balance_without_groups_drops_nothing():
    assert not run([row(1), row(2, "test", gender="male")], balance("gender", 1, 1)).dropped
    assert not run([], balance("gender", 1, 1)).dropped


def test_text_count_counts_changed_transcripts():
    rows = [row(1), replace(row(2), text=' "Hej" '), replace(row(3, "test"), text="Hej  då")]
    assert text_count(lambda: iter(rows)) == Count("text", 3, 3, 0, 2)


def test_clip_step_counts_group_reasons_by_step():
    reasons = ["silent", "unreadable", "noisy", "too_long", "too_short", "something_new", "clipped"]
    counts = clip_step_counts(10, reasons)
    assert [(count.step, count.dropped) for count in counts] == [
        ("usable", 2),
        ("duration", 2),
        ("level", 2),
        ("speaking_rate", 0),
        ("silence", 0),
        ("noise", 1),
    ]
    assert (counts[0].before, counts[-1].after) == (10, 3)
    assert all(later.before == earlier.after for earlier, later in pairwise(counts))
    assert set(CLIP_STEPS) < set(ORDER)
