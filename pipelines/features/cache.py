"""FeatureCache: trimmed log-mels in shards that are read through the page cache, sealed by a manifest.

<cache>/build.json            identity of the build; compared before an unfinished build is resumed
        shard-00000.bin       frames of its clips one after another, float32 or float16, [n_frames, n_mels]
        shard-00000.parquet   one row per clip; written after the frames: the shard is finished
        rejected.csv          id, split, reason, detail of every clip that was not used
        repaired.csv          id, before, after, labels of every clip whose transcript was replaced; absent if none
        manifest.json         identity, counts, size and sha256 of every file; written last: the cache is finished
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
from pipelines.infra.tables.formulas import decode_cell
from pipelines.recipes import differences, digest
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)


FORMAT = "5"
"""Version of the code that builds caches: raised when the same input would give other rows or frames."""
REPAIRED = "repaired.csv"
"""File of replaced transcripts in a cache."""
_SOFT_FIELDS = ("library.",)
"""Identity fields whose mismatch only warns: the frames are verified by their own sha256."""


class StaleCache(LabError):
    """The cache was built with another identity than the one that the recipe requires."""


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache, read by row number."""

    folder: Path
    identity: dict[str, Any]
    """Flat mapping of everything that decides the rows and frames: settings, source, code and library versions."""
    rows: pd.DataFrame
    """One row per clip: id, split, text, speaker, duration_s, frames, pad_value, offset, shard, label_offset,
    label_count, and the source's meta."""
    counts: dict[str, int]
    """Clips per split, and `rejected`."""
    token_ids: np.ndarray = field(repr=False)
    """int32 [n_tokens]: labels of all clips in a row; `label_offset` and `label_count` locate those of one clip."""

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
        """Size of all files on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @property
    def padded_bytes(self) -> int:
        """Size of the same clips as float32 tensors padded to 30 s."""
        return len(self.rows) * FULL_FRAMES * self.n_mels * 4

    def as_dict(self) -> dict[str, Any]:
        """Return what `features --json` prints, without the rejections."""
        names = ("digest", "counts", "curation", "bytes", "padded_bytes")
        return {"cache_uri": self.uri, **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        row = "  {step:<16}{before:>8}{after:>9}{dropped:>9}{changed:>9}"
        return "\n".join(
            [
                "curation            before    after  dropped  changed",
                *(row.format(**counts) for counts in self.curation),
                f"cache {self.uri}",
                f"digest {self.digest}, {self.counts}, {self.bytes / 1e6:.1f} MB "
                f"({self.bytes / self.padded_bytes:.1%} of padded float32)",
            ]
        )

    @property
    def rejected(self) -> pd.DataFrame:
        """Rejected clips: id, split, reason, detail."""
        return pd.read_csv(self.rejected_path, dtype=str, keep_default_na=False).map(decode_cell)

    @property
    def rejected_path(self) -> Path:
        """The table of the rejected clips."""
        return self.folder / "rejected.csv"

    @property
    def repaired(self) -> pd.DataFrame:
        """Clips whose transcript was replaced: id, before, after."""
        if not (self.folder / REPAIRED).exists():
            return pd.DataFrame(columns=["id", "before", "after"])
        return _read_repaired(self.folder).drop(columns="labels")

    @property
    def curation(self) -> list[dict[str, Any]]:
        """One entry per curation step: step, before, after, dropped, changed; empty without curation."""
        return (manifest.read(self.folder) or {}).get("curation", [])

    def split(self, name: str) -> np.ndarray:
        """Return the row numbers of a split, int64, in the source's order."""
        return np.flatnonzero((self.rows["split"] == name).to_numpy())

    def log_mel(self, row: int) -> LogMel:
        """Return the features of a row; its frames are a read-only view of the page cache, not a copy."""
        start, n_frames = self._offsets[row], self._frames[row]
        return LogMel(self._shards[self._shard_of[row]][start : start + n_frames], float(self._pad_values[row]))

    def labels(self, row: int) -> list[int]:
        """Return the target token ids of a row."""
        start = self._label_offsets[row]
        return self.token_ids[start : start + self._label_counts[row]].tolist()

    # Column arrays: indexing a DataFrame row by row costs more than reading the frames.
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
        """Pickle without the mapped shards: worker processes open them again."""
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}


class DamagedCache(LabError):
    """A file of the cache has other content than when the cache was finished: stage 01 makes it again."""


def open_cache(folder: Path, identity: Mapping[str, Any] | None = None) -> FeatureCache:
    """Open a finished cache and verify every byte of it, on all cores; with `identity`, compare it with the cache's.

    Raises StaleCache naming the fields that differ, DamagedCache, or LabError for a cache that is unfinished.
    """
    remedy = "Run 01_feature_pipeline (or the command features) again with the same settings"
    sealed = manifest.require_complete(folder, "feature cache", remedy, thorough=False)
    if not {"identity", "counts", "shards"} <= sealed.keys():
        raise LabError(
            f"{folder} is whole, but not a feature cache (it is a {sealed.get('kind', 'folder of another kind')}): "
            "name the cache that 01_feature_pipeline printed"
        )
    if identity is not None:
        _check_identity(folder, identity, sealed["identity"])
    if fault := manifest.problem(folder):
        raise DamagedCache(f"feature cache {folder} cannot be used: {fault}. {remedy}: it makes what is damaged again")
    try:
        return load(folder, sealed)
    except (OSError, ValueError, KeyError) as error:
        raise LabError(
            f"{folder} is whole, but this lab (format {FORMAT}) cannot read it: {type(error).__name__}. "
            "Another version made it: run 01_feature_pipeline again"
        ) from None


def is_finished(folder: Path) -> bool:
    """Return True if `folder` holds a finished cache. Compares file sizes only; `open_cache` reads every byte."""
    return manifest.problem(folder, thorough=False) is None


def _check_identity(folder: Path, required: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    """Raise StaleCache if a field differs; log differences of _SOFT_FIELDS."""
    lines = differences(required, actual)
    soft = [line for line in lines if line.startswith(_SOFT_FIELDS)]
    hard = [line for line in lines if line not in soft]
    if hard:
        raise StaleCache(
            f"the cache {folder} (digest {digest(actual)}) is not the one this recipe asks for "
            f"(digest {digest(required)}): {'; '.join(hard)}. Run 01_feature_pipeline with this recipe, "
            "or train with the recipe and overrides that made the cache"
        )
    if soft:
        logger.info(f"note: this cache was made with other library versions ({'; '.join(soft)})")


def load(folder: Path, sealed: dict[str, Any]) -> FeatureCache:
    """Load the cache that the manifest `sealed` describes, without verifying it."""
    import pyarrow

    tables = []
    for number in range(sealed["shards"]):
        table = shards.read(folder, number)[0].drop_columns(["audio"]).replace_schema_metadata(None)
        tables.append(table.append_column("shard", pyarrow.array(np.full(len(table), number, np.int32))))
    table = pyarrow.concat_tables(tables, promote_options="default")
    token_ids, offsets = _flat_labels(table["labels"])
    rows = table.drop_columns(["labels"]).to_pandas()
    rows = rows.assign(label_offset=offsets[:-1], label_count=np.diff(offsets))
    if sealed.get("repaired"):
        repaired = _read_repaired(folder)
        indices = pd.Index(rows["id"]).get_indexer(repaired["id"])
        labels = [[int(token) for token in cell.split()] for cell in repaired["labels"]]
        rows, token_ids = _replace_labels(rows, token_ids, indices, repaired["after"].tolist(), labels)
    order = [name for name in shards.RESERVED if name in rows]
    rows = rows[[*order, *(name for name in rows if name not in order)]]
    rows = rows[~rows["id"].isin(sealed.get("dropped", ()))].reset_index(drop=True)
    return FeatureCache(folder, sealed["identity"], rows, sealed["counts"], token_ids)


def with_transcripts(cache: FeatureCache, transcripts: Mapping[int, tuple[str, list[int]]]) -> FeatureCache:
    """Return the cache with other transcripts: row number to text and label ids. Files do not change."""
    texts, labels = ([pair[i] for pair in transcripts.values()] for i in (0, 1))
    indices = np.array([*transcripts], dtype=np.int64)
    rows, token_ids = _replace_labels(cache.rows, cache.token_ids, indices, texts, labels)
    return replace(cache, rows=rows, token_ids=token_ids)


def _replace_labels(
    rows: pd.DataFrame, token_ids: np.ndarray, indices: np.ndarray, texts: list[str], labels: list[list[int]]
) -> tuple[pd.DataFrame, np.ndarray]:
    """Replace transcripts at row numbers `indices`; append the new labels to `token_ids`."""
    counts = np.array([len(ids) for ids in labels])
    columns = {name: rows[name].to_numpy(copy=True) for name in ("text", "label_offset", "label_count")}
    columns["text"][indices] = texts
    columns["label_offset"][indices] = len(token_ids) + np.cumsum(counts) - counts
    columns["label_count"][indices] = counts
    return rows.assign(**columns), np.concatenate([token_ids, *(np.array(ids, np.int32) for ids in labels)])


def _read_repaired(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / REPAIRED, dtype=str, keep_default_na=False).map(decode_cell)


def _flat_labels(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Flatten a list column: token ids, int32 [n_tokens], and offsets of the clips, int64 [n_clips + 1]."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    counts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
    return np.concatenate(parts), offsets
