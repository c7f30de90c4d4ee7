"""FeatureCache: trimmed log-mels in shards that are read through the page cache, sealed by a manifest.

<cache>/build.json            what is being built; checked before an unfinished build goes on
        shard-00000.bin       frames of its clips one after another, float32 or float16, [n_frames, n_mels]
        shard-00000.parquet   one row per clip; written after the frames: the shard is done
        rejected.csv          id, split, reason, detail of every clip that was not used
        repaired.csv          id, before, after, labels of every clip that got another transcript; where there are some
        manifest.json         identity, counts, size and sha256 of every file; written last: the cache is done
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.features import shards
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import differences, digest
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)


FORMAT = "5"
"""Version of the code that makes caches: raised whenever the same input would give other rows or frames."""
_REPAIRED = "repaired.csv"
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


def open_cache(folder: Path, wanted: Mapping[str, Any] | None = None) -> FeatureCache:
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
        _refuse_stale(folder, wanted, sealed["identity"])
    try:
        return _load(folder, sealed)
    except (OSError, ValueError, KeyError) as error:
        raise LabError(
            f"{folder} is whole, but this lab (format {FORMAT}) cannot read it: {type(error).__name__}. "
            "Another version made it: run 01_feature_pipeline again"
        ) from None


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a sealed cache (sizes are compared; `open_cache` reads every byte)."""
    return manifest.problem(folder, thorough=False) is None


def _refuse_stale(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
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
        logger.info(f"note: this cache was made with other library versions ({'; '.join(soft)})")


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
