"""Assign Parquet files to splits and columns to their meaning: from the settings, else from names and types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

from pipelines.features.sources import SPLITS
from pipelines.features.sources.parquet import columns
from pipelines.features.sources.parquet.columns import Columns, ColumnSettings
from pipelines.features.sources.splits import SYNONYMS, canonical_split, check_unambiguous, refuse_other_columns
from pipelines.infra.errors import LabError
from pipelines.recipes import languages

PARTIAL = "partial-"
"""Prefix of splits of which the Hub converts only the head."""
SPLIT_NAMES = {split: (*names, f"{PARTIAL}{split}") for split, names in SYNONYMS.items()}
"""Names by which a split is guessed, in order."""
NOTHING = "none"
"""Setting of a split that stays empty."""
_KEYWORDS = {name for guesses in SPLIT_NAMES.values() for name in guesses}
_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?) ?%")
_SERIES = re.compile(r"(?P<series>.*?)-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]{8,})?\.\w+$")
_NUMBERING = re.compile(r"[-_.]?\d{4,}(-of-\d+)?(-[0-9a-f]{8,})?$")
"""`-00000-of-00010-a09b74b3ef9c3b56`: the number of a file within its split."""


@dataclass(frozen=True)
class LayoutSettings:
    """The settings of splits and columns; empty ones are guessed."""

    config: str = ""
    audio_column: str = ""
    text_column: str = ""
    speaker_column: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Split of the lab to splits of the data set: `validated`, `train+other`, NOTHING, or empty to guess.

    For validation and test also a share of the training rows, `5%`.
    """
    language: str = "sv"
    """Language code by which the configuration is guessed: `sv`, `sv_se`, `sv-SE`."""
    allow_missing_files: bool = False
    """Use a numbered series of files of which some are missing."""

    @property
    def columns(self) -> ColumnSettings:
        return ColumnSettings(self.audio_column, self.text_column, self.speaker_column)


@dataclass(frozen=True)
class Layout:
    """Splits and columns of the files."""

    config: str
    splits: dict[str, list[str]]
    """Split of the lab to the names of its files, in reading order."""
    names: dict[str, str]
    """Split of the lab to its origin: names of the data set's splits joined with `+`, or a share of train."""
    drawn: dict[str, float]
    """Split of the lab to the share of training rows, between 0 and 1, drawn for it."""
    unused: list[str]
    """Splits of the data set that are not used."""
    columns: Columns
    split_column: str = ""
    """Column that holds the split of each row; empty: each file belongs to one split."""
    split_of: Mapping[str, str] = field(default_factory=dict)
    """Value of that column to the split of the lab; empty for rows that are not used."""

    @property
    def files(self) -> dict[str, str]:
        """Return the split of each file, in reading order; empty if the column decides."""
        files = {name: split for split in SPLITS for name in self.splits.get(split, ())}
        return dict.fromkeys(files, "") if self.split_column else files


Declared = Mapping[str, Mapping[str, list[str]]]
"""Files as a data set declares them: configuration to split to files. The configuration `default` is ""."""


class Schemas(Protocol):
    """The open files of a data set, as far as a layout depends on them."""

    def schema(self, name: str) -> Any:
        """Return the pyarrow schema of a file."""

    def values(self, name: str, column: str) -> set[str]:
        """Return the values of a column of text."""


def infer_layout(
    where: str,
    files: list[str],
    schemas: Schemas,
    settings: LayoutSettings,
    declared: Declared | None = None,
    with_paths: bool = False,
) -> Layout:
    """Return the layout of the Parquet `files` at `where`; `with_paths`: audio may be paths of files beside them.

    Configurations and splits are those that are `declared`, else guessed from file names, else from a column `split`.
    Raises LabError, naming the setting, if the settings do not match the files or are ambiguous.
    """
    if not files:
        hint = "name another folder; own recordings are source.kind=folder" if with_paths else "name another data set"
        raise LabError(f"{where} must hold Parquet files, got none: {hint}")
    config, by_split = _choose_config(where, declared or _guessed_configs(files), settings)
    drawn = _drawn_fractions(where, settings.splits)
    named = {**settings.splits, **dict.fromkeys(drawn, NOTHING)}
    column, by_value = _split_values(by_split, schemas, named)
    chosen = _choose_values(where, by_value, named) if column else _choose_splits(where, by_split, named)
    by_split = by_value if column else by_split
    if drawn and "train" not in chosen:
        raise LabError(f"{where} has no training rows to draw from: name some with source.splits.train")
    used = {split: sorted({file for name in of for file in by_split[name]}) for split, of in chosen.items()}
    if not column:
        _check_disjoint(where, used)
    if not settings.allow_missing_files:
        _check_series(where, sorted({file for names in used.values() for file in names}))
    origins = {split: "+".join(of) for split, of in chosen.items()}
    origins |= {split: f"{share:.4g} of train" for split, share in drawn.items()}
    return Layout(
        config,
        used,
        {split: origins[split] for split in SPLITS if split in origins},
        drawn,
        sorted(by_split.keys() - {name for of in chosen.values() for name in of}),
        columns.choose(where, schemas.schema(next(iter(used.values()))[0]), settings.columns, with_paths),
        column,
        {name: split for split, of in chosen.items() for name in of},
    )


def _split_values(
    by_split: Mapping[str, list[str]], schemas: Schemas, settings: Mapping[str, str]
) -> tuple[str, dict[str, list[str]]]:
    """Return the column that decides the splits, and its values with all files; an empty name if the files decide.

    The column decides if all files are of one split, which no setting names, and rows are of another one.
    """
    [(name, files), *others] = by_split.items()
    column = columns.split_column(schemas.schema(files[0])) if not others and name not in settings.values() else ""
    if not column:
        is_free = not others and name not in settings.values()
        named = columns.other_split_columns(schemas.schema(files[0])) if is_free else []
        refuse_other_columns(files[0], {one: {v for f in files for v in schemas.values(f, one)} for one in named})
        return "", {}
    values = {value for file in files for value in schemas.values(file, column)}
    known = {canonical_split(value) for value in values} & {*SPLITS}
    decides = known and {canonical_split(value) for value in values} != {canonical_split(name)}
    return (column, dict.fromkeys(sorted(values), files)) if decides else ("", {})


def _choose_values(
    where: str, by_value: Mapping[str, list[str]], settings: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return split of the lab to values of the column: those that the settings name, else all synonyms."""
    named = {split: _named_splits(where, by_value, split, settings.get(split, "")) for split in SPLITS}
    free = [value for value in by_value if not any(value in of for of in named.values())]
    check_unambiguous(where, free)
    chosen = {
        split: named[split]
        or tuple(value for value in free if not settings.get(split) and canonical_split(value) == split)
        for split in SPLITS
    }
    return {split: of for split, of in chosen.items() if of}


def _check_series(where: str, files: list[str]) -> None:
    """Raise LabError if a series such as `train-00000-of-00004` lacks numbers, or occurs with two totals."""
    series: dict[str, dict[int, set[int]]] = {}
    for match in filter(None, map(_SERIES.match, files)):
        series.setdefault(match["series"], {}).setdefault(int(match["total"]), set()).add(int(match["number"]))
    for name, totals in series.items():
        if len(totals) > 1:
            listed = " and ".join(f"-of-{total:05d}" for total in sorted(totals))
            raise LabError(f"{where} holds {name} in {listed} files, two versions of the same rows: remove one")
        [(total, numbers)] = totals.items()
        first = min(1, min(numbers)) if max(numbers) == total else 0
        if missing := sorted({*range(first, first + total)} - numbers):
            listed = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
            raise LabError(
                f"{where} must hold all {total} files {name}-*-of-{total:05d}, lacks {len(missing)} of them, the "
                f"numbers {listed}: add them, or use what is there with source.allow_missing_files=true"
            )


def _check_disjoint(where: str, used: Mapping[str, list[str]]) -> None:
    """Raise LabError if a card names one file under two splits."""
    owner: dict[str, str] = {}
    for split, file in ((split, file) for split, files in used.items() for file in files):
        if owner.setdefault(file, split) != split:
            raise LabError(
                f"{where}: {file} is declared for {owner[file]} and for {split}: no row may serve two; set one of them "
                f"with source.splits to another split, or to {NOTHING!r}"
            )


def _guessed_configs(names: list[str]) -> Declared:
    configs: dict[str, dict[str, list[str]]] = {}
    for name in names:
        config, split = _config_and_split(name)
        configs.setdefault(config, {}).setdefault(split, []).append(name)
    return configs


def _choose_config(where: str, configs: Declared, settings: LayoutSettings) -> tuple[str, Mapping[str, list[str]]]:
    """Return the configuration, and its files by split of the data set."""
    name = settings.config
    aliases = {config: (config or "default", config.rpartition("/")[2]) for config in configs}
    matches = [
        config
        for config in configs
        if any(
            alias.casefold() == name.casefold() if name else languages.find(alias) == settings.language
            for alias in aliases[config]
        )
    ]
    if not name and len(configs) == 1:
        matches = list(configs)
    if len(matches) != 1:
        listed = ", ".join(repr(config or "default") for config in sorted(configs)[:12]) + (
            " ..." if len(configs) > 12 else ""
        )
        got = f"source.config = {name!r}" if name else "no source.config"
        raise LabError(f"{where} holds the configurations {listed}, got {got}: name one of them with source.config")
    return matches[0], configs[matches[0]]


def _config_and_split(name: str) -> tuple[str, str]:
    """Split `sv_se/train/0000.parquet` or `sv_se/train-00000-of-00002.parquet` into ("sv_se", "train")."""
    *folders, stem = (part.removeprefix("split=") for part in PurePosixPath(name).with_suffix("").parts)
    split = _NUMBERING.sub("", stem)
    keywords = [number for number, folder in enumerate(folders) if folder.lower() in _KEYWORDS]
    if split.lower() not in _KEYWORDS and keywords and not any(map(languages.find, folders[keywords[-1] + 1 :])):
        split, folders = folders[keywords[-1]], folders[: keywords[-1]]  # further folders are speakers or parts
    elif folders and not split:
        split = folders.pop()
    return "/".join(folder for folder in folders if folder != "data"), split


def _choose_splits(
    where: str, by_split: Mapping[str, list[str]], settings: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return split of the lab to splits of the data set. No file may serve two splits."""
    named = {split: _named_splits(where, by_split, split, settings.get(split, "")) for split in SPLITS}
    free = [name for name in by_split if not any(name in of for of in named.values())]
    guessed = {split: _guessed_split(free, split) if not settings.get(split) else () for split in SPLITS}
    chosen = {split: named[split] or guessed[split] for split in SPLITS}
    if not any(chosen.values()) and len(by_split) == 1 and not settings.get("train"):
        chosen["train"] = tuple(by_split)
    taken = [name for of in chosen.values() for name in of]
    twice = sorted({name for name in taken if taken.count(name) > 1})
    if twice:
        raise LabError(f"{where}: {twice[0]!r} is named for two splits in source.splits: no row may serve two")
    if not taken:
        raise LabError(f"{where} has the splits {', '.join(sorted(by_split))}: name one with source.splits.train")
    return {split: of for split, of in chosen.items() if of}


def _named_splits(where: str, by_split: Mapping[str, list[str]], split: str, setting: str) -> tuple[str, ...]:
    if setting in ("", NOTHING):
        return ()
    names: list[str] = []
    for name in (name.strip() for name in setting.split("+")):
        synonyms = [other for other in by_split if canonical_split(other) == canonical_split(name)]
        if name not in by_split and len(synonyms) != 1:
            raise LabError(
                f"{where} has the splits {', '.join(sorted(by_split))}, got source.splits.{split} = {setting!r}: "
                f"correct it, or write {NOTHING!r}"
            )
        names.append(name if name in by_split else synonyms[0])
    return tuple(names)


def _guessed_split(names: list[str], split: str) -> tuple[str, ...]:
    """Return the first usual name of `split` among `names`, which no setting uses."""
    lower = {name.lower(): name for name in names}
    return tuple(lower[guess] for guess in SPLIT_NAMES[split] if guess in lower)[:1]


def _drawn_fractions(where: str, settings: Mapping[str, str]) -> dict[str, float]:
    """Return split to the fraction of train in its setting: `5%` is 0.05."""
    matches = {split: _SHARE.fullmatch(settings.get(split, "")) for split in ("validation", "test")}
    fractions = {split: float(match[1]) / 100 for split, match in matches.items() if match}
    if sum(fractions.values()) >= 1:
        raise LabError(f"{where}: source.splits must leave something of train, got 100% or more: lower them")
    return fractions
