"""Parquet files on a disk, Arrow files that `save_to_disk` wrote, and the recordings beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.features.sources.parquet.layout import Declared
from pipelines.features.sources.stamps import stamp_all
from pipelines.infra import files
from pipelines.infra.errors import LabError
from pipelines.infra.file_lookup import FileLookup, is_inside

SUFFIXES = (".parquet", ".pq", ".parq")
_STATE = "state.json"
"""File of `save_to_disk` that lists the Arrow files of a split."""


@dataclass(frozen=True)
class LocalFiles:
    """A Parquet file, or a folder with Parquet files at any depth, else with the Arrow files of `save_to_disk`."""

    path: str

    @property
    def where(self) -> str:
        return self.path

    def identity(self) -> dict[str, str]:
        """Return a digest of path, size and sha256 of every file; for many bytes, of modification times."""
        files_by, digest = stamp_all(self._folder, [self._folder / name for name in self.names()])
        return {"kind": "parquet", "files_by": files_by, "files_sha256": digest}

    def names(self) -> list[str]:
        path = Path(self.path).expanduser()
        if path.is_file():
            return [path.name]
        if not path.is_dir():
            raise LabError(f"source.path must name a Parquet file or a folder of them, got {self.path!r}: correct it")
        parquet = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
        names = (file.relative_to(path) for file in parquet or _saved_arrow_files(path))
        return sorted(file.as_posix() for file in names if not any(part.startswith(".") for part in file.parts))

    def declared(self) -> Declared:
        return {}

    def open(self, name: str) -> Any:
        return str(self._folder / name)

    def beside(self, name: str, recording: str) -> Path | None:
        """Return the recording that a row of the file `name` names, relative to it or to the folder; None if absent."""
        for path in (os.path.normpath(PurePosixPath(name).parent / recording), recording):
            if (match := self._lookup.find(path)) and is_inside(self._folder / match, self._folder):
                return self._folder / match
        return None

    def stamp_recordings(self, recordings: list[Path]) -> dict[str, str]:
        """Return the identity of recordings beside the files; empty if there are none."""
        if not recordings:
            return {}
        files_by, digest = stamp_all(self._folder, recordings)
        return {"recordings_by": files_by, "recordings_sha256": digest}

    @cached_property
    def _lookup(self) -> FileLookup:
        return FileLookup(self._folder)

    @property
    def _folder(self) -> Path:
        path = Path(self.path).expanduser()
        return path.parent if path.is_file() else path


def _saved_arrow_files(folder: Path) -> list[Path]:
    """Return the files that each state.json below `folder` lists. Raises LabError if some are missing."""
    listed = []
    for state in folder.rglob(_STATE):
        content = _read_state(state)
        if content.get("_indices_files") or content.get("_indices_data_files"):
            raise LabError(
                f'{state.parent} holds a selection of its rows, which is not read: python -c "import datasets; '
                f"datasets.load_from_disk('{state.parent}').to_parquet('{state.parent.name}.parquet')\" converts it"
            )
        names = (one.get("filename") for one in content.get("_data_files") or () if isinstance(one, dict))
        listed += [state.parent / name for name in names if isinstance(name, str)]
    if missing := sorted(file.name for file in listed if not files.is_file(file)):
        raise LabError(
            f"{folder} lacks {', '.join(missing[:5])}, which its {_STATE} lists: copy the whole folder again"
        )
    return listed


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.retry(path.read_bytes, path))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise LabError(f"{path} must be a JSON object, as save_to_disk writes it: copy the folder again")
    return content
