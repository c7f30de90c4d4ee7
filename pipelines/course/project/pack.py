"""Pack a project for the teacher: a zip file with all that `project check` reads, without weights and features."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.course.project.rubric import Project
from pipelines.infra.errors import LabError

_HEAVY = (".safetensors", ".bin", ".parquet", ".pt", ".pth", ".onnx")
_SKIPPED_FOLDERS = ("checkpoints", "notebooks")
"""Folders below runs/ that no line of the rubric asks for."""


def files(project: Project) -> Iterator[Path]:
    """Yield the files that are packed, sorted: all but weights, features, checkpoints and hidden files."""
    for path in sorted(project.folder.rglob("*")):
        parts = path.relative_to(project.folder).parts
        skipped = any(part.startswith(".") for part in parts) or (
            parts[0] == "runs" and (path.suffix in _HEAVY or any(part in _SKIPPED_FOLDERS for part in parts))
        )
        if path.is_file() and not path.is_symlink() and not skipped:
            yield path


def write(project: Project, archive: Path) -> int:
    """Write the zip file and return its size in bytes. Raises LabError if it exists or cannot be written."""
    partial = archive.with_name(f".{archive.name}.partial")
    name = project.folder.resolve().name
    if archive.exists():
        raise LabError(f"{archive} exists: remove it, or name another file with --to")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            for path in files(project):
                file.write(path, Path(name) / path.relative_to(project.folder))
        partial.replace(archive)
    except (OSError, ValueError) as error:  # ValueError: a file is older than 1980
        raise LabError(f"{archive} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return archive.stat().st_size
