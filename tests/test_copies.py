"""Checkpoints at a URI: training goes on from them on an empty machine, and never waits for a store or dies of one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from servers.benches import Bench

from pipelines import checkpoints, manifest, models, training
from pipelines.errors import LabError
from pipelines.stores import local
from pipelines.training import Progress, copies

ROOT = Path(__file__).parents[1]
SETTINGS = {"training.steps": 6, "training.eval_every": 2, "training.batch_size": 2, "evaluation.max_new_tokens": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


class CutOff(BaseException):
    """Like a kill: nothing in the lab or in transformers may catch it."""


@pytest.fixture(autouse=True)
def lab_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "lab-cache"))


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch) -> None:
    """At the end of a run nobody waits long."""
    monkeypatch.setattr(copies, "LAST_PAUSES_S", (0.01, 0.02))


@pytest.fixture(params=["local", "drive", "hub", "hopsworks"])
def bench(request) -> Bench:
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture(params=["hub", "hopsworks"])
def served(request) -> Bench:
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture(scope="module")
def base(toy_model):
    return models.resolve(str(toy_model))


@dataclasses.dataclass
class Sitting:
    """One sitting of a run, and what it told."""

    made: training.TrainedModel | None
    lines: list[str]
    steps: list[int]

    def told(self, words: str) -> list[str]:
        return [line for line in self.lines if words in line]


@pytest.fixture
def live(monkeypatch) -> list[copies.Copies]:
    """The copies of every sitting so far."""
    made = []

    class Watched(copies.Copies):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(training, "Copies", Watched)
    return made


@pytest.fixture
def arrived(live):
    """`arrived(4)`: waits until the last sitting's checkpoint-4 is at its URI."""
    return lambda step: lambda: until(lambda: step in live[-1].kept().steps)


@pytest.fixture
def failed(live):
    """Waits until a push of the last sitting has failed."""
    return lambda: until(lambda: live[-1].kept().reason)


@pytest.fixture
def sit(toy_settings, toy_cache, base, monkeypatch, live):
    """`sit(run, uri)`: train in the folder `run`, with copies at `uri`; the looks at validation find `wers`.

    `at={3: act}` acts when step 3 is done; `cut_at` cuts it off there.
    """

    def one(
        run: Path,
        uri: str = "",
        *,
        wers: dict[int, float] | None = None,
        at: dict[int, Callable[[], object]] | None = None,
        cut_at: int = 0,
        **overrides,
    ) -> Sitting:
        lines: list[str] = []
        steps: list[int] = []
        found = {2: 0.5, 4: 0.4, 6: 0.3, **(wers or {})}
        monkeypatch.setattr(training, "validator", lambda *args: lambda model: {"wer": found[steps[-1]], "loss": 1.0})

        def on_step(step: int) -> None:
            steps.append(step)
            if at and step in at:
                at[step]()
            if step == cut_at:
                raise CutOff

        settings = toy_settings({**SETTINGS, **{name.replace("__", "."): value for name, value in overrides.items()}})
        progress = Progress(on_step=on_step, on_line=lines.append)
        try:
            made = training.train(settings, toy_cache, base, run, progress, uri)
        except CutOff:
            made = None
        assert (made is None) == bool(cut_at)
        return Sitting(made, lines, steps)

    return one


def until(seen: Callable[[], object], patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def there(bench: Bench, name: str = "run") -> list[int]:
    """Steps of the whole checkpoints at the URI."""
    return sorted(checkpoints.step_of(Path(uri)) for uri in bench.store.list(bench.uri(name)))


def weights(made: training.TrainedModel) -> str:
    return manifest.sha256(Path(made.uri) / "model.safetensors")


# ---- what is kept, and gone on from


def test_an_empty_machine_goes_on_and_ends_with_the_same_weights(bench, sit, arrived, tmp_path):
    whole = sit(tmp_path / "whole")
    first = sit(tmp_path / "first", bench.uri("run"), at={3: arrived(2), 5: arrived(4)}, cut_at=5)
    assert first.lines[0] == f"no checkpoint at {bench.uri('run')} yet: this run's checkpoints are copied there"
    assert first.told(f"checkpoint-2 is kept at {bench.uri('run')} (")
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "lab-cache", ignore_errors=True)

    second = sit(tmp_path / "second", bench.uri("run"))
    assert second.told("going on from checkpoint-4")
    assert second.steps == [5, 6]
    assert weights(second.made) == weights(whole.made)
    assert second.lines[-1] == f"kept at {bench.uri('run')}: checkpoint-4 and checkpoint-6"
    assert second.made.copies == copies.Kept(bench.uri("run"), (4, 6), (), "")
    assert there(bench) == [4, 6]
    assert [path.name for path in (tmp_path / "second").iterdir() if path.is_dir()] == ["model"]


def test_the_store_keeps_as_many_as_the_recipe_and_the_best(bench, sit, arrived, tmp_path):
    wait = {step + 1: arrived(step) for step in (2, 4)}
    made = sit(tmp_path / "run", bench.uri("run"), wers={2: 0.1}, at=wait, training__keep_checkpoints=1).made
    assert made.best_step == 2
    assert there(bench) == [2, 6]
    again = sit(tmp_path / "again", bench.uri("run"), wers={2: 0.1}, training__keep_checkpoints=1)
    assert again.told("going on from checkpoint-6")
    assert again.steps == []
    assert weights(again.made) == weights(made)


def test_what_is_newer_on_this_machine_is_gone_on_from_and_copied(hub_bench, sit, arrived, tmp_path):
    bench = hub_bench
    sit(tmp_path / "run", bench.uri("run"), at={3: arrived(2)}, cut_at=3)
    sit(tmp_path / "run", cut_at=5)
    second = sit(tmp_path / "run", bench.uri("run"), at={5: arrived(4)})
    assert second.told("going on from checkpoint-4")
    assert not second.told("fetching")
    assert there(bench) == [4, 6]


def test_a_damaged_newest_copy_is_named_and_the_one_before_it_used(bench, sit, arrived, tmp_path):
    whole = sit(tmp_path / "whole").made
    sit(tmp_path / "first", bench.uri("run"), at={3: arrived(2), 5: arrived(4)}, cut_at=5)
    assert there(bench) == [2, 4]
    optimizer = bench.files("run/checkpoint-4")["optimizer.pt"]
    bench.write("run/checkpoint-4", "optimizer.pt", bytes([optimizer[0] ^ 1]) + optimizer[1:])
    second = sit(tmp_path / "second", bench.uri("run"))
    assert second.told(f"skipping checkpoint-4 at {bench.uri('run')}: optimizer.pt of ")
    assert second.told("going on from checkpoint-2")
    assert weights(second.made) == weights(whole)
    assert there(bench) == [4, 6]
    third = sit(tmp_path / "third", bench.uri("run"))
    assert third.told("going on from checkpoint-6")


def test_a_copy_whose_best_is_not_there_is_skipped(hub_bench, sit, arrived, tmp_path):
    """The model is made of the best: without it the newest leads nowhere."""
    bench = hub_bench
    sit(tmp_path / "first", bench.uri("run"), wers={2: 0.1}, at={5: arrived(4)}, cut_at=5)
    bench.write("run/checkpoint-2", "manifest.json", None)
    second = sit(tmp_path / "second", bench.uri("run"), wers={2: 0.1})
    assert second.lines[:2] == [
        f"skipping {bench.uri('run')}/checkpoint-2: unfinished or damaged",
        f"skipping checkpoint-4 at {bench.uri('run')}: it needs checkpoint-2, which is not there",
    ]
    assert second.steps[0] == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"training__learning_rate": 2e-3}, "training.learning_rate: wanted 0.002, found 0.001"),
     ({"model__dropout": 0.1}, "model.dropout: wanted 0.1, found 0.0")],
)  # fmt: skip
def test_another_run_at_the_uri_is_refused_and_left_alone(bench, sit, arrived, tmp_path, overrides, named):
    sit(tmp_path / "run", bench.uri("run"), cut_at=3, at={3: arrived(2)})
    before = bench.files("run")
    for run in ("other", "again"):
        with pytest.raises(LabError, match=rf"run holds another run: {named}\. Name another URI"):
            sit(tmp_path / run, bench.uri("run"), **overrides)
    assert bench.files("run") == before
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_another_run_that_is_found_late_is_left_alone(hub_bench, sit, arrived, tmp_path):
    """The store did not answer at the start, and a checkpoint was on this machine: the thread finds out."""
    bench = hub_bench
    sit(tmp_path / "run", bench.uri("run"), cut_at=3, at={3: arrived(2)})
    before = bench.files("run")
    other = {"training__learning_rate": 2e-3}
    sit(tmp_path / "other", cut_at=3, **other)
    bench.server.fault("GET /api/", "500", times=None)
    second = sit(tmp_path / "other", bench.uri("run"), at={3: bench.server.faults.clear}, **other)
    assert second.told("Going on with what is on this machine")
    assert second.lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: hub://lab/run holds another run")
    assert bench.files("run") == before


# ---- stores that fail


def test_a_hub_that_fails_every_commit_does_not_look_like_success(hub_bench, sit, tmp_path):
    hub_bench.server.fault("POST .*/commit/", "500", times=None)
    sitting = sit(tmp_path / "run", hub_bench.uri("run"))
    assert sitting.steps == [1, 2, 3, 4, 5, 6]
    assert sitting.lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: the Hub failed (500)")
    assert sitting.told("waiting up to 15 min until checkpoint-6 is at hub://lab/run")
    assert sitting.made.copies.steps == ()
    assert sitting.made.copies.missing == (6,)
    assert there(hub_bench) == []
    assert not (tmp_path / "run" / "unsent").exists()


SAID = {"401": "does not accept the token", "403": "does not allow this token", "429": "slow down",
        "500": "failed (500)", "cut upload": "broke off"}  # fmt: skip
UPLOADS = {"hub": "PUT /lfs/|POST .*/commit/", "hopsworks": "POST .*/dataset/upload/"}


@pytest.mark.parametrize("kind", SAID)
def test_a_push_that_fails_is_told_with_its_reason_and_tried_again(served, sit, failed, tmp_path, kind):
    served.server.fault(UPLOADS[served.name], kind, times=None)
    sitting = sit(tmp_path / "run", served.uri("run"), at={3: failed, 4: served.server.faults.clear})
    (refused,) = sitting.told(f"checkpoint-2 is not kept at {served.uri('run')}: ")
    assert SAID[kind] in refused
    assert "\n" not in refused and served.secret not in refused
    assert sitting.lines[-1].startswith(f"kept at {served.uri('run')}: ")
    assert there(served)[-1] == 6


def test_a_drive_that_is_unmounted_in_mid_run_stops_nothing(drive_bench, sit, arrived, tmp_path):
    mount = tmp_path / "mount" / "MyDrive"
    sitting = sit(
        tmp_path / "run",
        drive_bench.uri("run"),
        at={3: lambda: (arrived(2)(), mount.rename(tmp_path / "unmounted"))},
    )
    assert sitting.steps[-1] == 6
    assert sitting.told("is not kept at") and sitting.told("the drive is not mounted")
    assert sitting.lines[-1].startswith(f"NOT kept at {drive_bench.uri('run')}: checkpoint-6 (the drive is not mounted")
    assert sitting.lines[-1].endswith("There is checkpoint-2")
    assert not mount.exists()


def test_a_store_that_is_full_keeps_what_it_has(drive_bench, sit, arrived, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def full(source, target):
        if "checkpoint-4" in str(target) and str(target).startswith(drive_bench.parent):
            raise OSError(errno.ENOSPC, "No space left")
        return copyfile(source, target)

    monkeypatch.setattr(local.shutil, "copyfile", full)
    sitting = sit(tmp_path / "run", drive_bench.uri("run"), at={3: arrived(2)}, training__steps=4)
    assert sitting.lines[-1].startswith(f"NOT kept at {drive_bench.uri('run')}: checkpoint-4 (the drive is full")
    assert there(drive_bench) == [2]


def test_an_empty_machine_does_not_start_anew_where_the_store_does_not_answer(served, sit, tmp_path):
    served.server.fault(r".", "500", times=None)
    with pytest.raises(LabError, match=r"failed .500."):
        sit(tmp_path / "run", served.uri("run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_training_does_not_wait_for_a_silent_store(hub_bench, sit, tmp_path):
    """The server answers nothing from the first checkpoint on until training is over."""
    server, silent = hub_bench.server, threading.Event()
    answer = server.answer

    def slow(request):
        server.lock.release()
        try:
            while silent.is_set():
                time.sleep(0.01)
        finally:
            server.lock.acquire()
        answer(request)

    server.answer = slow
    sitting = sit(tmp_path / "run", hub_bench.uri("run"), at={1: silent.set, 6: silent.clear})
    assert sitting.told(f"not at {hub_bench.uri('run')} yet: checkpoint-4; checkpoint-2 is being copied")
    # what was superseded meanwhile is not sent at all
    assert there(hub_bench) == [2, 6]
    assert not sitting.told("checkpoint-4 is kept")


def test_the_waiting_at_the_end_is_bounded(hub_bench, sit, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "PATIENCE_S", 0.5)
    server, over = hub_bench.server, threading.Event()
    answer = server.answer

    def silent(request):
        if request.method != "GET":
            server.lock.release()
            over.wait(20)
            server.lock.acquire()
        answer(request)

    server.answer = silent
    sitting = sit(tmp_path / "run", hub_bench.uri("run"))
    over.set()
    assert sitting.lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: the store had not taken it")


def test_what_is_unsent_is_told_at_every_log_line(hub_bench, sit, failed, tmp_path):
    hub_bench.server.fault("POST .*/commit/", "500", times=None)
    sitting = sit(tmp_path / "run", hub_bench.uri("run"), at={3: failed})
    assert len(sitting.told("not at hub://lab/run yet: checkpoint-2")) >= 2
    assert len(sitting.told("not at hub://lab/run yet: checkpoint-4")) >= 2


def test_what_is_pruned_here_is_still_whole_while_it_is_sent(local_bench, sit, tmp_path, monkeypatch):
    """With one checkpoint kept, the trainer prunes the second while its copy is on the way."""
    copy, busy, go = local.FolderPlace.copy, threading.Event(), threading.Event()

    def slow(self, source, target):
        if "checkpoint-2" in str(target) and str(target).startswith(local_bench.parent):
            busy.set()
            go.wait(20)
        copy(self, source, target)

    monkeypatch.setattr(local.FolderPlace, "copy", slow)

    def pruned() -> None:
        assert not (tmp_path / "run" / "checkpoints" / "checkpoint-2").exists()
        go.set()

    sitting = sit(tmp_path / "run", local_bench.uri("run"), at={3: busy.wait, 5: pruned}, training__keep_checkpoints=1)
    assert sitting.told("checkpoint-2 is kept at ")
    assert not sitting.told("is not kept")
    assert there(local_bench) == [6]


def test_without_hard_links_it_works_as_well(local_bench, sit, arrived, tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(copies.os, "link", no_links)
    sitting = sit(tmp_path / "run", local_bench.uri("run"), at={5: arrived(4)})
    assert sitting.lines[-1].startswith("kept at ")
    assert there(local_bench)[-1] == 6


# ---- the command, killed for real

STARTER = """
import json, os, sys

import torch
from transformers import Seq2SeqTrainer, WhisperForConditionalGeneration, WhisperProcessor
import hopsworks, huggingface_hub, huggingface_hub.hf_api

from pipelines import __main__ as cli
from pipelines import figures, lab

huggingface_hub.constants.HF_HUB_OFFLINE = False
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(job["environment"])
        sys.argv = ["pipelines", *job["arguments"]]
        try:
            cli.main()
        except SystemExit as ended:
            os._exit(ended.code or 0)
        finally:
            sys.stdout.flush()
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def starter():
    """A process that has imported everything and forks one command for each line it is given."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def command(starter, toy_recipe, toy_model, tmp_path):
    """`command("train", ..., kill_when=...)`: its exit status and all that it told."""
    settings = {**SETTINGS, "model.base": str(toy_model), "model.dropout": 0.1, "model.spec_augment": True}

    def run(name: str, *arguments: str, kill_when: Callable[[str], object] | None = None) -> tuple[int, str]:
        log = tmp_path / f"{time.monotonic_ns()}.log"
        given = [name, "--recipe", str(toy_recipe), *(f"--set={key}={value}" for key, value in settings.items())]
        variables = {key: value for key, value in os.environ.items() if key.startswith(("HF_", "LAB_", "HOPS"))}
        variables["HOME"] = os.environ["HOME"]
        job = {"arguments": [*given, *arguments], "log": str(log), "environment": variables}
        starter.stdin.write(json.dumps(job) + "\n")
        starter.stdin.flush()
        child = int(starter.stdout.readline())
        if kill_when:
            until(lambda: log.exists() and kill_when(log.read_text()), 60)
            os.kill(child, signal.SIGKILL)
        status = int(starter.stdout.readline())
        return os.waitstatus_to_exitcode(status), log.read_text()

    return run


def the_run(runs: Path) -> Path:
    (run,) = (runs / "toy").glob("train-*")
    return run


@pytest.mark.slow
def test_killed_and_everything_local_deleted_it_ends_with_the_same_weights(served, command, tmp_path):
    """The cache too comes from the store; the second machine has the recipe and the URIs."""
    here, there_, whole = tmp_path / "here", tmp_path / "there", tmp_path / "whole"
    cache, uri = served.uri("cache"), served.uri("run")
    assert command("features", f"--runs={here}", f"--publish={cache}")[0] == 0
    assert command("train", f"--runs={whole}", f"--cache={cache}")[0] == 0

    def seen(log: str) -> bool:
        return served.store.exists(f"{uri}/checkpoint-4")

    status, told = command("train", f"--runs={here}", f"--cache={cache}", f"--resume={uri}", kill_when=seen)
    assert status == -signal.SIGKILL, told
    shutil.rmtree(here)
    shutil.rmtree(tmp_path / "lab-cache")

    status, told = command("train", f"--runs={there_}", f"--cache={cache}", f"--resume={uri}", f"--publish={uri}-model")
    assert status == 0, told
    assert "going on from checkpoint-" in told
    assert "starting from" not in told
    assert told.strip().splitlines()[-1].startswith(f"kept at {uri}: ")
    sums = [manifest.sha256(the_run(runs) / "model" / "model.safetensors") for runs in (whole, there_)]
    assert sums[0] == sums[1]
    published = served.store.fetch(f"{uri}-model", log=lambda line: None)
    assert manifest.sha256(published / "model.safetensors") == sums[0]
    noted = json.loads((there_ / "toy" / "stages.json").read_text())
    assert noted["model publication"]["model_uri"].startswith(f"{uri}-model")


@pytest.mark.slow
def test_killed_while_it_copies_the_half_is_not_whole(bench, command, toy_cache, tmp_path, monkeypatch):
    """SIGKILL once a file of the first checkpoint has arrived and its manifest has not."""
    uri = bench.uri("run")

    def half(log: str) -> bool:
        files = bench.files("run/checkpoint-2")
        objects = getattr(bench.server, "objects", {})
        return bool(files or objects) and "manifest.json" not in files

    if bench.server:
        last = "manifest.json" if bench.name == "hopsworks" else "commit"
        bench.server.fault(f"POST .*{last}", "slow", times=None)
    status, told = command(
        "train", f"--runs={tmp_path / 'a'}", f"--cache={toy_cache.uri}", f"--resume={uri}", kill_when=half
    )
    assert status == -signal.SIGKILL, told
    if "manifest.json" in bench.files("run/checkpoint-2"):
        pytest.skip("the copy was whole before the kill came")
    if bench.server:
        bench.server.faults.clear()
    assert there(bench) == []
    shutil.rmtree(tmp_path / "a")
    status, told = command("train", f"--runs={tmp_path / 'b'}", f"--cache={toy_cache.uri}", f"--resume={uri}")
    assert status == 0, told
    assert "starting from" in told
    assert there(bench)[-1] == 6


def test_a_hub_that_fails_every_commit_is_the_last_word_of_the_command(
    hub_bench, command, toy_cache, tmp_path, monkeypatch
):
    hub_bench.server.fault("POST .*/commit/", "403", times=None)
    arguments = ("train", f"--runs={tmp_path}", f"--cache={toy_cache.uri}", f"--resume={hub_bench.uri('run')}")
    monkeypatch.setenv("LAB_TEST", "1")
    status, told = command(*arguments)
    assert status == 0
    assert told.strip().splitlines()[-1].startswith("NOTHING of this run is kept at hub://lab/run: the Hub does not")
