"""TODO: describe this module."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import itertools
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipelines.features import shards as features_shards
from pipelines.features.clips import Clip, Rejected
from pipelines.features.shards import Made, Maker, Task
from pipelines.features.sources import Example
from pipelines.infra.errors import LabError
from pipelines.infra.manifest import _PACKAGE, code_sha256
from pipelines.infra.parallel.process_pool import ATTEMPTS
from pipelines.infra.parallel.ray_cluster import _OWN, joined

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)


WINDOW = 2
"""Shards for each core in one Ray data set. Two of these are under way at a time, so that no core waits for the slowest
shard of the one before, nor for the source."""

_LARGE_BYTES = 64_000_000
"""Files from here on do not travel."""


def make_shards(
    make: Maker, tasks: Iterable[Task], address: str, versions: Mapping[str, str], on_clips: Callable[[int], None]
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
        logger.info(f"Ray cluster {address}: {n_cores} core(s)")
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
        logger.info(f"{arrivals.shards} shard(s) were made by {len(arrivals.machines)} machine(s)")


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
            aside = self.folder / f".{features_shards.bin_name(number)}.{os.getpid()}.partial"
            aside.write_bytes(row["frames"].as_buffer())
            features_shards.publish(self.folder, Made(number, aside, row["index"].as_py(), reused=0))
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
                with features_shards.one_thread():
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
