"""Find the file that a cell of a table means, although another system wrote its name.

A name is tried as it is, then without blanks and quotes around it, with `/` for `\\`, without `file://` and `%20`. Each
folder and file name may differ in its Unicode form (macOS writes NFD) or, if only one fits, in case. The path may come
from another machine or start at another folder: see `FileLookup.find`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

_DRIVE_OR_SHARE = re.compile(r"^([a-zA-Z]:)?/+")


class FileLookup:
    """Looks up files below a folder. The lists of its folders are read on the first miss, and kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[Path, list[str]] = {}

    def find(self, name: str) -> Path | None:
        """Return the path, relative to the folder, of the one existing file that `name` means; else None.

        Accepted besides the path itself: an absolute path, of which exactly one end exists below the folder; a path
        that starts with the folder's own name; and a bare name that exactly one of its direct subfolders holds.
        """
        for spelling in spellings(name):
            for candidates in (self._relative, self._from_parent, self._from_elsewhere, self._in_subfolder):
                matches = {match for parts in candidates(spelling) if (match := self._match(parts))}
                if len(matches) == 1:
                    return matches.pop()
        return None

    def _relative(self, name: str) -> Iterator[tuple[str, ...]]:
        path = PurePosixPath(os.path.normpath(name))
        if not _DRIVE_OR_SHARE.match(name) and ".." not in path.parts:
            yield path.parts

    def _from_parent(self, name: str) -> Iterator[tuple[str, ...]]:
        """Yield `clips/a.wav` for `corpus/clips/a.wav` and `../corpus/clips/a.wav` if the folder is called `corpus`."""
        parts = tuple(part for part in PurePosixPath(os.path.normpath(name)).parts if part != "..")
        own = self.folder.absolute().parts
        if not _DRIVE_OR_SHARE.match(name):
            yield from (parts[n:] for n in range(1, len(parts)) if own[-n:] == parts[:n])

    def _from_elsewhere(self, name: str) -> Iterator[tuple[str, ...]]:
        """Yield all ends of an absolute path."""
        if _DRIVE_OR_SHARE.match(name):
            parts = PurePosixPath(_DRIVE_OR_SHARE.sub("", name)).parts
            yield from (parts[n:] for n in range(len(parts)) if ".." not in parts)

    def _in_subfolder(self, name: str) -> Iterator[tuple[str, ...]]:
        if name and "/" not in name:
            yield from ((folder, name) for folder in self._listed(self.folder) if not folder.startswith("."))

    def _match(self, parts: tuple[str, ...]) -> Path | None:
        """Return the existing file with these parts, each of which may differ in Unicode form or case."""
        if not parts or os.path.isfile(self.folder.joinpath(*parts)):
            return Path(*parts) if parts else None
        found: list[str] = []
        for part in parts:
            actual = self._actual(self.folder.joinpath(*found), part)
            if actual is None:
                return None
            found.append(actual)
        return Path(*found) if os.path.isfile(self.folder.joinpath(*found)) else None

    def _actual(self, folder: Path, name: str) -> str | None:
        """Return the name in `folder` that equals `name`, else the only one that does in NFC, else without case."""
        names = self._listed(folder)
        if name in names:
            return name
        forms: tuple[Callable[[str], str], ...] = (_composed, lambda text: _composed(text).casefold())
        for form in forms:
            matches = [other for other in names if form(other) == form(name)]
            if matches:
                return matches[0] if len(matches) == 1 else None
        return None

    def _listed(self, folder: Path) -> list[str]:
        if folder not in self._names:
            try:
                self._names[folder] = os.listdir(folder)
            except (OSError, ValueError):
                self._names[folder] = []
        return self._names[folder]


def spellings(name: str) -> Iterator[str]:
    """Yield the ways to read a file name that another program wrote, the literal one first."""
    stripped = name.strip().strip("\"'").strip()
    slashed = stripped.replace("\\", "/")
    decoded = unquote(slashed)
    local = re.sub(r"^file:/*(?=/|[a-zA-Z]:)", "", decoded)
    yield from dict.fromkeys(text for text in (name, stripped, slashed, decoded, local) if "\0" not in text)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def is_inside(file: Path, folder: Path) -> bool:
    """Return True if `file`, with symlinks resolved, is in `folder`."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # circular links
        return False
