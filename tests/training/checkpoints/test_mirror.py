"""Checkpoints at a URI: training goes on from them on an empty machine, and never waits for a store or dies of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_jobs import JobStarter
from log_recorder import record_log
from servers.stores import Bench, contents

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.stores import local
from pipelines.training import loop as training_loop
from pipelines.training.callbacks.progress import Progress
from pipelines.training.checkpoints import mirror as checkpoint_mirror
from pipelines.training.checkpoints import remote as checkpoint_remote
from pipelines.training.checkpoints import sealed as sealed_checkpoints
from pipelines.training.run import TrainingRun
from pipelines.whisper import model as whisper_model

ROOT = Path(__file__).parents[3]
IDENTITY = {"training.steps": 6, "cache": "c1", "base.weights_sha256": "w"}
SETTINGS = {"training.steps": 6, "training.eval_every": 2, "training.batch_size": 2, "evaluation.max_new_tokens": 3}


@pytest.fixture(autouse=True)
def lab_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "lab-cache"))


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch) -> None:
    """At the end of a run nobody waits long."""
    monkeypatch.setattr(checkpoint_mirror, "LAST_PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(checkpoint_mirror, "SHARE", 1e3)


@pytest.fixture(params=["local", "drive", "hub", "hopsworks"])
def bench(request) -> Bench:
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture(params=["hub", "hopsworks"])
def served(request) -> Bench:
    return request.getfixturevalue(f"{request.param}_bench")


def until(seen: Callable[[], object], patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def there(bench: Bench) -> list[int | str]:
    """Steps of the whole checkpoints at the URI, and `model`."""
    names = [Path(uri).name for uri in bench.store.list(bench.uri("run"))]
    steps = sorted(sealed_checkpoints.step_of(Path(name)) for name in names if name != "model")
    return steps + [name for name in names if name == "model"]


class Run:
    """A run without a trainer: small checkpoints, sealed, pruned and offered in the order in which training does."""

    def __init__(self, folder: Path, uri: str, keep: int = 2, **identity: Any):
        folder.mkdir(exist_ok=True)
        self.folder, self.keep, self.lines = folder / "checkpoints", keep, record_log()
        self.copies = checkpoint_mirror.CheckpointMirror(uri, folder, IDENTITY | identity, keep)

    def start(self) -> Path | None:
        last = sealed_checkpoints.newest_complete(self.folder, run_digest="r")
        return self.copies.resume_from(last)

    def save(self, step: int, best: int | None = None) -> None:
        self.write(step, best)
        self.copies.offer(self.folder / f"checkpoint-{step}")

    def write(self, step: int, best: int | None = None) -> None:
        checkpoint = self.folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(f"weights at {step}".encode() * 100)
        (checkpoint / "optimizer.pt").write_bytes(f"moments at {step}".encode() * 200)
        sealed_checkpoints.seal(checkpoint, run_digest="r", best_step=best or step)
        sealed_checkpoints.prune(self.folder, keep=self.keep)

    def arrived(self, *steps: int) -> None:
        """Wait until these are at the URI, and all is tidy there."""
        names = {f"checkpoint-{step}" for step in steps}
        until(lambda: names <= {*self.copies.state().there} and not self.copies.busy())

    def failed(self) -> None:
        until(lambda: self.copies.state().reason)

    def told(self, words: str) -> list[str]:
        self.copies.log_messages()
        return [line for line in self.lines if words in line]


@pytest.fixture
def start(tmp_path):
    """`start("first", uri)`: the run in a folder of that name, begun."""

    def begin(name: str, uri: str, *args, **kwargs) -> Run:
        run = Run(tmp_path / name, uri, *args, **kwargs)
        run.last = run.start()
        return run

    return begin


# ---- what is kept, and gone on from


def test_copies_are_fetched_to_an_empty_machine(bench, start, tmp_path):
    first = start("first", bench.uri("run"))
    assert first.last is None
    assert first.lines == [f"no checkpoint at {bench.uri('run')} yet: this run's checkpoints are copied there"]
    with first.copies:
        first.save(2)
        first.arrived(2)
        first.save(4, best=2)
    assert first.told(f"checkpoint-2 is kept at {bench.uri('run')} (")
    assert first.lines[-1] == f"kept at {bench.uri('run')}: checkpoint-2 and checkpoint-4"
    assert there(bench) == [2, 4]

    second = start("second", bench.uri("run"))
    assert second.last == second.folder / "checkpoint-4"
    assert contents(second.folder) == contents(first.folder)
    assert [path.name for path in second.folder.parent.iterdir()] == ["checkpoints"]
    before = bench.uploads()
    with second.copies:
        pass
    assert bench.uploads() == before


def test_store_keeps_newest_and_best_checkpoints(bench, start):
    run = start("run", bench.uri("run"), keep=1)
    with run.copies:
        for step in (2, 4, 6):
            run.save(step, best=2)
            run.arrived(step)
    assert there(bench) == [2, 6]
    assert bench.store.list_folders(bench.uri("run")) == [bench.uri("run/checkpoint-2"), bench.uri("run/checkpoint-6")]


def test_newer_checkpoints_of_another_machine_remain(local_bench, start):
    late, early = (start(name, local_bench.uri("run"), keep=1) for name in ("late", "early"))
    with early.copies:
        with late.copies:
            late.save(8)
        early.save(2)
        early.arrived(2)
        early.save(4)
    assert there(local_bench) == [4, 8]


def test_newer_local_checkpoint_is_used_and_copied(hub_bench, start):
    first = start("run", hub_bench.uri("run"))
    with first.copies:
        first.save(2)
    first.write(4, best=2)  # in a sitting without a URI
    second = start("run", hub_bench.uri("run"))
    assert second.last.name == "checkpoint-4"
    with second.copies:
        pass
    assert not second.told("fetching")
    assert there(hub_bench) == [2, 4]


def test_damaged_newest_copy_falls_back_to_previous(bench, start):
    first = start("first", bench.uri("run"))
    with first.copies:
        first.save(2)
        first.arrived(2)
        first.save(4)
    bench.write("run/checkpoint-4", "optimizer.pt", bytes(len(b"moments at 4") * 200))
    second = start("second", bench.uri("run"))
    assert second.last.name == "checkpoint-2"
    assert second.told(f"skipping checkpoint-4 at {bench.uri('run')}: optimizer.pt of ")
    with second.copies:
        second.save(4)
    assert second.lines[-1] == f"kept at {bench.uri('run')}: checkpoint-2 and checkpoint-4"
    assert start("third", bench.uri("run")).last.name == "checkpoint-4"


@pytest.mark.parametrize("lost", ["manifest.json", "optimizer.pt"])
def test_unfinished_newest_copy_falls_back_to_previous(bench, start, lost):
    first = start("first", bench.uri("run"))
    with first.copies:
        first.save(2)
        first.arrived(2)
        first.save(4)
    bench.write("run/checkpoint-4", lost, None)
    second = start("second", bench.uri("run"))
    assert second.last.name == "checkpoint-2"
    assert second.lines[0] == f"skipping {bench.uri('run')}/checkpoint-4: unfinished or damaged"


def test_copy_without_its_best_is_skipped(hub_bench, start):
    """The model is made of the best: without it the newest leads nowhere."""
    first = start("first", hub_bench.uri("run"))
    with first.copies:
        for step in (2, 4, 6):
            first.save(step, best=min(step, 4))
            first.arrived(step)
    assert there(hub_bench) == [4, 6]
    hub_bench.write("run/checkpoint-4", "manifest.json", None)
    second = start("second", hub_bench.uri("run"))
    assert second.last is None
    assert second.told("skipping checkpoint-6 at hub://lab/run: it needs checkpoint-4, which is not there")


def test_damage_in_transfer_is_fetched_again(served, start):
    first = start("first", served.uri("run"))
    with first.copies:
        first.save(2)
    served.server.fault("GET .*/(resolve|with_auth)/.*optimizer.pt", "corrupt", times=1)
    assert start("second", served.uri("run")).last.name == "checkpoint-2"


@pytest.mark.parametrize(
    ("field", "named"), [({"training.steps": 8}, "training.steps: wanted 8, found 6"),
                         ({"cache": "c2"}, "cache: wanted c2, found c1"),
                         ({"base.weights_sha256": "v"}, "base.weights_sha256: wanted v, found w")],
)  # fmt: skip
def test_other_run_at_uri_is_refused_and_unchanged(bench, start, field, named):
    first = start("run", bench.uri("run"))
    with first.copies:
        first.save(2)
    before = bench.files("run")
    with pytest.raises(LabError, match=rf"run holds another run: {named}\. Name another URI"):
        start("other", bench.uri("run"), **field)
    assert bench.files("run") == before


def test_other_run_detected_late_is_unchanged(hub_bench, start):
    """The store did not answer at the start, and a checkpoint was on this machine: the thread finds out."""
    first = start("run", hub_bench.uri("run"))
    with first.copies:
        first.save(2)
    before = hub_bench.files("run")
    other = Run(first.folder.parents[1] / "other", hub_bench.uri("run"), cache="c2")
    other.write(4)
    hub_bench.server.fault("GET /api/", "500", times=None)
    assert other.start().name == "checkpoint-4"
    assert other.told("Continuing with the files on this machine")
    with other.copies:
        hub_bench.server.faults.clear()
        other.save(6)
    assert other.lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: hub://lab/run holds another run")
    assert "cache: wanted c2, found c1" in other.lines[-1]
    assert hub_bench.files("run") == before


@pytest.mark.parametrize("name", ["model", "checkpoint-4", "checkpoint-1000"])
def test_foreign_folder_is_refused_at_start_and_unchanged(bench, start, name):
    """A classic Trainer's checkpoint has the name and the files of ours, and no note of whose it is."""
    for file in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        bench.write(f"run/{name}", file, b"hers")
    before = bench.files("run")
    with pytest.raises(
        checkpoint_remote.OtherRun, match=rf"run/{name} is unfinished and holds files .* name another URI"
    ) as error:
        start("run", bench.uri("run"))
    assert "\n" not in str(error.value)
    assert bench.files("run") == before


def test_foreign_folder_appearing_later_is_unchanged(bench, start):
    run = start("run", bench.uri("run"), keep=1)
    foreign = {f"checkpoint-{step}/model.safetensors": b"hers" for step in (1, 4)}
    with run.copies:
        run.save(2)
        run.arrived(2)
        for name, content in foreign.items():  # once the Hub has a repository of models
            bench.write("run", name, content)
        run.save(4)
        run.failed()
        assert run.told("run/checkpoint-4 is unfinished and holds files")
        run.save(6)
        run.arrived(6)
    assert there(bench) == [6]
    assert {
        name: found for name, found in bench.files("run").items() if not name.startswith("checkpoint-6/")
    } == foreign


def test_finished_model_removes_only_its_checkpoints(local_bench, start, tmp_path):
    """Where only the remote is asked, whatever the start has seen."""
    run = start("run", local_bench.uri("run"))
    with run.copies:
        run.save(2)
    for name in ("checkpoint-500", "checkpoint-1000", "model"):
        local_bench.write(f"run/{name}", "model.safetensors", b"hers")
    local_bench.write("run/checkpoint-7", "run.json", json.dumps({**IDENTITY, "cache": "c2"}).encode())
    shutil.copytree(run.folder / "checkpoint-2", tmp_path / "run" / "model")
    before, remote = local_bench.files("run"), run.copies.remote
    with pytest.raises(checkpoint_remote.OtherRun, match="run/model is unfinished"):
        remote.push(tmp_path / "run" / "model")
    remote.prune({checkpoint_remote.MODEL}, checkpoint_remote.MODEL)
    assert local_bench.files("run") == {
        name: found for name, found in before.items() if not name.startswith("checkpoint-2/")
    }


def test_incomplete_push_is_recognised_and_removed(bench, start, monkeypatch):
    """The note of whose it is comes first: without any other file it is known already."""
    first = start("first", bench.uri("run"))
    with first.copies:
        first.save(2)
    for name in {*bench.files("run/checkpoint-2")} - {"run.json"}:
        bench.write("run/checkpoint-2", name, None)
    second = start("second", bench.uri("run"), keep=1)
    assert second.last is None
    assert second.lines[0] == f"skipping {bench.uri('run')}/checkpoint-2: unfinished or damaged"
    with second.copies:
        second.save(4)
    assert {name.partition("/")[0] for name in bench.files("run")} == {"checkpoint-4"}


def test_run_json_is_uploaded_first_and_removed_last(drive_bench, start, monkeypatch):
    """On the Hub all of it is one commit."""
    run, put, sent, left = start("run", drive_bench.uri("run")), local.LocalFolder.put, [], []

    def watched(self, folder, names):
        sent.extend(names)
        put(self, folder, names)

    with monkeypatch.context() as patched:
        patched.setattr(local.LocalFolder, "put", watched)
        with run.copies:
            run.save(2)
    assert (sent[0], sent[-1]) == ("run.json", "manifest.json")
    with monkeypatch.context() as patched:
        patched.setattr(local.shutil, "rmtree", lambda folder, **_: left.extend(drive_bench.files("run/checkpoint-2")))
        drive_bench.store.remove(drive_bench.uri("run/checkpoint-2"))
    assert left == ["run.json"]


# ---- stores that fail

SAID = {"401": "does not accept the token", "403": "does not allow this token", "429": "slow down",
        "500": "failed (500)", "cut upload": "broke off"}  # fmt: skip
UPLOADS = {"hub": "PUT /lfs/|POST .*/commit/", "hopsworks": "POST .*/dataset/upload/"}


@pytest.mark.parametrize("kind", SAID)
def test_failed_push_is_logged_and_retried(served, start, kind):
    run = start("run", served.uri("run"))
    served.server.fault(UPLOADS[served.name], kind, times=None)
    with run.copies:
        run.save(2)
        run.failed()
        (refused,) = run.told(f"checkpoint-2 is not kept at {served.uri('run')}: ")
        assert SAID[kind] in refused
        assert "\n" not in refused and served.secret not in refused
        run.copies.log_unsent()
        assert run.lines[-1] == f"not at {served.uri('run')} yet: checkpoint-2; it will be tried again"
        served.server.faults.clear()
        run.save(4, best=2)
    assert run.lines[-1] == f"kept at {served.uri('run')}: checkpoint-2 and checkpoint-4"
    best, newest = run.told(f" is kept at {served.uri('run')} (")
    assert best.startswith("checkpoint-2 ") and newest.startswith("checkpoint-4 ")
    assert there(served) == [2, 4]


def test_failed_push_is_retried_after_a_pause(hub_bench, start, monkeypatch):
    monkeypatch.setattr(checkpoint_mirror, "_RETRY_PAUSES_S", (0.2,))
    run = start("run", hub_bench.uri("run"))
    hub_bench.server.fault("POST .*/commit/", "500", times=1)
    with run.copies:
        run.save(2)
        run.arrived(2)
        assert len(run.told("is not kept")) == 1


def test_failing_hub_is_not_reported_as_success(hub_bench, start):
    hub_bench.server.fault("POST .*/commit/", "500", times=None)
    run = start("run", hub_bench.uri("run"))
    with run.copies:
        run.save(2)
        run.failed()
    assert run.told("waiting up to 15 min until checkpoint-2 is at hub://lab/run")
    assert run.lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: the Hub failed (500)")
    kept = run.copies.state()
    assert (kept.there, kept.missing) == ((), ("checkpoint-2",))
    assert there(hub_bench) == []
    assert not run.copies.aside.exists()


def test_unmounted_drive_does_not_stop_the_run(drive_bench, start, tmp_path):
    mount = tmp_path / "mount" / "MyDrive"
    run = start("run", drive_bench.uri("run"))
    with run.copies:
        run.save(2)
        run.arrived(2)
        mount.rename(tmp_path / "unmounted")
        run.save(4)
    assert run.lines[-1].startswith(f"NOT kept at {drive_bench.uri('run')}: checkpoint-4 (the drive is not mounted")
    assert run.lines[-1].endswith("There is checkpoint-2")
    assert not mount.exists()


def test_full_store_keeps_its_copies(drive_bench, start, monkeypatch):
    copyfile = shutil.copyfile

    def full(source, target):
        if "checkpoint-4" in str(target) and str(target).startswith(drive_bench.parent):
            raise OSError(errno.ENOSPC, "No space left")
        return copyfile(source, target)

    monkeypatch.setattr(local.shutil, "copyfile", full)
    run = start("run", drive_bench.uri("run"))
    with run.copies:
        run.save(2)
        run.arrived(2)
        run.save(4)
    assert run.lines[-1].startswith(f"NOT kept at {drive_bench.uri('run')}: checkpoint-4 (the drive is full")
    assert there(drive_bench) == [2]


def test_client_exception_does_not_stop_the_run(local_bench, start, monkeypatch):
    def broken(self, names):
        raise TypeError("a defect\nof a client")

    with monkeypatch.context() as defect:
        defect.setattr(local.LocalFolder, "put", lambda self, folder, names: broken(self, names))
        run = start("run", local_bench.uri("run"))
        with run.copies:
            run.save(2)
            run.failed()
    assert run.lines[-1] == f"NOTHING of this run is kept at {local_bench.uri('run')}: TypeError: a defect of a client"


def test_silent_store_is_an_error_on_an_empty_machine(served, start):
    served.server.fault(r".", "500", times=None)
    with pytest.raises(LabError, match=r"failed .500."):
        start("run", served.uri("run"))


@pytest.fixture
def silence(hub_bench):
    """While it is set, the Hub answers nothing."""
    server, silent = hub_bench.server, threading.Event()
    answer = server.answer

    def late(request):
        server.lock.release()
        try:
            until(lambda: not silent.is_set())
        finally:
            server.lock.acquire()
        answer(request)

    server.answer = late
    yield silent
    silent.clear()


def test_superseded_checkpoints_are_not_sent(hub_bench, start, silence):
    run = start("run", hub_bench.uri("run"), keep=1)
    silence.set()
    with run.copies:
        run.save(2)
        until(run.copies.busy)
        before = time.monotonic()
        run.save(4)
        run.save(6)
        assert time.monotonic() - before < 1
        run.copies.log_unsent()
        assert run.lines[-1] == "not at hub://lab/run yet: checkpoint-6; checkpoint-2 is being copied"
        assert not (run.folder / "checkpoint-2").exists(), "pruned here, whole there all the same"
        silence.clear()
    assert run.told("checkpoint-2 is kept at hub://lab/run")
    assert not run.told("checkpoint-4")
    assert there(hub_bench) == [6]


def test_thread_pauses_between_copies_until_the_end(local_bench, start, monkeypatch):
    """One copy took so much of the processor that the next would take more than its share."""
    monkeypatch.setattr(checkpoint_mirror, "SHARE", 1e-9)
    run = start("run", local_bench.uri("run"))
    with run.copies:
        run.save(2)
        run.arrived(2)
        run.save(4)
        time.sleep(0.1)
        run.copies.log_unsent()
        assert run.lines[-1] == f"not at {local_bench.uri('run')} yet: checkpoint-4; it comes next"
        run.save(6)
    assert there(local_bench) == [2, 6]
    assert not run.told("checkpoint-4 is kept")


def test_wait_at_the_end_is_bounded(hub_bench, start, silence, monkeypatch):
    monkeypatch.setattr(checkpoint_mirror, "FINAL_WAIT_S", 0.5)
    run = start("run", hub_bench.uri("run"))
    silence.set()
    with run.copies:
        run.save(2)
    assert run.lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: the store had not taken it")


def test_interrupted_run_does_not_wait(hub_bench, start, silence):
    run = start("run", hub_bench.uri("run"))
    silence.set()
    before = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), run.copies:
        run.save(2)
        raise KeyboardInterrupt
    assert time.monotonic() - before < 5
    assert run.lines[-1] == "NOTHING of this run is kept at hub://lab/run: the run was interrupted"


def test_failed_run_pushes_its_last_checkpoint(local_bench, start):
    run = start("run", local_bench.uri("run"))
    with contextlib.suppress(LabError), run.copies:
        run.save(2)
        raise LabError("the loss is not finite")
    assert there(local_bench) == [2]


def test_mirror_works_without_hard_links(local_bench, start, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint_mirror.os, "link", no_links)
    run = start("run", local_bench.uri("run"))
    with run.copies:
        run.save(2)
        run.save(4, best=2)
    assert there(local_bench) == [2, 4]
    assert (run.folder / "checkpoint-4").exists()


# ---- training


@pytest.fixture
def sit(toy_settings, toy_cache, toy_model, monkeypatch, one_thread):
    """`sit(run, uri)`: train in the folder `run` with copies at `uri`; the model and the lines told.

    `at={3: act}` acts, with the sitting's copies, when step 3 is done.
    """
    live = []

    class Watched(checkpoint_mirror.CheckpointMirror):
        def __init__(self, *args):
            super().__init__(*args)
            live.append(self)

    monkeypatch.setattr(training_loop, "CheckpointMirror", Watched)

    def one(run: Path, uri: str = "", at: dict[int, Callable] | None = None, **overrides):
        lines, looks = [], iter((0.5, 0.6, 0.4))
        record_log(lines)
        monkeypatch.setattr(training_loop, "validator", lambda *args: lambda model: {"wer": next(looks), "loss": 1.0})

        def act(step: int) -> None:
            (at or {}).get(step, lambda copies: None)(live and live[-1])

        progress = Progress(on_step=act)
        settings = toy_settings(SETTINGS | overrides)
        base = whisper_model.resolve(str(toy_model))
        return training_loop.train(TrainingRun(settings, toy_cache, base, run, progress, uri)), lines

    return one


def test_training_continues_with_a_silent_store(hub_bench, sit, silence, tmp_path):
    made, lines = sit(
        tmp_path / "run",
        hub_bench.uri("run"),
        at={1: lambda copies: silence.set(), 6: lambda copies: silence.clear()},
    )
    unsent = [line for line in lines if line.startswith("not at hub://lab/run yet: checkpoint-")]
    assert len(unsent) >= 4, "at every log line"
    assert any(line.startswith("step 6: validation WER 0.400, loss 1.000") for line in lines)
    assert lines[-1] == "kept at hub://lab/run: model"
    assert made.copies.there == ("model",)
    assert there(hub_bench) == ["model"]
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["model"]


def test_other_run_at_uri_is_refused_before_training(local_bench, sit, tmp_path):
    sit(tmp_path / "run", local_bench.uri("run"))
    with pytest.raises(LabError, match=r"holds another run: model.dropout: wanted 0.1, found 0.0\. Name another URI"):
        sit(tmp_path / "other", local_bench.uri("run"), **{"model.dropout": 0.1})
    assert not (tmp_path / "other" / "checkpoints").exists()
    _, lines = sit(tmp_path / "run", local_bench.uri("run"))
    assert lines[0].startswith("this run is finished")


def test_finished_run_pushes_model_for_an_empty_machine(hub_bench, sit, tmp_path):
    """The Hub failed until the end; the next call trains nothing and tries again, and so may the one after it."""
    hub_bench.server.fault("POST .*/commit/", "500", times=None)
    made, lines = sit(tmp_path / "run", "hub://lab/run")
    assert lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: the Hub failed (500)")
    assert (made.copies.there, made.copies.missing) == ((), ("model",))
    again, lines = sit(tmp_path / "run", "hub://lab/run")
    assert lines[0] == f"this run is finished: {made.uri}"
    assert lines[-1].startswith("NOTHING of this run is kept at hub://lab/run: the Hub failed (500)")
    hub_bench.server.faults.clear()
    again, lines = sit(tmp_path / "run", "hub://lab/run")
    assert (lines[0], lines[-1]) == (f"this run is finished: {made.uri}", "kept at hub://lab/run: model")
    assert not any(line.startswith("step ") for line in lines)
    assert there(hub_bench) == ["model"]

    before = hub_bench.uploads()
    fetched, lines = sit(tmp_path / "elsewhere", "hub://lab/run")
    assert not any(line.startswith(("starting", "resuming", "step ")) for line in lines)
    assert lines[-1] == "kept at hub://lab/run: model"
    assert hub_bench.uploads() == before
    assert contents(Path(fetched.uri)) == contents(Path(made.uri))
    assert fetched.validation == made.validation
    assert again.copies == fetched.copies
    assert manifest.problem(tmp_path / "elsewhere" / "model") is None


def test_finished_model_replaces_checkpoints_at_uri(local_bench, sit, tmp_path):
    seen = []
    sit(tmp_path / "run", local_bench.uri("run"),
        at={5: lambda copies: until(lambda: seen.extend(there(local_bench)) or 4 in seen)})  # fmt: skip
    assert local_bench.store.list_folders(local_bench.uri("run")) == [local_bench.uri("run/model")]


def test_finished_run_refuses_other_model_at_uri(local_bench, sit, tmp_path):
    sit(tmp_path / "run", local_bench.uri("run"))
    other = {"model.dropout": 0.1}
    sit(tmp_path / "other", **other)
    with pytest.raises(LabError, match=r"holds another run: model.dropout: wanted 0.1, found 0.0\. Name another URI"):
        sit(tmp_path / "other", local_bench.uri("run"), **other)


# ---- the command, killed for real

STARTER = """
import time

import hopsworks, huggingface_hub, torch
from transformers import Seq2SeqTrainer, WhisperForConditionalGeneration, WhisperProcessor

from pipelines import __main__ as cli
from pipelines.training import figures, pipeline
from pipelines.training.checkpoints import mirror

huggingface_hub.constants.HF_HUB_OFFLINE = False
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
mirror.LAST_PAUSES_S, mirror.SHARE = (0.1,), 1e3


def prepare(job):
    pass


def run(job):
    offer = mirror.CheckpointMirror.offer

    def offer_and_hold(self, newest):
        offer(self, newest)
        if mirror.step_of(newest) == job["hold_after"]:
            time.sleep(600)

    mirror.CheckpointMirror.offer = offer_and_hold
    os.environ.update(job["environment"])
    sys.argv = ["pipelines", *job["arguments"]]
    cli.main()
"""


@pytest.fixture(scope="module")
def starter():
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    process = JobStarter(STARTER, {**os.environ, **variables})
    yield process
    process.close()


@pytest.fixture
def command(starter, toy_recipe, toy_model, tmp_path):
    """`command("train", ..., kill_when=..., hold_after=4)`: the log, of a run that waits after the save at step 4."""
    settings = {**SETTINGS, "model.base": str(toy_model), "model.dropout": 0.1, "model.spec_augment": True}

    def run(name: str, *arguments: str, kill_when: Callable[[], object] | None = None, hold_after: int = 0) -> str:
        log = tmp_path / f"{time.monotonic_ns()}.log"
        given = [name, "--recipe", str(toy_recipe), *(f"--set={key}={value}" for key, value in settings.items())]
        of_stores = {key: value for key, value in os.environ.items() if key.startswith(("HF_", "LAB_", "HOPS", "HOME"))}
        job = {"arguments": [*given, *arguments], "log": str(log), "environment": of_stores, "hold_after": hold_after}
        code = starter.run(job, kill_when)
        assert code == (-signal.SIGKILL if kill_when else 0), log.read_text()
        return log.read_text()

    return run


def model_of(runs: Path) -> Path:
    (run,) = (runs / "toy").glob("train-*")
    return run / "model"


@pytest.mark.slow
def test_killed_run_resumes_from_uri_with_equal_weights(served, command, tmp_path):
    """The cache too comes from the store: the second machine has the recipe and two URIs."""
    cache, uri, model = served.uri("cache"), served.uri("run"), served.uri("model")
    here, elsewhere, whole = (tmp_path / name for name in ("here", "elsewhere", "whole"))
    command("features", f"--runs={here}", f"--publish={cache}")
    command("train", f"--runs={whole}", f"--cache={cache}")

    first = command("train", f"--runs={here}", f"--cache={cache}", f"--resume={uri}",
                    kill_when=lambda: "manifest.json" in served.files("run/checkpoint-4"), hold_after=4)  # fmt: skip
    assert "starting from" in first
    for folder in (here, tmp_path / "lab-cache"):
        shutil.rmtree(folder)

    told = command("train", f"--runs={elsewhere}", f"--cache={cache}", f"--resume={uri}", f"--publish={model}")
    assert "resuming from checkpoint-" in told
    assert "starting from" not in told
    assert told.strip().splitlines()[-1].startswith(f"kept at {uri}: ")
    weights = manifest.sha256(model_of(whole) / "model.safetensors")
    assert manifest.sha256(model_of(elsewhere) / "model.safetensors") == weights
    published = served.store.fetch(model)
    assert manifest.sha256(published / "model.safetensors") == weights
    noted = json.loads((elsewhere / "toy" / "stages.json").read_text())
    assert noted["model publication"]["model_uri"].startswith(model)


@pytest.mark.slow
def test_kill_during_copy_leaves_an_unfinished_copy(served, command, toy_cache, tmp_path):
    """SIGKILL once something of the first checkpoint has arrived, and its manifest has not."""
    uri = served.uri("run")
    served.server.fault("POST .*/(commit|upload)/", "slow", times=None)
    arguments = ("train", f"--cache={toy_cache.uri}", f"--resume={uri}")
    sent = served.uploads()
    command(*arguments, f"--runs={tmp_path / 'a'}", kill_when=lambda: served.uploads() > sent + 1, hold_after=2)
    assert "manifest.json" not in served.files("run/checkpoint-2")
    assert there(served) == []
    served.server.faults.clear()
    told = command(*arguments, f"--runs={tmp_path / 'b'}")
    assert "starting from" in told
    assert there(served) == ["model"]
    assert told.strip().splitlines()[-1].startswith(f"kept at {uri}: ")


@pytest.mark.slow
def test_failing_hub_is_the_last_line_of_the_command(hub_bench, command, toy_cache, tmp_path):
    hub_bench.server.fault("POST .*/commit/", "500", times=None)
    told = command("train", f"--runs={tmp_path}", f"--cache={toy_cache.uri}", "--resume=hub://lab/run")
    assert (
        told.strip().splitlines()[-1].startswith("NOTHING of this run is kept at hub://lab/run: the Hub failed (500)")
    )
    assert manifest.problem(model_of(tmp_path)) is None
    assert there(hub_bench) == []
