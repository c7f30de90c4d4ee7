"""A sitting that a signal or its time budget ends: one step more, a sealed checkpoint, the same weights in the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.infra import manifest
from pipelines.infra.errors import Unfinished
from pipelines.training import loop as training_loop
from pipelines.training import validation
from pipelines.training.checkpoints import sealed as sealed_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"training.steps": 8, "training.accumulation": 2, "model.dropout": 0.1, "training.patience": 2}
"""A look at validation, and a checkpoint, at 4 and 8."""


def sends(number: signal.Signals, at: int) -> Callable[[int], None]:
    """An `on_step` that sends this process a signal when step `at` is done."""
    return lambda step: signal.raise_signal(number) if step == at else None


def weights_sha256(model) -> str:
    return manifest.sha256(Path(model.uri) / "model.safetensors")


def measured(model) -> list[dict]:
    """The history without the times."""
    return [{name: row[name] for name in row if name not in ("seconds", "clips_per_s")} for row in model.history]


def steps_at_hand(run: Path) -> list[int]:
    return [sealed_checkpoints.step_of(path) for path in sealed_checkpoints.listed(run / "checkpoints")]


@pytest.fixture(scope="module")
def whole(train_toy, tmp_path_factory):
    """The run that was left alone."""
    return train_toy(tmp_path_factory.mktemp("whole") / "run", SETTINGS)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_checkpoint_and_changes_no_weight(train_toy, whole, tmp_path, number):
    run, before = tmp_path / "run", signal.getsignal(number)
    ended, _ = train_toy(run, SETTINGS, on_step=sends(number, 3))
    assert isinstance(ended, Unfinished)
    checkpoint = run / "checkpoints" / "checkpoint-3"
    assert str(ended) == (
        f"{number.name} ended training after step 3 of 8; {checkpoint} is kept. "
        "Run the same command or cell again to continue from there"
    )
    assert manifest.problem(checkpoint) is None
    assert signal.getsignal(number) is before
    assert not (run / "model").exists()

    ended, lines = train_toy(run, SETTINGS, on_step=sends(number, 5))
    assert lines[0] == "resuming from checkpoint-3"
    assert steps_at_hand(run) == [4, 5]

    made, lines = train_toy(run, SETTINGS)
    assert lines[0] == "resuming from checkpoint-5"
    assert weights_sha256(made) == weights_sha256(whole)
    assert (made.best_step, made.validation["eval_wer"]) == (whole.best_step, whole.validation["eval_wer"])
    assert [row["step"] for row in made.history if "eval_wer" in row] == [4, 8]
    assert measured(made) == measured(whole), "every loss and gradient to the end, not the best weights alone"


def test_signal_in_validation_ends_after_next_checkpoint(train_toy, whole, tmp_path, monkeypatch):
    validator = validation.validator

    def interrupted(*args):
        validate = validator(*args)
        return lambda model: signal.raise_signal(signal.SIGTERM) or validate(model)

    monkeypatch.setattr(training_loop, "validator", interrupted)
    ended, _ = train_toy(tmp_path / "run", SETTINGS)
    assert isinstance(ended, Unfinished)
    assert steps_at_hand(tmp_path / "run") == [4]
    monkeypatch.undo()
    made, _ = train_toy(tmp_path / "run", SETTINGS)
    assert weights_sha256(made) == weights_sha256(whole)


def test_time_budget_ends_each_sitting_after_a_step(train_toy, tmp_path):
    run, hasty = tmp_path / "run", {"training.steps": 2, "training.max_hours": 1e-9}
    ended, _ = train_toy(run, hasty)
    assert str(ended).startswith("the time budget of 1e-09 h ended training after step 1 of 2;")
    made, lines = train_toy(run, hasty)
    assert (lines[0], made.best_step) == ("resuming from checkpoint-1", 2)


def test_signal_after_last_step_is_raised_again(train_toy, whole, tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        made, _ = train_toy(tmp_path / "run", SETTINGS, on_step=sends(signal.SIGTERM, 8))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert weights_sha256(made) == weights_sha256(whole)


@pytest.fixture
def ctrl_c():
    """Python's own handler of SIGINT: where a shell started the tests in the background, the signal is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_ctrl_c_ends_at_once(train_toy, tmp_path, ctrl_c):
    def twice(step: int) -> None:
        for _ in range(2):  # raised in this thread: one sent to the process may come late by way of another thread
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "run", SETTINGS, on_step=twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_signal_handler_outside_the_main_thread(train_toy, tmp_path):
    """Gradio and Ray train in threads of their own."""
    handlers, made = [], []
    thread = threading.Thread(
        target=lambda: made.append(
            train_toy(
                tmp_path / "run",
                {"training.steps": 1},
                on_step=lambda step: handlers.append(signal.getsignal(signal.SIGTERM)),
            )[0]
        )
    )
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert handlers == [before]
    assert made[0].best_step == 1
