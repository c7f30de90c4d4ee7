"""FeatureCache: trimmed log-mels in shards that are read through the page cache, sealed by a manifest.

<cache>/build.json            what is being built; checked before an unfinished build goes on
        shard-00000.bin       frames of its clips one after another, float32 or float16, [n_frames, n_mels]
        shard-00000.parquet   one row per clip; written after the frames: the shard is done
        rejected.csv          id, split, reason, detail of every clip that was not used
        repaired.csv          id, before, after, labels of every clip that got another transcript; where there are some
        manifest.json         identity, counts, size and sha256 of every file; written last: the cache is done
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import pandas as pd

from pipelines import cluster, manifest, shards, workers
from pipelines.curation import Clip
from pipelines.curation.selection import Selection
from pipelines.errors import LabError
from pipelines.features import FULL_FRAMES, LogMel
from pipelines.recipe import differences, digest
from pipelines.shards import Made, Maker, Task
from pipelines.sources import Example

if TYPE_CHECKING:
    import pyarrow

FORMAT = "5"
"""Version of the code that makes caches: raised whenever the same input would give other rows or frames."""
LARGE_CLIPS = 2_048
"""With `workers=0` so many clips are made in this process: a smaller corpus is done before a worker has started."""
_BLOCK_BYTES = 64_000_000
"""A shard ends early where its encoded audio is this large: blocks wait in memory."""
_REPAIRED = "repaired.csv"
_OURS = re.compile(
    r"(shard-\d{5,}\.(bin|json|parquet)|build\.json|(rejected|repaired)\.csv|manifest\.json)|\..+\.partial|\.DS_Store"
)
"""Files that a build may remove from its folder."""
_SOFT_FIELDS = ("library.",)
"""Fields whose difference is told, but does not make a cache stale: the frames are checked by their own sha256."""
_FREE_FIELDS = ("source.", "settings.source.", "language", "features.vocabulary")
"""Fields that do not reach the frames of a clip: a cache that differs in these alone lends them."""


class StaleCache(LabError):
    """The cache at hand is not the one that the recipe asks for."""


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache, read by row number."""

    folder: Path
    identity: dict[str, Any]
    """Flat: everything that made this cache, name to value."""
    rows: pd.DataFrame
    """One row per clip: id, split, text, speaker, duration_s, frames, pad_value, offset, shard, label_offset,
    label_count, and the source's meta."""
    counts: dict[str, int]
    """Clips per split, and `rejected`."""
    token_ids: np.ndarray = field(repr=False)
    """int32: the labels of all clips one after another; `label_offset` and `label_count` say whose they are."""

    @property
    def uri(self) -> str:
        return str(self.folder)

    @property
    def digest(self) -> str:
        return digest(self.identity)

    @property
    def n_mels(self) -> int:
        return int(self.identity["features.n_mels"])

    @property
    def bytes(self) -> int:
        """Size of all files on the disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @property
    def padded_bytes(self) -> int:
        """What the same clips take as padded float32 tensors."""
        return len(self.rows) * FULL_FRAMES * self.n_mels * 4

    @property
    def rejected(self) -> pd.DataFrame:
        """id, split, reason, detail of every clip that was not used."""
        return pd.read_csv(self.folder / "rejected.csv", dtype=str, keep_default_na=False)

    @property
    def repaired(self) -> pd.DataFrame:
        """id, before, after of every clip that got another transcript."""
        if not (self.folder / _REPAIRED).exists():
            return pd.DataFrame(columns=["id", "before", "after"])
        return _read_repaired(self.folder).drop(columns="labels")

    @property
    def curation(self) -> list[dict[str, Any]]:
        """What each step of curation did: step, before, after, dropped, changed; empty where none was asked for."""
        return (manifest.read(self.folder) or {}).get("curation", [])

    def split(self, name: str) -> np.ndarray:
        """Row numbers of a split, int64, in the source's order."""
        return np.flatnonzero((self.rows["split"] == name).to_numpy())

    def log_mel(self, row: int) -> LogMel:
        """The features of a row: frames are a read-only view of the page cache, not a copy."""
        start, n_frames = self._offsets[row], self._frames[row]
        return LogMel(self._shards[self._shard_of[row]][start : start + n_frames], float(self._pad_values[row]))

    def labels(self, row: int) -> list[int]:
        """Token ids that the decoder is to produce for a row."""
        start = self._label_offsets[row]
        return self.token_ids[start : start + self._label_counts[row]].tolist()

    # column arrays: indexing a DataFrame row by row costs more than reading the frames
    _offsets = cached_property(lambda self: self.rows["offset"].to_numpy())
    _frames = cached_property(lambda self: self.rows["frames"].to_numpy())
    _pad_values = cached_property(lambda self: self.rows["pad_value"].to_numpy())
    _shard_of = cached_property(lambda self: self.rows["shard"].to_numpy())
    _label_offsets = cached_property(lambda self: self.rows["label_offset"].to_numpy())
    _label_counts = cached_property(lambda self: self.rows["label_count"].to_numpy())

    @cached_property
    def _shards(self) -> dict[int, np.ndarray]:
        return {
            int(number): shards.open_frames(self.folder, int(number), self.identity["features.dtype"], self.n_mels)
            for number in np.unique(self._shard_of)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open the shards themselves."""
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}


Curate = Callable[[FeatureCache, list[dict[str, str]]], Selection]
"""Given a whole cache that is not sealed yet, and what was rejected so far: what is to be dropped besides."""


def open_cache(
    folder: Path, wanted: Mapping[str, Any] | None = None, *, log: Callable[[str], None] = print
) -> FeatureCache:
    """Open a finished cache and verify every byte of it; with `wanted`, refuse one that was made otherwise.

    Verifying runs on all cores, as fast as the disk reads: nothing damaged is ever trained on.
    Raises StaleCache naming the fields that differ, LabError for a cache that is unfinished or damaged.
    """
    sealed = manifest.require_whole(
        folder, "feature cache", "Run 01_feature_pipeline (or: python -m pipelines features) again"
    )
    if not {"identity", "counts", "shards"} <= sealed.keys():
        raise LabError(
            f"{folder} is whole, but not a feature cache (it is a {sealed.get('kind', 'folder of another kind')}): "
            "name the cache that 01_feature_pipeline printed"
        )
    if wanted is not None:
        _refuse_stale(folder, wanted, sealed["identity"], log)
    try:
        return _load(folder, sealed)
    except (OSError, ValueError, KeyError) as error:
        raise LabError(
            f"{folder} is whole, but this lab (format {FORMAT}) cannot read it: {type(error).__name__}. "
            "Another version made it: run 01_feature_pipeline again"
        ) from None


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
    log: Callable[[str], None] = print,
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
        _start_or_go_on(folder, dict(identity), log)
        known = () if ray_address else tuple(lenders(reuse, identity, folder))
        make = Maker(folder, admit, identity["features.dtype"], int(identity["features.n_mels"]), known)
        tasks = _Tasks(folder, _blocks(examples, shard_clips), on_clips)
        if ray_address:
            cluster.make_shards(make, tasks, ray_address, _libraries(identity), on_clips, log)
        else:
            _make_shards(make, tasks, workers, on_clips, log)
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


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a sealed cache (sizes are compared; `open_cache` reads every byte)."""
    return manifest.problem(folder, thorough=False) is None


def _refuse_stale(
    folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    unlike = differences(wanted, found)
    soft = [line for line in unlike if line.startswith(_SOFT_FIELDS)]
    hard = [line for line in unlike if line not in soft]
    if hard:
        raise StaleCache(
            f"the cache {folder} (digest {digest(found)}) is not the one this recipe asks for "
            f"(digest {digest(wanted)}): {'; '.join(hard)}. Run 01_feature_pipeline with this recipe, "
            "or train with the recipe and overrides that made the cache"
        )
    if soft:
        log(f"note: this cache was made with other library versions ({'; '.join(soft)})")


def _only_builder(folder: Path) -> filelock.FileLock:
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        return lock.acquire()
    except filelock.Timeout:
        raise LabError(
            f"another process is building the cache {folder} right now: wait for it, then run this again"
        ) from None


def _start_or_go_on(folder: Path, identity: dict[str, Any], log: Callable[[str], None]) -> None:
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
        log(f"going on with an unfinished cache: {finished} shard(s) are already there")


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


def _make_shards(
    make: Maker, tasks: _Tasks, n: int, on_clips: Callable[[int], None], log: Callable[[str], None]
) -> None:
    """Every shard made and published, in any order.

    Publishing waits for the disk, and threads do the waiting. At most a few blocks are held at a time.
    """
    processes, late = n or workers.cores(), n == 0
    reused, waiting = 0, deque[tuple[int, Future[Made]]]()

    def take() -> None:
        nonlocal reused
        n_clips, future = waiting.popleft()
        reused += future.result().reused
        on_clips(n_clips)

    with ThreadPoolExecutor(processes + 2) as threads, _pool(make, processes, log) as pool:
        for task in tasks:
            elsewhere = processes > 1 and not (late and tasks.clips <= LARGE_CLIPS)
            waiting.append((len(task.block), _begin(threads, make, pool if elsewhere else None, task)))
            while len(waiting) > (processes + 2 if elsewhere else 1):
                take()
        while waiting:
            take()
    if make.known:
        log(f"{reused} of {tasks.clips} clips were taken from an earlier cache, the others were decoded")


@contextlib.contextmanager
def _pool(make: Maker, processes: int, log: Callable[[str], None]) -> Iterator[workers.Pool | None]:
    if processes > 1:
        with workers.Pool(processes, make, log) as pool:
            yield pool
    else:
        yield None


def _begin(threads: ThreadPoolExecutor, make: Maker, pool: workers.Pool | None, task: Task) -> Future[Made]:
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


def _load(folder: Path, sealed: dict[str, Any]) -> FeatureCache:
    import pyarrow

    tables = []
    for number in range(sealed["shards"]):
        table = shards.read(folder, number)[0].drop_columns(["audio"]).replace_schema_metadata(None)
        tables.append(table.append_column("shard", pyarrow.array(np.full(len(table), number, np.int32))))
    table = pyarrow.concat_tables(tables, promote_options="default")
    token_ids, ends = _flat_labels(table["labels"])
    rows = table.drop_columns(["labels"]).to_pandas()
    rows = rows.assign(label_offset=ends[:-1], label_count=np.diff(ends))
    if sealed.get("repaired"):
        repaired = _read_repaired(folder)
        places = pd.Index(rows["id"]).get_indexer(repaired["id"])
        labels = [[int(token) for token in told.split()] for told in repaired["labels"]]
        rows, token_ids = _with_labels(rows, token_ids, places, repaired["after"].tolist(), labels)
    order = [name for name in shards.RESERVED if name in rows]
    rows = rows[[*order, *(name for name in rows if name not in order)]]
    kept = ~rows["id"].isin(sealed.get("dropped", ()))
    return FeatureCache(folder, sealed["identity"], rows[kept].reset_index(drop=True), sealed["counts"], token_ids)


def with_transcripts(cache: FeatureCache, told: Mapping[int, tuple[str, list[int]]]) -> FeatureCache:
    """The cache with other transcripts and label ids for the rows that `told` numbers; nothing on the disk changes."""
    texts, labels = ([pair[i] for pair in told.values()] for i in (0, 1))
    rows, token_ids = _with_labels(cache.rows, cache.token_ids, np.array([*told], dtype=np.int64), texts, labels)
    return replace(cache, rows=rows, token_ids=token_ids)


def _with_labels(
    rows: pd.DataFrame, token_ids: np.ndarray, places: np.ndarray, texts: list[str], labels: list[list[int]]
) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows with new transcripts at `places`, and the token ids with those of the new labels at the end."""
    counts = np.array([len(ids) for ids in labels])
    columns = {name: rows[name].to_numpy(copy=True) for name in ("text", "label_offset", "label_count")}
    columns["text"][places] = texts
    columns["label_offset"][places] = len(token_ids) + np.cumsum(counts) - counts
    columns["label_count"][places] = counts
    return rows.assign(**columns), np.concatenate([token_ids, *(np.array(ids, np.int32) for ids in labels)])


def _read_repaired(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / _REPAIRED, dtype=str, keep_default_na=False)


def _flat_labels(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """All token ids in a row, int32, and where each clip's begin and the last one's end, int64 [clips + 1]."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    counts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    ends = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
    return np.concatenate(parts), ends


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
