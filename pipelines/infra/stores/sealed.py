"""Moving a sealed folder: what is there, what is missing, and when a copy counts as whole.

Every store moves folders by the functions here, so all of them keep the same promises: the manifest is put last and
read back; every file is read back before that; a second try moves only what is missing; what is fetched appears under
its name when all of it is there and verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import filelock

from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

Entries = dict[str, dict[str, Any]]
"""File name, with forward slashes, to `bytes` and `sha256`."""


NOTE = "run.json"
"""A file that tells whose an artefact is, where it holds one: it is put first and removed last, so that it is in what a
push or a removal left that was cut off."""


class Place(Protocol):
    """The copy of one artefact in a store: files by name, relative, with forward slashes."""

    def sizes(self) -> dict[str, int]:
        """Name to size in bytes of every file that is there now; empty where there is nothing."""

    def holds(self, name: str, local: Path, entry: dict[str, Any]) -> bool:
        """Whether the copy of `name` has the content of the file `local`, whose manifest entry is `entry`."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file, or None where it is not there."""

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Upload the files `names` of `folder`, over older ones."""

    def get(self, name: str, path: Path) -> None:
        """Download one file; the folder of `path` exists."""

    def remove(self, names: Sequence[str]) -> None:
        """Remove files that are there, in this order."""

    def clear(self) -> None:
        """Remove everything, the manifest first: what a removal that breaks off leaves is unfinished, not damaged.

        NOTE goes last.
        """


class Damaged(LabError):
    """What lies in a store is not what its manifest says."""


def publish(folder: Path, place: Place, uri: str, thorough: bool = True) -> None:
    """Bring the sealed `folder` to `place`, what is missing only, and read everything back; the manifest goes last."""
    manifest.require_whole(
        folder, "artefact", "Only finished artefacts are published: make it again", thorough=thorough
    )
    content = (folder / manifest.MANIFEST).read_bytes()
    files = entries(content, str(folder))
    sizes = place.sizes()
    missing = _unlike(folder, place, files, sizes)
    before = place.read(manifest.MANIFEST) if manifest.MANIFEST in sizes else None
    if not missing and before == content:
        logger.info(f"{uri} is there already, whole and the same")
        return
    # only what the old manifest names is removed: other artefacts may lie below, and in a folder anything else
    stale = [name for name in _named(before) if name in sizes and name not in files]
    if before is not None and (missing or stale):
        place.remove([manifest.MANIFEST, *stale])  # from here on the copy is not what its old manifest says
    if missing:
        missing.sort(key=lambda name: name != NOTE)
        n_bytes = sum(files[name]["bytes"] for name in missing)
        logger.info(f"publishing {len(missing)} of {len(files)} files ({n_bytes / 1e6:.1f} MB) to {uri}")
        place.put(folder, missing)
        _require_alike(folder, place, files, missing, uri)
    place.put(folder, [manifest.MANIFEST])
    if place.read(manifest.MANIFEST) != content:
        raise LabError(f"{uri} does not read back as it was published (manifest.json differs). Run this again")


def facts(place: Place) -> dict[str, Any] | None:
    """The manifest of a sealed artefact that is there with every file in its size (`fetch` compares every byte)."""
    content = place.read(manifest.MANIFEST)
    if content is None:
        return None
    try:
        files = entries(content, "")
    except LabError:
        return None
    sizes = place.sizes()
    alike = all(sizes.get(name) == entry["bytes"] for name, entry in files.items())
    return json.loads(content) if alike else None


def note(place: Place) -> dict[str, Any] | None:
    """What the artefact's NOTE tells, finished or not; {} where no file is there, None where others are without it."""
    content = place.read(NOTE)
    if content is None:
        return None if place.sizes() else {}
    with contextlib.suppress(ValueError):
        told = json.loads(content)
        return told if isinstance(told, dict) and told else None
    return None


def is_whole(place: Place) -> bool:
    """Whether a sealed artefact is there with every file in its size."""
    return facts(place) is not None


def fetch(place: Place, uri: str, into: Path | None = None) -> Path:
    """Bring the artefact at `place` to this machine and verify every byte. Returns its folder.

    The folder is named by the artefact and its manifest's sha256, so an artefact that was published anew is fetched
    anew, and one that is at hand is only verified. It appears when it is whole; what a cut-off fetch left is used.
    """
    content = place.read(manifest.MANIFEST)
    if content is None:
        raise LabError(
            f"nothing finished at {uri}: {'it has no manifest' if place.sizes() else 'there is nothing'}. "
            "Check the URI, or publish the artefact to it (again)"
        )
    files = entries(content, uri)
    home = (into or environment.cache_folder() / "fetched") / _name(uri, content)
    home.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(home.with_name(f".{home.name}.lock")):
        if manifest.problem(home) is not None:
            _complete(place, files, content, home, uri)
    return home


def entries(content: bytes, uri: str) -> Entries:
    """The files that a manifest names; LabError for one that is damaged or names files outside its folder."""
    try:
        files = json.loads(content)["files"]
        sound = all({"bytes", "sha256"} <= entry.keys() and _is_inside(name) for name, entry in files.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise LabError(
            f"the manifest of {uri} is damaged or names files outside its folder: publish the artefact again"
        )
    return files


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "."} & set(name.split("/")) and "\\" not in name


def _unlike(folder: Path, place: Place, files: Entries, sizes: dict[str, int]) -> list[str]:
    """The files that the copy lacks, or has with another content."""
    return [
        name
        for name, entry in files.items()
        if sizes.get(name) != entry["bytes"] or not place.holds(name, folder / name, entry)
    ]


def _require_alike(folder: Path, place: Place, files: Entries, names: list[str], uri: str) -> None:
    wrong = _unlike(folder, place, {name: files[name] for name in names}, place.sizes())
    if wrong:
        raise LabError(
            f"{uri} does not read back as it was published ({wrong[0]} differs or is missing), and is not finished. "
            "Run this again: what has arrived whole is kept"
        )


def _named(content: bytes | None) -> list[str]:
    """The files that an older manifest names; none where there is none, or a damaged one."""
    try:
        return [*entries(content, "")] if content is not None else []
    except LabError:
        return []


def _complete(place: Place, files: Entries, content: bytes, home: Path, uri: str) -> None:
    """Fetch what is missing into a folder aside, and give it its name when it is whole."""
    aside = home.with_name(f".{home.name}.partial")
    if home.exists():
        shutil.rmtree(aside, ignore_errors=True)
        home.rename(aside)  # damaged: what is whole of it is kept
    missing = [name for name, entry in files.items() if not is_alike(aside / name, entry)]
    n_bytes = sum(files[name]["bytes"] for name in missing)
    logger.info(f"fetching {len(missing)} of {len(files)} files ({n_bytes / 1e6:.1f} MB) from {uri}")
    for name in missing:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        place.get(name, aside / name)
        if not is_alike(aside / name, files[name]):
            (aside / name).unlink(missing_ok=True)
            raise Damaged(
                f"{name} of {uri} arrived damaged (its size or sha256 differs). Run this again to fetch it anew"
            )
    _keep_only(aside, {*files})
    with open(aside / manifest.MANIFEST, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(home)
    manifest.sync_folder(home.parent)


def is_alike(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a local file has the size and sha256 of its manifest entry."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and manifest.sha256(path) == entry["sha256"]


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove what a client left beside the files: notes on downloads, and files of an older artefact."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _name(uri: str, content: bytes) -> str:
    last = PurePosixPath(uri.rstrip("/").partition("@")[0]).name or "artefact"
    return f"{last}-{hashlib.sha256(content).hexdigest()[:12]}"
