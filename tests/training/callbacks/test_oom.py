"""Memory that runs out in a forward pass: the same batches in pieces, the same loss, a note for the next sitting.

In the optimizer's step likewise; in a look at validation batches become smaller; on a GPU the longest is tried first.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.infra import manifest
from pipelines.infra.errors import LabError, Unfinished
from pipelines.training.callbacks import oom, samples
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.memory import advice, report
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"training.steps": 6, "training.batch_size": 7, "training.accumulation": 2, "training.eval_every": 3}
"""48 clips: batches of 7 and one of 6, in groups of 2."""


@pytest.fixture
def room_for(monkeypatch):
    """`room_for(2)`: a device that holds the activations of two clips while training; from step `begin` on."""
    load = whisper_model.load

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

        monkeypatch.setattr(whisper_model, "load", small)
        monkeypatch.setattr(decoding.greedy, "runs_on", lambda model: False)  # a GPU encodes a batch in one pass
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


def test_batches_are_halved_until_they_fit_with_equal_loss(train_toy, whole, room_for, tmp_path):
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


@pytest.mark.slow
def test_oom_resumes_checkpoint_and_keeps_micro_batch(train_toy, whole, room_for, tmp_path):
    run = tmp_path / "run"
    room_for(4, begin=5)
    ended, lines = train_toy(
        run, SETTINGS, on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None
    )
    assert isinstance(ended, Unfinished)
    assert "did not fit into memory at step 5" in "\n".join(lines)
    assert lines[-1] == "resuming from checkpoint-3"
    assert json.loads((run / "memory.json").read_text()) == {"micro_batch": 3}
    assert [path.name for path in sealed_checkpoints.listed(run / "checkpoints")] == ["checkpoint-3", "checkpoint-5"]
    passes = room_for(4)
    made, lines = train_toy(run, SETTINGS)
    assert lines[0] == "resuming from checkpoint-5"
    assert not any("memory" in line for line in lines)
    assert max(passes) == 3
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)


def test_micro_batch_changes_only_rounding(train_toy, whole, tmp_path):
    made, _ = train_toy(tmp_path / "run", SETTINGS | {"training.micro_batch": 2})
    assert made.digest == whole.digest
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)
    assert manifest.read(Path(made.uri))["digest"] == whole.digest


@pytest.mark.slow
def test_automatic_micro_batch_fits_free_memory_and_is_kept_on_resume(train_toy, whole, tmp_path, monkeypatch):
    run, settings = tmp_path / "run", SETTINGS | {"training.micro_batch": "auto"}
    estimate_for = advice.estimate_for

    def with_room_for_three(recipe, config, work, device, clips):
        needed = estimate_for(recipe, config, work, device, clips)
        return needed if clips <= 3 else replace(needed, overhead=10**15)

    monkeypatch.setattr(advice, "estimate_for", with_room_for_three)
    ended, lines = train_toy(
        run, settings, on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
    )
    assert isinstance(ended, Unfinished)
    (line,) = [line for line in lines if "micro_batch" in line]
    assert line.startswith("training.micro_batch=auto: 3 of 7 clips at once, about ")
    assert json.loads((run / "memory.json").read_text()) == {"chosen": 3}
    monkeypatch.setattr(report, "_free_memory", lambda kind: pytest.fail("a resumed run must not choose again"))
    made, lines = train_toy(run, settings)
    assert lines[0] == "resuming from checkpoint-4" and not any("micro_batch" in line for line in lines)
    assert made.digest == whole.digest
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)


def test_automatic_choice_does_not_limit_a_number_that_is_set_later(tmp_path):
    assert oom.chosen_micro_batch(tmp_path, lambda: 2) == 2
    assert oom.chosen_micro_batch(tmp_path, lambda: 4) == 2
    assert oom.micro_batch(tmp_path, 8) == 8
    oom.halve_micro_batch(tmp_path, oom.OutOfMemory(2, 1))
    assert oom.chosen_micro_batch(tmp_path, lambda: 4) == oom.micro_batch(tmp_path, 8) == 1


@pytest.mark.parametrize("content", ["[]", '{"micro_batch": "x"}', '{"micro_batch": 0}', "{", "7"])
def test_damaged_record_of_memory_is_left_out(tmp_path, content):
    (tmp_path / "memory.json").write_text(content)
    assert oom.micro_batch(tmp_path, 8) == 8


@pytest.mark.slow
def test_one_clip_that_does_not_fit_raises_one_line(train_toy, room_for, tmp_path):
    room_for(0)
    ended, _ = train_toy(tmp_path / "run", SETTINGS)
    assert str(ended).startswith("memory does not hold one clip at step 1: take a smaller model.base")
    assert json.loads((tmp_path / "run" / "memory.json").read_text()) == {"micro_batch": 1}


@pytest.mark.slow
def test_oom_in_optimizer_step_halves_batches(train_toy, whole, tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def refuse(self, *args, **kwargs):
        calls.append(len(calls))
        if len(calls) in (1, 6):  # after the restart the second sitting begins with call 2: step 5 is call 6
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    made, lines = train_toy(tmp_path / "run", SETTINGS)
    told = [line for line in lines if line.startswith(("memory ran out", "starting", "resuming"))]
    assert [line.split(". From now on ")[0].split(" from /")[0] for line in told] == [
        "starting",
        *("memory ran out: 7 clips did not fit into memory at step 1", "starting"),
        *("memory ran out: 3 clips did not fit into memory at step 5", "resuming from checkpoint-3"),
    ]
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)
    assert made.digest == whole.digest


FULL = {"training.steps": 2, "training.eval_every": 1, "training.batch_size": 2, "training.context": "full"}
"""8 validation clips of 3,000 frames each."""


@pytest.fixture
def looks_at(monkeypatch):
    """`looks_at(4)`: a device that holds four clips in a look at validation; the sizes of all encoder passes in one."""
    load = whisper_model.load

    def plan(clips: int) -> list[int]:
        passes: list[int] = []

        def refuse(encoder, args, kwargs):
            if encoder.training:
                return
            passes.append(len(args[0] if args else kwargs["input_features"]))
            if passes[-1] > clips:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        def small(*args, **kwargs):
            model = load(*args, **kwargs)
            model.model.encoder.register_forward_pre_hook(refuse, with_kwargs=True)
            return model

        monkeypatch.setattr(whisper_model, "load", small)
        monkeypatch.setattr(decoding.greedy, "runs_on", lambda model: False)  # a GPU encodes a batch in one pass
        return passes

    return plan


@pytest.mark.slow
def test_oom_in_validation_halves_its_batches(train_toy, looks_at, tmp_path):
    wanted, _ = train_toy(tmp_path / "whole", FULL)
    passes = looks_at(3)
    made, lines = train_toy(tmp_path / "run", FULL)
    assert [line for line in lines if "memory" in line] == [
        "memory ran out in validation: from now on its batches hold at most "
        f"{frames} frames (evaluation.batch_frames={frames})"
        for frames in (12_000, 6_000)
    ]
    assert passes[0] == 5, "the clips of notebook 02, before training: they are left out, because they do not fit"
    assert passes[1:] == [8, 4, *[2] * 12], "two looks for transcripts and loss, and one for the confidences"
    assert 0 not in samples.read(tmp_path / "run") and samples.read(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "memory.json").read_text()) == {"batch_frames": 6_000}
    assert losses(made) == pytest.approx(losses(wanted), rel=1e-5, abs=1e-5)
    assert [row["eval_wer"] for row in made.history if "eval_wer" in row] == [
        row["eval_wer"] for row in wanted.history if "eval_wer" in row
    ]
    assert oom.ValidationBatch(tmp_path / "run", 24_000).frames == 6_000, "the next sitting begins with it"


def test_validation_that_cannot_fit_raises_one_line(train_toy, looks_at, tmp_path):
    looks_at(0)
    ended, _ = train_toy(tmp_path / "run", FULL)
    assert str(ended).startswith("memory does not hold 30 s of speech in validation: take a smaller")


def test_longest_batch_is_tried_before_first_step(train_toy, whole, toy_cache, tmp_path, monkeypatch):
    """A device that holds all but the longest: found at step 1, not when that batch is drawn."""
    load, shapes = whisper_model.load, []
    longest = -(-int(toy_cache.rows["frames"].to_numpy()[toy_cache.split("train")].max() + 1) // 8) * 8

    def refuse(encoder, args, kwargs):
        features = args[0] if args else kwargs["input_features"]
        if encoder.training:
            shapes.append((len(features), features.shape[-1]))
            if len(features) * features.shape[-1] >= 7 * longest:
                raise torch.OutOfMemoryError

    def small(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.encoder.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    monkeypatch.setattr(whisper_model, "load", small)
    monkeypatch.setattr(oom, "tries_longest_batch", lambda: True)
    made, lines = train_toy(tmp_path / "run", SETTINGS)
    assert [line.split(". From now on ")[0] for line in lines if "memory" in line] == [
        "memory ran out: 7 clips did not fit into memory at step 1"
    ]
    assert shapes[:2] == [(7, longest), (3, longest)]
    assert max(frames for _, frames in shapes) == longest
    assert losses(made) == pytest.approx(losses(whole), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", [{}, {"training.window_share": 0.3}])
def test_trial_batch_changes_no_state(train_toy, tmp_path, monkeypatch, kind):
    draws = {"model.dropout": 0.1, "model.spec_augment": True, "training.steps": 3, "training.eval_every": 3, **kind}
    plain, _ = train_toy(tmp_path / "plain", draws)
    monkeypatch.setattr(oom, "tries_longest_batch", lambda: True)
    made, _ = train_toy(tmp_path / "tried", draws)
    ours, theirs = weights(made), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_oom_on_several_devices_names_the_setting():
    with pytest.raises(LabError, match="one of 2 devices. Set training.micro_batch=4"):
        with oom.converted(8, 3, processes=2):
            raise torch.OutOfMemoryError


def test_micro_batches_have_each_clip_once_in_order():
    batch = {"input_features": torch.arange(14).reshape(7, 2), "labels": torch.arange(7)}
    pieces = list(oom.split(batch, 3))
    assert [len(piece["labels"]) for piece in pieces] == [3, 3, 1]
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), tensor)
