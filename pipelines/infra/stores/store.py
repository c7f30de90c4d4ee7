"""The base class of all stores."""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipelines.infra.stores import transfer
from pipelines.infra.stores.transfer import RemoteFolder


class Store(abc.ABC):
    """Finished artefacts at URIs.

    Methods raise LabError, one line without a token, for errors that a user can cause or fix.
    """

    @abc.abstractmethod
    def open_folder(self, uri: str) -> AbstractContextManager[RemoteFolder]:
        """Yield the folder at `uri`; errors of the block become LabError."""

    def exists(self, uri: str) -> bool:
        """Return True if a finished artefact is at `uri`."""
        return self.metadata(uri) is not None

    def metadata(self, uri: str) -> dict[str, Any] | None:
        """Return the manifest of the finished artefact at `uri`, or None."""
        with self.open_folder(uri) as folder:
            return transfer.metadata(folder)

    def run_record(self, uri: str) -> dict[str, Any] | None:
        """Return run.json of the artefact at `uri`, finished or not, which says which run it belongs to.

        Returns {} if there is no file at all, and None if there are files but no valid run.json.
        """
        with self.open_folder(uri) as folder:
            return transfer.run_record(folder)

    def list_folders(self, uri: str) -> list[str]:
        """Return the URIs of the folders directly below `uri`, finished or not, sorted."""
        with self.open_folder(uri) as folder:
            return [f"{uri.rstrip('/')}/{name}" for name in folder.folders()]

    def list(self, uri: str) -> list[str]:
        """Return the URIs of the finished artefacts directly below `uri`, sorted."""
        with self.open_folder(uri) as folder:
            complete = [name for name in folder.folders() if transfer.is_complete(folder.subfolder(name))]
            return [f"{uri.rstrip('/')}/{name}" for name in complete]

    def fetch(self, uri: str, *, into: Path | None = None) -> Path:
        """Return a folder of this machine with the artefact, every byte verified; an interrupted fetch is resumed.

        `into` is the folder for the copy. Raises transfer.Damaged if bytes differ.
        """
        with self.open_folder(uri) as folder:
            return transfer.fetch(folder, uri, into)

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        """Copy missing files of the sealed `folder` to `uri` and read them back. Returns the URI of this version.

        Without `thorough`, only the sizes of the files in `folder` are verified before.
        """
        with self.open_folder(uri) as remote:
            transfer.publish(folder, remote, uri, thorough)
        return uri

    def remove(self, uri: str) -> None:
        """Remove everything at `uri` and below, finished or not."""
        with self.open_folder(uri) as folder:
            folder.clear()
