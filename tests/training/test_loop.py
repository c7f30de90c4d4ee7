from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from log_recorder import record_log
from safetensors.torch import load_file
from toy_whisper import END, NO_TIMESTAMPS, START, SWEDISH, TRANSCRIBE

from pipelines import recipes
from pipelines.features import pipeline as feature_pipeline
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.training import loop as training_loop
from pipelines.training import run as training_run
from pipelines.training import validation
from pipelines.training.callbacks import samples
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.finish import context_s
from pipelines.training.run import TrainingRun
from pipelines.whisper import confidence
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import IGNORED, Collator
from pipelines.whisper.confidence import Calibration

SIZES = ("model.base", "training.steps", "training.eval_every", "training.warmup_steps")
POSITIONS = "model.encoder.embed_positions.weight"


class CutOff(BaseException):
    """Like a kill: nothing in the lab or in transformers may catch it."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(toy_model):
    return whisper_model.resolve(str(toy_model))


@pytest.fixture(scope="module")
def eight(toy_settings, tmp_path_factory):
    """A cache with eight clips to train on, of different lengths and with labels of different lengths."""
    sizes = {"source.train": 8, "source.validation": 3, "source.test": 1}
    return feature_pipeline.run(toy_settings(sizes), runs=tmp_path_factory.mktemp("eight"))


@pytest.fixture(scope="module")
def set_wers():
    """`set_wers([0.5, 0.2])`: replace the WERs of the next validations; return the list of the weights at each."""

    def replace(wers: list[float]) -> list[dict[str, torch.Tensor]]:
        weights, remaining = [], iter(wers)

        def validate(model):
            weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"wer": next(remaining), "loss": 1.0}

        training_loop.validator = lambda *args: validate
        return weights

    return replace


@pytest.fixture(autouse=True)
def real_validation():
    """Restore the real validation after each test."""
    yield
    training_loop.validator = validation.validator


@pytest.fixture(scope="module")
def fit(toy_settings, toy_cache, base):
    """`fit(run, {"training.steps": 4})`: train in the folder `run`; the model and the lines told.

    `cut_at=3` cuts it off when step 3 is done; `cut=True` says that something else will.
    """

    def train(run: Path, overrides: dict | None = None, cut_at: int = 0, cut: bool = False, **told):
        lines = record_log()

        def on_step(step: int) -> None:
            if step == cut_at:
                raise CutOff

        progress = Progress(on_step=on_step, **told)
        try:
            made = training_loop.train(TrainingRun(toy_settings(overrides), toy_cache, base, run, progress))
        except CutOff:
            made = None
        assert (made is None) == (cut or cut_at > 0)
        return made, lines

    return train


@contextlib.contextmanager
def cut_before(module, name: str, when=lambda *args, **facts: True):
    """Within, a call of `module.name` ends the run, where `when` says so."""
    original = getattr(module, name)

    def call(*args, **facts):
        if when(*args, **facts):
            raise CutOff
        return original(*args, **facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield


def weights(model) -> dict[str, torch.Tensor]:
    return load_file(Path(model.uri) / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, over the tensors that both have (a state in memory also lists the tied output layer)."""
    shared = one.keys() & other.keys()
    assert len(shared) > 60
    return all(torch.equal(one[name], other[name]) for name in shared)


def steps_at_hand(run: Path) -> list[int]:
    return [sealed_checkpoints.step_of(path) for path in sealed_checkpoints.listed(run / "checkpoints")]


# ---- the loss and its gradient


def reference(model, cache, rows: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Token mean of the cross entropy over `rows` in one batch, and its gradient: nothing of the trainer's."""
    model = copy.deepcopy(model)
    model.zero_grad()
    batch = Collator(cache, full_context=True)(rows)
    labels = batch["labels"]
    before = torch.where(labels == IGNORED, END, labels)[:, :-1]
    inputs = torch.cat([torch.full((len(rows), 1), START), before], dim=1)
    logits = model(input_features=batch["input_features"], decoder_input_ids=inputs).logits
    kept = labels != IGNORED
    loss = F.cross_entropy(logits[kept], labels[kept])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def gradients(recipe, cache, base, folder: Path, change=lambda trainer: None):
    """Every optimizer step of a training run: the rows it saw, its gradient, and the reference's loss and gradient."""
    from transformers import TrainerCallback

    trainer = training_loop._build_trainer(TrainingRun(recipe, cache, base, folder))
    trainer.validate = lambda model: {"wer": 1.0, "loss": 1.0}
    batches, steps, collate = [], [], trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(rows) or collate(rows)
    per_epoch = len(trainer.sampler)
    size = recipe.training.accumulation
    groups = [range(per_epoch)[at : at + size] for at in range(0, per_epoch, size)]

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            epoch, group = divmod(state.global_step, len(groups))
            rows = [row for batch in groups[group] for row in batches[epoch * per_epoch + batch]]
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            steps.append((rows, found, *reference(model, cache, rows)))

    trainer.add_callback(Watch())
    change(trainer)
    trainer.train()
    return steps, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    assert found.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / largest


def accumulating(settings, batch_size: int, accumulation: int, steps: int = 1):
    sizes = {"batch_size": batch_size, "accumulation": accumulation, "steps": steps}
    rest = {"context": "full", "warmup_steps": 0, "max_grad_norm": 1e9, "learning_rate": 1e-2}
    return settings({f"training.{name}": value for name, value in (sizes | rest).items()})


def test_four_accumulated_batches_equal_one_large_batch(toy_settings, eight, base, tmp_path):
    found = {}
    for batch_size, accumulation in ((8, 1), (2, 4)):
        recipe = accumulating(toy_settings, batch_size, accumulation)
        ((rows, gradient, loss, wanted),), logged = gradients(recipe, eight, base, tmp_path / str(accumulation))
        assert sorted(rows) == eight.split("train").tolist()
        assert distance(gradient, wanted) < 1e-5
        assert logged == [pytest.approx(loss, rel=1e-5)]
        found[accumulation] = gradient
    assert distance(found[4], found[1]) < 1e-5
    assert len({len(eight.labels(row)) for row in rows}) > 3


@pytest.mark.slow
def test_accumulation_test_detects_transformers_own_loss(toy_settings, eight, base, tmp_path):
    from transformers import Seq2SeqTrainer

    def leave_the_loss_to_the_model(trainer):
        trainer.compute_loss_func = None
        trainer.compute_loss = functools.partial(Seq2SeqTrainer.compute_loss, trainer)

    recipe = accumulating(toy_settings, 2, 4)
    ((_, gradient, _, wanted),), _ = gradients(recipe, eight, base, tmp_path, leave_the_loss_to_the_model)
    assert distance(gradient, wanted) > 0.01


@pytest.mark.slow
def test_incomplete_last_group_is_a_token_mean(toy_settings, eight, base, tmp_path):
    # 4 batches an epoch in groups of 3: six clips, two clips, six clips, ...
    steps, logged = gradients(accumulating(toy_settings, 2, 3, steps=4), eight, base, tmp_path)
    assert [len(rows) for rows, *_ in steps] == [6, 2, 6, 2]
    for (_, gradient, loss, wanted), told in zip(steps, logged, strict=True):
        assert distance(gradient, wanted) < 1e-5
        assert told == pytest.approx(loss, rel=1e-5)
    first, second = (sorted(row for rows, *_ in part for row in rows) for part in (steps[:2], steps[2:]))
    assert first == second == eight.split("train").tolist()
    assert steps[0][0] != steps[2][0]


@pytest.mark.parametrize("full_context", [False, True])
def test_validation_loss_is_token_mean_over_all_clips(toy_settings, toy_cache, base, full_context):
    model, rows = whisper_model.load(base, dropout=0.5).train(), toy_cache.split("validation")
    budget, shapes = 6_000 if full_context else 1_500, []
    batch = SimpleNamespace(run_with_retries=lambda work: work(budget))
    processor = whisper_model.load_processor(base, "sv")
    validate = validation.validator(toy_settings(), toy_cache, processor, full_context, batch)
    handle = model.model.encoder.register_forward_pre_hook(lambda encoder, args: shapes.append(args[0].shape))
    found = validate(model)["loss"]
    handle.remove()
    assert model.training
    assert len(shapes) > 1
    assert all(shape[0] * shape[2] <= budget for shape in shapes)
    assert sum(shape[0] for shape in shapes) == len(rows)
    assert (max(shape[2] for shape in shapes) == 3_000) == full_context
    if full_context:
        losses = [reference(model.eval(), toy_cache, [row])[0] for row in rows]
        tokens = [len(toy_cache.labels(row)) for row in rows]
        assert found == pytest.approx(np.average(losses, weights=tokens), rel=1e-5)


def test_decoder_input_has_one_start_token(fit, set_wers, tmp_path, monkeypatch):
    set_wers([1.0])
    seen, load = [], whisper_model.load

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.decoder.register_forward_pre_hook(
            lambda decoder, args, kwargs: seen.append(kwargs["input_ids"]) if decoder.training else None,
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr(whisper_model, "load", watched)
    fit(tmp_path / "run", {"training.steps": 3, "training.accumulation": 2})
    rows = [row for batch in seen for row in batch.tolist()]
    assert len(rows) == 3 * 2 * 4
    for row in rows:
        assert row[:2] == [START, SWEDISH]
        assert row.count(START) == 1
        assert IGNORED not in row


# ---- what comes out


def test_training_changes_all_weights_but_sinusoids(fit, toy_model, tmp_path):
    made, lines = fit(tmp_path / "run")
    before, after = load_file(toy_model / "model.safetensors"), weights(made)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == [POSITIONS]
    losses = [row["loss"] for row in made.history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert lines[0].startswith("starting from ")
    assert [line.split(":")[0] for line in lines[1:]] == ["step 4", "step 8", "step 12"]


def test_finished_model_is_sealed_and_complete(fit, set_wers, base, toy_cache, tmp_path):
    set_wers([0.5])
    ended = []
    noisy = {"training.steps": 2, "model.dropout": 0.1, "model.spec_augment": True}
    made, _ = fit(tmp_path / "run", noisy, on_end=ended.append)
    ref = whisper_model.resolve(made.uri)
    assert (ref.context, ref.quantisation, ref.facts["kind"]) == ("clip", None, "model")
    assert abs(datetime.fromisoformat(ref.facts["made"]).timestamp() - time.time()) < 600
    assert ref.facts["cache"] == toy_cache.digest
    assert ref.facts["base"] == f"(a local path) @ {base.revision}"
    assert ref.name == f"toy-{made.digest}"
    assert ended == [made.history]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert json.loads((ref.folder / "recipe.json").read_text())["training"]["steps"] == 2
    # settings of training do not follow the model out of the lab
    config = whisper_model.load(ref).config
    told = json.loads((ref.folder / "config.json").read_text())
    assert (config.max_source_positions, told["dropout"], told["apply_spec_augment"]) == (1500, 0.0, False)
    assert whisper_model.load(ref).generation_config.language == "sv"
    assert whisper_model.load_processor(ref, "sv").tokenizer("").input_ids == [
        START,
        SWEDISH,
        TRANSCRIBE,
        NO_TIMESTAMPS,
        END,
    ]


@pytest.mark.parametrize(("wers", "best"), [([0.5, 0.2, 0.9], 2), ([0.5, 0.5, 0.5], 1), ([0.9, 0.8, 0.3], 3)])
def test_model_is_the_best_checkpoint_not_the_last(fit, set_wers, tmp_path, wers, best):
    seen = set_wers(wers)
    made, _ = fit(tmp_path / "run", {"training.steps": 3, "training.eval_every": 1, "training.warmup_steps": 0})
    assert (made.best_step, made.validation["eval_wer"], made.validation["step"]) == (best, min(wers), best)
    assert [same(weights(made), state) for state in seen] == [step == best for step in (1, 2, 3)]


def test_last_step_is_validated_if_not_a_multiple(fit, set_wers, tmp_path):
    set_wers([0.5, 0.4])
    made, _ = fit(tmp_path / "run", {"training.steps": 6})
    assert [row["step"] for row in made.history if "eval_wer" in row] == [4, 6]
    assert made.best_step == 6


def test_patience_stops_a_run_early(fit, set_wers, tmp_path):
    impatient = {"training.steps": 5, "training.eval_every": 1, "training.patience": 2}
    wers = [0.5, 0.4, 0.6, 0.4, 0.1]
    set_wers(wers)
    made, _ = fit(tmp_path / "run", impatient)
    assert (made.best_step, made.history[-1]["step"]) == (2, 4)
    set_wers(wers)
    patient, _ = fit(tmp_path / "patient", {**impatient, "training.patience": 0})
    assert (patient.best_step, patient.history[-1]["step"]) == (5, 5)

    # cut off after the last checkpoint: it stays ended
    set_wers(wers)
    with cut_before(training_loop, "finish"):
        fit(tmp_path / "again", impatient, cut=True)
    set_wers([])
    again, lines = fit(tmp_path / "again", impatient)
    assert lines == ["resuming from checkpoint-4"]
    assert told(again.history) == told(made.history)
    assert same(weights(again), weights(made))


@pytest.mark.slow
def test_dropout_and_spec_augment_change_the_weights(fit, set_wers, tmp_path):
    learnt = {}
    for name, overrides in {
        "plain": {},
        "plain again": {"training.keep_checkpoints": 3},
        "dropout": {"model.dropout": 0.3},
        "spec_augment": {"model.spec_augment": True},
    }.items():
        set_wers([0.5])
        learnt[name] = weights(fit(tmp_path / name, {"training.steps": 3, **overrides})[0])
    alike = {pair for pair in itertools.combinations(learnt, 2) if same(learnt[pair[0]], learnt[pair[1]])}
    assert alike == {("plain", "plain again")}


def test_spec_augment_masks_only_real_frames(base):
    model = whisper_model.load(base, spec_augment=True).train()
    np.random.seed(0)
    mask = torch.ones(4, 400, dtype=torch.long)
    mask[:, 300:] = 0
    seen = [model.model._mask_input_features(torch.ones(4, 80, 400), mask) for _ in range(20)]
    zeros = torch.cat(seen) == 0
    in_time, in_mel = zeros.all(dim=1), zeros.all(dim=2)
    assert in_time.any(dim=1).all()
    assert not in_time[:, 300:].any()
    assert 0 < in_mel.any(dim=1).float().mean() < 1
    model.eval()
    assert (model.model._mask_input_features(torch.ones(4, 80, 400), mask) == 1).all()


# ---- one run, one folder


def test_finished_run_is_returned_at_once(fit, set_wers, tmp_path, monkeypatch):
    set_wers([0.5])
    made, _ = fit(tmp_path / "run", {"training.steps": 2})
    monkeypatch.setattr(training_loop, "_build_trainer", lambda *args: pytest.fail("trained again"))
    ended = []
    again, lines = fit(tmp_path / "run", {"training.steps": 2}, on_end=ended.append)
    assert again == made
    assert ended == [made.history]
    assert lines == [f"this run is finished: {made.uri}"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"training.learning_rate": 2e-3}, "training.learning_rate: wanted 0.002, found 0.001"),
     ({"model.dropout": 0.1}, "model.dropout: wanted 0.1, found 0.0")],
)  # fmt: skip
def test_folder_of_another_run_is_refused(fit, set_wers, tmp_path, overrides, named):
    set_wers([0.5])
    fit(tmp_path / "run", {"training.steps": 2})
    with pytest.raises(LabError, match=rf"belongs to another run: {named}\. Name another folder"):
        fit(tmp_path / "run", {"training.steps": 2, **overrides})


def test_other_cache_is_another_run(toy_settings, toy_cache, eight, base, tmp_path):
    (tmp_path / "run").mkdir()
    manifest.write_json(tmp_path / "run" / "run.json", training_run.run_identity(toy_settings(), toy_cache, base))
    with pytest.raises(LabError, match=f"cache: wanted {eight.digest}, found {toy_cache.digest}"):
        training_loop.train(TrainingRun(toy_settings(), eight, base, tmp_path / "run"))


def test_second_trainer_in_a_folder_is_refused(fit, tmp_path, monkeypatch):
    refused = []

    def validate(model):
        with pytest.raises(LabError, match=r"another process trains in .* right now") as caught:
            fit(tmp_path / "run", {"training.steps": 2})
        refused.append(caught.value)
        return {"wer": 0.5, "loss": 1.0}

    monkeypatch.setattr(training_loop, "validator", lambda *args: validate)
    fit(tmp_path / "run", {"training.steps": 2})
    assert len(refused) == 1


@pytest.mark.parametrize("split", ["train", "validation"])
def test_cache_without_a_split_raises_one_line(toy_settings, toy_cache, base, tmp_path, split):
    lacking = dataclasses.replace(toy_cache, rows=toy_cache.rows[toy_cache.rows["split"] != split])
    with pytest.raises(LabError, match=f"has no {split} clips"):
        training_loop.train(TrainingRun(toy_settings(), lacking, base, tmp_path / "run"))


# ---- cut off and gone on with


@pytest.fixture(scope="module")
def whole(fit, set_wers, tmp_path_factory):
    """The uninterrupted run that the ones that were cut off are held against."""
    set_wers([0.5, 0.6, 0.4])
    return fit(tmp_path_factory.mktemp("whole"))[0]


def told(history: list[dict]) -> list[dict]:
    """A history without the times."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "clips_per_s")} for row in history]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_run_interrupted_twice_is_bit_equal(fit, set_wers, whole, tmp_path):
    set_wers([0.5, 0.6])
    _, first = fit(tmp_path / "run", cut_at=7)
    _, second = fit(tmp_path / "run", cut_at=10)
    set_wers([0.4])
    made, third = fit(tmp_path / "run")
    assert first[0].startswith("starting from")
    assert second[0] == "resuming from checkpoint-4"
    assert third[0] == "resuming from checkpoint-8"
    assert same(weights(made), weights(whole))
    assert told(made.history) == told(whole.history)
    seconds = [row["seconds"] for row in made.history]
    assert seconds == sorted(seconds)
    assert made.seconds == seconds[-1] > 0
    assert [row["step"] for row in made.history if "loss" in row] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes_resume_bit_equal(fit, set_wers, tmp_path, name):
    """Its settings of model, training and augmentation on the toy; the numbers of steps alone are the toy's."""
    shipped = recipes.load(name)
    chosen = shipped.changed("model") | shipped.changed("training") | shipped.changed("augment")
    kept = {setting: value for setting, value in chosen.items() if setting not in SIZES and value != "auto"}
    few = kept | {"training.steps": 3, "training.eval_every": 2, "training.warmup_steps": 1}
    set_wers([0.5, 0.4])
    alone, _ = fit(tmp_path / "alone", few)
    set_wers([0.5])
    fit(tmp_path / "run", few, cut_at=3)
    set_wers([0.4])
    made, lines = fit(tmp_path / "run", few)
    assert lines[0] == "resuming from checkpoint-2"
    assert same(weights(made), weights(alone))
    assert told(made.history) == told(alone.history)


def test_progress_reports_resumed_steps(fit, set_wers, tmp_path):
    set_wers([0.5, 0.6])
    starts = []
    fit(tmp_path / "run", cut_at=6, on_start=lambda *args: starts.append(args))
    histories = []
    set_wers([0.6, 0.4])
    fit(tmp_path / "run", on_start=lambda *args: starts.append(args), on_log=lambda rows: histories.append(len(rows)))
    assert starts == [(0, 12), (4, 12)]
    assert histories == sorted(histories)
    assert histories[0] > 4


def test_damaged_checkpoint_falls_back_to_previous(fit, set_wers, whole, tmp_path):
    set_wers([0.5, 0.6])
    fit(tmp_path / "run", cut_at=10)
    flip(tmp_path / "run" / "checkpoints" / "checkpoint-8" / "optimizer.pt")
    set_wers([0.6, 0.4])
    made, lines = fit(tmp_path / "run")
    assert lines[:2] == [
        "skipping checkpoint-8: optimizer.pt is damaged (its sha256 differs)",
        "resuming from checkpoint-4",
    ]
    assert same(weights(made), weights(whole))


def test_unfinished_checkpoint_is_ignored_and_rewritten(fit, set_wers, tmp_path):
    longer = {"training.steps": 16}
    set_wers([0.5, 0.6])
    fit(tmp_path / "run", longer, cut_at=10)
    torn = tmp_path / "run" / "checkpoints" / "checkpoint-12"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (torn / "left.over").write_bytes(b"x")
    set_wers([0.7])
    _, lines = fit(tmp_path / "run", longer, cut_at=14)
    assert lines[0].startswith("skipping checkpoint-12: unfinished")
    assert lines[1] == "resuming from checkpoint-8"
    assert manifest.problem(torn) is None
    assert not (torn / "left.over").exists()


def test_interrupted_save_leaves_no_checkpoint(fit, set_wers, tmp_path):
    set_wers([0.5, 0.6])
    with cut_before(sealed_checkpoints, "seal", when=lambda folder, **facts: folder.name == "checkpoint-4"):
        fit(tmp_path / "run", {"training.steps": 6, "training.eval_every": 2}, cut=True)
    set_wers([0.6, 0.4])
    _, lines = fit(tmp_path / "run", {"training.steps": 6, "training.eval_every": 2})
    assert lines[0].startswith("skipping checkpoint-4: unfinished")
    assert lines[1] == "resuming from checkpoint-2"


def test_interruption_before_the_model_resumes_to_it(fit, set_wers, tmp_path):
    # five steps end inside an epoch of twelve, where transformers' trainer would take one step more
    short = {"training.steps": 5}
    set_wers([0.5, 0.4])
    wanted, _ = fit(tmp_path / "whole", short)
    set_wers([0.5, 0.4])
    with cut_before(training_loop, "finish"):
        fit(tmp_path / "run", short, cut=True)
    set_wers([])
    made, _ = fit(tmp_path / "run", short)
    assert made.best_step == 5
    assert told(made.history) == told(wanted.history)
    assert same(weights(made), weights(wanted))


def test_unsealed_model_is_written_again(fit, set_wers, whole, tmp_path):
    set_wers([0.5, 0.6, 0.4])
    with cut_before(manifest, "seal", when=lambda folder, kind, **facts: kind == "model"):
        fit(tmp_path / "run", cut=True)
    (tmp_path / "run" / "model" / "left.over").write_bytes(b"x")
    set_wers([])
    made, _ = fit(tmp_path / "run")
    assert same(weights(made), weights(whole))
    assert not (Path(made.uri) / "left.over").exists()


def test_damaged_best_checkpoint_is_trained_again(fit, set_wers, tmp_path):
    set_wers([0.3, 0.6])
    fit(tmp_path / "run", cut_at=10)
    flip(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "model.safetensors")
    set_wers([0.5, 0.6, 0.4])
    _, lines = fit(tmp_path / "run")
    assert lines[0].startswith("skipping checkpoint-8: the best one before it, checkpoint-4, cannot be used (mod")
    assert manifest.problem(tmp_path / "run" / "model") is None


@pytest.mark.parametrize("name", ["model.safetensors", "training.json", "manifest.json"])
def test_damaged_model_is_moved_aside_and_trained_again(fit, set_wers, whole, tmp_path, name):
    shutil.copytree(Path(whole.uri).parent, tmp_path / "run")
    flip(tmp_path / "run" / "model" / name) if name != "manifest.json" else None
    if name == "manifest.json":
        (tmp_path / "run" / "model" / name).write_text('{"kind": "model", "fil')
    set_wers([0.5, 0.6, 0.4])
    made, lines = fit(tmp_path / "run")
    assert "it was moved to model.damaged-1 and is made again" in lines[0] and name in lines[0]
    assert same(weights(made), weights(whole))
    assert fit(tmp_path / "run")[1] == [f"this run is finished: {made.uri}"]


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 10]), (2, [4, 8, 10]), (3, [4, 6, 8, 10])])
def test_newest_and_best_checkpoints_are_kept(fit, set_wers, tmp_path, keep, left):
    set_wers([0.5, 0.2, 0.6, 0.7, 0.8])
    fit(tmp_path / "run", {"training.eval_every": 2, "training.keep_checkpoints": keep}, cut_at=11)
    assert steps_at_hand(tmp_path / "run") == left
    assert all(manifest.problem(path) is None for path in sealed_checkpoints.listed(tmp_path / "run" / "checkpoints"))


def test_model_trained_without_speech_may_write_nothing(train_toy, tmp_path):
    model, _ = train_toy(tmp_path, {"training.steps": 1, "curation.non_speech_share": 0.1})
    settings = json.loads((Path(model.uri) / "generation_config.json").read_text("utf-8"))
    assert END not in settings["begin_suppress_tokens"]
    plain, _ = train_toy(tmp_path / "plain", {"training.steps": 1})
    settings = json.loads((Path(plain.uri) / "generation_config.json").read_text("utf-8"))
    assert END in settings["begin_suppress_tokens"]


def test_clips_without_speech_do_not_lengthen_the_context(toy_settings):
    rows = pd.DataFrame({"duration_s": [2.0, 3.0, 30.0], "text": ["ja", "nej", ""]})
    cache = SimpleNamespace(rows=rows, split=lambda name: [0, 1, 2])
    assert context_s(toy_settings(), cache) == 3.0


def test_model_records_context_and_calibration(train_toy, toy_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(confidence, "fit", lambda logprobs, right: Calibration(0.5, 0.1, len(right)))
    wanted = toy_cache.rows["duration_s"].iloc[toy_cache.split("train")].max()
    windows = {"share": 0.2, "fill": "random", "timestamps": 0.5, "prompt": 1.0}
    settings = {f"training.window_{name}": value for name, value in windows.items()}
    for overrides, longest_s in (({}, wanted), (settings, 30.0)):
        model, _ = train_toy(tmp_path / str(longest_s), {"training.steps": 1, **overrides})
        told = manifest.read(Path(model.uri))
        assert told["context_s"] == pytest.approx(longest_s)
        assert told.get("windows") == (windows if overrides else None)
        fitted = Calibration.of(told)
        assert fitted.words > 0
        assert fitted == Calibration(0.5, 0.1, fitted.words)


def test_samples_of_a_resumed_run_are_those_of_a_whole_one(fit, tmp_path):
    settings = {"training.steps": 8, "training.eval_every": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, settings)
    fit(cut, settings, cut_at=6)
    for step in (4, 8):  # the checkpoint's texts count, as on a machine without the run's file
        samples.add(cut, step, ["x"], ["written by another sitting"])
    fit(cut, settings)
    assert list(samples.read(cut)) == [0, 4, 8]
    assert (cut / samples.FILE).read_bytes() == (whole / samples.FILE).read_bytes()
