"""Which Parquet file is which split, which column is which: what the settings say, else what names and types tell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pipelines.features.sources import SPLITS
from pipelines.infra.errors import LabError

TEXT = ("text", "sentence", "transcript", "transcription", "raw_transcription", "raw_text", "normalized_text")
SPEAKER = ("speaker", "speaker_id", "client_id")
META = ("gender", "sex", "age", "accent", "accents", "dialect", "variant", "up_votes", "down_votes", "path")
SPLIT_NAMES = {
    "train": ("train", "training", "partial-train"),
    "validation": ("validation", "valid", "val", "dev", "partial-validation"),
    "test": ("test", "partial-test"),
}
"""What a split is guessed by, the first first; `partial-` are the heads that the Hub converts of large data sets."""
NOTHING = "none"
"""As a split's setting: leave it empty."""
_KEYWORDS = {name for guesses in SPLIT_NAMES.values() for name in guesses}
_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?) ?%")
_NUMBERING = re.compile(r"[-_.]?\d{4,}(-of-\d+)?(-[0-9a-f]{8,})?$")
"""`-00000-of-00010-a09b74b3ef9c3b56`: which part of a split a file is."""


@dataclass(frozen=True)
class Wishes:
    """What the settings say; empty ones are guessed."""

    config: str = ""
    audio_column: str = ""
    text_column: str = ""
    speaker_column: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Split of the lab to the data set's: `validated`, `train+other`, NOTHING, or empty to guess. For validation and
    test also a share of the training rows, `5%`."""
    language: str = "sv"
    """Guesses the configuration: `sv`, `sv_se`, `sv-SE`."""


@dataclass(frozen=True)
class Columns:
    """Which column is which."""

    audio: str
    text: str
    speaker: str
    """Empty where no column tells who speaks."""
    meta: tuple[str, ...]
    labels: dict[str, list[str]]
    """Meta columns that hold numbers for names: column to names."""


@dataclass(frozen=True)
class Layout:
    """What was understood of the files."""

    config: str
    splits: dict[str, list[str]]
    """Split of the lab to the names of its files, in reading order."""
    names: dict[str, str]
    """Split of the lab to what it was taken from: the data set's own names joined with `+`, or a share of train."""
    drawn: dict[str, float]
    """Split of the lab to the share of the training rows, between 0 and 1, that is drawn for it."""
    unused: list[str]
    """Splits of the data set that no split of the lab takes."""
    columns: Columns


Declared = Mapping[str, Mapping[str, list[str]]]
"""What a data set says of itself: configuration to split to files. The configuration `default` has no name here."""


def understand(
    where: str, files: list[str], schema_of: Callable[[str], Any], wishes: Wishes, declared: Declared | None = None
) -> Layout:
    """The layout of the Parquet `files` at `where`; `schema_of` gives the pyarrow schema of one of them.

    Configurations and splits are those that are `declared`, else guessed by the names of the files.
    Raises LabError, naming the setting, where the wishes do not fit or leave a choice.
    """
    if not files:
        raise LabError(f"{where} must hold Parquet files, got none: name another place")
    config, by_split = _choose_config(where, declared or _guessed_configs(files), wishes)
    drawn = _drawn_shares(where, wishes.splits)
    chosen = _choose_splits(where, by_split, {**wishes.splits, **dict.fromkeys(drawn, NOTHING)})
    if drawn and "train" not in chosen:
        raise LabError(f"{where} has no training rows to draw from: name some with source.splits.train")
    used = {split: sorted({file for name in of for file in by_split[name]}) for split, of in chosen.items()}
    _refuse_shared(where, used)
    taken_from = {split: "+".join(of) for split, of in chosen.items()}
    taken_from |= {split: f"{share:.4g} of train" for split, share in drawn.items()}
    return Layout(
        config,
        used,
        {split: taken_from[split] for split in SPLITS if split in taken_from},
        drawn,
        sorted(by_split.keys() - {name for of in chosen.values() for name in of}),
        _columns(where, schema_of(next(iter(used.values()))[0]), wishes),
    )


def _refuse_shared(where: str, used: Mapping[str, list[str]]) -> None:
    """A card may name one file under two splits."""
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


def _choose_config(where: str, configs: Declared, wishes: Wishes) -> tuple[str, Mapping[str, list[str]]]:
    """The configuration, and its files by the data set's own names of splits."""
    wanted = wishes.config
    asked = re.compile(re.escape(wanted) if wanted else rf"{wishes.language}([-_]\w+)?", re.IGNORECASE)
    names = {config: (config or "default", config.rpartition("/")[2]) for config in configs}
    fitting = [config for config in configs if any(asked.fullmatch(name) for name in names[config])]
    if not wanted and len(configs) == 1:
        fitting = list(configs)
    if len(fitting) != 1:
        found = ", ".join(repr(config or "default") for config in sorted(configs)[:12]) + (
            " ..." if len(configs) > 12 else ""
        )
        got = f"source.config = {wanted!r}" if wanted else "no source.config"
        raise LabError(f"{where} holds the configurations {found}, got {got}: name one of them with source.config")
    return fitting[0], configs[fitting[0]]


def _config_and_split(name: str) -> tuple[str, str]:
    """`sv_se/train/0000.parquet` and `sv_se/train-00000-of-00002.parquet` as ("sv_se", "train")."""
    *folders, stem = PurePosixPath(name).with_suffix("").parts
    split = _NUMBERING.sub("", stem)
    if folders and (not split or (folders[-1].lower() in _KEYWORDS and split.lower() not in _KEYWORDS)):
        split = folders.pop()
    return "/".join(folder for folder in folders if folder != "data"), split


def _choose_splits(
    where: str, by_split: Mapping[str, list[str]], settings: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Split of the lab to the data set's names for it. No file may serve two splits."""
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
    asked = tuple(name.strip() for name in setting.split("+"))
    for name in asked:
        if name not in by_split:
            raise LabError(
                f"{where} has the splits {', '.join(sorted(by_split))}, got source.splits.{split} = {setting!r}: "
                f"correct it, or write {NOTHING!r}"
            )
    return asked


def _guessed_split(names: list[str], split: str) -> tuple[str, ...]:
    """The first of the usual names for `split` that is among `names`: those that no setting has claimed."""
    lower = {name.lower(): name for name in names}
    return tuple(lower[guess] for guess in SPLIT_NAMES[split] if guess in lower)[:1]


def _drawn_shares(where: str, settings: Mapping[str, str]) -> dict[str, float]:
    """Split to the share of train that its setting asks for: `5%` is 0.05."""
    matches = {split: _SHARE.fullmatch(settings.get(split, "")) for split in ("validation", "test")}
    shares = {split: float(match[1]) / 100 for split, match in matches.items() if match}
    if sum(shares.values()) >= 1:
        raise LabError(f"{where}: source.splits must leave something of train, got 100% or more: lower them")
    return shares


def _columns(where: str, schema: Any, wishes: Wishes) -> Columns:
    features, lower = _hub_features(schema), {name.lower(): name for name in schema.names}
    audio = _audio_column(where, schema, features, wishes.audio_column)
    text = _text_column(where, schema, wishes.text_column)
    speaker = wishes.speaker_column or next((lower[name] for name in SPEAKER if name in lower), "")
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


def _audio_column(where: str, schema: Any, features: Mapping[str, Any], wanted: str) -> str:
    fitting = [name for name in schema.names if _holds_files(schema.field(name), features)]
    if wanted and wanted not in fitting:
        kind = f"of type {schema.field(wanted).type}" if wanted in schema.names else f"absent: {_listed(schema)}"
        raise LabError(f"{where}: source.audio_column must hold audio files as bytes, got {wanted!r}, {kind}")
    if not wanted and not fitting:
        raise LabError(f"{where} has no column of audio files as bytes, got {_listed(schema)}: name another data set")
    if not wanted and len(fitting) > 1:
        raise LabError(f"{where} has the audio columns {', '.join(fitting)}: name one with source.audio_column")
    return wanted or fitting[0]


def _holds_files(column: Any, features: Mapping[str, Any]) -> bool:
    """Whether a column holds encoded files: a struct with bytes, or bytes that its type or name calls audio."""
    import pyarrow.types as types

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    if types.is_struct(column.type):
        fields = {column.type.field(i).name: column.type.field(i).type for i in range(column.type.num_fields)}
        image = features.get(column.name, {}).get("_type") == "Image"
        return "bytes" in fields and binary(fields["bytes"]) and not image
    kind = features.get(column.name, {}).get("_type")
    return binary(column.type) and (kind == "Audio" or column.name.lower() in ("audio", "speech"))


def _text_column(where: str, schema: Any, wanted: str) -> str:
    strings = [name for name in schema.names if _is_string(schema.field(name).type)]
    if wanted and wanted not in strings:
        raise LabError(f"{where}: source.text_column must be one of {', '.join(strings) or 'none'}, got {wanted!r}")
    fitting = [name for name in strings if name.lower() in TEXT]
    if not wanted and len(fitting) != 1:
        found = f"the text columns {', '.join(fitting)}" if fitting else f"no column that is called {' or '.join(TEXT)}"
        raise LabError(f"{where} has {found}: name one of {', '.join(strings) or 'none'} with source.text_column")
    return wanted or fitting[0]


def _hub_features(schema: Any) -> dict[str, Any]:
    """The `features` that the library datasets writes into a schema; empty where it did not write it."""
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
