"""Finished folders: an artefact counts only once its manifest, written last, is in place.

A folder without `manifest.json` is unfinished and never used; one with it is whole, and every file in it has a size
and a sha256. Caches, checkpoints, models and reports are all such folders.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.infra.errors import LabError

MANIFEST = "manifest.json"


def seal(folder: Path, *, known_sha256: Mapping[str, str] | None = None, **facts: Any) -> dict[str, Any]:
    """Write the manifest of `folder`: size and sha256 of every file in it, and `facts`. Returns the manifest.

    Every file is flushed to the disk before the manifest is, so that a manifest never outlives its files.
    `known_sha256` (file name to digest) names files that were hashed while they were written; others are read.
    """
    known = known_sha256 or {}
    names = {path: path.relative_to(folder).as_posix() for path in sorted(_files(folder))}
    files = {name: _entry(path, known.get(name)) for path, name in names.items()}
    manifest = {**facts, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def amend(folder: Path, **facts: Any) -> None:
    """Add facts to the manifest of a sealed folder; its files stay as they are."""
    write_json(folder / MANIFEST, {**read(folder), **facts})


def replace(folder: Path, name: str, content: bytes, **facts: Any) -> None:
    """Exchange one file of a sealed folder and add facts to its manifest.

    The folder is whole at every moment: while the file is exchanged, the manifest does not name it.
    """
    sealed = {**read(folder), **facts}
    others = {other: entry for other, entry in sealed["files"].items() if other != name}
    write_json(folder / MANIFEST, {**sealed, "files": others})
    write_bytes(folder / name, content)
    write_json(folder / MANIFEST, {**sealed, "files": dict(sorted({**others, name: _entry(folder / name)}.items()))})


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None where there is none or it is no JSON object."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def problem(folder: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with `folder` in a few words, or None if it is whole.

    `thorough` reads every byte and compares digests; otherwise sizes alone are compared.
    """
    manifest = read(folder)
    if manifest is None:
        return "unfinished (it has no manifest)" if folder.exists() else "absent"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not (isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()):
            return f"the manifest's entry of {name} is damaged"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    return _damaged(folder, manifest["files"]) if thorough else None


def require_whole(folder: Path, what: str, mend: str, *, thorough: bool = True) -> dict[str, Any]:
    """The manifest of a whole folder; LabError naming `what`, the fault and the `mend` otherwise."""
    fault = problem(folder, thorough=thorough)
    if fault:
        raise LabError(f"{what} {folder} cannot be used: {fault}. {mend}")
    return read(folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either its old content or all of the new."""
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds either its old content or all of the new."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        _flush(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def flush(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with open(path, "rb") as file:
        _flush(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, so that a rename survives a loss of power (not every file system can)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        _flush(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, entries: dict[str, Any]) -> str | None:
    """The first file whose bytes are not those that were sealed; hashed on all cores."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: sha256(folder / name), entries)
        for (name, entry), found in zip(entries.items(), digests, strict=True):
            if found != entry["sha256"]:
                pool.shutdown(wait=False, cancel_futures=True)
                return f"{name} is damaged (its sha256 differs)"
    return None


def _flush(handle: int) -> None:
    """fsync where the file system can: network and Drive mounts answer EINVAL or ENOTSUP, and flush on their own."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".partial") and path != folder / MANIFEST
    ]


def _entry(path: Path, known_sha256: str | None = None) -> dict[str, Any]:
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": known_sha256 or sha256(path)}


_PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_sha256() -> str:
    """Of this package: every module's name and content."""
    code = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(_PACKAGE).as_posix()} {sha256(path)}\n".encode())
    return code.hexdigest()[:12]
