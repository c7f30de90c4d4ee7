"""Fixtures of several test files, and the two tiers: tests without the mark `slow` run offline and in this process."""

from __future__ import annotations

import gc
import io
import logging
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from lab_copy import lab_copy  # noqa: F401  a fixture
from log_recorder import record_log, stop_recording
from servers.stores import (  # noqa: F401  fixtures
    certificate,
    cluster,
    drive_bench,
    hopsworks_bench,
    hub_bench,
    hub_server,
    local_bench,
    no_waiting,
)

from pipelines.infra import environment

environment.share_cores()  # before torch is imported; the processes that tests start inherit it

SLOW_MARKS = ("browser", "ray")
SLOW_FIXTURES = ("lab_copy", "ray_address", "tiny_folder")
"""Fixtures that start many processes, or need files that are fetched over the network."""
OFFLINE = {"now": False}
"""Whether connections to other machines are refused: True while a fast test runs."""


def pytest_configure(config):
    _refuse_connections_while_offline()


def pytest_collection_modifyitems(items):
    """Mark each test as slow that has one of SLOW_MARKS or uses one of SLOW_FIXTURES."""
    for item in items:
        if any(map(item.get_closest_marker, SLOW_MARKS)) or set(SLOW_FIXTURES) & set(item.fixturenames):
            item.add_marker("slow")


def pytest_collection_finish(session):
    """Exclude the imported modules from garbage collection: the Trainer collects after each run."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Refuse connections to other machines in fast tests."""
    OFFLINE["now"] = item.get_closest_marker("slow") is None
    try:
        return (yield)
    finally:
        OFFLINE["now"] = False


def _refuse_connections_while_offline() -> None:
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: object) -> None:
        if OFFLINE["now"] and not re.fullmatch(r"127\..*|::1|localhost|0\.0\.0\.0|::|None|", str(host)):
            raise socket.gaierror(f"fast tests run offline, but this one connects to {host}: mark it as slow")

    def checked_connect(self, address, connect=connect):
        if isinstance(address, tuple):
            check(address[0])
        return connect(self, address)

    def checked_getaddrinfo(host, *args, **options):
        check(host.decode() if isinstance(host, bytes) else host)
        return getaddrinfo(host, *args, **options)

    socket.socket.connect = checked_connect
    socket.socket.connect_ex = lambda self, address: checked_connect(self, address, connect_ex)
    socket.getaddrinfo = checked_getaddrinfo


@pytest.fixture(scope="session")
def encoded():
    """`encoded(samples, rate_hz, format="WAV", subtype=None)`: the bytes of an audio file."""
    import soundfile

    def encode(samples, rate_hz: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples, rate_hz, format=format, subtype=subtype)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def speech():
    """`speech(n_samples, seed=0, peak=0.5)`: float32, 16 kHz: gliding harmonics in syllables, over a little noise."""

    def make(n_samples: int, seed: int = 0, peak: float = 0.5) -> np.ndarray:
        rng = np.random.default_rng(seed)
        t = np.arange(n_samples) / 16_000
        phase = 2 * np.pi * np.cumsum(130 + 40 * np.sin(2 * np.pi * 0.7 * t + rng.uniform(0, 6))) / 16_000
        voice = sum(np.sin(k * phase) / k for k in range(1, 20))
        sound = voice * (0.05 + np.sin(2 * np.pi * 2 * t) ** 2) + 0.01 * rng.standard_normal(n_samples)
        return (peak * sound / np.abs(sound).max()).astype(np.float32)

    return make


@pytest.fixture(autouse=True)
def console_as_before():
    """Remove the handlers that a test, or a command that it ran, added to the lab's logger."""
    logger = logging.getLogger("pipelines")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    stop_recording()
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="module")
def one_thread():
    """Run torch on one thread: small models are faster without threads that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_folder():
    """Folder of openai/whisper-tiny with its real weights: from this machine, the Hub or the registry mirror."""
    from pipelines.whisper import model as whisper_model

    return whisper_model.resolve("openai/whisper-tiny").folder


@pytest.fixture(scope="session")
def toy_of_width(tmp_path_factory):
    """`toy_of_width(32)`: the folder of a Whisper with random weights, two layers and 32 channels (toy_whisper.py)."""
    import toy_whisper

    return lambda width: toy_whisper.write(tmp_path_factory.mktemp("toy") / "toy-whisper", width)


@pytest.fixture(scope="session")
def toy_model(toy_of_width) -> Path:
    """A random Whisper whose transcripts depend on the audio and which trains in seconds."""
    return toy_of_width(32)


@pytest.fixture(scope="session")
def toy_recipe() -> Path:
    """Path of a recipe that runs in seconds once `model.base` is set to `toy_model`."""
    return Path(__file__).with_name("toy.toml")


@pytest.fixture(scope="session")
def toy_settings(toy_recipe, toy_model):
    """`toy_settings({"training.steps": 4})`: the toy recipe on the toy model, with overrides."""
    from pipelines import recipes

    def make(overrides: dict | None = None):
        return recipes.load(toy_recipe, {"model.base": str(toy_model), **(overrides or {})})

    return make


@pytest.fixture(scope="session")
def toy_cache(toy_settings, tmp_path_factory):
    """Feature cache of the toy recipe."""
    from pipelines.features import pipeline as feature_pipeline

    return feature_pipeline.run(toy_settings(), runs=tmp_path_factory.mktemp("toy-cache"))


@pytest.fixture(scope="session")
def train_toy(toy_settings, toy_cache, toy_model):
    """`train_toy(run, {"training.steps": 4}, on_step=...)`: train the toy model in the folder `run`; return the trained
    model or the LabError, and the messages logged."""
    from pipelines.infra.errors import LabError
    from pipelines.training import loop as training_loop
    from pipelines.training.callbacks.progress import Progress
    from pipelines.training.run import TrainingRun
    from pipelines.whisper import model as whisper_model

    def train(run: Path, overrides: dict | None = None, **callbacks):
        lines = record_log()
        recipe = toy_settings({"evaluation.max_new_tokens": 3, **(overrides or {})})
        base, progress = whisper_model.resolve(str(toy_model)), Progress(**callbacks)
        try:
            return training_loop.train(TrainingRun(recipe, toy_cache, base, run, progress)), lines
        except LabError as error:
            return error, lines

    return train


RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux 0, too: it keeps 127.0.0.1 as the address
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240",
    "GLOO_SOCKET_IFNAME": "lo",
}


@pytest.fixture(scope="session")
def ray_address():
    """Address of a Ray cluster of two nodes with one core each, on the loopback only.

    All tests of a process share it: it starts in 15 s.
    """
    temp = tempfile.mkdtemp(prefix="ray-")  # a short path: it holds sockets
    os.makedirs(f"{temp}/ray")  # a node writes the cluster's address here and does not create the folder
    variables = RAY | {"RAY_TMPDIR": temp}
    os.environ.update(variables)
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    pytest.importorskip("ray.train")
    nodes = cluster_utils.Cluster()
    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1"}
    node["include_log_monitor"] = False  # each process costs seconds
    head = {"temp_dir": temp, "include_dashboard": False, "no_monitor": True}
    head["_system_config"] = {"prestart_worker_first_driver": False}
    try:
        _add_node(nodes, **node, **head)
        _add_node(nodes, **node)
        yield nodes.address
    finally:
        nodes.shutdown()
        shutil.rmtree(temp, ignore_errors=True)
        for name in variables:
            os.environ.pop(name, None)


def _add_node(nodes, **options) -> None:
    """Add a node; try three times, because Ray's fixed limit of 30 s is short on a busy machine."""
    from pipelines.infra.parallel import process_pool

    for left in (2, 1, 0):
        try:
            return nodes.add_node(**options)
        except Exception as error:
            if "timed out" not in str(error):
                raise
            if not left and os.getloadavg()[0] > 2 * process_pool.cores():
                pytest.skip(f"Ray's node did not start three times: the load here is {os.getloadavg()[0]:.0f}")
            if not left:
                raise
