"""Write the shards of a feature cache on a Ray cluster.

The driver reads the examples, sends them with their audio bytes, and publishes the shards that come back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipelines.features import shards
from pipelines.features.clips import Clip, Rejected
from pipelines.features.shards import ShardResult, ShardTask, ShardWriter
from pipelines.features.sources import Audio, Example
from pipelines.infra.errors import LabError
from pipelines.infra.manifest import PACKAGE, code_sha256
from pipelines.infra.parallel.process_pool import ATTEMPTS
from pipelines.infra.parallel.ray_cluster import PACKAGE_NAME, connect
from pipelines.speech.audio import AudioError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

SHARDS_PER_CORE = 2
"""Shards per core in one Ray data set. Two data sets run at a time, so that no core waits for the slowest shard of the
previous one or for the source."""
_LARGE_BYTES = 64_000_000
"""Audio files of this size or more are decoded on the driver instead of being sent."""


def write_shards(
    writer: ShardWriter,
    tasks: Iterable[ShardTask],
    address: str,
    versions: Mapping[str, str],
    on_clips: Callable[[int], None],
) -> None:
    """Write every shard of `tasks` on the cluster at `address` and publish it in `writer.folder`, in any order.

    `address` is `auto` (the cluster of this machine), `host:6379`, or `local` (started on this machine and stopped at
    the end). `versions` maps packages to the version that every machine must have; `on_clips` receives the number of
    clips of each finished shard. Ray repeats the shard of a worker that died. Raises LabError for a cluster that cannot
    be used, and after ATTEMPTS workers died over one shard.
    """
    with connect(address) as ray:
        n_cores = int(ray.cluster_resources().get("CPU", 0))
        if not n_cores:
            raise LabError(
                f"the Ray cluster {address} must have CPUs, got none: start a node with --num-cpus=1 or more"
            )
        logger.info(f"Ray cluster {address}: {n_cores} core(s)")
        work = functools.partial(
            _write, ray.put(ray.cloudpickle.dumps(writer)), {**versions, PACKAGE_NAME: code_sha256()}
        )
        portable = (_with_audio(task, writer.create_clip) for task in tasks)
        collector = _Collector(writer.folder, on_clips)
        with ThreadPoolExecutor(2) as threads, collector.stopped_by_errors():
            previous: Future[None] | None = None
            while batch := list(itertools.islice(portable, SHARDS_PER_CORE * n_cores)):
                current = threads.submit(_run, ray, work, batch, collector)
                if previous:
                    previous.result()
                previous = current
            if previous:
                previous.result()
        logger.info(f"{collector.n_shards} shard(s) were made by {len(collector.machines)} machine(s)")


@dataclass
class _Collector:
    """Publishes shards as they return from the cluster, one at a time."""

    folder: Path
    on_clips: Callable[[int], None]
    n_shards: int = 0
    machines: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    @contextlib.contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        """After an error in the block, end every data set at its next result: none may outlive the connection."""
        try:
            yield
        except BaseException:
            self._stopped = True
            raise

    def publish(self, table: pyarrow.Table) -> None:
        """Publish one row of `_write`. Raises LabError for an error on the worker."""
        if self._stopped:
            raise LabError("the work was ended")
        row = {name: table[name][0] for name in table.column_names}
        if error := row["error"].as_py():
            raise LabError(error)
        number = row["number"].as_py()
        with self._lock:
            path = shards.temporary_path(self.folder, number)
            path.write_bytes(row["frames"].as_buffer())
            shards.publish(self.folder, ShardResult(number, path, row["index"].as_py(), n_reused=0))
            self.n_shards += 1
            self.machines.add(row["machine"].as_py())
            self.on_clips(row["clips"].as_py())


def _run(ray: ModuleType, work: Callable[[Any], Any], batch: list[ShardTask], collector: _Collector) -> None:
    """Run one Ray data set with one block per shard, so that each shard is scheduled separately."""
    rows = [{"task": pickle.dumps(task)} for task in batch]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        work, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=1, max_retries=ATTEMPTS - 1
    )
    try:
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            collector.publish(table)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        raise LabError(
            f"{ATTEMPTS} workers of the Ray cluster died over one of the shards {batch[0].number} to "
            f"{batch[-1].number}; most often memory is short: run again with less beside it; what is done is kept"
        ) from None


def _with_audio(task: ShardTask, create_clip: Callable[[Example], Clip]) -> ShardTask:
    """Return the task with the bytes of every audio file, so that workers need no access to the source.

    A file that cannot be sent (missing, empty or too large) is processed here: its clip, or the reason and detail of
    its rejection, takes the place of the bytes.
    """

    def load(example: Example) -> Example:
        try:
            audio: Any = _read(example.audio)
            if audio is None:
                with shards.one_thread():
                    audio = create_clip(example)
        except (Rejected, AudioError) as rejection:
            audio = (rejection.reason, rejection.detail)
        return Example(example.id, example.split, example.text, audio, example.speaker, example.meta)

    return replace(task, examples=[load(example) for example in task.examples])


def _read(audio: Audio) -> bytes | None:
    """Return the bytes of an audio file; None if it cannot be read, is empty, or is too large to send."""
    if not isinstance(audio, Path):
        return audio if isinstance(audio, bytes) else None
    try:
        return audio.read_bytes() if audio.is_file() and 0 < audio.stat().st_size < _LARGE_BYTES else None
    except (OSError, ValueError):
        return None


# ---- on the cluster's machines


def _write(pickled_writer: Any, versions: Mapping[str, str], table: pyarrow.Table) -> pyarrow.Table:
    """Map a row with a task to a row with its shard: number, clips, frames, index, machine; or with an error line."""
    import pyarrow
    import ray

    number, clips, index, error_line, frames = -1, 0, b"", "", io.BytesIO()
    machine = ray.util.get_node_ip_address()
    try:
        _check_versions(versions)
        task = pickle.loads(table["task"][0].as_buffer())
        number, clips = task.number, len(task.examples)
        index, _ = _load_writer(pickled_writer).write_frames(task, frames)
    except (ImportError, LabError) as error:
        error_line = (
            f"the Ray machine {machine} cannot make shards: {error}. Install there what is installed here: "
            "pip install -c constraints.txt -r requirements.txt"
        )
    schema = {
        "number": pyarrow.int64(),
        "clips": pyarrow.int64(),
        "frames": pyarrow.large_binary(),
        "index": pyarrow.large_binary(),
        "machine": pyarrow.string(),
        "error": pyarrow.string(),
    }
    row = (number, clips, frames.getvalue(), index, ray.get_runtime_context().get_node_id(), error_line)
    return pyarrow.table([[value] for value in row], pyarrow.schema(schema))


@functools.lru_cache(maxsize=1)
def _load_writer(pickled: Any) -> ShardWriter:
    """Unpickle the writer, which holds a tokenizer, once per process."""
    import ray

    writer = pickle.loads(ray.get(pickled))
    return replace(writer, create_clip=functools.partial(_create_clip, writer.create_clip))


def _create_clip(create_clip: Callable[[Example], Clip], example: Example) -> Clip:
    """Call `create_clip` unless `_with_audio` has already processed the example."""
    if isinstance(example.audio, tuple):
        raise Rejected(*example.audio)
    return example.audio if isinstance(example.audio, Clip) else create_clip(example)


def _check_versions(versions: Mapping[str, str]) -> None:
    for name, expected in versions.items():
        installed = code_sha256() if name == PACKAGE_NAME else importlib.metadata.version(name)
        if installed != expected:
            raise LabError(f"it has {name} {installed} ({PACKAGE.parent}), and this cache is made with {expected}")
