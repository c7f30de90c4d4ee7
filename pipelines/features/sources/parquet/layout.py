"""Assign Parquet files to splits and columns to their meaning: from the settings, else from names and types."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pipelines.features.sources import SPLITS
from pipelines.infra.errors import LabError
from pipelines.recipes import languages

TEXT = ("text", "sentence", "transcript", "transcription", "raw_transcription", "raw_text", "normalized_text")
SPEAKER = ("speaker", "speaker_id", "client_id")
META = ("gender", "sex", "age", "accent", "accents", "dialect", "variant", "up_votes", "down_votes", "path")
SPLIT_NAMES = {
    "train": ("train", "training", "partial-train"),
    "validation": ("validation", "valid", "val", "dev", "partial-validation"),
    "test": ("test", "partial-test"),
}
"""Names by which a split is guessed, in order; `partial-`: the Hub converts only the head of a large data set."""
NOTHING = "none"
"""Setting of a split that stays empty."""
_KEYWORDS = {name for guesses in SPLIT_NAMES.values() for name in guesses}
_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?) ?%")
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


@dataclass(frozen=True)
class Columns:
    """Names of the columns."""

    audio: str
    text: str
    speaker: str
    """Empty if unknown."""
    meta: tuple[str, ...]
    labels: dict[str, list[str]]
    """Meta columns with class labels: column to the names of the labels."""


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


Declared = Mapping[str, Mapping[str, list[str]]]
"""Files as a data set declares them: configuration to split to files. The configuration `default` is ""."""


def infer_layout(
    where: str,
    files: list[str],
    schema_of: Callable[[str], Any],
    settings: LayoutSettings,
    declared: Declared | None = None,
) -> Layout:
    """Return the layout of the Parquet `files` at `where`; `schema_of` returns the pyarrow schema of a file.

    Configurations and splits are those that are `declared`, else guessed from file names. Raises LabError, naming the
    setting, if the settings do not match the files or are ambiguous.
    """
    if not files:
        raise LabError(f"{where} must hold Parquet files, got none: name another data set or folder")
    config, by_split = _choose_config(where, declared or _guessed_configs(files), settings)
    drawn = _drawn_fractions(where, settings.splits)
    chosen = _choose_splits(where, by_split, {**settings.splits, **dict.fromkeys(drawn, NOTHING)})
    if drawn and "train" not in chosen:
        raise LabError(f"{where} has no training rows to draw from: name some with source.splits.train")
    used = {split: sorted({file for name in of for file in by_split[name]}) for split, of in chosen.items()}
    _check_disjoint(where, used)
    origins = {split: "+".join(of) for split, of in chosen.items()}
    origins |= {split: f"{share:.4g} of train" for split, share in drawn.items()}
    return Layout(
        config,
        used,
        {split: origins[split] for split in SPLITS if split in origins},
        drawn,
        sorted(by_split.keys() - {name for of in chosen.values() for name in of}),
        _columns(where, schema_of(next(iter(used.values()))[0]), settings),
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
    *folders, stem = PurePosixPath(name).with_suffix("").parts
    split = _NUMBERING.sub("", stem)
    if folders and (not split or (folders[-1].lower() in _KEYWORDS and split.lower() not in _KEYWORDS)):
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
    names = tuple(name.strip() for name in setting.split("+"))
    for name in names:
        if name not in by_split:
            raise LabError(
                f"{where} has the splits {', '.join(sorted(by_split))}, got source.splits.{split} = {setting!r}: "
                f"correct it, or write {NOTHING!r}"
            )
    return names


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


def _columns(where: str, schema: Any, settings: LayoutSettings) -> Columns:
    features, lower = _hub_features(schema), {name.lower(): name for name in schema.names}
    audio = _audio_column(where, schema, features, settings.audio_column)
    text = _text_column(where, schema, settings.text_column)
    speaker = settings.speaker_column or next((lower[name] for name in SPEAKER if name in lower), "")
    if speaker and speaker not in schema.names:
        raise LabError(f"{where} has no column {speaker!r} (source.speaker_column): {_listed(schema)}")
    meta = [lower[name] for name in META if name in lower and _is_plain(schema.field(lower[name]).type)]
    labels = {name: features.get(name, {}).get("names") for name in meta}
    return Columns(
        audio,
        text,
        speaker,
        tuple(name for name in meta if name not in (audio, text)),
        {name: names for name, names in labels.items() if isinstance(names, list)},
    )


def _audio_column(where: str, schema: Any, features: Mapping[str, Any], setting: str) -> str:
    matches = [name for name in schema.names if _holds_files(schema.field(name), features)]
    if setting and setting not in matches:
        kind = f"of type {schema.field(setting).type}" if setting in schema.names else f"absent: {_listed(schema)}"
        raise LabError(f"{where}: source.audio_column must hold audio files as bytes, got {setting!r}, {kind}")
    if not setting and not matches:
        raise LabError(f"{where} has no column of audio files as bytes, got {_listed(schema)}: name another data set")
    if not setting and len(matches) > 1:
        raise LabError(f"{where} has the audio columns {', '.join(matches)}: name one with source.audio_column")
    return setting or matches[0]


def _holds_files(column: Any, features: Mapping[str, Any]) -> bool:
    """Return True for a column of encoded files: a struct with bytes, or bytes whose type or name is audio."""
    import pyarrow.types as types

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    if types.is_struct(column.type):
        fields = {column.type.field(i).name: column.type.field(i).type for i in range(column.type.num_fields)}
        image = features.get(column.name, {}).get("_type") == "Image"
        return "bytes" in fields and binary(fields["bytes"]) and not image
    kind = features.get(column.name, {}).get("_type")
    return binary(column.type) and (kind == "Audio" or column.name.lower() in ("audio", "speech"))


def _text_column(where: str, schema: Any, setting: str) -> str:
    strings = [name for name in schema.names if _is_string(schema.field(name).type)]
    if setting and setting not in strings:
        raise LabError(f"{where}: source.text_column must be one of {', '.join(strings) or 'none'}, got {setting!r}")
    matches = [name for name in strings if name.lower() in TEXT]
    if not setting and len(matches) != 1:
        columns = f"the text columns {', '.join(matches)}" if matches else f"no column called {' or '.join(TEXT)}"
        raise LabError(f"{where} has {columns}: name one of {', '.join(strings) or 'none'} with source.text_column")
    return setting or matches[0]


def _hub_features(schema: Any) -> dict[str, Any]:
    """Return the `features` that the library datasets writes into a schema, or nothing."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _is_string(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_plain(kind: Any) -> bool:
    import pyarrow.types as types

    return _is_string(kind) or types.is_integer(kind) or types.is_floating(kind)


def _listed(schema: Any) -> str:
    return f"it has {', '.join(schema.names)}"
