"""Where finished artefacts are kept: a folder, a mounted drive, the Hugging Face Hub, a Hopsworks project.

Work is local; stores move sealed folders (manifest.py). A copy counts once its manifest, put last, has been read back,
and what is fetched appears when every byte of it is verified. A new store is one file, one row of the table below, and
the contract suite tests/infra/stores/test_stores.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pipelines.infra.errors import LabError
from pipelines.infra.stores import drive, hopsworks, hub, local


class Store(Protocol):
    """A back end. Every method raises LabError, one line without a token, for what a user can cause or mend."""

    def exists(self, uri: str) -> bool:
        """Whether a finished artefact is at `uri`; an unfinished one does not count."""

    def facts(self, uri: str) -> dict[str, Any] | None:
        """The manifest of the finished artefact at `uri`, without its files; None where there is none."""

    def note(self, uri: str) -> dict[str, Any] | None:
        """What run.json of the artefact at `uri` tells, finished or not: whose it is.

        Empty where there is no file at all; None where there are files, and no such one among them.
        """

    def below(self, uri: str) -> list[str]:
        """URIs of the folders directly below `uri`, finished or not, sorted."""

    def list(self, uri: str) -> list[str]:
        """URIs of the finished artefacts directly below `uri`, sorted."""

    def fetch(self, uri: str, *, into: Path | None = None) -> Path:
        """The folder on this machine that holds the artefact, every byte verified; a cut-off fetch goes on.

        `into` is the folder that a copy is made in, also of a folder. sealed.Damaged where bytes differ.
        """

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        """Copy the sealed `folder` to `uri`, what is missing only, read back. Returns the URI of what was published.

        Without `thorough` the folder itself is not verified byte for byte before.
        """

    def remove(self, uri: str) -> None:
        """Remove what lies at `uri` and below, finished or not."""


_TABLE: tuple[tuple[Callable[[str], bool], Callable[[], Store]], ...] = (
    (lambda uri: uri.startswith("hub://"), hub.HubStore),
    (lambda uri: uri.startswith("hopsworks://"), hopsworks.HopsworksStore),
    (drive.is_on_drive, drive.DriveStore),
    (lambda uri: "://" not in uri, local.LocalStore),
)
"""The first row that takes a URI names its store."""


def open_store(uri: str) -> Store:
    """The store of `uri`: hub://owner/name[/path][@revision], hopsworks://project/path, or a folder (on a drive)."""
    for takes, store in _TABLE:
        if takes(uri):
            return store()
    raise LabError(
        f"no store for {uri}: expected a folder, hub://owner/name[/path][@revision] or hopsworks://project/path"
    )


def is_remote(uri: str) -> bool:
    """Whether `uri` is not a path."""
    return "://" in uri


def at_hand(uri: str) -> Path:
    """The folder that holds the artefact `uri`: a local path as it is, anything else fetched to this machine."""
    store = open_store(uri)
    return Path(uri).expanduser() if isinstance(store, local.LocalStore) else store.fetch(uri)


def is_folder(uri: str) -> bool:
    """Whether a model's URI is a path of this machine."""
    return uri.startswith((".", "/", "~")) or Path(uri).expanduser().is_dir()
