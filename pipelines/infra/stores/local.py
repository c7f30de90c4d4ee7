"""A folder of this machine as a store; and folders as places, which Drive is, too."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.stores import sealed as sealed_folder

_BLOCK = 1 << 20


class FolderPlace:
    """A copy of an artefact that is a folder (see sealed.Place)."""

    def __init__(self, folder: Path):
        self.folder = folder

    def sizes(self) -> dict[str, int]:
        """As listed; a file that is listed and gone when it is looked at is left out."""
        found = {}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.name.endswith(".partial"):
                    found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return found

    def holds(self, name: str, local: Path, entry: dict[str, Any]) -> bool:
        """By comparing bytes, which takes a tenth of the time of a digest."""
        return _same_bytes(self.folder / name, local)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.partial")
            self.copy(folder / name, aside)
            os.replace(aside, target)

    def get(self, name: str, path: Path) -> None:
        self.copy(self.folder / name, path)

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def clear(self) -> None:
        self.remove([manifest.MANIFEST, *(name for name in self.sizes() if name != sealed_folder.NOTE)])
        shutil.rmtree(self.folder, ignore_errors=True)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file's content, flushed to the disk where the file system can."""
        shutil.copyfile(source, target)
        manifest.flush(target)


class LocalStore:
    """Folders of this machine: fetching one verifies it where it lies."""

    def exists(self, uri: str) -> bool:
        return sealed_folder.is_whole(FolderPlace(_folder(uri)))

    def facts(self, uri: str) -> dict[str, Any] | None:
        return sealed_folder.facts(FolderPlace(_folder(uri)))

    def note(self, uri: str) -> dict[str, Any] | None:
        return sealed_folder.note(FolderPlace(_folder(uri)))

    def below(self, uri: str) -> list[str]:
        return folders_below(_folder(uri), uri)

    def list(self, uri: str) -> list[str]:
        return [found for found in self.below(uri) if self.exists(found)]

    def fetch(self, uri: str, *, into: Path | None = None) -> Path:
        if into is not None:
            return sealed_folder.fetch(FolderPlace(_folder(uri)), uri, into)
        manifest.require_whole(_folder(uri), "artefact", "Check the path, or make it again")
        return _folder(uri)

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        try:
            sealed_folder.publish(folder, FolderPlace(_folder(uri)), uri, thorough)
        except OSError as error:
            raise LabError(
                f"{uri} is not finished: {error.strerror or error}. Make room or name another folder, "
                "then run this again: what has arrived is kept"
            ) from None
        return uri

    def remove(self, uri: str) -> None:
        FolderPlace(_folder(uri)).clear()


def folders_below(folder: Path, uri: str) -> list[str]:
    """URIs of the folders directly below `folder`, whose URI is `uri`, sorted by name."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [f"{uri.rstrip('/')}/{name}" for name in names]


def _same_bytes(one: Path, other: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), open(one, "rb") as left, open(other, "rb") as right:
        while block := left.read(_BLOCK):
            if block != right.read(_BLOCK):
                return False
        return not right.read(1)
    return False


def _folder(uri: str) -> Path:
    return Path(uri).expanduser()
