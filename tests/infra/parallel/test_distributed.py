"""Two processes, started by torchrun, Ray Train or `distributed.launch`, train like one: same batches, same loss."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from log_recorder import record_log

from pipelines.features import pipeline as feature_pipeline
from pipelines.infra.errors import UNFINISHED, LabError
from pipelines.infra.parallel import distributed
from pipelines.training import pipeline as training_pipeline
from pipelines.training import validation
from pipelines.training.callbacks import progress as callbacks_progress
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.data import data_parallel
from pipelines.training.pipeline import Launch
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import IGNORED

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")

# 50 clips in batches of 7: 4 and 3 clips per process, in micro-batches of 3, and a last batch of one clip, so that the
# second process has none. 8 batches make 4 steps an epoch: the checkpoint at step 3 is within an epoch
SETTINGS = {
    "source.train": 50,
    "source.validation": 30,
    "augment.speed": 0.1,
    "training.steps": 12,
    "training.batch_size": 7,
    "training.micro_batch": 3,
    "training.bucket_batches": 2,
    "training.accumulation": 2,
    "training.eval_every": 3,
    "evaluation.max_new_tokens": 3,
    "evaluation.batch_frames": 3_000,
}
RANDOM_SETTINGS = {"model.dropout": 0.1, "model.spec_augment": True, "training.ema_decay": 0.9}
LOSSES = ("loss", "grad_norm", "eval_loss")
TRAINING_SCRIPT = """
import json, os, sys
from pathlib import Path

from pipelines import recipes
from pipelines.features import pipeline as features
from pipelines.infra import console
from pipelines.infra.parallel import distributed
from pipelines.training import pipeline as training
from pipelines.training import validation
from pipelines.training.data import augmentation
from pipelines.whisper import model as models

job = json.loads(Path(sys.argv[1]).read_text())
settings, collate = recipes.load(job["recipe"], job["overrides"]), augmentation.AugmentingCollator.__call__


def record_rows(self, rows):
    with open(f"{job['runs']}/rows-{os.environ.get('RANK')}.txt", "a") as file:
        print(rows, file=file)
    return collate(self, rows)


augmentation.AugmentingCollator.__call__ = record_rows
console.configure()
with distributed.process_group():
    cache = features.open_cache(settings, job["cache"])
    model = training.run(settings, cache, runs=job["runs"])
    base = models.resolve(model.uri)
    validate = validation.validator(settings, cache, models.load_processor(base, "sv"), False)
    collate, rows = validation.Collator.__call__, []
    validation.Collator.__call__ = lambda self, batch: rows.extend(batch) or collate(self, batch)
    result = [validate(models.load(base)), rows]
    Path(f"{job['runs']}/validation-{distributed.rank()}.json").write_text(json.dumps(result))
distributed.exit_process(0)
"""


@pytest.fixture(scope="module")
def cache(toy_settings, tmp_path_factory):
    return feature_pipeline.run(toy_settings(SETTINGS), runs=tmp_path_factory.mktemp("cache"))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def torchrun(*arguments: str, log: Path) -> subprocess.Popen:
    """Start two processes on this machine."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    return start_python(*command, f"--master-port={free_port()}", *arguments, log=log)


def start_python(*arguments: str, log: Path) -> subprocess.Popen:
    """Start Python with these arguments, in a new process group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def output_of(process: subprocess.Popen, log: Path, timeout_s: float = 900) -> str:
    """Wait for a process and return its output; kill processes that are left."""
    children = psutil.Process(process.pid).children()
    try:
        process.wait(timeout_s)
    finally:
        for left in [*children, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    return log.read_text()


@pytest.fixture(scope="module")
def train(toy_recipe, toy_model, cache, tmp_path_factory):
    """Return a function that trains with torchrun, or with `devices` by the command itself.

    `interrupt` is called once a new checkpoint is sealed. Returns exit code and output.
    """

    def train(
        runs: Path, overrides: dict, interrupt: Callable[[psutil.Process], None] | None = None, devices: int = 0
    ) -> tuple[int, str]:
        log = runs / f"{time.monotonic_ns()}.log"
        settings = {**SETTINGS, **overrides, "model.base": str(toy_model)}
        options = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
        command = ["train", f"--recipe={toy_recipe}", f"--cache={cache.uri}", f"--runs={runs}", *options]
        command += [f"--devices={devices}"] if devices else []
        process = (start_python if devices else torchrun)("-m", "pipelines", *command, log=log)
        if interrupt:
            deadline, step = time.monotonic() + 600, newest_step(runs)
            while newest_step(runs) == step:
                assert time.monotonic() < deadline and process.poll() is None, log.read_text()
                time.sleep(0.01)
            interrupt(psutil.Process(process.pid))
        output = output_of(process, log)
        return process.returncode, output

    return train


def kill_second_process(torchrun: psutil.Process) -> None:
    next(child for child in torchrun.children() if child.environ().get("RANK") == "1").kill()


def run_of(runs: Path) -> Path:
    (run,) = (runs / "toy").glob("train-*")
    return run


def weights(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / "model" / "model.safetensors")


def history(run: Path) -> list[dict]:
    rows = json.loads((run / "model" / "training.json").read_text())["history"]
    return [{name: row[name] for name in row if name not in ("seconds", "clips_per_s")} for row in rows]


@pytest.mark.slow
def test_exit_process_runs_exit_handlers_and_keeps_the_code(tmp_path):
    script = """
import atexit, sys
from pipelines.infra.parallel import distributed

atexit.register(print, "handler")
print("end", end=" ")
with distributed.process_group():
    pass
distributed.exit_process(75)
print("the interpreter shuts down as usual")
"""
    log = tmp_path / "log"
    alone = start_python("-c", script, log=log)
    assert (alone.wait(100), log.read_text()) == (0, "end the interpreter shuts down as usual\nhandler\n")
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE)
        for variables in distributed_variables()
    ]
    assert [(rank.communicate(timeout=100)[0], rank.returncode) for rank in ranks] == [(b"end handler\n", 75)] * 2


def distributed_variables() -> list[dict[str, str]]:
    """Return the environment variables of two processes of one group."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    return [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


@pytest.mark.slow
def test_two_processes_train_like_one(toy_settings, toy_recipe, toy_model, cache, tmp_path, monkeypatch):
    from pipelines.training.data import augmentation

    drawn, collate = [], augmentation.AugmentingCollator.__call__
    monkeypatch.setattr(
        augmentation.AugmentingCollator, "__call__", lambda self, rows: drawn.append(str(rows)) or collate(self, rows)
    )
    settings = toy_settings(SETTINGS)
    training_pipeline.run(settings, cache, runs=tmp_path / "alone", progress=callbacks_progress.Progress())

    runs, log = tmp_path / "two", tmp_path / "two.log"
    runs.mkdir()
    overrides = {**SETTINGS, "model.base": str(toy_model)}
    job = {"recipe": str(toy_recipe), "overrides": overrides, "cache": cache.uri, "runs": str(runs)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "train.py").write_text(TRAINING_SCRIPT)
    process = torchrun(str(tmp_path / "train.py"), str(tmp_path / "job.json"), log=log)
    output = output_of(process, log)
    assert process.returncode == 0, output
    assert output.count("starting from") == 1
    assert output.count("validation WER") == 4

    rows = [(runs / f"rows-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    n_read = min(len(rows[0]), len(drawn))
    assert n_read >= 23
    assert rows[0] == rows[1]
    assert rows[0][:n_read] == drawn[:n_read]

    alone, both = history(run_of(tmp_path / "alone")), history(run_of(runs))
    assert [row["step"] for row in alone] == [row["step"] for row in both]
    for one, two in zip(alone, both, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & set(LOSSES):
            assert two[name] == pytest.approx(one[name], rel=1e-5), one["step"]
    assert len([row for row in both if "loss" in row]) == 12

    ours, theirs = weights(run_of(tmp_path / "alone")), weights(run_of(runs))
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-4

    results = [json.loads((runs / f"validation-{rank}.json").read_text()) for rank in (0, 1)]
    same = whisper_model.resolve(str(run_of(runs) / "model"))
    expected = validation.validator(settings, cache, whisper_model.load_processor(same, "sv"), False)(
        whisper_model.load(same)
    )
    (one, decoded_rows), (two, other_rows) = results
    assert one == two == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-12)}
    assert min(len(decoded_rows), len(other_rows)) > 0
    assert sorted(decoded_rows + other_rows) == cache.split("validation").tolist()


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory) -> Path:
    """Return the run of two processes without an interruption."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    code, output = train(runs, RANDOM_SETTINGS)
    assert code == 0, output
    return run_of(runs)


def newest_step(runs: Path) -> int:
    """Return the step of the newest complete checkpoint."""
    manifests = runs.glob("toy/train-*/checkpoints/checkpoint-*/manifest.json")
    return max((sealed_checkpoints.step_of(path.parent) for path in manifests), default=0)


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_interrupted_runs_resume_to_the_same_weights(train, uninterrupted, tmp_path):
    code, output = train(tmp_path, RANDOM_SETTINGS, kill_second_process, devices=2)
    assert code == UNFINISHED, output
    assert output.count("unfinished: another process of this run ended. Run the same command again") == 1
    assert not (run_of(tmp_path) / "model").exists()
    code, output = train(tmp_path, RANDOM_SETTINGS, psutil.Process.terminate, devices=2)
    assert code == UNFINISHED, output
    assert len(re.findall(r"unfinished: SIGTERM ended training after step \d+ of 12; .* is kept", output)) == 1, output
    code, output = train(tmp_path, RANDOM_SETTINGS)
    assert code == 0, output
    assert output.count("resuming from checkpoint-") == 1
    assert "starting from" not in output
    assert same_weights(run_of(tmp_path), uninterrupted)
    assert history(run_of(tmp_path)) == history(uninterrupted)


def ray_workers() -> list[int]:
    """Return the ids of the training processes on the cluster, which this process started."""
    pids = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                pids.append(process.pid)
    return sorted(pids)


@pytest.mark.slow
@pytest.mark.ray
def test_killed_ray_worker_is_restarted_with_equal_weights(ray_address, uninterrupted, toy_settings, cache, tmp_path):
    lines, killed, finished = record_log(), [], threading.Event()

    def kill() -> None:
        while not finished.wait(0.01):
            if newest_step(tmp_path):
                killed.append(ray_workers()[-1])
                return os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    settings, progress = toy_settings({**SETTINGS, **RANDOM_SETTINGS}), callbacks_progress.Progress()
    try:
        training_pipeline.run(settings, cache, runs=tmp_path, launch=Launch("", ray_address, 2), progress=progress)
    finally:
        finished.set()
        killer.join()
    assert len(killed) == 1
    assert sum(line.startswith("starting from") for line in lines) == 1
    assert sum(line.startswith("resuming from checkpoint-") for line in lines) == 1
    assert not (run_of(tmp_path) / "ray").exists()
    assert run_of(tmp_path).name == uninterrupted.name
    assert same_weights(run_of(tmp_path), uninterrupted)


@pytest.mark.slow
@pytest.mark.ray
def test_cluster_with_too_few_cores_is_a_one_line_error(ray_address, toy_settings, cache, tmp_path):
    with pytest.raises(LabError, match=r"has 2 CPU\(s\), and --devices asks for 3: ask for fewer"):
        training_pipeline.run(toy_settings(SETTINGS), cache, runs=tmp_path, launch=Launch("", ray_address, 3))


@pytest.mark.slow
def test_error_of_all_processes_is_printed_once(train, tmp_path):
    code, output = train(tmp_path, {"training.patiense": 1})
    assert code == 1
    assert output.count("error: ") == 1
    assert "training.patience" in output


def test_devices_without_a_cluster_are_an_error(toy_settings, cache, tmp_path):
    with pytest.raises(LabError, match="needs a cluster; on one machine, give the command train .* --devices 2"):
        training_pipeline.run(toy_settings(SETTINGS), cache, runs=tmp_path, launch=Launch(devices=2))


CODES = """
import os, sys
code = [{}][int(os.environ["RANK"])]
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize(
    ("codes", "combined"),
    [((0, 0), 0), ((75, 75), 75), ((75, -9), 75), ((75, 1), 1), ((130, 75), 130), ((-15, -15), 143), ((0, -9), 137)],
)
def test_exit_codes_are_combined_into_one(codes, combined):
    assert distributed.launch(2, [sys.executable, "-c", CODES.format(", ".join(map(str, codes)))]) == combined


def test_process_is_killed_after_a_failure_of_another(monkeypatch):
    monkeypatch.setattr(distributed, "GRACE_S", 0.2)
    script = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '0' else time.sleep(100)"
    assert distributed.launch(2, [sys.executable, "-c", script]) == 3


@pytest.mark.slow
def test_signal_is_forwarded_to_each_process_once(tmp_path):
    child = """
import os, signal, sys, time
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
while not received:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(75 if len(received) == 1 else 1)
"""
    launch = f"distributed.launch(2, [sys.executable, '-c', {child!r}, sys.argv[1]])"
    main = f"import sys; from pipelines.infra.parallel import distributed; sys.exit({launch})"
    process = start_python("-c", main, str(tmp_path), log=tmp_path / "log")
    while not {"0", "1"} <= {path.name for path in tmp_path.iterdir()}:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == UNFINISHED, (tmp_path / "log").read_text()


# --- parts -----------------------------------------------------------------------------------------------------------


def batch_of(n_clips: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.arange(n_clips * 6.0).reshape(n_clips, 2, 3),
        "labels": torch.arange(n_clips * 4).reshape(n_clips, 4),
    }


@pytest.mark.parametrize(("n_clips", "size"), [(7, 2), (8, 2), (4, 3), (3, 3)])
def test_parts_of_all_ranks_are_the_batch(n_clips: int, size: int):
    batch = batch_of(n_clips)
    parts = [data_parallel.rank_part(batch, rank, size) for rank in range(size)]
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]).sort(0).values, tensor)
    assert max(len(part["labels"]) for part in parts) - min(len(part["labels"]) for part in parts) <= 1


def test_rank_without_a_clip_gets_one_without_labels():
    batch = batch_of(1)
    spare = data_parallel.rank_part(batch, 1, 2)
    assert torch.equal(spare["input_features"], batch["input_features"])
    assert (spare["labels"] == IGNORED).all()
    assert not (batch["labels"] == IGNORED).any()


def test_resuming_with_other_world_size_is_logged(tmp_path):
    lines = record_log()
    for rank in (0, 1):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    data_parallel.log_other_world_size(tmp_path)
    assert lines[0].startswith(f"note: 2 process(es) wrote {tmp_path.name}, and 1 continue: same batches")
    (tmp_path / "rng_state_1.pth").unlink()
    data_parallel.log_other_world_size(tmp_path)
    assert len(lines) == 1


def test_single_process_starts_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.process_group():
        assert not torch.distributed.is_initialized()
        assert (
            distributed.rank(),
            distributed.world_size(),
            distributed.all_reduce_sum(2, 3.5),
            distributed.first_message("now"),
        ) == (
            0,
            1,
            [2, 3.5],
            "now",
        )
        assert distributed.broadcast_from_main(lambda: 7) == 7
