"""Stores of finished artefacts: a local folder, a mounted drive, the Hugging Face Hub, a Hopsworks project.

Work is local; stores copy sealed folders (manifest.py). The manifest of a copy is written last, and the copy counts
when it has been verified. A fetched folder appears when every byte is verified. A new store needs one module and one
row in the table below, and must pass tests/infra/stores/test_stores.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines.infra.errors import LabError
from pipelines.infra.stores import drive, hopsworks, hub, local
from pipelines.infra.stores.store import Store

_STORES: tuple[tuple[Callable[[str], bool], Callable[[], Store]], ...] = (
    (lambda uri: uri.startswith("hub://"), hub.HubStore),
    (lambda uri: uri.startswith("hopsworks://"), hopsworks.HopsworksStore),
    (drive.is_on_drive, drive.DriveStore),
    (lambda uri: "://" not in uri, local.LocalStore),
)
"""Test of a URI and its store; the first match counts."""


def open_store(uri: str) -> Store:
    """Return the store of `uri`: hub://owner/name[/path][@revision], hopsworks://project/path, or a folder."""
    for matches, store in _STORES:
        if matches(uri):
            return store()
    raise LabError(
        f"no store for {uri}: expected a folder, hub://owner/name[/path][@revision] or hopsworks://project/path"
    )


def is_remote(uri: str) -> bool:
    """Return True if `uri` is not a path."""
    return "://" in uri


def is_local_path(uri: str) -> bool:
    """Return True if a model's URI is a path of this machine and not a Hub id."""
    return uri.startswith((".", "/", "~")) or Path(uri).expanduser().is_dir()


def local_folder(uri: str) -> Path:
    """Return the folder with the artefact `uri`: a local path unchanged, anything else fetched to this machine."""
    store = open_store(uri)
    return Path(uri).expanduser() if isinstance(store, local.LocalStore) else store.fetch(uri)
