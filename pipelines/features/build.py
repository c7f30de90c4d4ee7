"""Build a feature cache: examples in blocks, one shard per block, the manifest last.

A build that was interrupted is resumed: finished shards stay, and the bytes are those of an uninterrupted build.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from pipelines.features import cache as caches
from pipelines.features import ray_shards, shards
from pipelines.features.cache import FeatureCache, is_finished
from pipelines.features.clips import Clip
from pipelines.features.curation.selection import Selection
from pipelines.features.shards import ShardResult, ShardTask, ShardWriter
from pipelines.features.sources import Example
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.infra.tables.formulas import encode_cell
from pipelines.recipes import differences, digest

logger = logging.getLogger(__name__)

LARGE_CLIPS = 2_048
"""With `workers=0`, so many clips are processed in this process first: workers take seconds to start."""
_BLOCK_BYTES = 64_000_000
"""A block ends early at this size of encoded audio: blocks wait in memory."""
_CACHE_FILES = re.compile(
    r"(shard-\d{5,}\.(bin|json|parquet)|build\.json|(rejected|repaired)\.csv|manifest\.json|README\.md)|\..+\.partial|\.DS_Store"
)
"""Files that a build may remove from its folder."""
_FREE_FIELDS = ("source.", "settings.source.", "language", "features.vocabulary")
"""Identity fields that do not affect the frames of a clip."""

Curate = Callable[[FeatureCache, list[dict[str, str]]], Selection]
"""Given the complete cache before it is sealed and the rejected clips: what else is dropped or repaired."""


@dataclass(frozen=True)
class BuildOptions:
    """How the work is divided. Only `shard_clips` affects the files; the rows and frames are always the same."""

    shard_clips: int = 256
    """Examples per shard."""
    workers: int = 1
    """Processes that write shards; 1: this process; 0: every core after LARGE_CLIPS clips."""
    ray_address: str = ""
    """Ray cluster whose machines write the shards instead, see ray_shards.py."""
    reuse: tuple[Path, ...] = ()
    """Folders of other caches, whose frames are reused if `reusable_caches` accepts them; not with a Ray cluster."""


def build(
    folder: Path,
    examples: Iterable[Example],
    create_clip: Callable[..., Clip],
    identity: Mapping[str, Any],
    options: BuildOptions = BuildOptions(),
    *,
    curate: Curate = lambda cache, rejected: Selection(),
    on_clips: Callable[[int], None] = lambda n: None,
) -> FeatureCache:
    """Build the cache `folder`, or resume it: finished shards stay, the manifest is written last.

    `create_clip(example)` returns a Clip or raises Rejected; it must be picklable for several workers. With
    `options.reuse` it is called as `create_clip(example, find_features)`. `identity` is flat and holds
    `features.dtype` and `features.n_mels`; an unfinished build with another identity is removed first. What `curate`
    drops becomes a line of `rejected.csv` instead of a row; its frames stay in their shard. `on_clips` receives the
    number of clips of each finished shard.

    Memory is that of a few blocks of examples. The sha256 of every file is computed while it is written;
    `open_cache` reads and verifies them. Raises LabError if another process builds the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        _prepare_folder(folder, dict(identity))
        reusable = () if options.ray_address else tuple(reusable_caches(options.reuse, identity, folder))
        writer = ShardWriter(
            folder, create_clip, identity["features.dtype"], int(identity["features.n_mels"]), reusable
        )
        tasks = _PendingShards(folder, _blocks(examples, options.shard_clips), on_clips)
        if options.ray_address:
            ray_shards.write_shards(writer, tasks, options.ray_address, _library_versions(identity), on_clips)
        else:
            _write_shards(writer, tasks, options.workers, on_clips)
        _remove_leftovers(folder, tasks.n_shards)
        return caches.load(folder, _seal(folder, tasks.n_shards, dict(identity), curate))


def reusable_caches(folders: Iterable[Path], identity: Mapping[str, Any], target: Path) -> list[Path]:
    """Return the finished caches among `folders`, except `target`, with the frames that `identity` would give."""
    reusable = []
    for folder in folders:
        other = (manifest.read(folder) or {}).get("identity")
        if folder != target and isinstance(other, dict) and is_finished(folder):
            if all(line.startswith(_FREE_FIELDS) for line in differences(identity, other)):
                reusable.append(folder)
    return reusable


def _lock(folder: Path) -> filelock.FileLock:
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        return lock.acquire()
    except filelock.Timeout:
        raise LabError(
            f"another process is building the cache {folder} right now: wait for it, then run this again"
        ) from None


def _prepare_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Keep the files of an earlier build with the same identity; remove those of any other."""
    record = folder / "build.json"
    _check_no_foreign_files(folder, record)
    _remove_generated_card(folder)
    _remove_damaged_files(folder)
    (folder / manifest.MANIFEST).unlink(missing_ok=True)
    try:
        same = json.loads(record.read_text("utf-8")) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        for path in folder.iterdir():
            if path.name != "README.md":  # a person's
                path.unlink()
        manifest.write_json(record, identity)
    elif finished := len(shards.numbers(folder)):
        logger.info(f"resuming an unfinished cache: {finished} shard(s) are already there")


def _check_no_foreign_files(folder: Path, record: Path) -> None:
    """Raise LabError, before anything is removed, for a folder with files that no build writes."""
    foreign = [path.name for path in folder.iterdir() if path.is_dir() or not _CACHE_FILES.fullmatch(path.name)]
    if not record.exists() and (folder / manifest.MANIFEST).exists():
        foreign.append(manifest.MANIFEST)  # every build writes build.json first: this belongs to another artefact
    if not record.exists() and (folder / "README.md").exists():
        foreign.append("README.md")
    if foreign:
        raise LabError(f"{folder} holds files that are not a feature cache ({foreign[0]} ...): name an empty folder")


def _remove_damaged_files(folder: Path) -> None:
    """Remove the files of a finished cache that differ from its manifest: their shards are written again."""
    files = manifest.verified((manifest.read(folder) or {}).get("files", {}))
    for path in [path for path in folder.iterdir() if path.name in files]:
        entry = files[path.name]
        if not (isinstance(entry, dict) and manifest.sha256(path) == entry.get("sha256")):
            logger.info(f"{path.name} is damaged and is made again")
            path.unlink()


def _remove_generated_card(folder: Path) -> None:
    """Remove the data card, which is written again when the cache is finished, unless a person has edited it."""
    card, listed = folder / "README.md", (manifest.read(folder) or {}).get("files", {}).get("README.md")
    if not card.is_file():
        return
    is_generated = manifest.GENERATED.encode() in card.read_bytes()
    if manifest.sha256(card) == listed["sha256"] if listed else is_generated:
        card.unlink()
    else:
        logger.info(f"note: {card} was edited and stays as it is: remove it to get a new data card")


def _blocks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Group examples by number and by bytes of audio in memory, so that the source alone decides the blocks."""
    block, n_bytes = [], 0
    for example in examples:
        block.append(example)
        audio = vars(example).get("audio")  # absent from an example that reads its audio on demand
        n_bytes += len(audio) if isinstance(audio, bytes) else 0
        if len(block) == size or n_bytes >= _BLOCK_BYTES:
            yield block
            block, n_bytes = [], 0
    if block:
        yield block


class _PendingShards:
    """Iterable of the shards that no earlier run finished; `on_clips` receives the clips of finished ones."""

    def __init__(self, folder: Path, blocks: Iterable[list[Example]], on_clips: Callable[[int], None]):
        self._folder, self._blocks, self._on_clips = folder, blocks, on_clips
        self.n_shards, self.n_clips = 0, 0
        """Shards and clips read so far, finished ones included."""

    def __iter__(self) -> Iterator[ShardTask]:
        for number, examples in enumerate(self._blocks):
            self.n_shards, self.n_clips = number + 1, self.n_clips + len(examples)
            if shards.is_done(self._folder, number, examples):
                self._on_clips(len(examples))
            else:
                yield ShardTask(number, examples)


def _write_shards(writer: ShardWriter, tasks: _PendingShards, workers: int, on_clips: Callable[[int], None]) -> None:
    """Write and publish every shard, in any order; hold at most a few blocks in memory.

    Publishing waits for the disk, so it runs in threads.
    """
    processes, start_late = workers or process_pool.cores(), workers == 0
    n_reused, waiting = 0, deque[tuple[int, Future[ShardResult]]]()

    def wait_for_oldest() -> None:
        nonlocal n_reused
        n_clips, future = waiting.popleft()
        n_reused += future.result().n_reused
        on_clips(n_clips)

    with ThreadPoolExecutor(processes + 2) as threads, _pool(writer, processes) as pool:
        for task in tasks:
            in_pool = processes > 1 and not (start_late and tasks.n_clips <= LARGE_CLIPS)
            waiting.append((len(task.examples), _submit(threads, writer, pool if in_pool else None, task)))
            while len(waiting) > (processes + 2 if in_pool else 1):
                wait_for_oldest()
        while waiting:
            wait_for_oldest()
    if writer.reusable:
        logger.info(f"{n_reused} of {tasks.n_clips} clips were taken from an earlier cache, the others were decoded")


@contextlib.contextmanager
def _pool(writer: ShardWriter, processes: int) -> Iterator[process_pool.Pool | None]:
    if processes > 1:
        with process_pool.Pool(processes, writer) as pool:
            yield pool
    else:
        yield None


def _submit(
    threads: ThreadPoolExecutor, writer: ShardWriter, pool: process_pool.Pool | None, task: ShardTask
) -> Future[ShardResult]:
    """Write a shard here, or in a process of the pool; publish it in a thread."""

    def finish(result: ShardResult | None) -> ShardResult:
        result = result or pool.run(task, f"shard {task.number}")
        shards.publish(writer.folder, result)
        return result

    return threads.submit(finish, writer(task) if pool is None else None)


def _library_versions(identity: Mapping[str, Any]) -> dict[str, str]:
    prefix = "library."
    return {name.removeprefix(prefix): version for name, version in identity.items() if name.startswith(prefix)}


def _seal(folder: Path, n_shards: int, identity: dict[str, Any], curate: Curate) -> dict[str, Any]:
    """Check all shards together, curate, write the tables of rejected and repaired clips, and the manifest last."""
    indexes = [shards.read(folder, number, ["id", "split"]) for number in range(n_shards)]
    rejected = [row for _, metadata in indexes for row in metadata["rejected"]]
    ids = [name for table, _ in indexes for name in table["id"].to_pylist()]
    _check_not_empty(len(ids), rejected)
    _check_unique(itertools.chain(ids, (row["id"] for row in rejected)))
    cache = caches.load(folder, {"shards": n_shards, "identity": identity, "counts": {}})
    selection = curate(cache, rejected)
    rejected += selection.rows()
    _write_rejected(folder / "rejected.csv", rejected)
    (folder / caches.REPAIRED).unlink(missing_ok=True)
    if selection.repaired:
        _write_repaired(folder / caches.REPAIRED, selection)
    dropped = cache.rows["id"].isin(selection.dropped.keys())
    optional: dict[str, Any] = {}
    if selection.counts:
        optional |= {"curation": selection.table(), "dropped": cache.rows["id"][dropped].tolist()}
    if selection.repaired:
        optional["repaired"] = len(selection.repaired)
    splits = cache.rows["split"][~dropped].value_counts(sort=False)
    return manifest.seal(
        folder,
        computed_sha256={shards.bin_name(number): metadata["sha256"] for number, (_, metadata) in enumerate(indexes)},
        identity=identity,
        digest=digest(identity),
        counts={**{str(name): int(n) for name, n in splits.items()}, "rejected": len(rejected)},
        shards=n_shards,
        **optional,
    )


def _check_not_empty(n_clips: int, rejected: list[dict[str, str]]) -> None:
    if not n_clips:
        why = (
            f"all {len(rejected)} were rejected, the first as {rejected[0]['reason']}: {rejected[0]['detail']}"
            if rejected
            else "the source yielded no example"
        )
        raise LabError(f"no clip can be used: {why}. Check the source")


def _check_unique(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise LabError(f"two examples have the id {name!r}: ids must be unique within a source")
        seen.add(name)


def _write_rejected(path: Path, rejected: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "split", "reason", "detail"])
        writer.writeheader()
        writer.writerows({name: encode_cell(cell) for name, cell in row.items()} for row in rejected)


def _write_repaired(path: Path, selection: Selection) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "before", "after", "labels"])
        for name, repair in selection.repaired.items():
            writer.writerow([*map(encode_cell, (name, repair.before, repair.after)), " ".join(map(str, repair.labels))])


def _remove_leftovers(folder: Path, n_shards: int) -> None:
    """Remove shards past the last one, from an earlier build, and temporary files of killed processes."""
    for path in folder.glob("shard-*"):
        if int(path.stem.removeprefix("shard-")) >= n_shards or path.suffix == ".json":
            path.unlink()
    for path in folder.glob(".*.partial"):
        path.unlink()
