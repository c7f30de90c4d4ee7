"""The data set card of a feature cache that is published to the Hub: what its rows are, and all that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAME = "README.md"
MARK = "<!-- Written when the cache was published. Remove this line to keep a card of your own. -->"
"""A card without it was written by a person, and is never replaced."""
LICENCES = {"tour": "apache-2.0", "common_voice": "cc0-1.0"}
"""Kind of source to the Hub's name of its licence, where the kind alone tells."""
_COLUMNS = {
    "id": "names the clip within its source",
    "split": "train, validation or test",
    "text": "the transcript",
    "speaker": "who speaks, as the source names them; empty where unknown",
    "duration_s": "seconds of sound",
    "frames": "log-mel frames of 10 ms that are kept",
    "pad_value": "the log-mel value of silence: what fills the clip up to 30 s",
    "labels": "token ids that the decoder is to produce",
    "offset": "the clip's first frame in its shard's `.bin`",
    "audio": "16 bytes of the sha256 of the audio file, not its sound",
}


def of_cache(folder: Path, sealed: Mapping[str, Any], licence_of: Callable[[dict[str, Any]], str | None]) -> str:
    """The card of the cache in `folder`, whose manifest is `sealed`; `licence_of` tells that of one source, if known.

    A source is given as its identity: `kind` and what names it.
    """
    identity, counts = sealed["identity"], sealed["counts"]
    licences = {licence_of(source) or "unknown" for source in _sources(identity)}
    licence = licences.pop() if len(licences) == 1 else "unknown"
    clips = ", ".join(f"{n} {name}" for name, n in counts.items())
    columns = "\n".join(f"| {name} | {_COLUMNS.get(name, 'as the source has it')} |" for name in _columns(folder))
    lineage = "\n".join(f"| {name} | {_cell(value)} |" for name, value in sorted(identity.items()))
    return f"""---
license: {json.dumps(licence)}
language:
- {identity["language"]}
task_categories:
- automatic-speech-recognition
tags:
- whisper
- log-mel
viewer: false
---
{MARK}

# Feature cache {sealed["digest"]}

Speech as Whisper hears it: log-mel features and transcripts, made by the feature pipeline of the Swedish Whisper lab.
Clips: {clips}.

There is no audio in it. Speech can be rebuilt from log-mel frames all the same, well enough to be understood and to
know a voice: treat them as the recordings. {_rehosting(identity)}

`shard-*.bin` holds the frames of its clips one after another, {identity["features.dtype"]}
[frames, {identity["features.n_mels"]}]; `shard-*.parquet` one row per clip; `rejected.csv` the clips that were not
used, with the reason; `manifest.json` size and sha256 of every file.

| column | what it holds |
|---|---|
{columns}

Train on it with `--cache` and the `hub://` URI of this repository.

## Lineage

Digest {sealed["digest"]}: of the recipe's settings, the source and the versions that decided rows and frames.

| field | value |
|---|---|
{lineage}
"""


def _sources(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The identity of each source: that of the cache's, or those of the parts of a mix."""
    told = {name.removeprefix("source."): value for name, value in identity.items() if name.startswith("source.")}
    if told.get("kind") != "mix":
        return [told]
    prefixes = [f"{part}." for part in told["parts"].split()]
    return [{n.removeprefix(p): value for n, value in told.items() if n.startswith(p)} for p in prefixes]


def _columns(folder: Path) -> list[str]:
    import pyarrow.parquet

    names: dict[str, None] = {}
    for path in sorted(folder.glob("shard-*.parquet")):
        names |= dict.fromkeys(pyarrow.parquet.read_schema(path).names)
    return list(names)


def _rehosting(identity: Mapping[str, Any]) -> str:
    kinds = {source.get("kind") for source in _sources(identity)}
    return "Common Voice may not be re-hosted: keep this repository private." if "common_voice" in kinds else ""


def _cell(value: Any) -> str:
    """A value as one cell of a table."""
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "`" + re.sub(r"\s+", " ", told).replace("|", "\\|").replace("`", "'") + "`"
