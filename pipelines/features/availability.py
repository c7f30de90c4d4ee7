"""Check that the files of a source are there before features are extracted, and are still the same afterwards.

A file that is away for a moment must not be sealed as `missing`, and a file that changes must not be sealed under the
digest of its earlier content.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.features.identity import find_model
from pipelines.features.sources import Source, file_of, is_available
from pipelines.features.sources.feedback import MISSING
from pipelines.features.sources.registry import local_identity
from pipelines.infra import files
from pipelines.infra.errors import LabError, Unfinished
from pipelines.recipes.settings import Recipe

_AGAIN = "nothing is lost: run the same command again when the files are there"


def check_present(recipe: Recipe, source: Source) -> None:
    """Raise LabError if more recordings of a folder are missing than the recipe allows, Unavailable if it is empty."""
    kinds = {recipe.source.kind, *(part.kind for part in recipe.source.parts)}
    outline = getattr(source, "outline", None) if "folder" in kinds else None
    paths = [path for example in outline() if (path := file_of(example))] if outline else []
    paths = [path for path in paths if path.name != MISSING]
    missing = [path for path in paths if not files.is_file(path)]
    by_folder: dict[Path, int] = defaultdict(int)
    for path in missing:
        by_folder[path.parent] += 1
    for folder, n in by_folder.items():
        if n > 1 and _may_be_unmounted(folder):
            raise files.Unavailable(
                f"{folder} is empty, and {n:,} recordings should be in it: see that its disk or Drive is connected and "
                "run the same command again, or remove the empty folder"
            )
    if len(missing) > recipe.features.max_rejected_share * len(paths):
        raise LabError(
            f"{len(missing):,} of {len(paths):,} recordings are missing, the first is {missing[0]}: see that their "
            "disk or Drive is connected, correct the paths, or allow more with features.max_rejected_share"
        )


def check_unchanged(
    recipe: Recipe,
    source: Source,
    identity: Mapping[str, Any],
    rejected: Iterable[Mapping[str, str]],
    runs: str | Path = "",
) -> None:
    """Raise Unfinished if a recording that was rejected as missing is there, or if the source's files have changed.

    `identity` is the source's before the extraction; models of other recipes are looked up below `runs`.
    """
    missing = {row["id"] for row in rejected if row["reason"] == "missing"}
    if missing:
        for example in source.examples():
            if example.id in missing and is_available(example):
                raise Unfinished(f"the recording of {example.id} was away for a moment and is back; {_AGAIN}")
    try:
        current = _without_log(recipe, runs)
    except LabError as error:
        raise Unfinished(f"the source cannot be read any more ({error}); {_AGAIN}") from None
    if changed := [name for name, value in current.items() if identity.get(name) != value]:
        raise Unfinished(f"the source changed while its features were extracted ({', '.join(changed)}); {_AGAIN}")


def _may_be_unmounted(folder: Path) -> bool:
    """Return True for an empty folder and for a link to a folder that does not exist."""
    if folder.is_symlink() and not folder.exists():
        return True
    try:
        return files.retry(lambda: not any(folder.iterdir()), folder)
    except OSError:
        return False


def _without_log(recipe: Recipe, runs: str | Path) -> dict[str, str]:
    """Return the identity of the files on this machine; the source logs nothing a second time."""
    logger = logging.getLogger("pipelines.features.sources")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        return local_identity(
            recipe.source, recipe.language, lambda name, setting: find_model(recipe, name, setting, runs)
        )
    finally:
        logger.setLevel(level)
