"""Names of splits: synonyms of train, validation and test, in columns, tables and folders. Every source uses them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from pipelines.features.sources import SPLITS
from pipelines.infra.errors import LabError

SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Split of the lab to its usual names, in the order of preference."""
_SPLIT_OF = {name: split for split, names in SYNONYMS.items() for name in names}
_FIRST_WORD = re.compile(r"[^\W_]+")


def canonical_split(name: str) -> str:
    """Return the split that `name` means, in any case; any other name unchanged, without spaces around it."""
    return _SPLIT_OF.get(name.strip().lower(), name.strip())


def check_unambiguous(where: str, names: Iterable[str]) -> None:
    """Raise LabError if `eval` may mean the test: beside another name for validation, and without a test."""
    names = {name.strip().lower() for name in names}
    evaluation = sorted(names & {"eval", "evaluation"})
    others = sorted(name for name in names - {*evaluation} if canonical_split(name) == "validation")
    if evaluation and others and not any(canonical_split(name) == "test" for name in names):
        raise LabError(
            f"{where}: {evaluation[0]!r} beside {others[0]!r} may mean the test, and training must not select by it: "
            f"rename {evaluation[0]!r} to test or to {others[0]!r}"
        )


def path_splits(where: str, paths: Sequence[PurePath]) -> list[str] | None:
    """Return the split of each path by its folders (`train/`, `split=test/`, `dev-clean/`); None if they name none.

    A name with further words counts only beside a folder of another split: `train_station/` alone is no split. Raises
    LabError if some paths lie in no split or in two.
    """
    named = [[part for part in path.parent.parts if _folder_split(part)] for path in paths]
    names = {part for parts in named for part in parts}
    if not any(_is_exact(name) for name in names) and len({_folder_split(name) for name in names}) < 2:
        return None
    check_unambiguous(where, (name.lower().removeprefix("split=") for name in names))
    for path, parts in zip(paths, named, strict=True):
        if len({_folder_split(part) for part in parts}) != 1:
            listed = ", ".join(f"{name}/" for name in sorted(names))
            problem = "is in two of them" if parts else "is in none of them"
            raise LabError(
                f"{where} has folders of splits ({listed}), and {str(path)!r} {problem}: move it, rename the folders, "
                "or name the splits in a table with a `split` column"
            )
    return [_folder_split(parts[0]) for parts in named]


def describe(splits: Iterable[str]) -> str:
    """Return the number of clips of each split: `8 train, 2 validation, 0 test, 1 'other'`."""
    counts = Counter(splits)
    usual = [f"{counts.pop(split, 0):,} {split}" for split in SPLITS]
    return ", ".join([*usual, *(f"{n:,} {split!r}" for split, n in counts.items())])


def _folder_split(name: str) -> str:
    """Return the split that a folder's name or its first word means, or an empty string."""
    first_word = _FIRST_WORD.match(name.lower().removeprefix("split="))
    return _SPLIT_OF.get(first_word[0], "") if first_word else ""


def _is_exact(name: str) -> bool:
    return name.strip().lower().removeprefix("split=") in _SPLIT_OF
