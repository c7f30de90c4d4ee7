"""Two processes, started by torchrun, Ray Train or `ranks.launch`, train as one does: same batches, same loss; and one
may die."""

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

# 50 clips in batches of 7: shares of 4 and 3, in pieces of 3 and 1 or 3, and a last batch of one clip, which leaves
# the second process none. 8 batches make 4 steps an epoch: the checkpoint at 3 lies inside one
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
DRAWS = {"model.dropout": 0.1, "model.spec_augment": True}
LOSSES = ("loss", "grad_norm", "eval_loss")
SIT = """
import json, os, sys
from pathlib import Path

from pipelines import recipes
from pipelines.features import pipeline as features
from pipelines.infra.parallel import distributed
from pipelines.training import pipeline as training
from pipelines.training import validation
from pipelines.training.data import augmentation
from pipelines.whisper import model as models

job = json.loads(Path(sys.argv[1]).read_text())
settings, collate = recipes.load(job["recipe"], job["overrides"]), augmentation.AugmentingCollator.__call__


def noted(self, rows):
    with open(f"{job['runs']}/rows-{os.environ.get('RANK')}.txt", "a") as file:
        print(rows, file=file)
    return collate(self, rows)


augmentation.AugmentingCollator.__call__ = noted
with distributed.joined():
    cache = features.open_cache(settings, job["cache"])
    model = training.train(settings, cache, runs=job["runs"])
    base = models.resolve(model.uri)
    validate = validation.validator(settings, cache, models.load_processor(base, "sv"), False)
    decode, own = validation.decoding.decode_rows_to_text, []
    validation.decoding.decode_rows_to_text = lambda *args: own.extend(args[3].tolist()) or decode(*args)
    looked = [validate(models.load(base)), own]
    Path(f"{job['runs']}/looked-{distributed.rank()}.json").write_text(json.dumps(looked))
"""


@pytest.fixture(scope="module")
def cache(toy_settings, tmp_path_factory):
    return feature_pipeline.run(toy_settings(SETTINGS), runs=tmp_path_factory.mktemp("cache"))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def torchrun(*arguments: str, log: Path) -> subprocess.Popen:
    """Two processes on this machine, in a group of their own."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    return started(*command, f"--master-port={free_port()}", *arguments, log=log)


def started(*arguments: str, log: Path) -> subprocess.Popen:
    """Python with these arguments, in a process group of its own."""
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


def ended(process: subprocess.Popen, log: Path, patience_s: float = 900) -> str:
    """What was told until torchrun ended; nothing of it stays behind."""
    children = psutil.Process(process.pid).children()
    try:
        process.wait(patience_s)
    finally:
        for left in [*children, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    return log.read_text()


@pytest.fixture(scope="module")
def sit(toy_recipe, toy_model, cache, tmp_path_factory):
    """`sit(runs, overrides, cut)`: one sitting under torchrun, or with `devices` as the command starts them; cut off by
    `cut` once it has sealed a checkpoint."""

    def one(
        runs: Path, overrides: dict, cut: Callable[[psutil.Process], None] | None = None, devices: int = 0
    ) -> tuple[int, str]:
        log = runs / f"{time.monotonic_ns()}.log"
        settings = {**SETTINGS, **overrides, "model.base": str(toy_model)}
        told = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
        command = ["train", f"--recipe={toy_recipe}", f"--cache={cache.uri}", f"--runs={runs}", *told]
        command += [f"--devices={devices}"] if devices else []
        process = (started if devices else torchrun)("-m", "pipelines", *command, log=log)
        if cut:
            end, before = time.monotonic() + 600, sealed(runs)
            while sealed(runs) == before:
                assert time.monotonic() < end and process.poll() is None, log.read_text()
                time.sleep(0.01)
            cut(psutil.Process(process.pid))
        words = ended(process, log)
        return process.returncode, words

    return one


def kill_second(torchrun: psutil.Process) -> None:
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
def test_two_processes_train_as_one_does(toy_settings, toy_recipe, toy_model, cache, tmp_path, monkeypatch):
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
    (tmp_path / "sit.py").write_text(SIT)
    process = torchrun(str(tmp_path / "sit.py"), str(tmp_path / "job.json"), log=log)
    told = ended(process, log)
    assert process.returncode == 0, told
    assert told.count("starting from") == 1
    assert told.count("validation WER") == 4

    rows = [(runs / f"rows-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    n_read = min(len(rows[0]), len(drawn))
    assert n_read >= 23
    assert rows[0] == rows[1]
    assert rows[0][:n_read] == drawn[:n_read]

    here, there = history(run_of(tmp_path / "alone")), history(run_of(runs))
    assert [row["step"] for row in here] == [row["step"] for row in there]
    for one, two in zip(here, there, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & set(LOSSES):
            assert two[name] == pytest.approx(one[name], rel=1e-5), one["step"]
    assert len([row for row in there if "loss" in row]) == 12

    ours, theirs = weights(run_of(tmp_path / "alone")), weights(run_of(runs))
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-4

    looks = [json.loads((runs / f"looked-{rank}.json").read_text()) for rank in (0, 1)]
    same = whisper_model.resolve(str(run_of(runs) / "model"))
    looked = validation.validator(settings, cache, whisper_model.load_processor(same, "sv"), False)(
        whisper_model.load(same)
    )
    (one, decoded), (two, decoded_there) = looks
    assert one == two == {**looked, "loss": pytest.approx(looked["loss"], rel=1e-12)}
    assert min(len(decoded), len(decoded_there)) > 0
    assert sorted(decoded + decoded_there) == cache.split("validation").tolist()


@pytest.fixture(scope="module")
def whole(sit, tmp_path_factory) -> Path:
    """The run of two processes that was left alone."""
    runs = tmp_path_factory.mktemp("whole")
    code, told = sit(runs, DRAWS)
    assert code == 0, told
    return run_of(runs)


def sealed(runs: Path) -> int:
    """The step of the newest whole checkpoint."""
    notes = runs.glob("toy/train-*/checkpoints/checkpoint-*/manifest.json")
    return max((sealed_checkpoints.step_of(note.parent) for note in notes), default=0)


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_killed_then_asked_to_end_and_the_next_start_ends_with_the_same_weights(sit, whole, tmp_path):
    code, told = sit(tmp_path, DRAWS, kill_second, devices=2)
    assert code == UNFINISHED, told
    assert told.count("unfinished: another process of this run ended. Run the same command again") == 1
    assert not (run_of(tmp_path) / "model").exists()
    code, told = sit(tmp_path, DRAWS, psutil.Process.terminate, devices=2)
    assert code == UNFINISHED, told
    assert len(re.findall(r"unfinished: SIGTERM ended training after step \d+ of 12; .* is kept", told)) == 1, told
    code, told = sit(tmp_path, DRAWS)
    assert code == 0, told
    assert told.count("resuming from checkpoint-") == 1
    assert "starting from" not in told
    assert same_weights(run_of(tmp_path), whole)
    assert history(run_of(tmp_path)) == history(whole)


def ray_workers() -> list[int]:
    """The processes that train on the cluster, which this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return sorted(found)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_starts_a_killed_worker_anew_and_ends_with_the_weights_of_torchrun(
    ray_address, whole, toy_settings, cache, tmp_path
):
    lines, killed, ended = [], [], threading.Event()
    record_log(lines)

    def kill() -> None:
        while not ended.wait(0.01):
            if sealed(tmp_path):
                killed.append(ray_workers()[-1])
                return os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    settings, progress = toy_settings({**SETTINGS, **DRAWS}), callbacks_progress.Progress()
    try:
        training_pipeline.run(settings, cache, runs=tmp_path, launch=Launch("", ray_address, 2), progress=progress)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 1
    assert sum(line.startswith("starting from") for line in lines) == 1
    assert sum(line.startswith("resuming from checkpoint-") for line in lines) == 1
    assert not (run_of(tmp_path) / "ray").exists()
    assert run_of(tmp_path).name == whole.name
    assert same_weights(run_of(tmp_path), whole)


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_tells_what_is_wrong_in_one_line(ray_address, toy_settings, cache, tmp_path):
    with pytest.raises(LabError, match=r"has 2 CPU\(s\), and --devices asks for 3: ask for fewer"):
        training_pipeline.run(toy_settings(SETTINGS), cache, runs=tmp_path, launch=Launch("", ray_address, 3))


@pytest.mark.slow
def test_an_error_of_all_is_one_line(sit, tmp_path):
    code, told = sit(tmp_path, {"training.patiense": 1})
    assert code == 1
    assert told.count("error: ") == 1
    assert "training.patience" in told


def test_devices_without_a_cluster_are_refused(toy_settings, cache, tmp_path):
    with pytest.raises(LabError, match="needs a cluster; on one machine: python -m pipelines train --devices 2"):
        training_pipeline.run(toy_settings(SETTINGS), cache, runs=tmp_path, launch=Launch(devices=2))


CODES = """
import os, sys
code = [{}][int(os.environ["RANK"])]
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize(
    ("codes", "one"),
    [((0, 0), 0), ((75, 75), 75), ((75, -9), 75), ((75, 1), 1), ((130, 75), 130), ((-15, -15), 143), ((0, -9), 137)],
)
def test_processes_end_with_one_code(codes, one):
    assert distributed.launch(2, [sys.executable, "-c", CODES.format(", ".join(map(str, codes)))]) == one


def test_who_stays_after_a_fault_of_another_is_killed(monkeypatch):
    monkeypatch.setattr(distributed, "GRACE_S", 0.2)
    stays = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '0' else time.sleep(100)"
    assert distributed.launch(2, [sys.executable, "-c", stays]) == 3


@pytest.mark.slow
def test_a_signal_is_handed_on_to_each_once(tmp_path):
    hear = """
import os, signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
while not heard:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(75 if len(heard) == 1 else 1)
"""
    launch = f"distributed.launch(2, [sys.executable, '-c', {hear!r}, sys.argv[1]])"
    main = f"import sys; from pipelines.infra.parallel import distributed; sys.exit({launch})"
    process = started("-c", main, str(tmp_path), log=tmp_path / "log")
    while not {"0", "1"} <= {path.name for path in tmp_path.iterdir()}:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == UNFINISHED, (tmp_path / "log").read_text()


# --- shares ----------------------------------------------------------------------------------------------------------


def batch_of(n_clips: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.arange(n_clips * 6.0).reshape(n_clips, 2, 3),
        "labels": torch.arange(n_clips * 4).reshape(n_clips, 4),
    }


@pytest.mark.parametrize(("n_clips", "size"), [(7, 2), (8, 2), (4, 3), (3, 3)])
def test_shares_are_the_batch(n_clips: int, size: int):
    batch = batch_of(n_clips)
    parts = [data_parallel.rank_part(batch, rank, size) for rank in range(size)]
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]).sort(0).values, tensor)
    assert max(len(part["labels"]) for part in parts) - min(len(part["labels"]) for part in parts) <= 1


def test_who_has_no_clip_runs_one_that_counts_in_nothing():
    batch = batch_of(1)
    spare = data_parallel.rank_part(batch, 1, 2)
    assert torch.equal(spare["input_features"], batch["input_features"])
    assert (spare["labels"] == IGNORED).all()
    assert not (batch["labels"] == IGNORED).any()


def test_another_number_of_processes_is_told(tmp_path):
    told = record_log()
    for rank in (0, 1):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    data_parallel.log_other_world_size(tmp_path)
    assert told[0].startswith(f"note: 2 process(es) wrote {tmp_path.name}, and 1 continue: same batches")
    (tmp_path / "rng_state_1.pth").unlink()
    data_parallel.log_other_world_size(tmp_path)
    assert len(told) == 1


def test_alone_nothing_is_started(monkeypatch):
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
