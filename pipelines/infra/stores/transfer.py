"""Copy sealed folders to and from a store, the same way for every store.

The manifest is written last, after each copied file was compared with the original (how: `RemoteFolder.holds`). A
second try copies only the files that are missing or differ. A fetched folder appears under its final name when all of
it is verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import filelock

from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

Entries = dict[str, dict[str, Any]]
"""File name, with forward slashes, to `bytes` and `sha256`."""
RUN_FILE = "run.json"
"""File that says which run an artefact belongs to. It is uploaded first and removed last, so that an interrupted
upload or removal leaves it in place."""


class RemoteFolder(Protocol):
    """The copy of one artefact in a store: files by relative name, with forward slashes."""

    def sizes(self) -> dict[str, int]:
        """Return name to size in bytes of every file; empty if there is none."""

    def holds(self, name: str, local: Path, entry: dict[str, Any]) -> bool:
        """Return True if the copy of `name` has the content of the file `local`, whose manifest entry is `entry`."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if it does not exist."""

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Upload the files `names` of `folder`; existing ones are replaced."""

    def get(self, name: str, path: Path) -> None:
        """Download one file to `path`, whose folder exists."""

    def remove(self, names: Sequence[str]) -> None:
        """Remove existing files, in this order."""

    def clear(self) -> None:
        """Remove everything, the manifest first and RUN_FILE last.

        An interrupted removal then leaves an unfinished artefact, not a damaged one.
        """

    def folders(self) -> list[str]:
        """Return the names of the folders directly below, sorted."""

    def subfolder(self, name: str) -> RemoteFolder:
        """Return the folder `name` directly below."""


class Damaged(LabError):
    """The content of a store differs from its manifest."""


def publish(folder: Path, remote: RemoteFolder, uri: str, thorough: bool = True) -> None:
    """Upload the files of the sealed `folder` that are missing or differ, verify them, then write the manifest.

    `thorough` first verifies the digests of `folder`. Without it, as for checkpoints, messages have level DEBUG. Raises
    LabError if `folder` is not sealed, or if an uploaded file differs from the original.
    """
    level = logging.INFO if thorough else logging.DEBUG
    manifest.require_complete(
        folder, "artefact", "Only finished artefacts are published: make it again", thorough=thorough
    )
    sizes = remote.sizes()
    previous = remote.read(manifest.MANIFEST) if manifest.MANIFEST in sizes else None
    content, files = _current(folder)
    kept = [name for name in manifest.EDITABLE if name in files and _was_edited(folder, remote, name, previous, sizes)]
    missing = [name for name in _differing(folder, remote, files, sizes) if name not in kept]
    if not missing and previous == content:
        logger.log(level, f"{uri} is there already, whole and the same")
        return
    # only files of the old manifest are removed: the folder may hold other artefacts and any other files
    stale = [name for name in _listed_files(previous) if name in sizes and name not in files]
    if previous is not None and (missing or stale):
        remote.remove([manifest.MANIFEST, *stale])  # from now on the copy does not match its old manifest
    if missing:
        missing.sort(key=lambda name: name != RUN_FILE)
        n_bytes = sum(files[name]["bytes"] for name in missing)
        logger.log(level, f"publishing {len(missing)} of {len(files)} files ({n_bytes / 1e6:.1f} MB) to {uri}")
        remote.put(folder, missing)
        _require_same(folder, remote, files, missing, uri)
    for name in kept:
        logger.info(f"note: {name} was edited at {uri} and stays as it is: remove it there to publish the one here")
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / manifest.MANIFEST).write_bytes(content)
        remote.put(Path(temporary), [manifest.MANIFEST])
    if remote.read(manifest.MANIFEST) != content:
        raise LabError(f"{uri} does not read back as it was published (manifest.json differs). Run this again")


def metadata(remote: RemoteFolder) -> dict[str, Any] | None:
    """Return the manifest of a complete artefact, else None. Sizes are compared; `fetch` compares digests too."""
    content = remote.read(manifest.MANIFEST)
    if content is None:
        return None
    try:
        files = entries(content, "")
    except LabError:
        return None
    sizes = remote.sizes()
    complete = all(sizes.get(name) == entry["bytes"] for name, entry in manifest.verified(files).items())
    return json.loads(content) if complete else None


def run_record(remote: RemoteFolder) -> dict[str, Any] | None:
    """Return the content of RUN_FILE, also of an unfinished artefact.

    Returns {} for an empty folder, and None if there are files but no valid RUN_FILE.
    """
    content = remote.read(RUN_FILE)
    if content is None:
        return None if remote.sizes() else {}
    with contextlib.suppress(ValueError):
        record = json.loads(content)
        return record if isinstance(record, dict) and record else None
    return None


def is_complete(remote: RemoteFolder) -> bool:
    """Return True if the folder holds a sealed artefact and every file has its size."""
    return metadata(remote) is not None


def fetch(remote: RemoteFolder, uri: str, into: Path | None = None) -> Path:
    """Download the artefact and verify every byte. Returns its local folder.

    The folder, in `into` or in the cache, is named after the artefact and the manifest's sha256: a new version gets a
    new folder, and an existing folder is only verified. An interrupted download is resumed.
    """
    content = remote.read(manifest.MANIFEST)
    if content is None:
        raise LabError(
            f"nothing finished at {uri}: {'it has no manifest' if remote.sizes() else 'there is nothing'}. "
            "Check the URI, or publish the artefact to it (again)"
        )
    files = entries(content, uri)
    target = (into or environment.cache_folder() / "fetched") / _folder_name(uri, content)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f".{target.name}.lock")):
        if manifest.problem(target) is not None:
            _download(remote, files, content, target, uri)
    return target


def entries(content: bytes, uri: str) -> Entries:
    """Return the files in a manifest. Raises LabError if it is damaged or names files outside its folder."""
    try:
        files = json.loads(content)["files"]
        valid = all({"bytes", "sha256"} <= entry.keys() and _is_inside(name) for name, entry in files.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise LabError(
            f"the manifest of {uri} is damaged or names files outside its folder: publish the artefact again"
        )
    return files


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "."} & set(name.split("/")) and "\\" not in name


def _current(folder: Path) -> tuple[bytes, Entries]:
    """Return the manifest of a sealed folder and its files, with the entries of EDITABLE files as they are now."""
    content = (folder / manifest.MANIFEST).read_bytes()
    listed = entries(content, str(folder))
    files = manifest.verified(listed)
    for name in (name for name in listed if name in manifest.EDITABLE and (folder / name).is_file()):
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": manifest.sha256(folder / name)}
    if files != listed:
        content = json.dumps({**json.loads(content), "files": dict(sorted(files.items()))}, indent=1).encode()
    return content, files


def _was_edited(folder: Path, remote: RemoteFolder, name: str, previous: bytes | None, sizes: dict[str, int]) -> bool:
    """Return True if a file of the copy was written by a person.

    It differs from the manifest that was published with it; or no manifest names it, and it is no generated card.
    """
    if name not in sizes:
        return False
    entry = entries(previous, "").get(name) if _listed_files(previous) else None
    if entry is not None:
        return hashlib.sha256(remote.read(name)).hexdigest() != entry["sha256"]
    return _is_generated((folder / name).read_bytes()) and not _is_generated(remote.read(name) or b"")


def _is_generated(card: bytes) -> bool:
    """Return True for a card with the end of manifest.GENERATED, which older versions begin differently."""
    return b"Remove this line to keep a card of your own. -->" in card


def _differing(folder: Path, remote: RemoteFolder, files: Entries, sizes: dict[str, int]) -> list[str]:
    """Return the files that the copy lacks or has with other content."""
    return [
        name
        for name, entry in files.items()
        if sizes.get(name) != entry["bytes"] or not remote.holds(name, folder / name, entry)
    ]


def _require_same(folder: Path, remote: RemoteFolder, files: Entries, names: list[str], uri: str) -> None:
    differing = _differing(folder, remote, {name: files[name] for name in names}, remote.sizes())
    if differing:
        raise LabError(
            f"{uri} does not read back as it was published ({differing[0]} differs or is missing), and is not "
            "finished. Run this again: what has arrived whole is kept"
        )


def _listed_files(content: bytes | None) -> list[str]:
    """Return the files in an older manifest; none if it is missing or damaged."""
    try:
        return [*entries(content, "")] if content is not None else []
    except LabError:
        return []


def _download(remote: RemoteFolder, files: Entries, content: bytes, target: Path, uri: str) -> None:
    """Download missing files to a hidden folder, and rename it to `target` when it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    if target.exists():
        shutil.rmtree(partial, ignore_errors=True)
        target.rename(partial)  # damaged: its valid files are kept
    sizes = remote.sizes()
    files = {name: entry for name, entry in files.items() if name in sizes or name not in manifest.EDITABLE}
    missing = [name for name, entry in files.items() if not _has_content(partial / name, entry)]
    n_bytes = sum(files[name]["bytes"] for name in missing)
    logger.info(f"fetching {len(missing)} of {len(files)} files ({n_bytes / 1e6:.1f} MB) from {uri}")
    for name in missing:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        remote.get(name, partial / name)
        if name not in manifest.EDITABLE and not _has_content(partial / name, files[name]):
            (partial / name).unlink(missing_ok=True)
            raise Damaged(f"{name} of {uri} arrived damaged (its size or sha256 differs). Run this again to fetch it")
    _remove_other_files(partial, {*files})
    with open(partial / manifest.MANIFEST, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(target)
    manifest.sync_folder(target.parent)


def _has_content(path: Path, entry: dict[str, Any]) -> bool:
    """Return True if a local file has the size and sha256 of its manifest entry."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and manifest.sha256(path) == entry["sha256"]


def _remove_other_files(folder: Path, names: set[str]) -> None:
    """Remove files that are not in `names`, such as a client's download records or files of an older version."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _folder_name(uri: str, content: bytes) -> str:
    last = PurePosixPath(uri.rstrip("/").partition("@")[0]).name or "artefact"
    return f"{last}-{hashlib.sha256(content).hexdigest()[:12]}"
