"""A mounted folder (Google Drive in Colab) as a store: it fills up, goes away in the middle, and shows old listings.

What is written to Drive lands in a buffer of the mount and is uploaded later; a read-back proves that the mount took
it. Call `drive.flush_and_unmount()` before a Colab machine is given back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.infra.errors import LabError
from pipelines.infra.stores import sealed as sealed_folder
from pipelines.infra.stores.errors import redact
from pipelines.infra.stores.local import FolderPlace, folders_below

MOUNT = "/content/drive"
"""Where Colab mounts Google Drive; LAB_DRIVE names another mount."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_GONE = (errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN)
_STALE_TRIES = 3


def mount_point() -> Path:
    """The folder under which the drive is mounted."""
    return Path(os.environ.get("LAB_DRIVE") or MOUNT)


def is_on_drive(uri: str) -> bool:
    """Whether `uri` is a path below the mount."""
    return "://" not in uri and Path(uri).expanduser().is_relative_to(mount_point())


class DrivePlace(FolderPlace):
    """A folder below the mount: looked at again where it shows an old state, never made where nothing is mounted."""

    def __init__(self, folder: Path, wait_s: float):
        super().__init__(folder)
        self.wait_s = wait_s
        self._written: dict[str, int] = {}
        """Name to size of what this process wrote: the mount may not show it yet."""

    def sizes(self) -> dict[str, int]:
        """As listed, and what this process wrote; waits a little where that is not shown in its new size."""
        _require_mounted(self.folder)
        for again in range(_STALE_TRIES):
            if all(self._size(name) == size for name, size in self._written.items()):
                break
            time.sleep(self.wait_s * 2**again)
        written = {name: self._size(name) for name in self._written}
        return super().sizes() | {name: size for name, size in written.items() if size is not None}

    def put(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            _require_mounted(self.folder)
            super().put(folder, [name])
            self._written[name] = (folder / name).stat().st_size

    def get(self, name: str, path: Path) -> None:
        _require_mounted(self.folder)
        super().get(name, path)

    def _size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None


class DriveStore:
    """Finished folders on a mounted drive; fetching copies to this machine, where random reads are fast."""

    def __init__(self, wait_s: float = 1.0):
        self.wait_s = wait_s

    def exists(self, uri: str) -> bool:
        with _one_line(uri):
            return sealed_folder.is_whole(self._place(uri))

    def facts(self, uri: str) -> dict[str, Any] | None:
        with _one_line(uri):
            return sealed_folder.facts(self._place(uri))

    def note(self, uri: str) -> dict[str, Any] | None:
        with _one_line(uri):
            return sealed_folder.note(self._place(uri))

    def below(self, uri: str) -> list[str]:
        with _one_line(uri):
            return folders_below(self._place(uri).folder, uri)

    def list(self, uri: str) -> list[str]:
        return [found for found in self.below(uri) if self.exists(found)]

    def fetch(self, uri: str, *, into: Path | None = None) -> Path:
        with _one_line(uri, full="this machine's disk"):
            return sealed_folder.fetch(self._place(uri), uri, into)

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        with _one_line(uri):
            sealed_folder.publish(folder, self._place(uri), uri, thorough)
        return uri

    def remove(self, uri: str) -> None:
        with _one_line(uri):
            self._place(uri).clear()

    def _place(self, uri: str) -> DrivePlace:
        folder = Path(uri).expanduser()
        _require_mounted(folder)
        return DrivePlace(folder, self.wait_s)


def _require_mounted(folder: Path) -> None:
    """LabError where the drive is not mounted: an empty mount point is a folder of this machine that gets lost."""
    below = folder.relative_to(mount_point()).parts
    if not below or not (mount_point() / below[0]).is_dir():
        raise _unmounted(str(folder))


def _unmounted(uri: str) -> LabError:
    return LabError(
        f"the drive is not mounted (any more) at {mount_point()}, so {uri} is not finished. Mount it "
        f"(from google.colab import drive; drive.mount({str(mount_point())!r})), then run this again: "
        "what has arrived is kept"
    )


@contextlib.contextmanager
def _one_line(uri: str, full: str = "the drive") -> Iterator[None]:
    """Turn an error of the file system into one line; `full` is what has no room left if there is none."""
    try:
        yield
    except OSError as error:
        raise _explained(error, uri, full) from None


def _explained(error: OSError, uri: str, full: str) -> LabError:
    if error.errno in _FULL:
        return LabError(
            f"{full} is full, so {uri} is not finished. Free some space (on Drive, empty the bin too), "
            "then run this again: what has arrived is kept"
        )
    top = mount_point() / Path(uri).expanduser().relative_to(mount_point()).parts[0]
    if error.errno in _GONE or not os.path.isdir(top):
        return _unmounted(uri)
    return LabError(
        f"the drive refused {uri}: {redact(error.strerror or str(error))}. Look at the folder, then run this again"
    )
