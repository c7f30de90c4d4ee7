"""The data set card of a feature cache on the Hub: its columns, and the identity that it was created from."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import manifest
from pipelines.infra.stores.hub_client import CARD
from pipelines.infra.stores.transfer import RemoteFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MARK = "<!-- Written when the cache was published. Remove this line to keep a card of your own. -->"
"""Only a card with this line is replaced: without it, a person wrote the card."""
_LICENCES = {"tour": "apache-2.0", "common_voice": "cc0-1.0"}
"""Kind of source to the Hub's name of its licence, if all sources of this kind have the same."""
_COLUMNS = {
    "id": "names the clip within its source",
    "split": "train, validation or test",
    "text": "the transcript",
    "speaker": "the speaker's id in the source; empty if unknown",
    "duration_s": "seconds of audio",
    "frames": "number of stored log-mel frames of 10 ms",
    "pad_value": "the log-mel value of silence, which pads the clip to 30 s",
    "labels": "token ids of the transcript",
    "offset": "the clip's first frame in its shard's `.bin`",
    "audio": "the first 16 bytes of the sha256 of the audio file, not its audio",
}


def update(remote: RemoteFolder, folder: Path, api: HfApi) -> None:
    """Write or update the card of the feature cache in `folder`; other artefacts and cards by a person are skipped."""
    metadata = manifest.read(folder) or {}
    if not {"identity", "counts"} <= metadata.keys():
        return
    new = create(folder, metadata, api).encode()
    existing = remote.read(CARD)
    if existing != new and (existing is None or _MARK.encode() in existing):
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / CARD).write_bytes(new)
            remote.put(Path(temporary), [CARD])


def create(folder: Path, metadata: Mapping[str, Any], api: HfApi) -> str:
    """Return the card of the cache in `folder`, whose manifest is `metadata`. `api` looks up licences."""
    from huggingface_hub import DatasetCardData

    identity, counts = metadata["identity"], metadata["counts"]
    licences = {_licence(api, source) or "unknown" for source in _sources(identity)}
    front_matter = DatasetCardData(
        license=licences.pop() if len(licences) == 1 else "unknown",
        language=[identity["language"]],
        task_categories=["automatic-speech-recognition"],
        tags=["whisper", "log-mel"],
        viewer=False,
    )
    clips = ", ".join(f"{n} {name}" for name, n in counts.items())
    columns = "\n".join(f"| {name} | {_COLUMNS.get(name, 'as in the source')} |" for name in _columns(folder))
    lineage = "\n".join(f"| {name} | {_cell(value)} |" for name, value in sorted(identity.items()))
    return f"""---
{front_matter.to_yaml()}
---
{_MARK}

# Feature cache {metadata["digest"]}

Log-mel features for Whisper and transcripts, created by the feature pipeline of the Swedish Whisper lab.
Clips: {clips}.

The cache contains no audio. Speech can still be reconstructed from log-mel frames, well enough to be understood and to
recognise a voice: protect them like the recordings. {_rehosting(identity)}

`shard-*.bin` holds the frames of its clips one after another, {identity["features.dtype"]}
[frames, {identity["features.n_mels"]}]; `shard-*.parquet` one row per clip; `rejected.csv` the clips that were not
used, with the reason; `manifest.json` size and sha256 of every file.

| column | content |
|---|---|
{columns}

Train on it with `--cache` and the `hub://` URI of this repository.

## Lineage

Digest {metadata["digest"]} of the settings, the source and the versions that determine rows and frames:

| field | value |
|---|---|
{lineage}
"""


def _licence(api: HfApi, source: Mapping[str, Any]) -> str | None:
    """Return the licence of a source by its identity (`kind` and other fields); for a Hub data set, from its card."""
    if source.get("kind") != "hub":
        return _LICENCES.get(source.get("kind", ""))
    try:
        card = api.dataset_info(source["dataset"], revision=source["commit"]).card_data
    except Exception:  # the data set may be gone or private; a card without a licence is no reason to fail
        return None
    licence = card.get("license") if card else None
    return licence if isinstance(licence, str) else None


def _sources(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the identity of the cache's source, or those of the parts of a mix."""
    source = {name.removeprefix("source."): value for name, value in identity.items() if name.startswith("source.")}
    if source.get("kind") != "mix":
        return [source]
    prefixes = [f"{part}." for part in source["parts"].split()]
    return [{n.removeprefix(p): value for n, value in source.items() if n.startswith(p)} for p in prefixes]


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
    """Return a value as one cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "`" + re.sub(r"\s+", " ", text).replace("|", "\\|").replace("`", "'") + "`"
