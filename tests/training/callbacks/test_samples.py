"""The texts of a few validation clips, kept at each validation."""

from __future__ import annotations

import pytest

from pipelines.training.callbacks import samples


@pytest.mark.parametrize(
    ("n", "positions"),
    [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (9, [0, 2, 4, 6, 8]), (120, [0, 29, 59, 89, 119])],
)
def test_positions_are_spread_and_never_repeat(n: int, positions: list[int]):
    assert samples.positions(n) == positions


def test_texts_are_read_by_step_and_the_last_counts(tmp_path):
    for step, text in ((8, "b"), (4, "a"), (4, "c")):  # step 4 again, after an interruption
        samples.add(tmp_path, step, ["x", "y"], [text, "☃\u2028"])
    with (tmp_path / samples.FILE).open("a") as file:
        file.write('{"step": 12, "tex')  # killed while writing, by an older version
    assert samples.read(tmp_path) == {4: {"x": "c", "y": "☃\u2028"}, 8: {"x": "b", "y": "☃\u2028"}}
    assert list(samples.read(tmp_path)) == [4, 8]


def test_adding_leaves_hard_links_of_checkpoints_alone(tmp_path):
    samples.add(tmp_path, 4, ["x"], ["a"])
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / samples.FILE).hardlink_to(tmp_path / samples.FILE)
    samples.add(tmp_path, 8, ["x"], ["b"])
    assert list(samples.read(tmp_path / "checkpoint-4")) == [4]


def test_restored_file_is_that_of_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    for folder, text in ((checkpoint, "old"), (tmp_path, "new")):
        samples.add(folder, 4, ["x"], [text])
    samples.add(tmp_path, 8, ["x"], ["new"])
    samples.restore(tmp_path, checkpoint, 4)
    assert samples.read(tmp_path) == {4: {"x": "old"}}
    samples.restore(tmp_path, None)
    assert not (tmp_path / samples.FILE).exists()


def test_checkpoint_without_texts_keeps_the_runs_earlier_ones(tmp_path):
    for step in (4, 8):
        samples.add(tmp_path, step, ["x"], ["a"])
    samples.restore(tmp_path, tmp_path / "checkpoint-4", 4)
    assert list(samples.read(tmp_path)) == [4]


def test_run_without_file_has_no_texts(tmp_path):
    assert samples.read(tmp_path) == {}
    samples.add(tmp_path, 0, [], [])
    assert not (tmp_path / samples.FILE).exists()


def test_full_disk_stops_no_training(tmp_path):
    samples.add(tmp_path / "gone", 4, ["x"], ["a"])
