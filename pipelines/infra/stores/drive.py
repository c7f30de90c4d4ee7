"""A mounted drive (Google Drive in Colab) as a store: it may be full, disappear, or show old listings.

Files written to Drive are buffered by the mount and uploaded later; reading them back proves only that the mount has
them. Call `drive.flush_and_unmount()` before a Colab machine is given back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.infra.errors import LabError
from pipelines.infra.stores import transfer
from pipelines.infra.stores.errors import redact_secrets
from pipelines.infra.stores.local import LocalFolder
from pipelines.infra.stores.store import Store

MOUNT = "/content/drive"
"""Colab's mount point of Google Drive; LAB_DRIVE names another one."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNMOUNTED = (errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN)
_STALE_TRIES = 3


def mount_point() -> Path:
    """Return the folder under which the drive is mounted."""
    return Path(os.environ.get("LAB_DRIVE") or MOUNT)


def is_on_drive(uri: str) -> bool:
    """Return True if `uri` is a path below the mount point."""
    return "://" not in uri and Path(uri).expanduser().is_relative_to(mount_point())


class DriveFolder(LocalFolder):
    """A folder below the mount point: outdated listings are read again, and nothing is written if it is unmounted."""

    def __init__(self, folder: Path, wait_s: float):
        super().__init__(folder)
        self.wait_s = wait_s
        self._written: dict[str, int] = {}
        """Name to size of files that this process wrote; the mount may not list them yet."""

    def sizes(self) -> dict[str, int]:
        """Return name to size; wait a little for files that this process wrote and the mount does not show yet."""
        _require_mounted(self.folder)
        for attempt in range(_STALE_TRIES):
            if all(self._size(name) == size for name, size in self._written.items()):
                break
            time.sleep(self.wait_s * 2**attempt)
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

    def subfolder(self, name: str) -> DriveFolder:
        return DriveFolder(self.folder / name, self.wait_s)

    def _size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None


class DriveStore(Store):
    """Folders on a mounted drive. `fetch` copies to this machine, where random reads are fast."""

    def __init__(self, wait_s: float = 1.0):
        self.wait_s = wait_s
        """First wait for an outdated listing, seconds; doubled for each further one."""

    @contextlib.contextmanager
    def open_folder(self, uri: str, full_disk: str = "the drive") -> Iterator[DriveFolder]:
        """Yield the folder at `uri`. `full_disk` is named in the error if no space is left."""
        try:
            folder = Path(uri).expanduser()
            _require_mounted(folder)
            yield DriveFolder(folder, self.wait_s)
        except OSError as error:
            raise _explain(error, uri, full_disk) from None

    def fetch(self, uri: str, *, into: Path | None = None) -> Path:
        with self.open_folder(uri, full_disk="this machine's disk") as folder:
            return transfer.fetch(folder, uri, into)


def _require_mounted(folder: Path) -> None:
    """Raise LabError if the drive is not mounted: the empty mount point is a folder of this machine that is lost."""
    below = folder.relative_to(mount_point()).parts
    if not below or not (mount_point() / below[0]).is_dir():
        raise _not_mounted(str(folder))


def _not_mounted(uri: str) -> LabError:
    return LabError(
        f"the drive is not mounted (any more) at {mount_point()}, so {uri} is not finished. Mount it "
        f"(from google.colab import drive; drive.mount({str(mount_point())!r})), then run this again: "
        "what has arrived is kept"
    )


def _explain(error: OSError, uri: str, full_disk: str) -> LabError:
    if error.errno in _FULL:
        return LabError(
            f"{full_disk} is full, so {uri} is not finished. Free some space (on Drive, empty the bin too), "
            "then run this again: what has arrived is kept"
        )
    top = mount_point() / Path(uri).expanduser().relative_to(mount_point()).parts[0]
    if error.errno in _UNMOUNTED or not os.path.isdir(top):
        return _not_mounted(uri)
    detail = redact_secrets(error.strerror or str(error))
    return LabError(f"the drive refused {uri}: {detail}. Look at the folder, then run this again")
