"""Caches built by a local Ray cluster of two nodes: the same files as without it, even if workers die."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from log_recorder import record_log

from pipelines.__main__ import app
from pipelines.features import cache as caches
from pipelines.features import pipeline as feature_pipeline
from pipelines.features import ray_shards
from pipelines.features.build import BuildOptions, build
from pipelines.features.cache import FeatureCache
from pipelines.features.clips import Clip
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.whisper.log_mel import LogMel

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def address(ray_address):
    """Address of the cluster; the definitions of this file are pickled by value."""
    sys.modules["ray"].cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray_address
    sys.modules["ray"].cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def recordings(tmp_path, encoded, speech) -> Path:
    """A folder of 12 recordings, of which three cannot be used, each for a different reason."""
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


def filter_with(before_clip: Callable[[Example], None]) -> type[ClipFilter]:
    """Return a ClipFilter class, pickled by value, that calls `before_clip` before every clip."""

    class HookedFilter(ClipFilter):
        def create_clip(self, example: Example, find_features=None) -> Clip:
            before_clip(example)
            return ClipFilter.create_clip(self, example, find_features)

    return HookedFilter


def waiting_for(happens: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not happens() and time.monotonic() < until:
        time.sleep(0.02)


def test_cluster_builds_same_cache_despite_killed_worker(address, recordings, toy_settings, tmp_path, monkeypatch):
    features = {"features.shard_clips": 2, "features.workers": 1, "features.max_rejected_share": 0.5}
    features |= {"curation.leaks": "ignore"}
    settings = toy_settings({"source.kind": "folder", "source.path": str(recordings), **features})
    calls, killed, driver = tmp_path / "asked", tmp_path / "killed", os.getpid()

    def stop(example: Example) -> None:
        if example.id == "2":
            raise KeyboardInterrupt

    def kill_once(example: Example) -> None:
        with open(calls, "a") as file:
            file.write(f"{example.id} {os.getpid()}\n")
        assert isinstance(example.audio, bytes) or os.getpid() == driver, "a path leads nowhere on another machine"
        if example.id in ("2", "4"):  # neither node makes all the shards
            waiting_for(lambda: len({pid for _, pid in lines_of(calls) if pid != str(driver)}) > 1)
        if example.id == "7" and not killed.exists():
            waiting_for(lambda: len(list(tmp_path.glob("there/features/*/shard-*.parquet"))) > 1)
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    here = feature_pipeline.run(settings, runs=tmp_path / "here")
    monkeypatch.setattr(feature_pipeline, "ClipFilter", filter_with(stop))
    with pytest.raises(KeyboardInterrupt):
        feature_pipeline.run(settings, runs=tmp_path / "there")
    monkeypatch.setattr(feature_pipeline, "ClipFilter", filter_with(kill_once))
    lines = record_log()
    there = feature_pipeline.run(settings, runs=tmp_path / "there", ray_address=address)
    assert killed.exists()
    times = Counter(name for name, _ in lines_of(calls))
    assert times == {**{str(i): 1 for i in range(2, 12)}, "6": 2, "7": 2}
    assert "5 shard(s) were made by 2 machine(s)" in lines
    assert set(there.rejected["reason"]) == {"empty", "unreadable", "missing"}
    assert there.digest == here.digest
    assert len(files(there)) == 6 * 2 + 4
    assert files(there) == files(here)


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def create_clip(example: Example) -> Clip:
    return Clip(example, example.text, [1, 2], LogMel(np.zeros((3, 8), np.float32), -1.0), 0.03)


def kill_process(example: Example) -> Clip:
    os.kill(os.getpid(), signal.SIGKILL)


def build_cache(folder: Path, address: str, create_clip=create_clip, **identity) -> FeatureCache:
    identity = {"features.dtype": "float32", "features.n_mels": 8, **identity}
    examples = [Example("0", "train", "mening", b"sound")]
    return build(folder, examples, create_clip, identity, BuildOptions(ray_address=address))


def test_shard_that_kills_workers_raises(address, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_shards, "ATTEMPTS", 1)
    with pytest.raises(LabError, match=r"1 workers .* died over one of the shards 0 to 0; .* what is done is kept"):
        build_cache(tmp_path / "c", address, kill_process)


def test_machine_with_other_packages_raises(address, tmp_path):
    with pytest.raises(LabError, match=r"it has soxr .* made with 0\.0\. .*pip install -c constraints.txt") as error:
        build_cache(tmp_path / "c", address, **{"library.soxr": "0.0"})
    assert "\n" not in str(error.value)
    assert not caches.is_finished(tmp_path / "c")


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_silent_address_is_a_one_line_error(tmp_path):
    pytest.importorskip("ray.data")
    there = f"127.0.0.1:{closed_port()}"
    with pytest.raises(LabError, match=f"no Ray cluster answers at {there} .*: start one there with ray start --head"):
        build_cache(tmp_path / "c", there)


@pytest.mark.parametrize("wrong", ["head", "head:", "head:many", "ray://head:10001"])
def test_invalid_address_is_a_one_line_error(tmp_path, wrong):
    pytest.importorskip("ray.data")
    with pytest.raises(LabError, match="address is host:port, auto or local, got .*: run this on one of the"):
        build_cache(tmp_path / "c", wrong)


def test_missing_ray_error_names_the_install(monkeypatch, toy_recipe, toy_model, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    lines = ["--recipe", str(toy_recipe), "--set", f"model.base={toy_model}", "--runs", str(tmp_path)]
    with pytest.raises(LabError, match=r"not installed\. Run: pip install 'ray\[data\]"):
        app(["features", *lines, "--cluster", "auto"], standalone_mode=False)
