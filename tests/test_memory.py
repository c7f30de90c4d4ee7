"""Memory that runs out in a forward pass: the same batches in pieces, the same loss, a note for the next sitting."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import checkpoints, manifest, models
from pipelines.errors import LabError, Unfinished
from pipelines.training import memory

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"training.steps": 6, "training.batch_size": 7, "training.accumulation": 2, "training.eval_every": 3}
"""48 clips: batches of 7 and one of 6, in groups of 2."""


@pytest.fixture
def room_for(monkeypatch):
    """`room_for(2)`: a device that holds the activations of two clips while training; from step `begin` on."""
    load = models.load

    def plan(clips: int, begin: int = 1) -> list[int]:
        passes: list[int] = []

        def refuse(encoder, args, kwargs):
            size = len(args[0] if args else kwargs["input_features"])
            if not encoder.training:
                return
            passes.append(size)
            if size > clips and len(passes) > 2 * (begin - 1):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        def small(*args, **kwargs):
            model = load(*args, **kwargs)
            model.model.encoder.register_forward_pre_hook(refuse, with_kwargs=True)
            return model

        monkeypatch.setattr(models, "load", small)
        return passes

    return plan


@pytest.fixture(scope="module")
def whole(train_toy, tmp_path_factory):
    """The run that had room for its batches."""
    return train_toy(tmp_path_factory.mktemp("whole") / "run", SETTINGS)[0]


def losses(model) -> list[float]:
    return [value for row in model.history for name, value in row.items() if name in ("loss", "eval_loss")]


def weights(model) -> dict[str, torch.Tensor]:
    return load_file(Path(model.uri) / "model.safetensors")


def test_batches_that_do_not_fit_are_halved_until_they_do_with_the_same_loss(train_toy, whole, room_for, tmp_path):
    passes = room_for(2)
    made, lines = train_toy(tmp_path / "run", SETTINGS)
    assert [line for line in lines if "memory" in line] == [
        f"memory ran out: {clips} clips did not fit into memory at step 1. From now on {half} go through the model at "
        "once, and the gradient is summed over each batch as before: same batches, same loss"
        for clips, half in ((6, 3), (3, 1))
    ]
    assert set(passes[2:]) == {1}
    assert len(losses(made)) == len(losses(whole)) == 8
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)
    assert [row["learning_rate"] for row in made.history if "loss" in row] == [
        row["learning_rate"] for row in whole.history if "loss" in row
    ]
    assert made.digest == whole.digest


def test_it_goes_on_from_the_last_checkpoint_and_a_resumed_run_is_split_at_once(train_toy, whole, room_for, tmp_path):
    run = tmp_path / "run"
    room_for(4, begin=5)
    ended, lines = train_toy(
        run, SETTINGS, on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None
    )
    assert isinstance(ended, Unfinished)
    assert "did not fit into memory at step 5" in "\n".join(lines)
    assert lines[-1] == "going on from checkpoint-3"
    assert json.loads((run / "memory.json").read_text()) == {"micro_batch": 3}
    assert [path.name for path in checkpoints.listed(run / "checkpoints")] == ["checkpoint-3", "checkpoint-5"]
    passes = room_for(4)
    made, lines = train_toy(run, SETTINGS)
    assert lines[0] == "going on from checkpoint-5"
    assert not any("memory" in line for line in lines)
    assert max(passes) == 3
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)


def test_a_micro_batch_of_ones_own_is_the_same_run_up_to_rounding(train_toy, whole, tmp_path):
    made, _ = train_toy(tmp_path / "run", SETTINGS | {"training.micro_batch": 2})
    assert made.digest == whole.digest
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)
    assert manifest.read(Path(made.uri))["digest"] == whole.digest


def test_one_clip_that_does_not_fit_ends_the_run_in_one_line(train_toy, room_for, tmp_path):
    room_for(0)
    ended, _ = train_toy(tmp_path / "run", SETTINGS)
    assert str(ended).startswith("memory does not hold one clip at step 1: take a smaller model.base")
    assert json.loads((tmp_path / "run" / "memory.json").read_text()) == {"micro_batch": 1}


def test_beside_other_devices_the_run_ends_and_says_what_to_set():
    with pytest.raises(LabError, match="one of 2 devices. Set training.micro_batch=4"):
        with memory.watched(8, 3, processes=2):
            raise torch.OutOfMemoryError


def test_pieces_hold_every_clip_once_in_order():
    batch = {"input_features": torch.arange(14).reshape(7, 2), "labels": torch.arange(7)}
    pieces = list(memory.pieces(batch, 3))
    assert [len(piece["labels"]) for piece in pieces] == [3, 3, 1]
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), tensor)
