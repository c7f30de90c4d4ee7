"""Names of splits: synonyms of train, validation and test, in columns, tables and folders. Every source uses them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
_WORD = re.compile(r"[^\W\d_]+")


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
    """Return the split of each path by its folders (`train/`, `split=test/`, `my_dev-2/`); None if they name none.

    A name with further words counts only beside a folder of another split: `train_station/` alone is no split. Within
    a path, names without further words decide. Raises LabError if some paths lie in no split or in two.
    """
    named = [[part for part in path.parent.parts if name_split(part)] for path in paths]
    named = [[part for part in parts if _is_exact(part)] or parts for parts in named]
    names = {part for parts in named for part in parts}
    if not any(_is_exact(name) for name in names) and len({name_split(name) for name in names}) < 2:
        return None
    check_unambiguous(where, (word for name in names for word in _split_words(name)))
    for path, parts in zip(paths, named, strict=True):
        if len({name_split(part) for part in parts}) != 1:
            listed = ", ".join(f"{name}/" for name in sorted(names))
            problem = "is in two of them" if parts else "is in none of them"
            raise LabError(
                f"{where} has folders of splits ({listed}), and {str(path)!r} {problem}: move it, rename the folders, "
                "or name the splits in a table with a `split` column"
            )
    return [name_split(parts[0]) for parts in named]


def file_name_splits(where: str, paths: Sequence[PurePath]) -> list[str] | None:
    """Return the split of each path by its file name (`train_01.wav`); None unless all name one, some train."""
    splits = [name_split(path.stem) for path in paths]
    if not all(splits) or len({*splits}) < 2 or "train" not in splits:
        return None
    check_unambiguous(where, (word for path in paths for word in _split_words(path.stem)))
    return splits


def refuse_other_columns(where: str, values_of: Mapping[str, Iterable[str]]) -> None:
    """Raise LabError if a column that is not called `split` holds nothing but names of splits, train and another.

    values_of: column to its values.
    """
    for column, values in values_of.items():
        meant = {canonical_split(value) for value in values if value.strip()}
        if "train" in meant and 2 <= len(meant) and meant <= {*SPLITS}:
            raise LabError(
                f"{where}: the column {column!r} holds names of splits, and only a column `split` is read: "
                "rename it to split, or remove it"
            )


def describe(splits: Iterable[str]) -> str:
    """Return the number of clips of each split: `8 train, 2 validation, 0 test, 1 'other'`."""
    counts = Counter(splits)
    usual = [f"{counts.pop(split, 0):,} {split}" for split in SPLITS]
    return ", ".join([*usual, *(f"{n:,} {split!r}" for split, n in counts.items())])


def _split_words(name: str) -> set[str]:
    """Return the words of a name that mean a split; `testset` counts as `test`."""
    return {word.removesuffix("set") for word in _WORD.findall(name.lower())} & _SPLIT_OF.keys()


def name_split(name: str) -> str:
    """Return the split that the words of a name mean, or an empty string for none or several."""
    meant = {_SPLIT_OF[word] for word in _split_words(name)}
    return meant.pop() if len(meant) == 1 else ""


def _is_exact(name: str) -> bool:
    return name.strip().lower().removeprefix("split=") in _SPLIT_OF
