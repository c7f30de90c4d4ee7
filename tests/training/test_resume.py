"""A run that is killed several times ends with exactly the weights of an uninterrupted run."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_jobs import JobStarter

from pipelines.infra import environment as machine
from pipelines.infra import manifest
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.optimization import precision

ROOT = Path(__file__).parents[2]
# 48 clips make 5 batches of up to 10, and with accumulation 2 three steps per epoch, the last of a single batch. The
# checkpoints at steps 4 and 8 are within an epoch, the one at 12 is between two, and the run ends within one
SETTINGS = {
    "model.dropout": 0.1,
    "model.spec_augment": True,
    "augment.speed": 0.1,
    "augment.noise_share": 0.5,
    "augment.mel_masks": 1,
    "training.steps": 14,
    "training.batch_size": 10,
    "training.bucket_batches": 2,
    "training.accumulation": 2,
    "training.eval_every": 4,
    "evaluation.max_new_tokens": 3,
}
TIMES = ("seconds", "clips_per_s")
"""Columns of the history that depend on the machine's speed."""
STARTER = '''
import functools, gc
from pathlib import Path

import torch
from transformers import Seq2SeqTrainer, WhisperForConditionalGeneration, WhisperProcessor

from pipelines import recipes
from pipelines.features import cache
from pipelines.infra import console
from pipelines.training import loop
from pipelines.training.callbacks.progress import Progress
from pipelines.training.run import TrainingRun
from pipelines.whisper import model as models

console.configure()


def run(job):
    settings = recipes.load(job["recipe"], job["overrides"])
    progress = Progress(on_step=lambda step: print("done step", step, flush=True))
    opened, base = cache.open_cache(Path(job["cache"])), models.resolve(settings.model.base)
    loop.train(TrainingRun(settings, opened, base, Path(job["run"]), progress))


def by_loss(*args):
    """Select by loss: the toy's WER is constant, which selects the first checkpoint; its loss falls, up to the last."""
    validate = validator(*args)

    def scores_by_loss(model):
        scores = validate(model)
        return {**scores, "wer": scores["loss"]}

    return scores_by_loss


validator, loop.validator = loop.validator, by_loss
models.load_processor = functools.cache(models.load_processor)


def prepare(job):
    """Load once what every child needs, and exclude it from their garbage collection."""
    models.load_processor(models.resolve(job["overrides"]["model.base"]), "sv")
    gc.collect()
    gc.freeze()
'''


def environment(threads: int = 1) -> dict[str, str]:
    """Return the variables of a training process. One thread is faster for a toy, and beside other tests."""
    variables = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **variables}


@pytest.fixture(scope="module")
def starter():
    """Return `starter(threads)`: a process with everything imported that forks one trainer per line on its input."""

    @functools.cache
    def start(threads: int) -> JobStarter:
        started.append(JobStarter(STARTER, environment(threads)))
        return started[-1]

    started: list[JobStarter] = []
    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def train_once(starter, toy_recipe, toy_model, toy_cache):
    """Return `train(run, kill_when)`, which trains in one process, up to the kill, and returns the lines of its log.

    The signal is sent to the whole process group. After one other than SIGKILL the exit code is that of an error.
    """

    def train(
        run: Path,
        kill_when: Callable[[Path, str], bool] | None = None,
        threads: int = 1,
        sends: signal.Signals = signal.SIGKILL,
        **overrides,
    ) -> list[str]:
        log = run.with_name(f"{run.name}-{time.monotonic_ns()}.log")
        job = {"recipe": str(toy_recipe), "cache": toy_cache.uri, "run": str(run), "log": str(log)}
        settings = {**SETTINGS, "model.base": str(toy_model), **overrides}
        condition = kill_when and (lambda: log.exists() and kill_when(run / "checkpoints", log.read_text()))
        code = starter(threads).run({**job, "overrides": settings}, condition, sends)
        output = log.read_text()
        assert code == _exit_code(kill_when, sends), output
        return output.splitlines()

    return train


def _exit_code(kill_when: Callable | None, sends: signal.Signals) -> int:
    if not kill_when:
        return 0
    return -signal.SIGKILL if sends == signal.SIGKILL else 1


def wait_until(condition: Callable[[], bool], log: Path, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, log.read_text() if log.exists() else "it never started"
        time.sleep(0.0005)


def sealed(step: int) -> Callable[[Path, str], bool]:
    return lambda checkpoints, log: (checkpoints / f"checkpoint-{step}" / manifest.MANIFEST).exists()


def written(step: int, name: str) -> Callable[[Path, str], bool]:
    return lambda checkpoints, log: (checkpoints / f"checkpoint-{step}" / name).exists()


def partly_written(step: int) -> Callable[[Path, str], bool]:
    """Return a condition: the weights exist, at least in part, and the files after them do not."""
    return lambda checkpoints, log: any((checkpoints / f"checkpoint-{step}").glob("*model.safetensors"))


def done(step: int) -> Callable[[Path, str], bool]:
    return lambda checkpoints, log: f"done step {step}\n" in log


def weights_sha256(run: Path) -> str:
    return manifest.sha256(run / "model" / "model.safetensors")


def history(run: Path) -> list[dict]:
    rows = json.loads((run / "model" / "training.json").read_text())["history"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def steps(lines: list[str]) -> list[int]:
    return [int(line.removeprefix("done step ")) for line in lines if line.startswith("done step ")]


@pytest.fixture(scope="module")
def uninterrupted(train_once, tmp_path_factory) -> Path:
    """Return the folder of the uninterrupted run."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert steps(train_once(run)) == list(range(1, 15))
    assert json.loads((run / "model" / "training.json").read_text())["best_step"] == 14, (
        "the weights after the last step are compared"
    )
    return run


@pytest.mark.slow
def test_run_killed_four_times_is_bit_equal(train_once, uninterrupted, tmp_path):
    run = tmp_path / "run"
    first = train_once(run, sealed(4))
    second = train_once(run, done(7))
    third = train_once(run, partly_written(8))
    assert manifest.problem(run / "checkpoints" / "checkpoint-8").startswith("unfinished")
    fourth = train_once(run, sealed(12))
    last = train_once(run)
    assert first[0].startswith("starting from ")
    assert second[0] == "resuming from checkpoint-4"
    assert third[0] == "resuming from checkpoint-4"
    assert fourth[:2] == ["skipping checkpoint-8: unfinished (it has no manifest)", "resuming from checkpoint-4"]
    assert last[0] == "resuming from checkpoint-12"
    assert (steps(second)[0], steps(third)[0], steps(last)) == (5, 5, [13, 14])
    assert not any(line.startswith("starting from") for lines in (second, third, fourth, last) for line in lines)
    assert weights_sha256(run) == weights_sha256(uninterrupted)
    assert history(run) == history(uninterrupted)


@pytest.mark.slow
def test_run_killed_with_two_workers_is_bit_equal(train_once, uninterrupted, tmp_path):
    run, workers = tmp_path / "run", {"training.workers": 2}
    train_once(run, done(6), **workers)
    second = train_once(run, partly_written(12), **workers)
    third = train_once(run, **workers)
    assert second[0] == "resuming from checkpoint-4"
    assert third[:2] == ["skipping checkpoint-12: unfinished (it has no manifest)", "resuming from checkpoint-8"]
    assert weights_sha256(run) == weights_sha256(uninterrupted)
    assert history(run) == history(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"model.adapter": "lora", "model.lora_dropout": 0.1, "training.learning_rate": 1e-2},
        {"model.freeze_encoder": True},
        {"training.ema_decay": 0.9},
        {
            "training.window_share": 0.5,
            "training.window_fill": "random",
            "training.window_timestamps": 0.5,
            "training.window_prompt": 0.5,
        },
        {
            "distillation.teacher": "x",
            "distillation.decoder_layers": 1,
            "distillation.labels": "transcript",
            "distillation.max_label_wer": 0,
        },
        {
            "model.layer_drop": 0.3,
            "training.label_smoothing": 0.1,
            "training.bpe_dropout": 0.3,
            "training.layer_decay": 0.8,
            "training.optimizer": "muon",
        },
        {"training.precision": "bfloat16"},
    ],
    ids=["lora", "frozen", "average", "windows", "student", "regularised", "bfloat16"],
)
def test_other_kinds_of_training_resume_bit_equal(train_once, uninterrupted, tmp_path, other):
    if "training.precision" in other and not precision.has_bfloat16(machine.detect()):
        pytest.skip("this CPU has no bfloat16")
    reference, run = tmp_path / "reference", tmp_path / "run"
    train_once(reference, **other)
    train_once(run, done(6), **other)
    second = train_once(run, partly_written(12), **other)
    third = train_once(run, **other)
    assert second[0] == "resuming from checkpoint-4"
    assert third[:2] == ["skipping checkpoint-12: unfinished (it has no manifest)", "resuming from checkpoint-8"]
    assert weights_sha256(run) == weights_sha256(reference) != weights_sha256(uninterrupted)
    assert history(run) == history(reference)


@pytest.mark.slow
def test_run_killed_at_random_moments_is_bit_equal(train_once, tmp_path):
    """Kills during start-up, steps, validation, saves and right after saves: four of each, in random order."""
    seed = int(os.environ.get("KILL_SEED") or time.time_ns())
    rng, settings = random.Random(seed), {"training.steps": 20, "training.eval_every": 2, "training.batch_size": 4}
    phases = [phase for phase in MOMENTS for _ in range(4)]
    rng.shuffle(phases)
    run, logs = tmp_path / "run", []
    for phase in phases:
        moment = MOMENTS[phase](next_checkpoint(run, every=2), rng)
        logs.append((phase, train_once(run, moment, **settings)))
    last = train_once(run, **settings)
    train_once(tmp_path / "uninterrupted", **settings)
    details = f"KILL_SEED={seed}\n" + "\n".join(f"{phase}: {lines}" for phase, lines in logs)
    assert any(line.startswith("resuming from checkpoint-") for line in last), details
    assert weights_sha256(run) == weights_sha256(tmp_path / "uninterrupted"), details
    assert history(run) == history(tmp_path / "uninterrupted"), details


def next_checkpoint(run: Path, every: int) -> int:
    complete = [path for path in sealed_checkpoints.listed(run / "checkpoints") if manifest.problem(path) is None]
    return sealed_checkpoints.step_of(complete[-1]) + every if complete else every


def after(condition: Callable[[Path, str], bool], delay_s: float, limit: int) -> Callable[[Path, str], bool]:
    """Return a condition: true `delay_s` after another, at the latest when this process starts checkpoint `limit`."""
    true_since: list[float] = []

    def when(folder: Path, log: str) -> bool:
        if not true_since and condition(folder, log):
            true_since.append(time.monotonic())
        is_due = bool(true_since) and time.monotonic() - true_since[0] >= delay_s
        return is_due or (f"done step {limit}\n" in log and (folder / f"checkpoint-{limit}").exists())

    return when


def saves(step: int, name: str) -> Callable[[Path, str], bool]:
    """Return a condition: this process wrote the file. Earlier processes may have written the same file."""
    return lambda folder, log: done(step)(folder, log) and written(step, name)(folder, log)


def started(folder: Path, log: str) -> bool:
    return "starting from" in log or "resuming from" in log


FILES = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
"""Files of a checkpoint in the order of writing; the manifest is last."""
MOMENTS = {
    "start-up": lambda step, rng: after(lambda folder, log: True, rng.uniform(0, 1), step),
    "step": lambda step, rng: after(rng.choice([started, done(step - 1)]), rng.uniform(0, 0.1), step),
    "validation": lambda step, rng: after(done(step), rng.uniform(0, 0.1), step),
    "save": lambda step, rng: after(saves(step, rng.choice(FILES)), rng.uniform(0, 0.02), step + 2),
    "sealed": lambda step, rng: after(saves(step, manifest.MANIFEST), rng.uniform(0, 0.1), step + 2),
}
"""Phase to a function that draws a moment in it, given the step of the next checkpoint."""


@pytest.mark.slow
def test_sigterm_to_process_group_resumes_bit_equal(train_once, uninterrupted, tmp_path):
    run, workers = tmp_path / "run", {"training.workers": 2}
    first = train_once(run, done(4), sends=signal.SIGTERM, **workers)
    assert "pipelines.infra.errors.Unfinished: SIGTERM ended training after step " in first[-1]
    (newest,) = sealed_checkpoints.listed(run / "checkpoints")[-1:]
    assert f"{newest} is kept" in first[-1]
    last = train_once(run, **workers)
    assert last[0] == f"resuming from {newest.name}"
    assert weights_sha256(run) == weights_sha256(uninterrupted)
    assert history(run) == history(uninterrupted)


@pytest.mark.slow
def test_comparison_detects_another_seed(train_once, uninterrupted, tmp_path):
    """Dropout and SpecAugment are random: another seed gives other weights."""
    train_once(tmp_path / "run", **{"training.seed": 43})
    assert weights_sha256(tmp_path / "run") != weights_sha256(uninterrupted)


@pytest.mark.slow
def test_run_killed_on_two_threads_is_bit_equal(train_once, toy_of_width, tmp_path):
    """The model is so wide that both threads add to one gradient, by default in random order."""
    sizes = {"training.steps": 3, "training.batch_size": 16, "training.eval_every": 1, "training.accumulation": 1}
    settings = {**sizes, "model.base": str(toy_of_width(192)), "threads": 2}
    train_once(tmp_path / "uninterrupted", **settings)
    train_once(tmp_path / "run", sealed(1), **settings)
    assert train_once(tmp_path / "run", **settings)[0].startswith("resuming from checkpoint-")
    assert weights_sha256(tmp_path / "run") == weights_sha256(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_killed_command_resumes(uninterrupted, toy_recipe, toy_model, toy_cache, tmp_path):
    settings = [f"--set={name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "pipelines", "train", "--recipe", str(toy_recipe), f"--set=model.base={toy_model}"]
    command += [*settings, f"--cache={toy_cache.uri}", f"--runs={tmp_path / 'runs'}"]
    log = tmp_path / "first.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
    pattern = "train-*/checkpoints/checkpoint-4/manifest.json"
    try:  # beside other tests, the imports alone may take a minute
        wait_until(lambda: any((tmp_path / "runs" / "toy").glob(pattern)), log, timeout_s=240)
    finally:
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    again = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "starting from" in log.read_text()
    assert "resuming from checkpoint-" in again.stdout
    assert "starting from" not in again.stdout
    (run,) = (tmp_path / "runs" / "toy").glob("train-*")
    assert f"model {run / 'model'}" in again.stdout
    # the command selects by WER: its model is of another step, but every loss and gradient is the same
    assert [{**row, "eval_wer": 0} for row in history(run)] == [
        {**row, "eval_wer": 0} for row in history(uninterrupted)
    ]
