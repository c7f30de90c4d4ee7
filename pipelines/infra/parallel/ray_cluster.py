"""Connect to a Ray cluster, whose machines receive a copy of this package.

Everything else travels through Ray too, so the machines need no shared disk for features and hold none of your tokens.
Each needs Ray and requirements.txt in the versions of this machine.
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
from pipelines.infra.manifest import PACKAGE

CONNECT_TIMEOUT_S = 5.0
"""Longest wait for a connection; Ray itself waits for minutes."""
PACKAGE_NAME = PACKAGE.name
_ADDRESS = re.compile(r"\[?(?P<host>[\w.:-]+?)\]?:(?P<port>\d+)", re.ASCII)


def require_visible(folders: Iterable[Path]) -> None:
    """Raise LabError if a folder does not exist on this machine of the cluster."""
    import ray

    for folder in folders:
        if not folder.exists():
            raise LabError(
                f"the Ray machine {ray.util.get_node_ip_address()} does not see {folder}: keep runs (--runs) and "
                "weights (LAB_CACHE) on a disk that all machines share"
            )


@contextlib.contextmanager
def connect(address: str) -> Iterator[ModuleType]:
    """Connect to the cluster at `address`, yield the module `ray` with `ray.data` imported, and disconnect."""
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # otherwise Ray Data may start another cluster
    try:
        import ray
        import ray.data
    except ImportError:
        raise missing_package("ray", "ray[data]>=2.60,<2.64", "a Ray cluster (--cluster)") from None
    _require_reachable(address)
    started_here = {"include_dashboard": False} if address == "local" else {}
    try:
        with _package_copy() as folder:
            ray.init(
                address,
                runtime_env={"working_dir": folder},
                log_to_driver=False,
                logging_level=logging.WARNING,
                **started_here,
            )
    except Exception as error:  # Ray has a class for each cause, and plain Exception for a busy machine
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise LabError(
            f"the Ray cluster {address} cannot be joined: {cause}. Start one with ray start --head, or try again"
        ) from None
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False  # the stage shows one
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what it raises
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ray_remote_args")  # until 2.64; the only way to set max_retries
            yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _package_copy() -> Iterator[str]:
    """Yield a temporary folder with a copy of this package, which Ray sends to every machine and imports first."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / PACKAGE_NAME, ignore=shutil.ignore_patterns("__pycache__"))
        yield folder


def _require_reachable(address: str) -> None:
    """Raise LabError for an invalid address, or a host and port without a listening server."""
    if address in ("auto", "local"):
        return
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise LabError(
            f"a Ray cluster's address is host:port, auto or local, got {address!r} (Ray Data does not support ray://): "
            "run this on one of the cluster's machines, with auto"
        )
    try:
        socket.create_connection((match["host"], int(match["port"])), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or error
        raise LabError(
            f"no Ray cluster answers at {address} ({cause}): start one there with ray start --head"
        ) from None
