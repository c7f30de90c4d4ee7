from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from log_recorder import record_log

from pipelines.infra import manifest
from pipelines.training.checkpoints import sealed as sealed_checkpoints


def checkpoint(folder: Path, step: int, run: str | None = "r1", best: int | None = None) -> Path:
    """A checkpoint at `step`; unfinished where `run` is None."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"w" * step)
    (path / "optimizer.bin").write_bytes(b"o" * step)
    if run:
        sealed_checkpoints.seal(path, run_digest=run, best_step=best)
    return path


def steps(folder: Path) -> list[int]:
    return [sealed_checkpoints.step_of(path) for path in sealed_checkpoints.listed(folder)]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    lines = record_log()
    return sealed_checkpoints.newest_complete(folder, run_digest="r1"), lines


def test_seal_records_step_and_run(tmp_path):
    found = manifest.read(checkpoint(tmp_path, 40))
    assert (found["kind"], found["step"], found["run_digest"], set(found["files"])) == (
        "checkpoint",
        40,
        "r1",
        {"weights.bin", "optimizer.bin"},
    )


def test_checkpoints_are_listed_by_step(tmp_path):
    for step in (100, 20, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 30, run=None)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-8.partial").mkdir()
    assert steps(tmp_path) == [3, 20, 30, 100]
    assert steps(tmp_path / "nowhere") == []


def test_newest_whole_checkpoint_is_returned_silently(tmp_path):
    checkpoint(tmp_path, 9)
    latest = checkpoint(tmp_path, 10)
    assert newest(tmp_path) == (latest, [])
    assert newest(tmp_path / "nowhere") == (None, [])


def test_unusable_checkpoint_is_skipped_and_logged(tmp_path):
    good = checkpoint(tmp_path, 20)
    for step in (30, 40):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-30" / "weights.bin").write_bytes(b"w" * 29 + b"x")
    (tmp_path / "checkpoint-40" / "optimizer.bin").unlink()
    checkpoint(tmp_path, 50, run=None)
    checkpoint(tmp_path, 60, run="r2")
    found, lines = newest(tmp_path)
    assert found == good
    assert len(lines) == 4
    for line, words in zip(
        lines,
        [
            ("checkpoint-60", "another run (r2)"),
            ("checkpoint-50", "unfinished"),
            ("checkpoint-40", "optimizer.bin is missing"),
            ("checkpoint-30", "weights.bin is damaged"),
        ],
        strict=True,
    ):
        assert all(word in line for word in words)


def test_no_whole_checkpoint_returns_none(tmp_path):
    checkpoint(tmp_path, 10, run=None)
    assert newest(tmp_path)[0] is None
    assert len(newest(tmp_path)[1]) == 1


def test_checkpoints_after_the_newest_are_removed(tmp_path):
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    sealed_checkpoints.remove_unusable(tmp_path, tmp_path / "checkpoint-20")
    assert steps(tmp_path) == [10, 20]
    sealed_checkpoints.remove_unusable(tmp_path, None)
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [40, 50]),
        (1, None, [50]),
        (2, 20, [20, 40, 50]),
        (2, 50, [40, 50]),
        (1, 10, [10, 50]),
        (9, 20, [10, 20, 30, 40, 50]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in (10, 20, 30, 40, 50):
        checkpoint(tmp_path, step, best=best)
    sealed_checkpoints.prune(tmp_path, keep=keep)
    assert steps(tmp_path) == left
    assert all(manifest.problem(path) is None for path in sealed_checkpoints.listed(tmp_path))


def test_prune_keeps_best_of_each_remaining_checkpoint(tmp_path):
    for step, best in ((10, 10), (20, 10), (30, 30)):
        checkpoint(tmp_path, step, best=best)
    sealed_checkpoints.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [10, 20, 30]
    checkpoint(tmp_path, 40, best=30)
    sealed_checkpoints.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [30, 40]


def test_prune_ignores_unfinished_checkpoints(tmp_path):
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 40, run=None)
    sealed_checkpoints.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [20, 30, 40]


def test_interrupted_prune_leaves_no_whole_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        checkpoint(tmp_path, step)

    def killed_on_the_way(path: Path) -> None:
        (path / "weights.bin").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed_on_the_way)
    with pytest.raises(KeyboardInterrupt):
        sealed_checkpoints.prune(tmp_path, keep=1)
    assert manifest.problem(tmp_path / "checkpoint-10", thorough=False) == "unfinished (it has no manifest)"
    assert newest(tmp_path) == (tmp_path / "checkpoint-20", [])
