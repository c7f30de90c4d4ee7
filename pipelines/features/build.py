"""TODO: describe this module."""

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
from pathlib import Path
from typing import Any

import filelock

from pipelines.features import ray_shards, shards
from pipelines.features.cache import _REPAIRED, FeatureCache, _load, is_finished
from pipelines.features.clips import Clip
from pipelines.features.curation.selection import Selection
from pipelines.features.shards import Made, Maker, Task
from pipelines.features.sources import Example
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.recipes import differences, digest

logger = logging.getLogger(__name__)

LARGE_CLIPS = 2_048
"""With `workers=0` so many clips are made in this process: a smaller corpus is done before a worker has started."""
_BLOCK_BYTES = 64_000_000
"""A shard ends early where its encoded audio is this large: blocks wait in memory."""
_OURS = re.compile(
    r"(shard-\d{5,}\.(bin|json|parquet)|build\.json|(rejected|repaired)\.csv|manifest\.json)|\..+\.partial|\.DS_Store"
)
"""Files that a build may remove from its folder."""
_FREE_FIELDS = ("source.", "settings.source.", "language", "features.vocabulary")
"""Fields that do not reach the frames of a clip: a cache that differs in these alone lends them."""


Curate = Callable[[FeatureCache, list[dict[str, str]]], Selection]
"""Given a whole cache that is not sealed yet, and what was rejected so far: what is to be dropped besides."""


def build(
    folder: Path,
    examples: Iterable[Example],
    admit: Callable[..., Clip],
    identity: Mapping[str, Any],
    *,
    shard_clips: int = 256,
    workers: int = 1,
    ray_address: str = "",
    reuse: Iterable[Path] = (),
    curate: Curate = lambda cache, rejected: Selection(),
    on_clips: Callable[[int], None] = lambda n: None,
) -> FeatureCache:
    """Make the cache `folder`, or finish it: shards that are done are kept, the manifest is written last.

    `identity` is flat and holds `features.dtype` and `features.n_mels`; `on_clips` is told of clips as they are done.
    `curate` is given the cache before it is sealed, and the rejected; what it drops is no row of the sealed cache
    (its frames stay in their shard) but a line of `rejected.csv`.
    `workers` processes make shards side by side, one makes them here, and 0 takes every core once LARGE_CLIPS are
    done; the bytes are the same. With several, `admit` must be something that can be pickled, and no shard is made
    twice but that of a process that died. With `ray_address` the machines of that Ray cluster make them instead
    (cluster.py). `reuse` names other caches: what `lenders` leaves of them lends its frames, and `admit` is then called
    as `admit(example, recall)`; a cluster borrows none.

    An unfinished build of another identity is removed. Memory is that of a few blocks of examples. What is returned
    was hashed while it was written; `open_cache` reads it again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_builder(folder):
        _start_or_go_on(folder, dict(identity))
        known = () if ray_address else tuple(lenders(reuse, identity, folder))
        make = Maker(folder, admit, identity["features.dtype"], int(identity["features.n_mels"]), known)
        tasks = _Tasks(folder, _blocks(examples, shard_clips), on_clips)
        if ray_address:
            ray_shards.make_shards(make, tasks, ray_address, _libraries(identity), on_clips)
        else:
            _make_shards(make, tasks, workers, on_clips)
        n_shards = tasks.shards
        _remove_leftovers(folder, n_shards)
        return _load(folder, _seal(folder, n_shards, dict(identity), curate))


def lenders(folders: Iterable[Path], identity: Mapping[str, Any], borrower: Path) -> list[Path]:
    """The finished caches among `folders` whose frames are those that `identity` would make of the same audio."""
    fitting = []
    for folder in folders:
        found = (manifest.read(folder) or {}).get("identity")
        if folder != borrower and isinstance(found, dict) and is_finished(folder):
            if all(line.startswith(_FREE_FIELDS) for line in differences(identity, found)):
                fitting.append(folder)
    return fitting


def _only_builder(folder: Path) -> filelock.FileLock:
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        return lock.acquire()
    except filelock.Timeout:
        raise LabError(
            f"another process is building the cache {folder} right now: wait for it, then run this again"
        ) from None


def _start_or_go_on(folder: Path, identity: dict[str, Any]) -> None:
    """Keep what an earlier build of the same identity left; remove what any other left."""
    note = folder / "build.json"
    _refuse_foreign(folder, note)
    (folder / manifest.MANIFEST).unlink(missing_ok=True)
    try:
        same = json.loads(note.read_text("utf-8")) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        for path in folder.iterdir():
            path.unlink()
        manifest.write_json(note, identity)
    elif finished := len(shards.numbers(folder)):
        logger.info(f"going on with an unfinished cache: {finished} shard(s) are already there")


def _refuse_foreign(folder: Path, note: Path) -> None:
    """LabError, before anything is removed, for a folder that holds what no build of ours has written."""
    foreign = [path.name for path in folder.iterdir() if path.is_dir() or not _OURS.fullmatch(path.name)]
    if not note.exists() and (folder / manifest.MANIFEST).exists():
        foreign.append(manifest.MANIFEST)  # every build starts with its note: this is another artefact's manifest
    if foreign:
        raise LabError(f"{folder} holds files that are not a feature cache ({foreign[0]} ...): name an empty folder")


def _blocks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Cut by number, and by the bytes of audio that examples bring along: the source alone decides."""
    block, held = [], 0
    for example in examples:
        block.append(example)
        sound = vars(example).get("audio")  # an example that reads its sound late holds none yet
        held += len(sound) if isinstance(sound, bytes) else 0
        if len(block) == size or held >= _BLOCK_BYTES:
            yield block
            block, held = [], 0
    if block:
        yield block


class _Tasks:
    """The shards that no earlier run has finished, read as they are asked for; `on_clips` is told of the others."""

    def __init__(self, folder: Path, blocks: Iterable[list[Example]], on_clips: Callable[[int], None]):
        self._folder, self._blocks, self._on_clips = folder, blocks, on_clips
        self.shards, self.clips = 0, 0
        """How many were read so far, finished ones included."""

    def __iter__(self) -> Iterator[Task]:
        for number, block in enumerate(self._blocks):
            self.shards, self.clips = number + 1, self.clips + len(block)
            if shards.is_done(self._folder, number, block):
                self._on_clips(len(block))
            else:
                yield Task(number, block)


def _make_shards(make: Maker, tasks: _Tasks, n: int, on_clips: Callable[[int], None]) -> None:
    """Every shard made and published, in any order.

    Publishing waits for the disk, and threads do the waiting. At most a few blocks are held at a time.
    """
    processes, late = n or process_pool.cores(), n == 0
    reused, waiting = 0, deque[tuple[int, Future[Made]]]()

    def take() -> None:
        nonlocal reused
        n_clips, future = waiting.popleft()
        reused += future.result().reused
        on_clips(n_clips)

    with ThreadPoolExecutor(processes + 2) as threads, _pool(make, processes) as pool:
        for task in tasks:
            elsewhere = processes > 1 and not (late and tasks.clips <= LARGE_CLIPS)
            waiting.append((len(task.block), _begin(threads, make, pool if elsewhere else None, task)))
            while len(waiting) > (processes + 2 if elsewhere else 1):
                take()
        while waiting:
            take()
    if make.known:
        logger.info(f"{reused} of {tasks.clips} clips were taken from an earlier cache, the others were decoded")


@contextlib.contextmanager
def _pool(make: Maker, processes: int) -> Iterator[process_pool.Pool | None]:
    if processes > 1:
        with process_pool.Pool(processes, make) as pool:
            yield pool
    else:
        yield None


def _begin(threads: ThreadPoolExecutor, make: Maker, pool: process_pool.Pool | None, task: Task) -> Future[Made]:
    """A shard under way: made here, or by a process of the pool; published by a thread."""

    def finish(made: Made | None) -> Made:
        made = made or pool.ask(task, f"shard {task.number}")
        shards.publish(make.folder, made)
        return made

    return threads.submit(finish, make(task) if pool is None else None)


def _libraries(identity: Mapping[str, Any]) -> dict[str, str]:
    """The packages whose versions an identity tells."""
    prefix = "library."
    return {name.removeprefix(prefix): version for name, version in identity.items() if name.startswith(prefix)}


def _seal(folder: Path, n_shards: int, identity: dict[str, Any], curate: Curate) -> dict[str, Any]:
    """Look at all shards together, curate, write what was rejected, and the manifest last."""
    indexes = [shards.read(folder, number, ["id", "split"]) for number in range(n_shards)]
    rejected = [row for _, facts in indexes for row in facts["rejected"]]
    ids = [name for table, _ in indexes for name in table["id"].to_pylist()]
    _refuse_empty(len(ids), rejected)
    _refuse_twins(itertools.chain(ids, (row["id"] for row in rejected)))
    whole = _load(folder, {"shards": n_shards, "identity": identity, "counts": {}})
    chosen = curate(whole, rejected)
    rejected += chosen.rows()
    _write_rejected(folder / "rejected.csv", rejected)
    (folder / _REPAIRED).unlink(missing_ok=True)
    if chosen.repaired:
        _write_repaired(folder / _REPAIRED, chosen)
    out = whole.rows["id"].isin(chosen.dropped.keys())
    told = {"curation": chosen.table(), "dropped": whole.rows["id"][out].tolist()} if chosen.counts else {}
    told |= {"repaired": len(chosen.repaired)} if chosen.repaired else {}
    splits = whole.rows["split"][~out].value_counts(sort=False)
    return manifest.seal(
        folder,
        known_sha256={shards.bin_name(number): facts["sha256"] for number, (_, facts) in enumerate(indexes)},
        identity=identity,
        digest=digest(identity),
        counts={**{str(name): int(n) for name, n in splits.items()}, "rejected": len(rejected)},
        shards=n_shards,
        **told,
    )


def _refuse_empty(n_clips: int, rejected: list[dict[str, str]]) -> None:
    if not n_clips:
        why = (
            f"all {len(rejected)} were rejected, the first as {rejected[0]['reason']}: {rejected[0]['detail']}"
            if rejected
            else "the source yielded no example"
        )
        raise LabError(f"no clip can be used: {why}. Check the source")


def _refuse_twins(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise LabError(f"two examples have the id {name!r}: ids must be unique within a source")
        seen.add(name)


def _write_rejected(path: Path, rejected: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "split", "reason", "detail"])
        writer.writeheader()
        writer.writerows(rejected)


def _write_repaired(path: Path, chosen: Selection) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "before", "after", "labels"])
        for name, repair in chosen.repaired.items():
            writer.writerow([name, repair.before, repair.after, " ".join(map(str, repair.labels))])


def _remove_leftovers(folder: Path, n_shards: int) -> None:
    """Shards past the last one belong to an earlier build; what lies aside, to a process that was killed."""
    for path in folder.glob("shard-*"):
        if int(path.stem.removeprefix("shard-")) >= n_shards or path.suffix == ".json":
            path.unlink()
    for path in folder.glob(".*.partial"):
        path.unlink()
