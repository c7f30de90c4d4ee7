"""FeatureCache: trimmed log-mels in shards that are read through the page cache, sealed by a manifest.

<cache>/build.json            what is being built; checked before an unfinished build goes on
        shard-00000.bin       frames of its clips one after another, float32 or float16, [n_frames, n_mels]
        shard-00000.json      one row per clip and per rejected clip; written after the frames: the shard is done
        rejected.csv          id, split, reason, detail of every clip that was not used
        manifest.json         identity, counts, size and sha256 of every file; written last: the cache is done
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd

from pipelines import manifest
from pipelines.curation import Clip, Rejected
from pipelines.curation.selection import Selection
from pipelines.errors import LabError
from pipelines.features import FULL_FRAMES, LogMel
from pipelines.recipe import differences, digest
from pipelines.sources import Example

FORMAT = "4"
"""Version of the code that makes caches: raised whenever the same input would give other rows or frames."""
_OURS = re.compile(r"(shard-\d{5,}\.(bin|json)|build\.json|rejected\.csv|manifest\.json)|\..+\.partial|\.DS_Store")
"""Files that a build may remove from its folder."""
_SOFT_FIELDS = ("library.",)
"""Fields whose difference is told, but does not make a cache stale: the frames are checked by their own sha256."""


class StaleCache(LabError):
    """The cache at hand is not the one that the recipe asks for."""


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache, read by row number."""

    folder: Path
    identity: dict[str, Any]
    """Flat: everything that made this cache, name to value."""
    rows: pd.DataFrame
    """One row per clip: id, split, text, speaker, duration_s, frames, pad_value, labels, shard, offset, and meta."""
    counts: dict[str, int]
    """Clips per split, and `rejected`."""

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
        return self._labels[row]

    # column arrays: indexing a DataFrame row by row costs more than reading the frames
    _offsets = cached_property(lambda self: self.rows["offset"].to_numpy())
    _frames = cached_property(lambda self: self.rows["frames"].to_numpy())
    _pad_values = cached_property(lambda self: self.rows["pad_value"].to_numpy())
    _shard_of = cached_property(lambda self: self.rows["shard"].to_numpy())
    _labels = cached_property(lambda self: self.rows["labels"].tolist())

    @cached_property
    def _shards(self) -> dict[int, np.ndarray]:
        dtype = np.dtype(self.identity["features.dtype"])
        return {
            int(number): np.memmap(self.folder / _bin(number), dtype, "r").reshape(-1, self.n_mels)
            for number in np.unique(self._shard_of)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes open the shards themselves."""
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}


def open_cache(
    folder: Path, wanted: Mapping[str, Any] | None = None, *, log: Callable[[str], None] = print
) -> FeatureCache:
    """Open a finished cache and verify every byte of it; with `wanted`, refuse one that was made otherwise.

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
    shards = [json.loads((folder / _json(number)).read_text("utf-8")) for number in range(sealed["shards"])]
    return FeatureCache(folder, sealed["identity"], _rows(shards, sealed.get("dropped", ())), sealed["counts"])


def build(
    folder: Path,
    examples: Iterable[Example],
    admit: Callable[[Example], Clip],
    identity: Mapping[str, Any],
    *,
    shard_clips: int = 256,
    curate: Callable[[FeatureCache, list[dict[str, str]]], Selection] = lambda cache, rejected: Selection(),
    on_clips: Callable[[int], None] = lambda n: None,
    log: Callable[[str], None] = print,
) -> FeatureCache:
    """Make the cache `folder`, or finish it: shards that are done are kept, the manifest is written last.

    `identity` is flat and holds `features.dtype` and `features.n_mels`; `on_clips` is told of clips as they are done.
    `curate` is given the cache before it is sealed, and the rejected; what it drops is no row of the sealed cache
    (its frames stay in their shard) but a line of `rejected.csv`.
    An unfinished build of another identity is removed. Memory is that of one shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_builder(folder):
        _start_or_go_on(folder, dict(identity), log)
        shards = []
        for number, block in enumerate(_blocks(examples, shard_clips)):
            shards.append(_done_shard(folder, number, block) or _write_shard(folder, number, block, admit, identity))
            on_clips(len(block))
        _refuse_empty(shards)
        _refuse_twins(shards)
        rejected = [row for shard in shards for row in shard["rejected"]]
        whole = FeatureCache(folder, dict(identity), _rows(shards), {})
        chosen = curate(whole, rejected)
        rejected += chosen.rows()
        _write_rejected(folder / "rejected.csv", rejected)
        _remove_leftovers(folder, len(shards))
        dropped = [name for name in whole.rows["id"] if name in chosen.dropped]
        told = {"curation": chosen.table(), "dropped": dropped} if chosen.counts else {}
        counts = {**_counts(_rows(shards, dropped)), "rejected": len(rejected)}
        manifest.seal(folder, identity=whole.identity, digest=whole.digest, counts=counts, shards=len(shards), **told)
    return open_cache(folder, log=log)


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
    elif finished := len(list(folder.glob("shard-*.json"))):
        log(f"going on with an unfinished cache: {finished} shard(s) are already there")


def _refuse_foreign(folder: Path, note: Path) -> None:
    """LabError, before anything is removed, for a folder that holds what no build of ours has written."""
    foreign = [path.name for path in folder.iterdir() if path.is_dir() or not _OURS.fullmatch(path.name)]
    if not note.exists() and (folder / manifest.MANIFEST).exists():
        foreign.append(manifest.MANIFEST)  # every build starts with its note: this is another artefact's manifest
    if foreign:
        raise LabError(f"{folder} holds files that are not a feature cache ({foreign[0]} ...): name an empty folder")


def _blocks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while block := list(itertools.islice(iterator, size)):
        yield block


def _block_digest(block: list[Example]) -> str:
    return digest({"examples": [[example.id, example.split, example.text] for example in block]})


def _done_shard(folder: Path, number: int, block: list[Example]) -> dict[str, Any] | None:
    """The rows of a shard that an earlier run finished from the same examples, or None."""
    try:
        shard = json.loads((folder / _json(number)).read_text("utf-8"))
        whole = shard["examples"] == _block_digest(block) and manifest.sha256(folder / _bin(number)) == shard["sha256"]
    except (OSError, ValueError, KeyError):
        return None
    return shard if whole else None


def _write_shard(
    folder: Path, number: int, block: list[Example], admit: Callable[[Example], Clip], identity: Mapping[str, Any]
) -> dict[str, Any]:
    rows, rejected, offset = [], [], 0
    with open(folder / _bin(number), "wb") as file:
        for example in block:
            try:
                clip = admit(example)
            except Rejected as error:
                rejected.append(
                    {"id": example.id, "split": example.split, "reason": error.reason, "detail": error.detail}
                )
                continue
            file.write(np.ascontiguousarray(clip.log_mel.frames, dtype=identity["features.dtype"]).data)
            rows.append(_row(clip, number, offset))
            offset += len(clip.log_mel.frames)
        file.flush()
        os.fsync(file.fileno())
    shard = {
        "examples": _block_digest(block),
        "sha256": manifest.sha256(folder / _bin(number)),
        "rows": rows,
        "rejected": rejected,
    }
    manifest.write_json(folder / _json(number), shard)
    return shard


def _row(clip: Clip, shard: int, offset: int) -> dict[str, Any]:
    example = clip.example
    return {
        "id": example.id,
        "split": example.split,
        "text": clip.text,
        "speaker": example.speaker,
        "duration_s": round(clip.duration_s, 4),
        "frames": len(clip.log_mel.frames),
        "pad_value": clip.log_mel.pad_value,
        "labels": clip.labels,
        "shard": shard,
        "offset": offset,
        **{name: value for name, value in example.meta.items() if name not in _FIXED},
    }


_FIXED = ("id", "split", "text", "speaker", "duration_s", "frames", "pad_value", "labels", "shard", "offset")


def _columns(shards: list[dict[str, Any]]) -> list[str]:
    """The fixed columns, then whatever the source told besides, in the order in which it came up."""
    return list(dict.fromkeys([*_FIXED, *(name for shard in shards for row in shard["rows"] for name in row)]))


def _refuse_empty(shards: list[dict[str, Any]]) -> None:
    if not any(shard["rows"] for shard in shards):
        rejected = [row for shard in shards for row in shard["rejected"]]
        why = (
            f"all {len(rejected)} were rejected, the first as {rejected[0]['reason']}: {rejected[0]['detail']}"
            if rejected
            else "the source yielded no example"
        )
        raise LabError(f"no clip can be used: {why}. Check the source")


def _refuse_twins(shards: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for row in (row for shard in shards for kind in ("rows", "rejected") for row in shard[kind]):
        if row["id"] in seen:
            raise LabError(f"two examples have the id {row['id']!r}: ids must be unique within a source")
        seen.add(row["id"])


def _write_rejected(path: Path, rejected: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "split", "reason", "detail"])
        writer.writeheader()
        writer.writerows(rejected)


def _remove_leftovers(folder: Path, shards: int) -> None:
    """Shards past the last one belong to an earlier build with more examples or smaller shards."""
    for path in folder.glob("shard-*"):
        if int(path.stem.removeprefix("shard-")) >= shards:
            path.unlink()


def _rows(shards: list[dict[str, Any]], dropped: Collection[str] = ()) -> pd.DataFrame:
    out = set(dropped)
    rows = [row for shard in shards for row in shard["rows"] if row["id"] not in out]
    return pd.DataFrame(rows, columns=_columns(shards))


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    """Clips per split, in the order in which the splits come up."""
    return {name: int(n) for name, n in rows["split"].value_counts(sort=False).items()}


def _bin(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _json(number: int) -> str:
    return f"shard-{number:05d}.json"
