"""Progress of a notebook's process, as `python -m pipelines run` shows it."""

from __future__ import annotations

import io
import os
import re
import time

import pytest

from pipelines.cli import progress
from pipelines.infra import progress_file
from pipelines.recipes import runs as recipe_runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.05)
    monkeypatch.setattr(progress, "_REFRESH_S", 0.02)


def test_redirected_output_gets_each_new_line_once():
    stream = io.StringIO()
    with progress.follow("02_training", stream):
        progress_file.append("step 1/12")
        time.sleep(0.2)
        progress_file.append("step 2/12, loss 3.1")
    assert stream.getvalue() == "02_training  step 1/12\n02_training  step 2/12, loss 3.1\n"


def test_terminal_overwrites_one_line_and_clears_it():
    stream = Terminal()
    with progress.follow("02_training", stream):
        progress_file.append("step 3/12")
        time.sleep(0.3)
    assert "\n" not in stream.getvalue()
    assert re.search(r"02_training 0:00  step 3/12", stream.getvalue())
    assert stream.getvalue().endswith("\x1b[2K")


def test_terminal_line_fits_its_width(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    stream = Terminal()
    with progress.follow("02_training", stream):
        progress_file.append("step 3/12" * 9)
        time.sleep(0.2)
    assert {len(line) for line in stream.getvalue().split("\r\x1b[2K")} <= {0, 16, 17, 18, 19}


def test_incomplete_line_is_not_shown(tmp_path):
    (tmp_path / "progress.txt").write_text("step 1/12\nstep 2")
    assert progress._last_line(tmp_path / "progress.txt") == "step 1/12"
    assert progress._last_line(tmp_path / "missing.txt") == ""


def test_variable_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(progress_file.VARIABLE, "outer")
    with pytest.raises(KeyError) as error, progress.follow("02_training", io.StringIO()):
        raise KeyError(os.environ[progress_file.VARIABLE])
    assert error.value.args[0] != "outer"
    assert os.environ[progress_file.VARIABLE] == "outer"


def test_clip_bar_writes_first_and_last_count():
    stream = io.StringIO()
    with progress.follow("01_feature", stream), recipe_runs.clip_progress_bar("log-mel", 3) as advance:
        for _ in range(3):
            advance(1)
            time.sleep(0.1)
    assert stream.getvalue() == "01_feature  log-mel: 1/3 clips\n01_feature  log-mel: 3/3 clips\n"
