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
    for step, text in ((4, "a"), (8, "b"), (4, "c")):  # step 4 again, after an interruption
        samples.append(tmp_path, step, ["x", "y"], [text, "☃"])
    with (tmp_path / samples.FILE).open("a") as file:
        file.write('{"step": 12, "tex')  # killed while writing
    assert samples.read(tmp_path) == {4: {"x": "c", "y": "☃"}, 8: {"x": "b", "y": "☃"}}


def test_run_without_file_has_no_texts(tmp_path):
    assert samples.read(tmp_path) == {}


def test_full_disk_stops_no_training(tmp_path):
    samples.append(tmp_path / "gone", 4, ["x"], ["a"])
