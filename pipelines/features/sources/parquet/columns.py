"""The columns of a data set: from the settings, else from names and types."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.infra.errors import LabError
from pipelines.speech.recordings.excerpts import find_columns

logger = logging.getLogger(__name__)

TEXT = ("text", "sentence", "transcript", "transcription", "raw_transcription", "raw_text", "normalized_text")
SPEAKER = ("speaker", "speaker_id", "client_id")
META = ("gender", "sex", "age", "accent", "accents", "dialect", "variant", "up_votes", "down_votes", "path")
SPLIT, LIKE_SPLIT = "split", ("subset", "partition", "set", "fold", "split_name", "data_split")
PATH = ("audio", "path", "file", "file_name", "audio_path", "audio_filepath", "audio_file")
"""Names of columns of paths, for data sets without a column of audio."""
SAMPLES = ("audio", "array", "speech", "samples", "waveform")
RATE = ("sampling_rate", "sample_rate", "sr")


@dataclass(frozen=True)
class ColumnSettings:
    """Names of columns from the recipe; empty ones are guessed."""

    audio: str = ""
    text: str = ""
    speaker: str = ""


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
    rate: str = ""
    """Column of the sampling rate in Hz, if `audio` holds decoded samples."""


def choose(where: str, schema: Any, settings: ColumnSettings, with_paths: bool = False) -> Columns:
    """Return the columns of a file. `with_paths`: a column of paths will do if there is none of audio.

    Raises LabError, naming the setting, if the settings do not match the file or are ambiguous.
    """
    features, lower = _hub_features(schema), {name.lower(): name for name in schema.names}
    audio = _audio_column(where, schema, features, settings.audio, with_paths)
    text = _text_column(where, schema, settings.text)
    speaker = settings.speaker or _first(lower, SPEAKER)
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
        _rate_column(where, schema, audio, lower),
    )


def split_column(schema: Any) -> str:
    """Return the column `split`, in any case, or an empty string."""
    names = (name for name in schema.names if name.lower() == SPLIT and is_string(schema.field(name).type))
    return next(names, "")


def other_split_columns(schema: Any) -> list[str]:
    """Return the columns that may hold splits under another name than `split`."""
    return [name for name in schema.names if name.lower() in LIKE_SPLIT and is_string(schema.field(name).type)]


def unequal(schema: Any, columns: Columns, settings: ColumnSettings) -> str:
    """Return what a file of the same data set has otherwise than the first, in words, or an empty string."""
    needed = [column for column in (columns.text, columns.speaker, columns.audio, columns.rate) if column]
    if missing := {*needed} - {*schema.names}:
        return f"lacks {', '.join(sorted(missing))}"
    speaker = _first({name.lower(): name for name in schema.names}, SPEAKER)
    if speaker and not columns.speaker and not settings.speaker:
        return f"has {speaker}, which is missing there"
    return ""


def check_excerpts(where: str, schema: Any, audio: str) -> None:
    """Log that columns of start and end are not used. Raises LabError if `audio` holds paths: rows may share a file."""
    excerpts = find_columns(schema.names)
    if not excerpts or not (excerpts.start or excerpts.end):
        return
    listed = ", ".join(excerpts.names)
    if is_string(schema.field(audio).type):
        raise LabError(
            f"{where} has paths of recordings and the columns {listed}, and Parquet is not read in parts: write the "
            "rows to transcripts.csv beside the recordings, and set source.kind=folder"
        )
    logger.info(f"note: {where}: the columns {listed} are not used: the audio of a row is used whole")


def is_string(kind: Any) -> bool:
    """Return True for text in any encoding: string, large_string, string_view, or a dictionary of them."""
    import pyarrow.types as types

    kind = _plain_type(kind)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _first(lower: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((lower[name] for name in names if name in lower), "")


def _audio_column(where: str, schema: Any, features: Mapping[str, Any], setting: str, with_paths: bool) -> str:
    matches = [name for name in schema.names if _holds_audio(schema.field(name), features)]
    strings = [name for name in schema.names if with_paths and is_string(schema.field(name).type)]
    if setting and setting not in [*matches, *strings]:
        kind = f"of type {schema.field(setting).type}" if setting in schema.names else f"absent: {_listed(schema)}"
        raise LabError(f"{where}: source.audio_column must hold audio files as bytes, got {setting!r}, {kind}")
    if not setting and not matches:
        matches = [_first({name.lower(): name for name in strings}, PATH)]
    if not setting and not any(matches):
        raise LabError(f"{where} has no column of audio files as bytes, got {_listed(schema)}: name another data set")
    if not setting and len(matches) > 1:
        raise LabError(f"{where} has the audio columns {', '.join(matches)}: name one with source.audio_column")
    return setting or matches[0]


def _holds_audio(column: Any, features: Mapping[str, Any]) -> bool:
    """Return True for a column of encoded files or decoded samples.

    That is a struct with bytes or with array and sampling_rate, or bytes or samples whose type or name is audio.
    """
    import pyarrow.types as types

    feature, kind = features.get(column.name, {}).get("_type"), _plain_type(column.type)
    if types.is_struct(kind):
        fields = {kind.field(i).name: _plain_type(kind.field(i).type) for i in range(kind.num_fields)}
        has_samples = "sampling_rate" in fields and _is_list(fields.get("array"))
        return (_is_binary(fields.get("bytes")) or has_samples) and feature != "Image"
    if _is_list(kind):
        return column.name.lower() in SAMPLES and _is_numeric(_innermost(kind))
    return _is_binary(kind) and (feature == "Audio" or column.name.lower() in ("audio", "speech"))


def _rate_column(where: str, schema: Any, audio: str, lower: Mapping[str, str]) -> str:
    if not _is_list(_plain_type(schema.field(audio).type)):
        return ""
    rate = _first(lower, RATE)
    if not rate:
        raise LabError(
            f"{where}: the column {audio!r} holds decoded samples, and no column {' or '.join(RATE)} holds their rate "
            "in Hz: add it"
        )
    return rate


def _text_column(where: str, schema: Any, setting: str) -> str:
    strings = [name for name in schema.names if is_string(schema.field(name).type)]
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


def _plain_type(kind: Any) -> Any:
    """Return the type of the values of a dictionary or an extension type."""
    import pyarrow.types as types

    kind = getattr(kind, "storage_type", kind)
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return kind is not None and any(test(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return kind is not None and any(test(kind) for test in tests)


def _innermost(kind: Any) -> Any:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_numeric(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(kind) or types.is_floating(kind)


def _is_plain(kind: Any) -> bool:
    return is_string(kind) or _is_numeric(_plain_type(kind))


def _listed(schema: Any) -> str:
    return f"it has {', '.join(schema.names)}"
