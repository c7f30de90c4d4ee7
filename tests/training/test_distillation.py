"""A student: which layers it begins with, what it learns from, how far it is from its teacher, how it is trained."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from log_recorder import record_log
from safetensors.torch import load_file
from toy_whisper import END, NO_TIMESTAMPS, START, SWEDISH, TRANSCRIBE
from transformers import GenerationConfig

from pipelines import recipes
from pipelines.experiments import pipeline as experiment_pipeline
from pipelines.experiments.comparison import validity
from pipelines.features import cache as caches
from pipelines.features.curation import label_errors
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes.training_settings import DistillationSettings
from pipelines.training import distillation, trainer
from pipelines.training import loop as training_loop
from pipelines.training import pipeline as training_pipeline
from pipelines.training import run as training_run
from pipelines.training.callbacks.progress import Progress
from pipelines.training.finish import context_s
from pipelines.training.run import TrainingRun
from pipelines.training.trainer import shift_right, token_mean_loss
from pipelines.whisper import decoding, engines, export
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import IGNORED, Collator

pytestmark = pytest.mark.usefixtures("one_thread")
TAUGHT = {"distillation.teacher": "x", "distillation.decoder_layers": 1, "distillation.max_label_wer": 0}
SHORT = {"training.steps": 4, "training.eval_every": 2, "evaluation.max_new_tokens": 3}


class CutOff(BaseException):
    """Like a kill."""


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Read once: that takes longer than a toy's training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whisper_model, "load_processor", functools.cache(whisper_model.load_processor))
        yield


@pytest.fixture(scope="module")
def teacher(toy_model):
    """The toy, as if it had been tuned at the length of its clips."""
    facts = {"context_s": 4.0, "cache": "of-the-teacher", "base_model": "openai/whisper-tiny"}
    return dataclasses.replace(whisper_model.resolve(str(toy_model)), context="clip", facts=facts)


@pytest.fixture(scope="module")
def batch(toy_cache):
    """Features, decoder's input and labels of four clips of unlike length."""
    told = Collator(toy_cache)(toy_cache.split("train")[:4].tolist())
    told["decoder_input_ids"] = shift_right(told["labels"], START, END)
    return told


def small(**settings) -> DistillationSettings:
    return DistillationSettings(**{"teacher": "x", "decoder_layers": 1, **settings})


def answer(model, batch):
    """A model's outputs on a batch."""
    return model(input_features=batch["input_features"], decoder_input_ids=batch["decoder_input_ids"])


# ---- the student


@pytest.mark.parametrize(
    ("layers", "wanted", "chosen"),
    [(4, 0, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3]), (4, 2, [0, 3]), (4, 1, [3]), (12, 3, [0, 6, 11]), (32, 2, [0, 31])],
)
def test_layers_are_evenly_spaced_and_include_the_last(layers, wanted, chosen):
    assert distillation.spaced_layers(layers, wanted, "decoder") == chosen


def test_more_layers_than_the_teachers_are_refused():
    with pytest.raises(LabError, match=r"distillation.decoder_layers must be at most .* are 4, got 5"):
        distillation.spaced_layers(4, 5, "decoder")


def test_student_has_teacher_weights_with_new_layer_indices(teacher, toy_model, tmp_path):
    made = distillation.student(whisper_model.load(teacher), small(encoder_layers=1))
    whisper_model.save(made, whisper_model.load_processor(teacher, "sv"), tmp_path / "student")
    before, after = load_file(toy_model / "model.safetensors"), load_file(tmp_path / "student" / "model.safetensors")
    assert len(after) < len(before)
    for name, weights in after.items():
        assert torch.equal(weights, before[name.replace("layers.0.", "layers.1.")]), name
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (config["decoder_layers"], config["encoder_layers"]) == (1, 1)
    again = whisper_model.load(whisper_model.resolve(str(tmp_path / "student")))
    assert len(again.model.decoder.layers) == len(again.model.encoder.layers) == 1


def test_student_key_value_cache_has_its_layers(teacher, batch):
    """Greedy tokens with the cache, against those of whole passes without it."""
    made, processor = (
        distillation.student(whisper_model.load(teacher), small()).eval(),
        whisper_model.load_processor(teacher, "sv"),
    )
    prompt = [START, SWEDISH, TRANSCRIBE, NO_TIMESTAMPS]
    fast = decoding.generate(made, batch["input_features"][:1], prompt, 6)[0].tolist()
    slow = list(prompt)
    suppressed = torch.tensor(made.generation_config.suppress_tokens)
    first = torch.tensor(made.generation_config.begin_suppress_tokens)
    for step in range(len(fast)):
        with torch.no_grad():
            logits = made(batch["input_features"][:1], decoder_input_ids=torch.tensor([slow])).logits[0, -1]
        logits[suppressed] = -torch.inf
        if not step:
            logits[first] = -torch.inf
        slow.append(int(logits.argmax()))
    assert slow[4:] == fast
    assert processor.tokenizer.decode(fast, decode_with_timestamps=True)


def test_alignment_heads_are_renumbered_with_layers():
    settings = GenerationConfig(alignment_heads=[[2, 2], [3, 0], [3, 5]])
    distillation._renumber_alignment_heads(settings, [0, 3])
    assert settings.alignment_heads == [[1, 0], [1, 5]]
    distillation._renumber_alignment_heads(settings, [0])
    assert not hasattr(settings, "alignment_heads")
    distillation._renumber_alignment_heads(settings, [0])


@pytest.mark.skipif(not export.installed(), reason="ctranslate2 is not installed")
def test_student_transcript_is_equal_in_both_engines(teacher, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path / "cache")
    made, processor = (
        distillation.student(whisper_model.load(teacher), small()),
        whisper_model.load_processor(teacher, "sv"),
    )
    whisper_model.save(made, processor, tmp_path / "student")
    ref = dataclasses.replace(whisper_model.resolve(str(tmp_path / "student")), context="clip")
    told = {"device": "cpu", "max_new_tokens": 8}
    windows = batch["input_features"].numpy()
    stock = engines.open_engine(ref, "sv", "transformers", **told).decode(windows)
    exact = engines.open_engine(ref, "sv", "ctranslate2", compute_type="float32", **told).decode(windows)
    assert [one.text for one in stock] == [one.text for one in exact]
    assert len({one.text for one in stock}) > 1


# ---- the divergence


def test_divergence_is_zero_only_for_the_same_model(teacher, batch):
    judge = distillation.Teacher(whisper_model.load(teacher), 2.0, 1.0, shared=False)
    whole, part = whisper_model.load(teacher).eval(), distillation.student(whisper_model.load(teacher), small()).eval()
    with torch.no_grad():
        apart = [judge.divergence(batch, answer(model, batch), batch["labels"], None) for model in (whole, part)]
    assert float(apart[0]) == pytest.approx(0, abs=1e-6)
    assert float(apart[1]) > 0.01


def test_divergence_matches_its_definition(teacher, batch):
    judge = distillation.Teacher(whisper_model.load(teacher), 3.0, 0.5, shared=False)
    with torch.no_grad():
        outputs = answer(distillation.student(whisper_model.load(teacher), small()).eval(), batch)
        told = answer(whisper_model.load(teacher).eval(), batch).logits
    wanted, counted = 0.0, batch["labels"] != IGNORED
    for b, n in counted.nonzero().tolist():
        p, q = (F.softmax(logits[b, n].double() / 3.0, -1) for logits in (told, outputs.logits))
        wanted += float((p * (p / q).log()).sum())
    wanted *= 0.5 * 3.0**2
    assert float(judge.divergence(batch, outputs, batch["labels"], 100)) == pytest.approx(wanted / 100, rel=1e-4)
    alone = judge.divergence(batch, outputs, batch["labels"], None)
    assert float(alone) == pytest.approx(wanted / int(counted.sum()), rel=1e-4)


def test_shared_encoder_runs_once_with_equal_divergence(teacher, batch, toy_settings):
    recipe = toy_settings({**TAUGHT, "model.freeze_encoder": True})
    shared, apart = distillation.load_teacher(recipe, teacher), distillation.load_teacher(toy_settings(TAUGHT), teacher)
    assert (shared.shared, apart.shared) == (True, False)
    assert not len(shared.model.model.encoder.layers)
    with torch.no_grad():
        outputs = answer(distillation.student(whisper_model.load(teacher), small()).eval(), batch)
    ran = []
    shared.model.model.encoder.register_forward_hook(lambda *told: ran.append(told))
    found = [float(one.divergence(batch, outputs, batch["labels"], None)) for one in (shared, apart)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert not ran
    fewer = toy_settings({**TAUGHT, "model.freeze_encoder": True, "distillation.encoder_layers": 1})
    assert not distillation.load_teacher(fewer, teacher).shared
    assert distillation.load_teacher(toy_settings({**TAUGHT, "distillation.kl_weight": 0}), teacher) is None


def test_only_the_student_has_gradients(teacher, batch):
    judge = distillation.Teacher(whisper_model.load(teacher), 2.0, 1.0, shared=False)
    model = distillation.student(whisper_model.load(teacher), small()).train()
    outputs = answer(model, batch)
    loss = trainer.distillation_loss(judge, batch, outputs, batch["labels"], None)
    own = token_mean_loss(outputs, batch["labels"])
    assert float(loss.detach()) > float(own.detach())
    loss.backward()
    assert model.model.decoder.layers[0].fc1.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in judge.model.parameters())


# ---- what it learns from


@pytest.fixture
def set_transcripts(monkeypatch):
    """`set_transcripts(texts)`: the teacher's transcripts of the training clips, in their order."""

    def replace(texts: list[str]) -> None:
        monkeypatch.setattr(label_errors, "transcribe", lambda cache, rows, *args, **kwargs: texts)

    return replace


@pytest.fixture
def student_cache(toy_cache, teacher, tmp_path):
    """`student_cache(recipe)`: the cache of a student without checkpoints."""
    return lambda recipe: distillation.student_cache(recipe, toy_cache, teacher, tmp_path, lambda: None)


def test_close_transcripts_become_labels_others_are_dropped(
    toy_settings, toy_cache, teacher, set_transcripts, student_cache
):
    rows = toy_cache.split("train")
    said = toy_cache.rows["text"].iloc[rows].tolist()
    test = toy_cache.rows["text"].iloc[toy_cache.split("test")[0]]
    words = [text.upper() for text in said]
    words[1], words[2], words[3] = "helt andra ord än de som sades", "", test
    words[4] = f"{said[4]} och"
    set_transcripts(words)
    recipe, lines = toy_settings({**TAUGHT, "distillation.max_label_wer": 0.5}), record_log()
    made = student_cache(recipe)
    own = made.rows.iloc[made.split("train")]
    wers = label_errors.label_wers(said, words)
    gone = {toy_cache.rows["id"].iloc[rows[place]] for place in (1, 2, 3)}
    assert all(wers[[1, 2]] > 0.5)
    assert set(toy_cache.rows["id"].iloc[rows]) - set(own["id"]) == gone
    assert own["text"].iloc[0] == words[0]
    assert own["text"].iloc[1] == words[4]
    assert made.counts["train"] == len(own) == len(rows) - 3
    assert f"{len(rows) - 3} of {len(rows)} training clips are used (teacher labels)" in lines[-1]
    labelled = whisper_model.load_processor(teacher, "sv").tokenizer
    place = int(made.split("train")[1])
    assert labelled.decode(made.labels(place), skip_special_tokens=True) == words[4]
    assert made.labels(place)[-1] == END
    for split in ("validation", "test"):
        for before, after in zip(toy_cache.split(split), made.split(split), strict=True):
            assert toy_cache.labels(before) == made.labels(after)
            assert np.array_equal(toy_cache.log_mel(before).frames, made.log_mel(after).frames)
    assert made.digest == toy_cache.digest


def test_reference_labels_drop_clips_with_far_transcripts(toy_settings, toy_cache, set_transcripts, student_cache):
    rows = toy_cache.split("train")
    said = toy_cache.rows["text"].iloc[rows].tolist()
    set_transcripts([said[0].upper(), "något annat", *said[2:]])
    told = {**TAUGHT, "distillation.labels": "transcript", "distillation.max_label_wer": 0.2}
    made = student_cache(toy_settings(told))
    assert made.rows["text"].iloc[made.split("train")].tolist() == [said[0], *said[2:]]
    plain = toy_settings({**told, "distillation.max_label_wer": 0})
    assert student_cache(plain) is toy_cache


def test_teacher_without_close_transcripts_is_refused(toy_settings, toy_cache, set_transcripts, student_cache):
    set_transcripts(["något annat än det som sades"] * len(toy_cache.split("train")))
    recipe = toy_settings({**TAUGHT, "distillation.max_label_wer": 0.1})
    with pytest.raises(LabError, match="none of 48 training clips can be used: in 48 the teacher"):
        student_cache(recipe)


def test_complete_transcripts_of_a_checkpoint_are_reused(toy_settings, toy_cache, teacher, set_transcripts, tmp_path):
    rows, recipe = toy_cache.split("train"), toy_settings(TAUGHT)
    run, last = tmp_path / "run", tmp_path / "checkpoint-2"
    run.mkdir(), last.mkdir()

    def learnt(newest: Path | None) -> list[str]:
        made = distillation.student_cache(recipe, toy_cache, teacher, run, lambda: newest)
        return made.rows["text"].iloc[made.split("train")].tolist()

    first, other = [f"först {n}" for n in range(len(rows))], [f"sedan {n}" for n in range(len(rows))]
    set_transcripts(first)
    assert learnt(None) == first
    told = (run / distillation.TRANSCRIPTS).read_text()
    names = [json.loads(line)["clip"] for line in told.splitlines()]
    assert names == sorted(label_errors.fingerprints(toy_cache, rows)), "the same clips are the same bytes"
    set_transcripts(other)
    (last / distillation.TRANSCRIPTS).write_text(told)
    assert learnt(last) == first
    assert (run / distillation.TRANSCRIPTS).read_text() == told
    (last / distillation.TRANSCRIPTS).write_text("".join(told.splitlines(keepends=True)[1:]))
    assert learnt(last) == other, "a checkpoint that does not tell all of it"
    (last / distillation.TRANSCRIPTS).unlink()
    assert learnt(last) == other, "one from before checkpoints told it"


def test_other_transcripts_change_no_other_row(toy_cache):
    made = caches.with_transcripts(toy_cache, {5: ("hej", [1, 2, 3]), 2: ("då", [4])})
    assert (made.labels(5), made.labels(2)) == ([1, 2, 3], [4])
    assert made.rows["text"].iloc[[5, 2]].tolist() == ["hej", "då"]
    others = [row for row in range(len(toy_cache.rows)) if row not in (5, 2)]
    assert [made.labels(row) for row in others] == [toy_cache.labels(row) for row in others]
    assert toy_cache.labels(5) != [1, 2, 3]


# ---- training


@pytest.fixture
def fit(toy_settings, toy_cache, teacher):
    """`fit(run, overrides)`: a student trained in the folder `run`, and the lines told; `cut_at=3` cuts it off, once
    what it has is at `resume`."""

    def train(run: Path, overrides: dict, cut_at: int = 0, resume: str = ""):
        lines = record_log()

        def on_step(step: int) -> None:
            if step == cut_at:
                ends = time.monotonic() + 60
                while not list(Path(resume).glob("*/manifest.json")):
                    assert time.monotonic() < ends
                    time.sleep(0.01)
                raise CutOff

        progress = Progress(on_step=on_step)
        try:
            return training_loop.train(
                TrainingRun(toy_settings(overrides), toy_cache, teacher, run, progress, resume)
            ), lines
        except CutOff:
            return None, lines

    return train


def test_interrupted_student_resumes_bit_equal_elsewhere(fit, tmp_path, monkeypatch):
    """Teacher and student share the encoder; tests/training/test_resume.py kills one with a separate encoder."""
    settings = {**TAUGHT, **SHORT, "model.dropout": 0.1, "model.freeze_encoder": True}
    alone, lines = fit(tmp_path / "alone", settings)
    assert any("of 48 training clips are used (teacher labels)" in line for line in lines)
    here, kept = tmp_path / "runs" / "student", str(tmp_path / "kept")
    assert fit(here / "run", settings, cut_at=3, resume=kept)[0] is None
    shutil.rmtree(here)
    monkeypatch.setattr(label_errors, "transcribe", lambda *args, **told: pytest.fail("the teacher is asked again"))
    made, lines = fit(here / "run", settings, resume=kept)
    assert "resuming from checkpoint-2" in lines
    assert "the teacher's transcripts of 48 training clips are taken from checkpoint-2" in lines
    ours, theirs = (Path(model.uri) / "model.safetensors" for model in (made, alone))
    assert manifest.sha256(ours) == manifest.sha256(theirs)
    assert not any("layers.1." in name for name in load_file(ours) if ".decoder." in name)
    facts = manifest.read(Path(made.uri))
    assert facts["teacher"]["caches"] == ["of-the-teacher"]
    assert facts["base_model"] == "openai/whisper-tiny"
    assert "words" in facts["confidence"]
    assert "by the teacher" in (Path(made.uri) / "README.md").read_text()


def test_divergence_is_part_of_the_loss(fit, tmp_path):
    settings = {**TAUGHT, **SHORT, "training.steps": 1, "training.eval_every": 1, "distillation.labels": "transcript"}
    made = [fit(tmp_path / str(weight), {**settings, "distillation.kl_weight": weight})[0] for weight in (1, 0)]
    losses = [next(row["loss"] for row in model.history if "loss" in row) for model in made]
    assert losses[0] > losses[1] + 0.01


def test_run_name_depends_on_student_not_teacher_path(toy_settings, toy_cache, teacher):
    def named(ref=teacher, **told):
        settings = {**TAUGHT, **{f"distillation.{name}": value for name, value in told.items()}}
        return training_run.run_identity(toy_settings(settings), toy_cache, ref)

    plain = training_run.run_identity(toy_settings(), toy_cache, teacher)
    assert not any("distillation" in name for name in plain)
    assert named() == named(teacher="another/place")
    told = {"temperature": 1.0, "kl_weight": 0.5, "labels": "transcript", "max_label_wer": 0.3, "encoder_layers": 1}
    for name, value in {**told, "decoder_layers": 2}.items():
        assert named(**{name: value}) != named(), name
    other = dataclasses.replace(teacher, facts={"made_of": {"weights_sha256": "x"}}, folder=Path("elsewhere"))
    assert named(other)["base.weights_sha256"] == "x" != named()["base.weights_sha256"]


@pytest.fixture(scope="module")
def home(toy_settings, tmp_path_factory):
    """The runs folder in which teacher and student are made, and the student's recipe."""
    folder = tmp_path_factory.mktemp("home")
    own = "name = 'toy'\n[training]\nsteps = 1\neval_every = 1\nbatch_size = 4\n[evaluation]\nmax_new_tokens = 3\n"
    (folder / "toy.toml").write_text(own + "bootstrap_samples = 100\n")
    settings = {**TAUGHT, **SHORT, "name": "toy-student", "distillation.teacher": f"run:{folder / 'toy.toml'}"}
    return folder, toy_settings({**settings, "training.steps": 1, "training.eval_every": 1})


def test_missing_teacher_is_trained_first_and_once(home, toy_cache, tmp_path):
    runs, recipe = home
    lines = record_log()
    steps: list[int] = []
    progress, kept = Progress(on_step=steps.append), str(tmp_path / "kept")
    with pytest.raises(LabError, match=r"no finished run of it .*: python -m pipelines distill .*name=toy-student"):
        training_pipeline.run(recipe, toy_cache, runs=runs, progress=progress)
    made = training_pipeline.distill(recipe, toy_cache, runs=runs, progress=progress, resume=f"{kept}/")
    own = "toy-for-toy-student"  # trained on other data than the recipe toy says
    first = f"no finished run of {own} on this cache: training the teacher first"
    assert f"{first}, unless {kept}-teacher has it" in lines
    (taught_by,) = (runs / own).glob("train-*")
    assert Path(made.uri).parents[1] == runs / "toy-student"
    assert manifest.read(Path(made.uri))["teacher"]["digest"] == taught_by.name.removeprefix("train-")
    sealed_ns = (taught_by / "model" / manifest.MANIFEST).stat().st_mtime_ns
    lines.clear()
    other = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": 43})})
    training_pipeline.distill(other, toy_cache, runs=runs, progress=progress)
    assert lines[0] == "teacher model found; skipping teacher training"
    assert (taught_by / "model" / manifest.MANIFEST).stat().st_mtime_ns == sealed_ns
    # what the teacher heard for the first student is not decoded again for the second
    assert len(list((runs / "toy-student" / "heard").glob("*.jsonl"))) == 1
    assert not any(line.startswith("  ") and "of 48 clips" in line for line in lines) or "  48 of 48 clips" in lines
    assert validity.of_report(_report(made, recipe, toy_cache, runs), runs)[0] != validity.INVALID
    # an empty machine takes both from where they are kept
    assert Path(f"{kept}-teacher", "model", manifest.MANIFEST).is_file()
    steps.clear()
    again = training_pipeline.distill(recipe, toy_cache, runs=tmp_path / "bare", progress=progress, resume=kept)
    assert not steps
    assert again.digest == made.digest
    weights = [Path(model.uri) / "model.safetensors" for model in (again, made)]
    assert manifest.sha256(weights[0]) == manifest.sha256(weights[1])


@pytest.mark.parametrize("at_hand", [False, True])
def test_teacher_run_gets_launch_and_resume_uri(home, toy_cache, tmp_path, monkeypatch, at_hand):
    _, recipe = home
    own, asked = training_pipeline._teacher_recipe(recipe), []
    monkeypatch.setattr(
        training_pipeline, "run", lambda recipe, cache, runs, progress, **how: asked.append((recipe.name, how))
    )
    monkeypatch.setattr(training_pipeline, "_finished_teacher", lambda *told: (own, "there") if at_hand else None)
    launch = training_pipeline.Launch(cluster="auto", devices=2)
    training_pipeline.distill(recipe, toy_cache, runs=tmp_path, resume="hub://me/run", launch=launch, publish="there")
    assert asked == [
        (own.name, {"resume": "hub://me/run-teacher", "launch": launch}),
        (recipe.name, {"resume": "hub://me/run", "launch": launch, "publish": "there"}),
    ]
    asked.clear()
    training_pipeline.distill(recipe, toy_cache, runs=tmp_path)
    assert [name for name, _ in asked] == ([] if at_hand else [own.name]) + [recipe.name]


def test_teacher_on_other_data_has_another_name(toy_settings):
    own = training_pipeline._teacher_recipe(toy_settings({"name": "mine", "distillation.teacher": "run:tour"}))
    assert own.name == "tour-for-mine"
    asks = {"name": "mine", "distillation.teacher": "run:tour", "model.base": recipes.load("tour").model.base}
    assert training_pipeline._teacher_recipe(recipes.load("tour", asks)).name == "tour"
    assert (
        len(
            training_pipeline._teacher_recipe(toy_settings({"name": "m" * 64, "distillation.teacher": "run:tour"})).name
        )
        == 64
    )


def _report(made, recipe, cache, runs):
    return experiment_pipeline.evaluate(recipe, cache, made.uri, "test", runs=runs)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({}, "recipe toy names no teacher"),
        ({"distillation.teacher": "run:tour-distil"}, "must name a recipe that tunes a whole model"),
        ({"distillation.teacher": "run:tour", "name": "tour"}, "under another name"),
        ({"distillation.teacher": "no/such-model@q8"}, "is not on this machine"),
    ],
)
def test_invalid_teacher_raises_one_line(toy_settings, toy_cache, tmp_path, overrides, told):
    with pytest.raises(LabError, match=told):
        training_pipeline.distill(toy_settings(overrides), toy_cache, runs=tmp_path, progress=Progress())


def test_conflicting_settings_are_refused(toy_settings, toy_cache, tmp_path):
    for settings, told in (
        ({"distillation.decoder_layers": 2}, "distillation.decoder_layers is set, so distillation.teacher must name"),
        ({**TAUGHT, "model.adapter": "lora"}, "distillation.teacher excludes model.adapter"),
    ):
        with pytest.raises(LabError, match=told):
            recipes.load("tour", settings)
    with pytest.raises(LabError, match="a student starts from its teacher's layers: leave out --fork"):
        training_pipeline.run(
            toy_settings(TAUGHT), toy_cache, runs=tmp_path, launch=training_pipeline.Launch("somewhere")
        )


def test_teacher_of_shorter_inputs_is_refused(toy_settings, toy_cache, teacher):
    whole = dataclasses.replace(teacher, context="full")
    distillation.refuse_shorter_teacher(toy_settings(TAUGHT), toy_cache, teacher)
    distillation.refuse_shorter_teacher(toy_settings({**TAUGHT, "training.context": "full"}), toy_cache, whole)
    with pytest.raises(LabError, match="was tuned on windows of 30 s only"):
        distillation.refuse_shorter_teacher(toy_settings(TAUGHT), toy_cache, whole)
    with pytest.raises(LabError, match="was tuned on at most 4 s, and the student is to train on 30 s"):
        distillation.refuse_shorter_teacher(toy_settings({**TAUGHT, "training.window_share": 0.2}), toy_cache, teacher)


def test_teacher_of_equal_clips_is_accepted_shorter_refused(toy_settings, toy_cache, teacher):
    recipe, frames = toy_settings(TAUGHT), toy_cache.rows["frames"].to_numpy()
    for longest in (*toy_cache.split("train"), frames.argmin()):  # whatever its length, it is the longest of its own
        alone = dataclasses.replace(toy_cache, rows=toy_cache.rows.iloc[[longest]].assign(split="train"))
        own = dataclasses.replace(teacher, facts={"context_s": context_s(recipe, alone)})
        distillation.refuse_shorter_teacher(recipe, alone, own)
    shorter = dataclasses.replace(teacher, facts={"context_s": context_s(recipe, toy_cache) / 2})
    with pytest.raises(
        LabError, match=r"at most 1\.\d+ s, and the student is to train on clips of .*max_duration_s=1\."
    ):
        distillation.refuse_shorter_teacher(recipe, toy_cache, shorter)
    distillation.refuse_shorter_teacher(recipe, toy_cache, dataclasses.replace(teacher, facts={}))


def test_fast_dev_run_uses_few_training_clips(home, toy_cache, tmp_path):
    _, recipe = home
    rehearsed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"fast_dev_run": True})})
    lines = record_log()
    made = training_pipeline.distill(rehearsed, toy_cache, runs=tmp_path, progress=Progress())
    assert "fast-dev-run" in made.uri
    assert sum(line.startswith("fast_dev_run: 2 steps") for line in lines) == 2
    assert not list(tmp_path.glob("*/train-*"))
