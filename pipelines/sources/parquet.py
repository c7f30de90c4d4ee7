"""Parquet files with an audio column and a text column, on the Hub or on a disk, read row group by row group.

Which files make which split, and which column is which, is taken from the settings, else guessed from names and types;
every guess is told and is part of the identity. The sound of a row is read when it is asked for, with that of its row
group: what another run has finished is passed over without fetching it, and memory is that of the row groups in use.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pipelines.errors import LabError, missing_package
from pipelines.manifest import sha256
from pipelines.sources import SPLITS, Example

TEXT = ("text", "sentence", "transcript", "transcription", "raw_transcription", "raw_text", "normalized_text")
SPEAKER = ("speaker", "speaker_id", "client_id")
META = ("gender", "sex", "age", "accent", "accents", "dialect", "variant", "up_votes", "down_votes", "path")
SPLIT_NAMES = {
    "train": ("train", "training", "partial-train"),
    "validation": ("validation", "valid", "val", "dev", "partial-validation"),
    "test": ("test", "partial-test"),
}
"""What a split is guessed by, the first first; `partial-` are the heads that the Hub converts of large data sets."""
SWEDISH = ("sv", "sv_se", "sv-se", "swedish")
NOTHING = "none"
"""As a split's setting: leave it empty."""
HASHED_BYTES = 200_000_000
"""Below this many bytes of local Parquet, `identity` reads every byte; from here on it trusts sizes and times."""
_KEYWORDS = {name for guesses in SPLIT_NAMES.values() for name in guesses}
_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?) ?%")
_NUMBERING = re.compile(r"[-_.]?\d{4,}(-of-\d+)?(-[0-9a-f]{8,})?$")
"""`-00000-of-00010-a09b74b3ef9c3b56`: which part of a split a file is."""


class Files(Protocol):
    """Parquet files somewhere."""

    where: str
    """The place, for messages."""

    def identity(self) -> dict[str, str]:
        """What decides every byte of the files."""

    def names(self) -> list[str]:
        """Paths of the Parquet files below the place, with `/`, sorted."""

    def open(self, name: str) -> Any:
        """Something that pyarrow reads with random access."""


@dataclass(frozen=True)
class LocalFiles:
    """A Parquet file, or a folder that holds some at any depth."""

    path: str

    @property
    def where(self) -> str:
        return self.path

    def identity(self) -> dict[str, str]:
        """(path, size, sha256) of every file; from HASHED_BYTES on the time of change stands in for the sha256."""
        files = [self._folder / name for name in self.names()]
        by_content = sum(path.stat().st_size for path in files) < HASHED_BYTES
        stamps = (
            f"{name} {path.stat().st_size} {sha256(path) if by_content else path.stat().st_mtime_ns}"
            for name, path in zip(self.names(), files, strict=True)
        )
        digest = hashlib.sha256("\n".join(stamps).encode()).hexdigest()
        return {"kind": "parquet", "files_by": "content" if by_content else "size and time", "files_sha256": digest}

    def names(self) -> list[str]:
        path = Path(self.path).expanduser()
        if path.is_file():
            return [path.name]
        if not path.is_dir():
            raise LabError(f"source.path must name a Parquet file or a folder of them, got {self.path!r}: correct it")
        found = (file.relative_to(path) for file in path.rglob("*.parquet") if file.is_file())
        return sorted(file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts))

    def open(self, name: str) -> Any:
        return str(self._folder / name)

    @property
    def _folder(self) -> Path:
        path = Path(self.path).expanduser()
        return path.parent if path.is_file() else path


@dataclass(frozen=True)
class Layout:
    """What was understood of the files."""

    config: str
    splits: dict[str, list[str]]
    """Split of the lab to the names of its files, in reading order."""
    names: dict[str, str]
    """Split of the lab to the data set's own names for it, joined with `+`."""
    audio: str
    text: str
    speaker: str
    """Empty where no column tells who speaks."""
    meta: tuple[str, ...]
    labels: dict[str, list[str]]
    """Meta columns that hold numbers for names: column to names."""
    drawn: dict[str, float]
    """Split of the lab to the share of the training rows, between 0 and 1, that is drawn for it."""


@dataclass(frozen=True)
class ParquetSource:
    """The corpus in `files`. Empty settings are guessed; `log` is told what was."""

    files: Files
    config: str = ""
    audio_column: str = ""
    text_column: str = ""
    speaker_column: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Split of the lab to the data set's: `validated`, `train+other`, NOTHING, or empty to guess. For validation and
    test also a share of the training rows, `5%`: `seed` draws it by speaker, or by row where speakers are unknown."""
    seed: int = 7
    log: Callable[[str], None] = print

    def identity(self) -> dict[str, str]:
        """The files' identity, and what was chosen of them. Raises LabError where a choice cannot be made."""
        layout = self._layout
        return {
            **self.files.identity(),
            **({"seed": str(self.seed)} if layout.drawn else {}),
            "config": layout.config,
            **{f"splits.{split}": layout.names.get(split, NOTHING) for split in SPLITS},
            "columns": json.dumps([layout.audio, layout.text, layout.speaker, *layout.meta]),
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """The examples of these splits: train, validation, test, each in the order of its files and rows.

        Rows that are drawn from train stand where they stood there.

        Raises LabError at once for files that cannot be used, and in the middle where one cannot be read.
        """
        layout = self._layout
        read = {*splits, *(["train"] if {*splits} & layout.drawn.keys() else [])}
        files = [(split, name) for split in SPLITS if split in read for name in layout.splits.get(split, ())]
        rows = (example for split, name in files for example in self._rows(split, name))
        return (example for example in rows if example.split in splits)

    @cached_property
    def _layout(self) -> Layout:
        names = self.files.names()
        if not names:
            raise LabError(f"{self.files.where} must hold Parquet files, got none: name another place")
        config, by_split = _choose_config(self.files.where, names, self.config)
        drawn = _drawn_shares(self.files.where, self.splits)
        chosen = _choose_splits(self.files.where, by_split, {**self.splits, **dict.fromkeys(drawn, NOTHING)})
        if drawn and "train" not in chosen:
            raise LabError(f"{self.files.where} has no training rows to draw from: name some with source.splits.train")
        used = {split: sorted(file for name in of for file in by_split[name]) for split, of in chosen.items()}
        schema = self._opened(next(iter(used.values()))[0]).schema_arrow
        names = {split: "+".join(of) for split, of in chosen.items()}
        names |= {split: f"{share:.4g} of train" for split, share in drawn.items()}
        names = {split: names[split] for split in SPLITS if split in names}
        layout = _columns(self, schema, config, used, names, drawn)
        self._tell(layout, sorted(by_split.keys() - {name for of in chosen.values() for name in of}))
        return layout

    def _tell(self, layout: Layout, unused: list[str]) -> None:
        splits = ", ".join(f"{split} = {name}" for split, name in layout.names.items())
        speaker = layout.speaker or "unknown"
        self.log(
            f"{self.files.where}{f' ({layout.config})' if layout.config else ''}: {splits}; "
            f"audio = {layout.audio}, text = {layout.text}, speaker = {speaker}"
            + (f"; not used: {', '.join(unused)}" if unused else "")
        )
        if heads := [name for name in layout.names.values() if "partial-" in name]:
            self.log(f"note: {', '.join(heads)} is only the head of the data set that the Hub converted, not all of it")

        if lacking := [split for split in SPLITS if split not in layout.names]:
            self.log(
                f"note: {self.files.where} gives no {' and no '.join(lacking)}: mix it with a source that does, "
                "or draw it from train (source.splits.validation = '5%')"
            )

    def _opened(self, name: str) -> Any:
        """The file as a pyarrow ParquetFile."""
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise missing_package("pyarrow", "pyarrow>=18", "reading Parquet") from None
        return _read(
            f"{self.files.where}/{name}",
            # pre_buffer asks for neighbouring columns at once: over a network every question counts
            lambda: parquet.ParquetFile(self.files.open(name), pre_buffer=True),
        )

    def _rows(self, split: str, name: str) -> Iterator[Example]:
        layout, file, place = self._layout, self._opened(name), f"{self.files.where}/{name}"
        lacking = {layout.audio, layout.text, layout.speaker, *layout.meta} - {""} - {*file.schema_arrow.names}
        if lacking:
            raise LabError(f"{place} must have the columns of the first file, lacks {', '.join(sorted(lacking))}")
        light = [layout.text, *filter(None, [layout.speaker]), *layout.meta]
        stem, number = name.removesuffix(".parquet"), 0
        for group in range(file.num_row_groups):
            rows = _read(place, lambda group=group: file.read_row_group(group, columns=light).to_pylist())
            sounds = _Sounds(file, group, layout.audio, place)
            for index, row in enumerate(rows):
                meta = {column: _named(layout, column, row[column]) for column in layout.meta}
                id, speaker = f"{stem}:{number}", _string(row[layout.speaker]) if layout.speaker else ""
                yield RowExample(
                    id,
                    _drawn_split(layout.drawn, speaker or id, self.seed) if split == "train" else split,
                    _string(row[layout.text]),
                    speaker,
                    {column: value for column, value in meta.items() if value},
                    (sounds, index),
                )
                number += 1


class RowExample(Example):
    """An Example whose sound is read from its row group when it is asked for; pickled, it takes the bytes along."""

    def __init__(self, id: str, split: str, text: str, speaker: str, meta: dict[str, str], sound: tuple[_Sounds, int]):
        self.__dict__.update(id=id, split=split, text=text, speaker=speaker, meta=meta, sound=sound)

    @property
    def audio(self) -> bytes:
        sounds, index = self.__dict__["sound"]
        return sounds[index]

    def __reduce__(self):
        return Example, (self.id, self.split, self.text, self.audio, self.speaker, self.meta)


class _Sounds:
    """The audio column of one row group, read once, at the first question; it goes with the last of its examples."""

    def __init__(self, file: Any, group: int, column: str, place: str):
        self._file, self._group, self._column, self._place = file, group, column, place

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a row; empty where the row has none: curation rejects it."""
        value = self._values[index].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value or b""

    @cached_property
    def _values(self) -> Any:
        return _read(self._place, lambda: self._file.read_row_group(self._group, columns=[self._column]).column(0))


def _read(place: str, action: Callable[[], Any]) -> Any:
    """What pyarrow gives, or one line where the file is broken."""
    import pyarrow

    try:
        return action()
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        told = str(error).partition("\n")[0][:200]
        raise LabError(f"{place} must be a whole Parquet file, got: {told}. Replace it") from None


def _choose_config(where: str, names: list[str], wanted: str) -> tuple[str, dict[str, list[str]]]:
    """The configuration, and its files by the data set's own names of splits."""
    configs: dict[str, dict[str, list[str]]] = {}
    for name in names:
        config, split = _config_and_split(name)
        configs.setdefault(config, {}).setdefault(split, []).append(name)
    asked = [wanted.lower()] if wanted else SWEDISH
    fitting = [config for config in configs if {config.lower(), config.lower().rpartition("/")[2]} & {*asked}]
    if not wanted and len(configs) == 1:
        fitting = list(configs)
    if len(fitting) != 1:
        found = ", ".join(repr(config) for config in sorted(configs)[:12]) + (" ..." if len(configs) > 12 else "")
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
    free = [name for name in by_split if not any(name in of for of in chosen.values())]
    if not any(chosen.values()) and len(free) == 1 and not settings.get("train"):
        chosen["train"] = (free[0],)
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


def _drawn_split(drawn: Mapping[str, float], who: str, seed: int) -> str:
    """By a hash of who speaks: no other row can change it, and each speaker is wholly in one split."""
    place = int(hashlib.sha256(f"{seed}\n{who}".encode()).hexdigest()[:12], 16) / 16**12
    for split, share in drawn.items():
        if place < share:
            return split
        place -= share
    return "train"


def _columns(
    source: ParquetSource,
    schema: Any,
    config: str,
    splits: dict[str, list[str]],
    names: dict[str, str],
    drawn: dict[str, float],
) -> Layout:
    features = _hub_features(schema)
    where, lower = source.files.where, {name.lower(): name for name in schema.names}
    audio = _audio_column(where, schema, features, source.audio_column)
    text = _text_column(where, schema, source.text_column)
    if source.speaker_column and source.speaker_column not in schema.names:
        raise LabError(f"{where} has no column {source.speaker_column!r} (source.speaker_column): {_listed(schema)}")
    guessed = next((lower[name] for name in SPEAKER if name in lower), "")
    meta = [lower[name] for name in META if name in lower]
    kinds = {name: features.get(name, {}).get("names") for name in meta}
    return Layout(
        config,
        splits,
        names,
        audio,
        text,
        source.speaker_column or guessed,
        tuple(name for name in meta if name not in (audio, text) and _is_plain(schema.field(name).type)),
        {name: labels for name, labels in kinds.items() if isinstance(labels, list)},
        drawn,
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
    called = features.get(column.name, {}).get("_type") == "Audio" or column.name.lower() in (
        "audio",
        "speech",
        "bytes",
    )
    return binary(column.type) and called


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


def _named(layout: Layout, column: str, value: Any) -> str:
    """A cell for slices: the name behind a class label, the last part of a path."""
    labels = layout.labels.get(column)
    if labels and isinstance(value, int):
        return labels[value] if 0 <= value < len(labels) else ""
    return PurePosixPath(value).name if column.lower() == "path" and value else _string(value)


def _string(value: Any) -> str:
    return "" if value is None else str(value)


def _is_string(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_plain(kind: Any) -> bool:
    import pyarrow.types as types

    return _is_string(kind) or types.is_integer(kind) or types.is_floating(kind)


def _listed(schema: Any) -> str:
    return f"it has {', '.join(schema.names)}"
