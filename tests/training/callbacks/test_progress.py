"""What a run tells of its time: the pace without its stops, the hours of all sittings, and the time left."""

from __future__ import annotations

import re
import time

import pytest

from pipelines.training import figures
from pipelines.training.callbacks import progress
from pipelines.training.callbacks.progress import Pace, TimeLeft

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clock(monkeypatch):
    """`clock[0] += 5`: five seconds go by."""
    now = [1_000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_pace_counts_the_time_of_training_alone(clock):
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


def test_steps_of_earlier_sittings_cost_this_one_no_time(clock):
    left = TimeLeft(step=80, seconds=3_600)
    clock[0] += 30
    assert left.told(90, 100) == "1:00:30 done, 0:30 left"
    clock[0] += 35
    assert left.told(100, 100) == "1:01:05 done, 0:00 left"


def test_a_resumed_bar_shows_the_pace_of_this_sitting(capfd):
    told = figures.console_progress(lambda line: None)
    told.on_start(1_000, 1_010)
    time.sleep(0.2)
    told.on_step(1_002)
    told.on_end([])
    shown = capfd.readouterr().err.split("\r")[-1]
    assert "1002/1010" in shown
    rate, unit = re.search(r"([\d.]+)(step/s|s/step)", shown).groups()
    assert 1 < (float(rate) if unit == "step/s" else 1 / float(rate)) < 12


def test_a_run_tells_clips_per_second_and_the_time_left(train_toy, tmp_path):
    started = time.monotonic()
    made, lines = train_toy(tmp_path / "run", {"training.steps": 3, "training.eval_every": 2})
    elapsed = time.monotonic() - started
    paces = [row["clips_per_s"] for row in made.history if "loss" in row]
    assert len(paces) == 3
    assert min(paces) > 3 * 4 / elapsed, "faster than the whole with validation and checkpoints"
    assert re.fullmatch(r"step 2: validation WER \d\.\d{3}, loss [\d.]+; \d+:\d\d done, \d+:\d\d left", lines[1])
    assert len(figures.curves(made.history).axes) == 3
