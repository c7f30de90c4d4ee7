"""Stamps of files for identities: size and content, or size and time for much audio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.features.sources import lines_sha256
from pipelines.infra import files
from pipelines.infra.errors import LabError
from pipelines.infra.manifest import sha256

HASHED_BYTES = 200_000_000
"""Below this size of all files, stamps hash their content; from it on, sizes and modification times.

A copy with other times is then another corpus.
"""
ABSENT = "absent"


def stamp_all(root: Path, paths: Sequence[Path]) -> tuple[str, str]:
    """Return what the stamps are made of, and a digest of path and stamp of all files below `root`.

    Raises Unavailable if a file cannot be read at the moment, LabError for a name that is no text.
    """
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise LabError(f"names of files must be in UTF-8, got {str(path)!a}: rename it") from None
    sizes = [files.retry(lambda path=path: path.stat().st_size, path) for path in paths if files.is_file(path)]
    by_content = sum(sizes) < HASHED_BYTES
    stamps = (f"{path.relative_to(root)} {_stamp(path, by_content)}" for path in paths)
    return "content" if by_content else "size and time", lines_sha256(sorted(stamps))


def _stamp(path: Path, by_content: bool) -> str:
    def read() -> str:
        about = os.stat(path)
        return f"{about.st_size} {sha256(path) if by_content else about.st_mtime_ns}"

    try:
        return files.retry(read, path)
    except (OSError, ValueError):
        return ABSENT
