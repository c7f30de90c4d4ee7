"""Shards made by the machines of a Ray cluster: Ray Data takes clips there and brings finished shards back.

The machine that runs the stage reads the source and writes the cache, with the code and in the bytes of a build without
a cluster (shards.py). Everything between travels through Ray: this package, the encoded clips, the frames of a shard
that is done. So the machines share no disk and hold no token of yours. Each needs Ray and requirements.txt in the
versions of this machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import logging
import os
import pickle
import re
import shutil
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipelines import manifest, shards
from pipelines.curation import Clip, Rejected
from pipelines.errors import LabError, missing_package
from pipelines.shards import Made, Maker, Task
from pipelines.sources import Example
from pipelines.workers import ATTEMPTS

if TYPE_CHECKING:
    import pyarrow

WINDOW = 2
"""Shards for each core in one Ray data set. Two of these are under way at a time, so that no core waits for the slowest
shard of the one before, nor for the source."""
CONNECT_S = 5.0
"""Silence after which nothing is at an address: Ray itself waits for minutes."""

_LARGE_BYTES = 64_000_000
"""Files from here on do not travel."""
_PACKAGE = Path(__file__).parent
_OWN = _PACKAGE.name
_ADDRESS = re.compile(r"\[?(?P<host>[\w.:-]+?)\]?:(?P<port>\d+)", re.ASCII)


def make_shards(
    make: Maker,
    tasks: Iterable[Task],
    address: str,
    versions: Mapping[str, str],
    on_clips: Callable[[int], None],
    log: Callable[[str], None],
) -> None:
    """Every shard of `tasks`, made by the cluster at `address` and published in `make.folder`, in any order.

    `address` is `auto` (the cluster that this machine is part of), `host:6379` (which of several), or `local` (one of
    this machine alone, started here and ended). `versions` names packages that every machine must have in just these
    versions; `on_clips` is told of clips as they are done. A worker that dies costs the shard that it was
    making: another makes it again. Raises LabError for a cluster that cannot be used, and where ATTEMPTS workers died
    over one shard.
    """
    with joined(address) as ray:
        n_cores = int(ray.cluster_resources().get("CPU", 0))
        if not n_cores:
            raise LabError(
                f"the Ray cluster {address} must have CPUs, got none: start a node with --num-cpus=1 or more"
            )
        log(f"Ray cluster {address}: {n_cores} core(s)")
        work = functools.partial(_make, ray.put(ray.cloudpickle.dumps(make)), {**versions, _OWN: code_sha256()})
        carried = (_carried(task, make.admit) for task in tasks)
        arrivals = _Arrivals(make.folder, on_clips)
        with ThreadPoolExecutor(2) as threads, arrivals.ended_by_an_error():
            before: Future[None] | None = None
            while window := list(itertools.islice(carried, WINDOW * n_cores)):
                under_way = threads.submit(_run, ray, work, window, arrivals)
                if before:
                    before.result()
                before = under_way
            if before:
                before.result()
        log(f"{arrivals.shards} shard(s) were made by {len(arrivals.machines)} machine(s)")


@dataclass
class _Arrivals:
    """Shards as they come back, published one at a time."""

    folder: Path
    on_clips: Callable[[int], None]
    shards: int = 0
    machines: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: bool = False

    @contextlib.contextmanager
    def ended_by_an_error(self) -> Iterator[None]:
        """An error within ends every data set at its next arrival: none may outlive the connection."""
        try:
            yield
        except BaseException:
            self._ended = True
            raise

    def take(self, table: pyarrow.Table) -> None:
        """What `_make` made."""
        if self._ended:
            raise LabError("the work was ended")
        row = {name: table[name][0] for name in table.column_names}
        if refusal := row["refusal"].as_py():
            raise LabError(refusal)
        number = row["number"].as_py()
        with self._lock:
            aside = self.folder / f".{shards.bin_name(number)}.{os.getpid()}.partial"
            aside.write_bytes(row["frames"].as_buffer())
            shards.publish(self.folder, Made(number, aside, row["index"].as_py(), reused=0))
            self.shards += 1
            self.machines.add(row["machine"].as_py())
            self.on_clips(row["clips"].as_py())


def _run(ray: ModuleType, work: Callable[[Any], Any], window: list[Task], arrivals: _Arrivals) -> None:
    """One Ray data set: a block for each shard, so that each is a piece of work of its own."""
    rows = [{"task": pickle.dumps(task)} for task in window]
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        work, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=1, max_retries=ATTEMPTS - 1
    )
    try:
        for table in made.iter_batches(batch_size=None, batch_format="pyarrow"):
            arrivals.take(table)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        raise LabError(
            f"{ATTEMPTS} workers of the Ray cluster died over one of the shards {window[0].number} to "
            f"{window[-1].number}; most often memory is short: run again with less beside it; what is done is kept"
        ) from None


def _carried(task: Task, admit: Callable[[Example], Clip]) -> Task:
    """The task with all that its shard is made of: the bytes of every audio file.

    A file that cannot be taken along (it is not there, or too large for memory) is judged here, and what comes of it
    travels in the place of its bytes: a clip, or the reason and detail of a rejection.
    """

    def carry(example: Example) -> Example:
        sound: Any = _read(example.audio)
        if sound is None:
            try:
                with shards.one_thread():
                    sound = admit(example)
            except Rejected as rejection:
                sound = (rejection.reason, rejection.detail)
        return replace(example, audio=sound)

    return replace(task, block=[carry(example) for example in task.block])


def _read(sound: bytes | Path) -> bytes | None:
    """What is to travel; None for what cannot be read, holds nothing, or is too large to be taken into memory."""
    if isinstance(sound, bytes):
        return sound
    try:
        return sound.read_bytes() if sound.is_file() and 0 < sound.stat().st_size < _LARGE_BYTES else None
    except (OSError, ValueError):
        return None


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


# ---- on the cluster's machines


def _make(pickled_maker: Any, versions: Mapping[str, str], table: pyarrow.Table) -> pyarrow.Table:
    """A row with a task to a row with its shard: number, clips, frames, index, machine; or with a refusal, one line."""
    import pyarrow
    import ray

    number, clips, index, refusal, frames = -1, 0, b"", "", io.BytesIO()
    machine = ray.util.get_node_ip_address()
    try:
        _refuse_other_versions(versions)
        task = pickle.loads(table["task"][0].as_buffer())
        number, clips = task.number, len(task.block)
        index, _ = _maker(pickled_maker).write(task, frames)
    except (ImportError, LabError) as error:
        refusal = (
            f"the Ray machine {machine} cannot make shards: {error}. Install there what is installed here: "
            "pip install -c constraints.txt -r requirements.txt"
        )
    schema = {
        "number": pyarrow.int64(),
        "clips": pyarrow.int64(),
        "frames": pyarrow.large_binary(),
        "index": pyarrow.large_binary(),
        "machine": pyarrow.string(),
        "refusal": pyarrow.string(),
    }
    row = (number, clips, frames.getvalue(), index, ray.get_runtime_context().get_node_id(), refusal)
    return pyarrow.table([[value] for value in row], pyarrow.schema(schema))


@functools.lru_cache(maxsize=1)
def _maker(pickled: Any) -> Maker:
    """The maker, unpickled once in a process: it holds a tokenizer."""
    import ray

    make = pickle.loads(ray.get(pickled))
    return replace(make, admit=functools.partial(_admit, make.admit))


def _admit(admit: Callable[[Example], Clip], example: Example) -> Clip:
    """`admit`, for an example as `_carried` leaves it."""
    if isinstance(example.audio, tuple):
        raise Rejected(*example.audio)
    return example.audio if isinstance(example.audio, Clip) else admit(example)


def _refuse_other_versions(versions: Mapping[str, str]) -> None:
    for name, wanted in versions.items():
        found = code_sha256() if name == _OWN else importlib.metadata.version(name)
        if found != wanted:
            raise LabError(f"it has {name} {found} ({_PACKAGE.parent}), and this cache is made with {wanted}")


@functools.cache
def code_sha256() -> str:
    """Of this package: every module's name and content."""
    code = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(_PACKAGE).as_posix()} {manifest.sha256(path)}\n".encode())
    return code.hexdigest()[:12]
