"""Sealed folders: an artefact is finished once its manifest, which is written last, exists.

A folder without `manifest.json` is unfinished and never used. The manifest lists size and sha256 of every file in the
folder. Caches, checkpoints, models and reports are such folders. Files that people edit in a finished folder (EDITABLE)
are listed and copied, but not verified.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
EDITABLE = ("README.md", ".gitattributes")
"""Files that people edit in a finished folder, here or on the Hub. They may differ from the manifest or be missing."""
GENERATED = "<!-- Generated from the cache. Remove this line to keep a card of your own. -->"
"""A line of cards that may be replaced by newer ones: without it, a person wrote the card."""
_SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that systems add to folders that people look at."""
PACKAGE = Path(__file__).parents[1]
"""The folder of this package's code."""


def seal(folder: Path, *, computed_sha256: Mapping[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    """Write and return the manifest of `folder`: `fields`, and size and sha256 of every file.

    Every file is flushed to the disk before the manifest, so that after a crash no manifest names a missing file. Every
    file gets the permissions of a new file: safetensors writes weights that only their owner can read.
    `computed_sha256` has the digests of files that were hashed while they were written; the others are read.
    """
    digests = computed_sha256 or {}
    names = {path: path.relative_to(folder).as_posix() for path in sorted(_files(folder))}
    _permit_readers(names)
    files = {name: _entry(path, digests.get(name)) for path, name in names.items()}
    manifest = {**fields, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def amend(folder: Path, **fields: Any) -> None:
    """Add or replace fields of a sealed folder's manifest; its files do not change."""
    write_json(folder / MANIFEST, {**read(folder), **fields})


def replace(folder: Path, name: str, content: bytes, **fields: Any) -> None:
    """Replace one file of a sealed folder, and add fields to its manifest.

    The folder is valid at every moment: while the file is replaced, the manifest does not name it.
    """
    sealed = {**read(folder), **fields}
    others = {other: entry for other, entry in sealed["files"].items() if other != name}
    write_json(folder / MANIFEST, {**sealed, "files": others})
    write_bytes(folder / name, content)
    write_json(folder / MANIFEST, {**sealed, "files": dict(sorted({**others, name: _entry(folder / name)}.items()))})


def read(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of `folder`, or None if it is missing or invalid."""
    manifest = read_json(folder / MANIFEST)
    return manifest if manifest is not None and isinstance(manifest.get("files"), dict) else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # RecursionError: nested a thousand times
        return None
    return value if isinstance(value, dict) else None


def made_at(folder: Path) -> float:
    """Return when a complete folder was made, in seconds since 1970: the manifest's field `made`.

    Manifests of older versions may lack it: then it is the time of the weights, which are written once, or else that of
    the manifest.
    """
    try:
        return datetime.fromisoformat((read(folder) or {})["made"]).timestamp()
    except (KeyError, TypeError, ValueError):
        weights = folder / "model.safetensors"
        return (weights if weights.is_file() else folder / MANIFEST).stat().st_mtime


def problem(folder: Path, *, thorough: bool = True) -> str | None:
    """Return a short description of what is wrong with `folder`, or None if it is complete.

    With `thorough` every file is read and its digest compared, otherwise only its size.
    """
    manifest = read(folder)
    if manifest is None:
        if (folder / MANIFEST).exists():
            return f"{MANIFEST} is damaged"
        return "unfinished (it has no manifest)" if folder.exists() else "absent"
    files = verified(manifest["files"])
    for name, entry in files.items():
        path = folder / name
        if not (isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()):
            return f"the manifest's entry of {name} is damaged"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    return _damaged(folder, files) if thorough else None


def verified(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a manifest without those of EDITABLE."""
    return {name: entry for name, entry in files.items() if name not in EDITABLE}


def require_complete(folder: Path, what: str, remedy: str, *, thorough: bool = True) -> dict[str, Any]:
    """Return the manifest of a complete folder. Raises LabError with `what`, the problem and the `remedy` otherwise."""
    fault = problem(folder, thorough=thorough)
    if fault:
        raise LabError(f"{what} {folder} cannot be used: {fault}. {remedy}")
    return read(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: after a crash it has its old or its new content."""
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has its old or its new content, whichever process writes it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            _flush(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def flush(path: Path) -> None:
    """Flush a file to the disk."""
    with open(path, "rb") as file:
        _flush(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power failure, if the file system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        _flush(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return the sha256 of a file; it is read once in a process while its size and time stay the same."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def move_aside(folder: Path, fault: str) -> Path:
    """Rename a damaged folder to `<name>.damaged-1` (or the next free number), log that, and return the new path."""
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.damaged-{n}").exists())
    aside = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(aside)
    logger.info(f"{folder} is damaged ({fault}): it was moved to {aside.name} and is made again")
    return aside


def _damaged(folder: Path, entries: dict[str, Any]) -> str | None:
    """Return a description of the first file with another digest, or None. Files are hashed in parallel."""

    def fault(name: str) -> str | None:
        try:
            same = sha256(folder / name) == entries[name]["sha256"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if same else f"{name} is damaged (its sha256 differs)"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for problem in pool.map(fault, entries):
            if problem:
                pool.shutdown(wait=False, cancel_futures=True)
                return problem
    return None


def _flush(handle: int) -> None:
    """Call fsync if the file system supports it: network and Drive mounts return EINVAL or ENOTSUP."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.endswith(".partial")
        and path != folder / MANIFEST
        and path.name not in _SYSTEM_FILES
    ]


def _permit_readers(files: Iterable[Path]) -> None:
    """Give files at least the permissions that a new file gets, if this process may change them."""
    mask = os.umask(0o022)  # the only way to read it
    os.umask(mask)
    for path in files:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode | 0o666 & ~mask != mode:
            with contextlib.suppress(OSError):  # another user's file, a mount without permissions
                path.chmod(mode | 0o666 & ~mask)


def _entry(path: Path, digest: str | None = None) -> dict[str, Any]:
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": digest or sha256(path)}


@functools.cache
def code_sha256() -> str:
    """Return 12 hexadecimal digits of the sha256 of all modules of this package, names and content."""
    code = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(PACKAGE).as_posix()} {sha256(path)}\n".encode())
    return code.hexdigest()[:12]
