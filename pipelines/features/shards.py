"""One shard of a feature cache: some hundred clips, the unit that is made in one piece, by whichever process.

shard-00000.bin       frames of its clips one after another, float32 or float16, [n_frames, n_mels]
shard-00000.parquet   one row per clip; what was rejected, and the sha256 of the frames, in its metadata

The index is written after the frames are on the disk: with it, the shard is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.features.clips import Clip, Rejected
from pipelines.features.sources import Example
from pipelines.infra import manifest
from pipelines.recipes import digest
from pipelines.whisper.log_mel import LogMel

if TYPE_CHECKING:
    import pyarrow


_FACTS = b"shard"
"""Key of the shard's facts in its index's metadata."""


@dataclass(frozen=True)
class Task:
    """The examples of one shard."""

    number: int
    block: list[Example]


@dataclass(frozen=True)
class Made:
    """A shard that is written but not yet published: its frames lie aside, its index is not on the disk."""

    number: int
    aside: Path
    index: bytes
    reused: int
    """Clips whose frames came from an earlier cache."""


@dataclass
class Maker:
    """Makes shards; can be pickled, so that other processes make them, too. Memory is that of one clip and one index.

    With `known`, finished caches, `admit` is called as `admit(example, recall)`: see `Known`.
    """

    folder: Path
    admit: Callable[..., Clip]
    dtype: str
    n_mels: int
    known: tuple[Path, ...] = ()
    _recall: Known | None = field(default=None, init=False, repr=False)

    def __call__(self, task: Task) -> Made:
        if self.known and self._recall is None:
            self._recall = Known(self.known, self.dtype, self.n_mels)
        aside = self.folder / f".{bin_name(task.number)}.{os.getpid()}.partial"
        with open(aside, "wb") as file:
            index, reused = self.write(task, file)
        return Made(task.number, aside, index, reused)

    def write(self, task: Task, file: Any) -> tuple[bytes, int]:
        """Write the frames of a shard to a binary `file`; its index, and how many clips came from an earlier cache."""
        with one_thread():
            return self._write(task, file)

    def _write(self, task: Task, file: Any) -> tuple[bytes, int]:
        rows, rejected, offset, reused, sha256 = [], [], 0, 0, hashlib.sha256()
        for example in task.block:
            try:
                clip = self.admit(example, self._recall) if self._recall else self.admit(example)
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
            reused += clip.reused
        facts = {"examples": block_digest(task.block), "sha256": sha256.hexdigest(), "rejected": rejected}
        return _index(rows, facts), reused


class Known:
    """Frames that finished caches hold, by the fingerprint of the audio file they were made of: a `curation.Recall`.

    The caller sees to it that those caches were made with the same settings and code. A shard's bytes are compared
    with the sha256 in the manifest before any of them is used; a shard that is damaged or gone is as good as none.
    """

    def __init__(self, folders: tuple[Path, ...], dtype: str, n_mels: int):
        self._dtype, self._n_mels = dtype, n_mels
        sealed = {folder: (manifest.read(folder) or {"files": {}})["files"] for folder in folders}
        self._shards = [(folder, number) for folder in folders for number in numbers(folder)]
        self._sha256 = [sealed[folder].get(bin_name(number), {}).get("sha256") for folder, number in self._shards]
        self._open: dict[int, np.ndarray | None] = {}
        columns = {name: [] for name in ("audio", "shard", "offset", "frames", "pad_value", "duration_s")}
        for place, (folder, number) in enumerate(self._shards):
            with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged index recalls nothing
                if manifest.sha256(folder / index_name(number)) != sealed[folder][index_name(number)]["sha256"]:
                    continue
                table, _ = read(folder, number, [name for name in columns if name != "shard"])
                columns["audio"].append(np.array(table["audio"].to_pylist(), "S16"))
                columns["shard"].append(np.full(len(table), place))
                for name in ("offset", "frames", "pad_value", "duration_s"):
                    columns[name].append(table[name].to_numpy())
        joined = {
            name: np.concatenate([*parts, np.zeros(0, "S16" if name == "audio" else "i4")])
            for name, parts in columns.items()
        }
        order = np.argsort(joined["audio"], kind="stable")
        self._columns = {name: column[order] for name, column in joined.items()}

    def __call__(self, fingerprint: bytes) -> tuple[LogMel, float] | None:
        """The features and the duration in seconds of the clip with this fingerprint, or None."""
        keys, key = self._columns["audio"], np.array(fingerprint, "S16")
        at = int(np.searchsorted(keys, key))
        if not fingerprint or at == len(keys) or keys[at] != key:
            return None
        start, n_frames = int(self._columns["offset"][at]), int(self._columns["frames"][at])
        frames = self._frames(int(self._columns["shard"][at]))
        if frames is None or start + n_frames > len(frames):
            return None
        pad_value, duration_s = float(self._columns["pad_value"][at]), float(self._columns["duration_s"][at])
        return LogMel(frames[start : start + n_frames], pad_value), duration_s

    def _frames(self, place: int) -> np.ndarray | None:
        if place not in self._open:
            try:
                folder, number = self._shards[place]
                whole = manifest.sha256(folder / bin_name(number)) == self._sha256[place]
                self._open[place] = open_frames(folder, number, self._dtype, self._n_mels) if whole else None
            except (OSError, ValueError):
                self._open[place] = None
        return self._open[place]


def publish(folder: Path, made: Made) -> None:
    """Put a shard in its place: its frames on the disk first, then its index."""
    manifest.flush(made.aside)
    os.replace(made.aside, folder / bin_name(made.number))
    manifest.write_bytes(folder / index_name(made.number), made.index)


def is_done(folder: Path, number: int, block: list[Example]) -> bool:
    """Whether an earlier run finished this shard from the same examples, and its bytes are what they were."""
    try:
        facts = read(folder, number, [])[1]
        return (
            facts["examples"] == block_digest(block) and manifest.sha256(folder / bin_name(number)) == facts["sha256"]
        )
    except (OSError, ValueError):
        return False


def read(folder: Path, number: int, columns: list[str] | None = None) -> tuple[pyarrow.Table, dict[str, Any]]:
    """The index of a shard (all columns, or these) and its facts: `examples`, `sha256`, `rejected`.

    Raises OSError or ValueError where there is none or it is damaged.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(folder / index_name(number), page_checksum_verification=True) as file:
        try:
            facts = json.loads(file.schema_arrow.metadata[_FACTS])
        except (KeyError, TypeError):
            raise ValueError(f"{index_name(number)} is not the index of a shard") from None
        return file.read(columns), facts


def open_frames(folder: Path, number: int, dtype: str, n_mels: int) -> np.ndarray:
    """The frames of a shard, [n_frames, n_mels], read-only through the page cache; the shard is not empty."""
    # a plain array over the map: slicing a memmap costs three times as much
    return np.asarray(np.memmap(folder / bin_name(number), np.dtype(dtype), "r")).reshape(-1, n_mels)


def numbers(folder: Path) -> list[int]:
    """The shards of a folder that have an index, in order."""
    return sorted(int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.parquet"))


def block_digest(block: list[Example]) -> str:
    return digest({"examples": [[example.id, example.split, example.text] for example in block]})


def bin_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def index_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


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


RESERVED = (
    "id split text speaker duration_s frames pad_value labels offset audio shard label_offset label_count".split()
)
"""Columns that a source's `meta` cannot replace."""


def _index(rows: list[dict[str, Any]], facts: dict[str, Any]) -> bytes:
    """The rows as a Parquet file, the facts in its metadata: the same bytes for the same rows."""
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
    table = pyarrow.table(columns).replace_schema_metadata({_FACTS: json.dumps(facts)})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread to a clip: more are slower on so little work, and could sum in another order than a worker does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
