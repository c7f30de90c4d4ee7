"""A cache made by a Ray cluster of two nodes on this machine: the same files as without one, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines import __main__ as cli
from pipelines import cache as caches
from pipelines import lab
from pipelines.cache import FeatureCache
from pipelines.curation import Clip, Rejected
from pipelines.errors import LabError
from pipelines.features import LogMel
from pipelines.sources import Example

pytestmark = pytest.mark.slow
IDENTITY = {"features.dtype": "float32", "features.n_mels": 8}


@pytest.fixture(scope="module")
def address():
    """Two nodes of one core each, which listen on the loopback alone."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as there: 127.0.0.1 stays 127.0.0.1
    }
    os.environ.update(settings)
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    temp = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1"}
    sys.modules["ray"].cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = cluster_utils.Cluster()
    try:
        cluster.add_node(**node, temp_dir=temp, include_dashboard=False, no_monitor=True, include_log_monitor=False)
        cluster.add_node(**node, include_log_monitor=False)
        yield cluster.address
    finally:
        cluster.shutdown()
        shutil.rmtree(temp, ignore_errors=True)
        for name in settings:
            os.environ.pop(name)


@pytest.fixture
def recordings(tmp_path, encoded, speech) -> Path:
    """A folder of 12 recordings, of which three cannot be used, each for another reason."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    lines = ["path,text,split"]
    for i in range(12):
        (folder / f"{i}.wav").write_bytes(encoded(speech(6_000 + 900 * i, seed=i)))
        lines.append(f"{i}.wav,mening {i},{'train' if i < 8 else 'validation' if i < 10 else 'test'}")
    (folder / "3.wav").write_bytes(b"")
    (folder / "4.wav").write_bytes(b"no sound")
    (folder / "9.wav").unlink()
    (folder / "transcripts.csv").write_text("\n".join(lines))
    return folder


def files(cache: FeatureCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


def test_a_cluster_makes_the_same_cache(address, recordings, toy_settings, tmp_path):
    settings = toy_settings(
        {"source.kind": "folder", "source.path": str(recordings), "features.shard_clips": 2, "curation.leaks": "ignore"}
    )
    here = lab.features(settings, runs=tmp_path / "here", log=lambda line: None)
    there = lab.features(settings, runs=tmp_path / "there", ray_address=address, log=lambda line: None)
    assert set(there.rejected["reason"]) == {"empty", "unreadable", "missing"}
    assert len(list(there.folder.glob("shard-*.bin"))) == 6
    assert there.digest == here.digest
    assert files(there) == files(here)


def admitting(asked: Path, before: Callable[[Example], None] = lambda example: None):
    """A small gate that notes in the file `asked` whom it is asked for, and where."""

    def admit(example: Example) -> Clip:
        with open(asked, "a") as file:
            file.write(f"{example.id} {os.getpid()}\n")
        before(example)
        if example.id == "7":
            raise Rejected("silent", "nothing to hear")
        frames = np.random.default_rng(int(example.id)).random((int(example.id) + 2, 8), np.float32)
        return Clip(example, example.text, [1, 2], LogMel(frames, -1.0), len(frames) / 100)

    return admit


def build(folder: Path, admit: Callable[[Example], Clip], **more) -> FeatureCache:
    examples = [Example(str(i), "train", f"mening {i}", b"sound") for i in range(16)]
    given = {"identity": IDENTITY, "shard_clips": 2, "log": lambda line: None, **more}
    return caches.build(folder, examples, admit, **given)


def waiting_for(happens: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happens() and time.monotonic() < until:
        time.sleep(0.02)


def test_a_worker_that_is_killed_costs_its_shard_only(address, tmp_path):
    there, asked, done_before = tmp_path / "there", tmp_path / "asked", tmp_path / "done before"

    def trouble(example: Example) -> None:
        if example.id in ("0", "2"):  # neither node makes all the shards
            waiting_for(lambda: len({line.split()[1] for line in asked.read_text().splitlines()}) > 1)
        if example.id == "11" and not done_before.exists():
            waiting_for(lambda: len(list(there.glob("shard-*.parquet"))) >= 2)
            done_before.write_text(" ".join(path.stem for path in there.glob("shard-*.parquet")))
            os.kill(os.getpid(), signal.SIGKILL)

    told, lines = [], []
    cache = build(there, admitting(asked, trouble), ray_address=address, on_clips=told.append, log=lines.append)
    assert len(done_before.read_text().split()) >= 2
    ids = Counter(line.split()[0] for line in asked.read_text().splitlines())
    assert {name: times for name, times in ids.items() if times > 1} == {"10": 2, "11": 2}
    assert sum(told) == 16
    assert "8 shard(s) were made by 2 machine(s)" in lines
    assert files(cache) == files(build(tmp_path / "here", admitting(tmp_path / "asked here")))


def test_finished_shards_are_not_made_again_and_a_shard_that_kills_all_is_given_up(address, tmp_path):
    def stop(example: Example) -> None:
        if example.id == "12":
            raise KeyboardInterrupt

    def poison(example: Example) -> None:
        if example.id == "12":
            os.kill(os.getpid(), signal.SIGKILL)

    asked = tmp_path / "asked"
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", admitting(tmp_path / "asked here", stop))
    with pytest.raises(LabError, match=r"3 workers .* died over one of the shards 6 to 7; .* what is done is kept"):
        build(tmp_path / "c", admitting(asked, poison), ray_address=address)
    ids = Counter(line.split()[0] for line in asked.read_text().splitlines())
    assert ids["12"] == 3
    assert not ids.keys() & {str(i) for i in range(12)}


def test_a_machine_with_other_packages_is_refused(address, tmp_path):
    identity = IDENTITY | {"library.soxr": "0.0"}
    with pytest.raises(LabError, match=r"it has soxr .* made with 0.0\. .*pip install -c constraints.txt") as error:
        build(tmp_path / "c", admitting(tmp_path / "asked"), identity=identity, ray_address=address)
    assert "\n" not in str(error.value)
    assert not caches.is_finished(tmp_path / "c")


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_an_address_that_is_silent_is_one_line(tmp_path):
    pytest.importorskip("ray.data")
    there = f"127.0.0.1:{closed_port()}"
    with pytest.raises(LabError, match=f"no Ray cluster answers at {there} .*: start one there with ray start --head"):
        build(tmp_path / "c", admitting(tmp_path / "asked"), ray_address=there)


@pytest.mark.parametrize("wrong", ["head", "head:", "head:many", "ray://head:10001"])
def test_an_address_that_is_none_is_one_line(tmp_path, wrong):
    pytest.importorskip("ray.data")
    with pytest.raises(LabError, match="address is host:port, auto or local, got .*: run this on one of the"):
        build(tmp_path / "c", admitting(tmp_path / "asked"), ray_address=wrong)


def test_without_ray_the_command_says_how_to_get_it(monkeypatch, toy_recipe, toy_model, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = ["--recipe", str(toy_recipe), "--set", f"model.base={toy_model}", "--runs", str(tmp_path)]
    with pytest.raises(LabError, match=r"not installed\. Run: pip install 'ray\[data\]"):
        cli.app(["features", *told, "--cluster", "auto"], standalone_mode=False)
