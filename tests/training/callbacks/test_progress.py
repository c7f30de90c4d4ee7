"""A run's pace, its time over all sittings, the time left, and the lines that report them."""

from __future__ import annotations

import re
import time

import pytest
from log_recorder import record_log

from pipelines.infra import progress_file
from pipelines.training import figures
from pipelines.training.callbacks import console, progress
from pipelines.training.callbacks.console import ProgressLines
from pipelines.training.callbacks.progress import Pace, Progress, TimeLeft

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clock(monkeypatch):
    """`clock[0] += 5`: five seconds go by."""
    now = [1_000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_pace_excludes_paused_time(clock):
    pace = Pace()
    clock[0] += 4
    pace.add(20)
    with pace.paused():
        clock[0] += 100
    clock[0] += 1
    pace.add(20)
    assert pace.take() == 8.0
    clock[0] += 2
    pace.add(8)
    assert pace.take() == 4.0


def test_time_left_ignores_steps_of_earlier_sittings(clock):
    left = TimeLeft(step=80, seconds=3_600)
    clock[0] += 30
    assert left.describe(90, 100) == "1:00:30 done, 0:30 left"
    clock[0] += 35
    assert left.describe(100, 100) == "1:01:05 done, 0:00 left"


def test_resumed_bar_shows_rate_of_this_sitting(capfd):
    bar = console.progress_bar()
    bar.on_start(1_000, 1_010)
    time.sleep(0.2)
    bar.on_step(1_002)
    bar.on_end([])
    drawn = capfd.readouterr().err.split("\r")[-1]
    assert "1002/1010" in drawn
    rate, unit = re.search(r"([\d.]+)(step/s|s/step)", drawn).groups()
    assert 1 < (float(rate) if unit == "step/s" else 1 / float(rate)) < 12


def validation(step: int, wer: float) -> dict[str, float]:
    return {"step": step, "eval_wer": wer, "eval_loss": 1.0}


def test_lines_are_at_most_one_per_interval(clock):
    lines = []
    report = ProgressLines(lines.append, interval_s=3).progress()
    report.on_start(0, 200)
    for step in range(1, 5):
        clock[0] += 1
        report.on_step(step)
    report.on_log([{"step": 4, "loss": 1.2345}])
    assert lines == ["step 1/200, 3:19 left", "step 4/200, 3:16 left"]
    clock[0] += 3
    report.on_step(5)
    assert lines[2:] == ["step 5/200, loss 1.23, 4:33 left"]


def test_each_validation_writes_a_line_at_once(clock):
    lines, history = [], [{"step": 20, "loss": 1.5}, validation(20, 0.61)]
    report = ProgressLines(lines.append).progress()
    report.on_start(19, 40)
    clock[0] += 10
    report.on_step(20)
    report.on_log(history)
    report.on_log([*history, {"step": 21, "loss": 1.25}])
    assert lines == ["step 20/40, 3:20 left", "step 20/40, loss 1.5, validation WER 0.610 (step 20), 3:20 left"]
    lines.clear()
    quiet = ProgressLines(lines.append, validations=False).progress()
    quiet.on_log(history)
    assert not lines, "a validation that is logged elsewhere is not repeated"


def test_progress_without_terminal_is_logged(clock, monkeypatch):
    lines = record_log()
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: False, raising=False)
    report = console.console_progress()
    report.on_start(0, 2)
    clock[0] += 60
    report.on_step(1)
    assert lines == ["step 1/2, 1:00 left"]


def test_progress_file_receives_lines_if_set(clock, monkeypatch, tmp_path):
    path, steps = tmp_path / "progress.txt", []
    monkeypatch.delenv(progress_file.VARIABLE, raising=False)
    plain = Progress(on_step=steps.append)
    assert console.with_progress_file(plain) is plain
    monkeypatch.setenv(progress_file.VARIABLE, str(path))
    report = console.with_progress_file(plain)
    report.on_start(0, 4)
    report.on_step(1)
    report.on_log([validation(1, 0.5)])
    report.on_end([])
    assert path.read_text().splitlines() == [
        "step 1/4, 0:00 left",
        "step 1/4, validation WER 0.500 (step 1), 0:00 left",
    ]
    assert steps == [1]
    monkeypatch.setenv(progress_file.VARIABLE, str(tmp_path))
    console.with_progress_file(plain).on_step(2)
    assert steps == [1, 2], "a file that cannot be written stops nothing"


def test_run_logs_clips_per_second_and_time_left(train_toy, tmp_path):
    started = time.monotonic()
    model, lines = train_toy(tmp_path / "run", {"training.steps": 3, "training.eval_every": 2})
    elapsed = time.monotonic() - started
    paces = [row["clips_per_s"] for row in model.history if "loss" in row]
    assert len(paces) == 3
    assert min(paces) > 3 * 4 / elapsed, "faster than the whole with validation and checkpoints"
    assert re.fullmatch(r"step 2: validation WER \d\.\d{3}, loss [\d.]+; \d+:\d\d done, \d+:\d\d left", lines[1])
    assert len(figures.curves(model.history).axes) == 3
