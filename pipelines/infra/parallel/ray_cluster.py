"""Shards made by the machines of a Ray cluster: Ray Data takes clips there and brings finished shards back.

The machine that runs the stage reads the source and writes the cache, with the code and in the bytes of a build without
a cluster (shards.py). Everything between travels through Ray: this package, the encoded clips, the frames of a shard
that is done. So the machines share no disk and hold no token of yours. Each needs Ray and requirements.txt in the
versions of this machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.manifest import _PACKAGE

CONNECT_S = 5.0
"""Silence after which nothing is at an address: Ray itself waits for minutes."""
_OWN = _PACKAGE.name
_ADDRESS = re.compile(r"\[?(?P<host>[\w.:-]+?)\]?:(?P<port>\d+)", re.ASCII)


def refuse_unseen(places: Iterable[Path]) -> None:
    """On a machine of the cluster: LabError where it does not see one of these folders."""
    import ray

    for place in places:
        if not place.exists():
            raise LabError(
                f"the Ray machine {ray.util.get_node_ip_address()} does not see {place}: keep runs (--runs) and "
                "weights (LAB_CACHE) on a disk that all machines share"
            )


@contextlib.contextmanager
def joined(address: str) -> Iterator[ModuleType]:
    """Ray, connected to the cluster at `address`, with `ray.data` imported; left when the context ends."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or Ray Data, asked late, starts a cluster of its own
    try:
        import ray
        import ray.data
    except ImportError:
        raise missing_package("ray", "ray[data]>=2.60,<2.64", "a Ray cluster (--cluster)") from None
    _refuse_silent(address)
    started_here = {"include_dashboard": False} if address == "local" else {}
    try:
        with _own_code() as folder:
            ray.init(
                address,
                runtime_env={"working_dir": folder},
                log_to_driver=False,
                logging_level=logging.WARNING,
                **started_here,
            )
    except Exception as error:  # Ray has a kind for each cause, and a bare one for a machine that is too busy
        told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise LabError(
            f"the Ray cluster {address} cannot be joined: {told}. Start one with ray start --head, or try again"
        ) from None
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False  # the stage shows its own
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what it raises
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ray_remote_args")  # goes in 2.64; nothing else sets max_retries yet
            yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_code() -> Iterator[str]:
    """A folder with a copy of this package alone: Ray sends it to every machine, where it goes before other copies."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(_PACKAGE, Path(folder) / _OWN, ignore=shutil.ignore_patterns("__pycache__"))
        yield folder


def _refuse_silent(address: str) -> None:
    """LabError for a host and port at which nobody listens."""
    if address in ("auto", "local"):
        return
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise LabError(
            f"a Ray cluster's address is host:port, auto or local, got {address!r} (Ray Data does not speak ray://): "
            "run this on one of the cluster's machines, with auto"
        )
    try:
        socket.create_connection((found["host"], int(found["port"])), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or error
        raise LabError(f"no Ray cluster answers at {address} ({told}): start one there with ray start --head") from None
