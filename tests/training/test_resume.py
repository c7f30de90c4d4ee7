"""A run that is killed, again and again, ends with the very weights of one that was left alone."""

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

from pipelines.infra import manifest
from pipelines.training.checkpoints import sealed as sealed_checkpoints

ROOT = Path(__file__).parents[2]
# 48 clips in batches of 10 make 5 batches, in groups of 2 three steps an epoch, the last of one batch: the checkpoints
# at 4 and 8 lie inside an epoch, the one at 12 between two, and the run ends inside one
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
"""What a history tells of the machine, and not of the run."""
STARTER = '''
import functools, gc, json, os, sys, traceback
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


def train(job):
    settings = recipes.load(job["recipe"], job["overrides"])
    progress = Progress(on_step=lambda step: print("done step", step, flush=True))
    opened, base = cache.open_cache(Path(job["cache"])), models.resolve(settings.model.base)
    loop.train(TrainingRun(settings, opened, base, Path(job["run"]), progress))


def by_loss(*args):
    """The toy's WER never moves, so the first checkpoint would be the model; its loss falls, so the last one is."""
    validate = validator(*args)
    return lambda model: (lambda found: {**found, "wer": found["loss"]})(validate(model))


validator, loop.validator = loop.validator, by_loss
models.load_processor = functools.cache(models.load_processor)
for line in sys.stdin:
    job = json.loads(line)
    # what every sitting would do again, and what a child need not look through for garbage
    models.load_processor(models.resolve(job["overrides"]["model.base"]), "sv")
    gc.collect()
    gc.freeze()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            train(job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
'''


def environment(threads: int = 1) -> dict[str, str]:
    """One thread is faster for a toy, and beside other tests."""
    told = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **told}


@pytest.fixture(scope="module")
def starter():
    """`starter(threads)`: a process that has imported everything and forks one trainer for each line it is given."""

    @functools.cache
    def start(threads: int) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=ROOT,
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    started: list[subprocess.Popen] = []
    yield start
    for process in started:
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def sit(starter, toy_recipe, toy_model, toy_cache):
    """`sit(run, kill_when)`: one sitting of a run, killed where told; the lines that it told.

    The signal goes to all processes of the sitting; other than SIGKILL, it ends with the exit code of an error.
    """

    def one(
        run: Path,
        kill_when: Callable[[Path, str], bool] | None = None,
        threads: int = 1,
        sends: signal.Signals = signal.SIGKILL,
        **overrides,
    ) -> list[str]:
        process = starter(threads)
        log = run.with_name(f"{run.name}-{time.monotonic_ns()}.log")
        job = {"recipe": str(toy_recipe), "cache": toy_cache.uri, "run": str(run), "log": str(log)}
        settings = {**SETTINGS, "model.base": str(toy_model), **overrides}
        process.stdin.write(json.dumps({**job, "overrides": settings}) + "\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        if kill_when:
            watch(lambda: log.exists() and kill_when(run / "checkpoints", log.read_text()), log)
            os.killpg(child, sends)
        status = int(process.stdout.readline())
        told = log.read_text()
        assert os.waitstatus_to_exitcode(status) == _exit_code(kill_when, sends), told
        return told.splitlines()

    return one


def _exit_code(kill_when: Callable | None, sends: signal.Signals) -> int:
    if not kill_when:
        return 0
    return -signal.SIGKILL if sends == signal.SIGKILL else 1


def watch(seen: Callable[[], bool], log: Path, patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < end, log.read_text() if log.exists() else "it never began"
        time.sleep(0.0005)


def sealed(step: int) -> Callable[[Path, str], bool]:
    return lambda checkpoints, log: (checkpoints / f"checkpoint-{step}" / manifest.MANIFEST).exists()


def written(step: int, name: str) -> Callable[[Path, str], bool]:
    return lambda checkpoints, log: (checkpoints / f"checkpoint-{step}" / name).exists()


def being_written(step: int) -> Callable[[Path, str], bool]:
    """The weights are there, or a part of them; what follows is not."""
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
def whole(sit, tmp_path_factory) -> Path:
    """The run that was left alone."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert steps(sit(run)) == list(range(1, 15))
    assert json.loads((run / "model" / "training.json").read_text())["best_step"] == 14, "the last weights are compared"
    return run


@pytest.mark.slow
def test_run_killed_four_times_is_bit_equal(sit, whole, tmp_path):
    run = tmp_path / "run"
    first = sit(run, sealed(4))
    second = sit(run, done(7))
    third = sit(run, being_written(8))
    assert manifest.problem(run / "checkpoints" / "checkpoint-8").startswith("unfinished")
    fourth = sit(run, sealed(12))
    last = sit(run)
    assert first[0].startswith("starting from ")
    assert second[0] == "resuming from checkpoint-4"
    assert third[0] == "resuming from checkpoint-4"
    assert fourth[:2] == ["skipping checkpoint-8: unfinished (it has no manifest)", "resuming from checkpoint-4"]
    assert last[0] == "resuming from checkpoint-12"
    assert (steps(second)[0], steps(third)[0], steps(last)) == (5, 5, [13, 14])
    assert not any(line.startswith("starting from") for lines in (second, third, fourth, last) for line in lines)
    assert weights_sha256(run) == weights_sha256(whole)
    assert history(run) == history(whole)


@pytest.mark.slow
def test_run_killed_with_two_workers_is_bit_equal(sit, whole, tmp_path):
    run, workers = tmp_path / "run", {"training.workers": 2}
    sit(run, done(6), **workers)
    second = sit(run, being_written(12), **workers)
    third = sit(run, **workers)
    assert second[0] == "resuming from checkpoint-4"
    assert third[:2] == ["skipping checkpoint-12: unfinished (it has no manifest)", "resuming from checkpoint-8"]
    assert weights_sha256(run) == weights_sha256(whole)
    assert history(run) == history(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"model.adapter": "lora", "model.lora_dropout": 0.1, "training.learning_rate": 1e-2},
        {"model.freeze_encoder": True},
        {"training.window_share": 0.5, "training.window_timestamps": True},
        {
            "distillation.teacher": "x",
            "distillation.decoder_layers": 1,
            "distillation.labels": "transcript",
            "distillation.max_label_wer": 0,
        },
    ],
    ids=["lora", "frozen", "windows", "student"],
)
def test_other_kinds_of_training_resume_bit_equal(sit, whole, tmp_path, other):
    alone, run = tmp_path / "alone", tmp_path / "run"
    sit(alone, **other)
    sit(run, done(6), **other)
    second = sit(run, being_written(12), **other)
    third = sit(run, **other)
    assert second[0] == "resuming from checkpoint-4"
    assert third[:2] == ["skipping checkpoint-12: unfinished (it has no manifest)", "resuming from checkpoint-8"]
    assert weights_sha256(run) == weights_sha256(alone) != weights_sha256(whole)
    assert history(run) == history(alone)


@pytest.mark.slow
def test_run_killed_at_random_moments_is_bit_equal(sit, tmp_path):
    """In start-up, in steps, in validation, in saves and right after them, four times each, in random order."""
    seed = int(os.environ.get("KILL_SEED") or time.time_ns())
    rng, settings = random.Random(seed), {"training.steps": 20, "training.eval_every": 2, "training.batch_size": 4}
    phases = [phase for phase in MOMENTS for _ in range(4)]
    rng.shuffle(phases)
    run, told = tmp_path / "run", []
    for phase in phases:
        moment = MOMENTS[phase](next_checkpoint(run, every=2), rng)
        told.append((phase, sit(run, moment, **settings)))
    last = sit(run, **settings)
    sit(tmp_path / "whole", **settings)
    story = f"KILL_SEED={seed}\n" + "\n".join(f"{phase}: {lines}" for phase, lines in told)
    assert any(line.startswith("resuming from checkpoint-") for line in last), story
    assert weights_sha256(run) == weights_sha256(tmp_path / "whole"), story
    assert history(run) == history(tmp_path / "whole"), story


def next_checkpoint(run: Path, every: int) -> int:
    whole = [path for path in sealed_checkpoints.listed(run / "checkpoints") if manifest.problem(path) is None]
    return sealed_checkpoints.step_of(whole[-1]) + every if whole else every


def after(seen: Callable[[Path, str], bool], delay_s: float, limit: int) -> Callable[[Path, str], bool]:
    """So long after something is seen; at the latest when this sitting begins the checkpoint `limit`."""
    seen_at: list[float] = []

    def when(folder: Path, log: str) -> bool:
        if not seen_at and seen(folder, log):
            seen_at.append(time.monotonic())
        late = bool(seen_at) and time.monotonic() - seen_at[0] >= delay_s
        return late or (f"done step {limit}\n" in log and (folder / f"checkpoint-{limit}").exists())

    return when


def saves(step: int, name: str) -> Callable[[Path, str], bool]:
    """This sitting has written a file of the step's checkpoint; an earlier one may have left its own."""
    return lambda folder, log: done(step)(folder, log) and written(step, name)(folder, log)


def started(folder: Path, log: str) -> bool:
    return "starting from" in log or "resuming from" in log


FILES = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
"""Of a checkpoint, in the order in which they are written; the manifest comes last."""
MOMENTS = {
    "start-up": lambda step, rng: after(lambda folder, log: True, rng.uniform(0, 1), step),
    "step": lambda step, rng: after(rng.choice([started, done(step - 1)]), rng.uniform(0, 0.1), step),
    "validation": lambda step, rng: after(done(step), rng.uniform(0, 0.1), step),
    "save": lambda step, rng: after(saves(step, rng.choice(FILES)), rng.uniform(0, 0.02), step + 2),
    "sealed": lambda step, rng: after(saves(step, manifest.MANIFEST), rng.uniform(0, 0.1), step + 2),
}
"""Phase to what draws a moment in it, given the step of the next checkpoint."""


@pytest.mark.slow
def test_sigterm_to_process_group_resumes_bit_equal(sit, whole, tmp_path):
    run, workers = tmp_path / "run", {"training.workers": 2}
    ended = sit(run, done(4), sends=signal.SIGTERM, **workers)
    assert "pipelines.infra.errors.Unfinished: SIGTERM ended training after step " in ended[-1]
    (newest,) = sealed_checkpoints.listed(run / "checkpoints")[-1:]
    assert f"{newest} is kept" in ended[-1]
    last = sit(run, **workers)
    assert last[0] == f"resuming from {newest.name}"
    assert weights_sha256(run) == weights_sha256(whole)
    assert history(run) == history(whole)


@pytest.mark.slow
def test_comparison_detects_another_seed(sit, whole, tmp_path):
    """Dropout and SpecAugment do draw: another seed gives other weights."""
    sit(tmp_path / "run", **{"training.seed": 43})
    assert weights_sha256(tmp_path / "run") != weights_sha256(whole)


@pytest.mark.slow
def test_run_killed_on_two_threads_is_bit_equal(sit, toy_of_width, tmp_path):
    """A model wide enough for both threads to add to one gradient: unless told, they take turns at random."""
    sizes = {"training.steps": 3, "training.batch_size": 16, "training.eval_every": 1, "training.accumulation": 1}
    settings = {**sizes, "model.base": str(toy_of_width(192)), "threads": 2}
    sit(tmp_path / "whole", **settings)
    sit(tmp_path / "run", sealed(1), **settings)
    assert sit(tmp_path / "run", **settings)[0].startswith("resuming from checkpoint-")
    assert weights_sha256(tmp_path / "run") == weights_sha256(tmp_path / "whole")


@pytest.mark.slow
def test_killed_command_resumes(whole, toy_recipe, toy_model, toy_cache, tmp_path):
    settings = [f"--set={name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "pipelines", "train", "--recipe", str(toy_recipe), f"--set=model.base={toy_model}"]
    command += [*settings, f"--cache={toy_cache.uri}", f"--runs={tmp_path / 'runs'}"]
    log = tmp_path / "first.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
    pattern = "train-*/checkpoints/checkpoint-4/manifest.json"
    try:  # beside other tests, the imports alone may take a minute
        watch(lambda: any((tmp_path / "runs" / "toy").glob(pattern)), log, patience_s=240)
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
    assert [{**row, "eval_wer": 0} for row in history(run)] == [{**row, "eval_wer": 0} for row in history(whole)]
