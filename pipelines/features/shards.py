"""One shard of a feature cache: some hundred clips, written as a unit by one process.

shard-00000.bin       frames of its clips one after another, float32 or float16, [n_frames, n_mels]
shard-00000.parquet   index: one row per clip; rejected examples and the sha256 of the frames in its metadata

The index is written after the frames are flushed to disk: a shard with an index is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipelines.features.clips import Clip, Rejected
from pipelines.features.sources import Example, is_available, read_ahead
from pipelines.infra import manifest
from pipelines.recipes import digest
from pipelines.whisper.log_mel import LogMel

if TYPE_CHECKING:
    import pyarrow

RESERVED = (
    "id split text speaker duration_s frames pad_value labels offset audio shard label_offset label_count".split()
)
"""Columns that a source's `meta` cannot replace."""
_METADATA_KEY = b"shard"
"""Key of the shard's metadata in the Parquet metadata of its index."""


@dataclass(frozen=True)
class ShardTask:
    """The examples of one shard."""

    number: int
    examples: list[Example]


@dataclass(frozen=True)
class ShardResult:
    """A shard that is not published yet: its frames are in a temporary file, its index is in memory."""

    number: int
    frames_path: Path
    index: bytes
    n_reused: int
    """Clips whose frames were read from an earlier cache."""


@dataclass
class ShardWriter:
    """Turn examples into shards. Can be pickled for other processes; holds one clip and one index in memory.

    With `reusable`, folders of finished caches, `create_clip` is called as `create_clip(example, find_features)`
    with a `ReusableFeatures` of them.
    """

    folder: Path
    create_clip: Callable[..., Clip]
    dtype: str
    n_mels: int
    reusable: tuple[Path, ...] = ()
    _find_features: ReusableFeatures | None = field(default=None, init=False, repr=False)

    def __call__(self, task: ShardTask) -> ShardResult:
        if self.reusable and self._find_features is None:
            self._find_features = ReusableFeatures(self.reusable, self.dtype, self.n_mels)
        path = temporary_path(self.folder, task.number)
        with open(path, "wb") as file:
            index, n_reused = self.write_frames(task, file)
        return ShardResult(task.number, path, index, n_reused)

    def write_frames(self, task: ShardTask, file: BinaryIO) -> tuple[bytes, int]:
        """Write the frames of a shard to `file`. Return its index and the number of reused clips."""
        with one_thread():
            return self._write_frames(task, file)

    def _write_frames(self, task: ShardTask, file: BinaryIO) -> tuple[bytes, int]:
        rows, rejected, offset, n_reused, sha256 = [], [], 0, 0, hashlib.sha256()
        for example in read_ahead(task.examples):
            try:
                clip = self._create(example)
            except Rejected as error:
                rejected.append(
                    {"id": example.id, "split": example.split, "reason": error.reason, "detail": error.detail}
                )
                continue
            frames = np.ascontiguousarray(clip.log_mel.frames, dtype=self.dtype)
            file.write(frames.data)
            sha256.update(frames.data)
            rows.append(_row(clip, offset))
            offset += len(frames)
            n_reused += clip.reused
        metadata = {"examples": examples_digest(task.examples), "sha256": sha256.hexdigest(), "rejected": rejected}
        return _index(rows, metadata), n_reused

    def _create(self, example: Example) -> Clip:
        return self.create_clip(example, self._find_features) if self._find_features else self.create_clip(example)


class ReusableFeatures:
    """Features stored in finished caches, looked up by audio fingerprint: a `clips.FindFeatures`.

    The caller guarantees that those caches were built with the same settings and code. The sha256 of a shard is
    compared with the manifest before first use; a damaged or missing shard is ignored.
    """

    def __init__(self, folders: tuple[Path, ...], dtype: str, n_mels: int):
        self._dtype, self._n_mels = dtype, n_mels
        files = {folder: (manifest.read(folder) or {"files": {}})["files"] for folder in folders}
        self._shards = [(folder, number) for folder in folders for number in numbers(folder)]
        self._sha256 = [files[folder].get(bin_name(number), {}).get("sha256") for folder, number in self._shards]
        self._open: dict[int, np.ndarray | None] = {}
        columns = {name: [] for name in ("audio", "shard", "offset", "frames", "pad_value", "duration_s")}
        for shard, (folder, number) in enumerate(self._shards):
            with contextlib.suppress(OSError, ValueError, KeyError):  # ignore a damaged index
                if manifest.sha256(folder / index_name(number)) != files[folder][index_name(number)]["sha256"]:
                    continue
                table, _ = read(folder, number, [name for name in columns if name != "shard"])
                columns["audio"].append(np.array(table["audio"].to_pylist(), "S16"))
                columns["shard"].append(np.full(len(table), shard))
                for name in ("offset", "frames", "pad_value", "duration_s"):
                    columns[name].append(table[name].to_numpy())
        joined = {
            name: np.concatenate([*parts, np.zeros(0, "S16" if name == "audio" else "i4")])
            for name, parts in columns.items()
        }
        order = np.argsort(joined["audio"], kind="stable")
        self._columns = {name: column[order] for name, column in joined.items()}

    def __call__(self, fingerprint: bytes) -> tuple[LogMel, float] | None:
        """Return the features and the duration in seconds of the clip with this fingerprint, or None."""
        keys, key = self._columns["audio"], np.array(fingerprint, "S16")
        row = int(np.searchsorted(keys, key))
        if not fingerprint or row == len(keys) or keys[row] != key:
            return None
        start, n_frames = int(self._columns["offset"][row]), int(self._columns["frames"][row])
        frames = self._frames(int(self._columns["shard"][row]))
        if frames is None or start + n_frames > len(frames):
            return None
        pad_value, duration_s = float(self._columns["pad_value"][row]), float(self._columns["duration_s"][row])
        return LogMel(frames[start : start + n_frames], pad_value), duration_s

    def _frames(self, shard: int) -> np.ndarray | None:
        if shard not in self._open:
            folder, number = self._shards[shard]
            try:
                intact = manifest.sha256(folder / bin_name(number)) == self._sha256[shard]
                self._open[shard] = open_frames(folder, number, self._dtype, self._n_mels) if intact else None
            except (OSError, ValueError):
                self._open[shard] = None
        return self._open[shard]


def publish(folder: Path, result: ShardResult) -> None:
    """Move a shard to its final name: frames first, flushed to disk, then the index."""
    manifest.flush(result.frames_path)
    os.replace(result.frames_path, folder / bin_name(result.number))
    manifest.write_bytes(folder / index_name(result.number), result.index)


def is_done(folder: Path, number: int, examples: list[Example]) -> bool:
    """Return True if an earlier run finished this shard from the same examples and its bytes are intact.

    A shard is not done if a recording that was missing is there now.
    """
    try:
        metadata = read(folder, number, [])[1]
        missing = {row["id"] for row in metadata["rejected"] if row["reason"] == "missing"}
        return (
            metadata["examples"] == examples_digest(examples)
            and not any(is_available(example) for example in examples if example.id in missing)
            and manifest.sha256(folder / bin_name(number)) == metadata["sha256"]
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read(folder: Path, number: int, columns: list[str] | None = None) -> tuple[pyarrow.Table, dict[str, Any]]:
    """Read the index of a shard: its `columns` (default: all) and its metadata `examples`, `sha256`, `rejected`.

    Raises OSError or ValueError if it is missing or damaged.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(folder / index_name(number), page_checksum_verification=True) as file:
        try:
            metadata = json.loads(file.schema_arrow.metadata[_METADATA_KEY])
        except (KeyError, TypeError):
            raise ValueError(f"{index_name(number)} is not the index of a shard") from None
        return file.read(columns), metadata


def open_frames(folder: Path, number: int, dtype: str, n_mels: int) -> np.ndarray:
    """Map the frames of a shard that is not empty: [n_frames, n_mels], read-only, through the page cache."""
    # np.asarray: slicing a memmap costs three times as much as slicing a plain array
    return np.asarray(np.memmap(folder / bin_name(number), np.dtype(dtype), "r")).reshape(-1, n_mels)


def numbers(folder: Path) -> list[int]:
    """Return the numbers of the shards in a folder that have an index, sorted."""
    return sorted(int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.parquet"))


def examples_digest(examples: list[Example]) -> str:
    """Return a digest of the ids, splits and transcripts of a shard."""
    return digest({"examples": [[example.id, example.split, example.text] for example in examples]})


def bin_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def index_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def temporary_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's frames until they are published, separate for each process."""
    return folder / f".{bin_name(number)}.{os.getpid()}.partial"


def _row(clip: Clip, offset: int) -> dict[str, Any]:
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
        "offset": offset,
        "audio": clip.fingerprint,
        "meta": {name: str(value) for name, value in example.meta.items() if name not in RESERVED},
    }


def _index(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> bytes:
    """Encode the rows and the metadata as a Parquet file: the same bytes for the same rows."""
    import pyarrow.parquet

    types = {
        "id": pyarrow.string(),
        "split": pyarrow.string(),
        "text": pyarrow.string(),
        "speaker": pyarrow.string(),
        "duration_s": pyarrow.float64(),
        "frames": pyarrow.int32(),
        "pad_value": pyarrow.float32(),
        "labels": pyarrow.list_(pyarrow.int32()),
        "offset": pyarrow.int64(),
        "audio": pyarrow.binary(),
    }
    columns = {name: pyarrow.array([row[name] for row in rows], kind) for name, kind in types.items()}
    for name in dict.fromkeys(name for row in rows for name in row["meta"]):
        columns[name] = pyarrow.array([row["meta"].get(name) for row in rows], pyarrow.string())
    table = pyarrow.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: more are slower for one clip, and could change the order of summation."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
