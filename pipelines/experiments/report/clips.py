"""Audio of single clips for the report page, if the source provides it without network access."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.features.sources.registry import open_source
from pipelines.infra.errors import LabError
from pipelines.recipes.data_settings import SourceSettings
from pipelines.speech import audio_uri

MAX_BYTES = 1_200_000
"""Limit for all embedded audio, as base64: the page stays below 2 MB."""
_REMOTE = ("hub", "mozilla")
"""Kinds of sources that need the network: a report fetches nothing."""


def embedded(settings: SourceSettings, language: str, split: str, ids: Iterable[str]) -> tuple[dict[str, str], str]:
    """Return FLAC audio at 16 kHz as data URIs by id, and the reason why other ids have none (empty if all have).

    The first of `ids` are preferred if MAX_BYTES does not allow all.
    """
    requested = list(ids)
    if remote := sorted({kind for kind in _kinds(settings) if kind in _REMOTE}):
        return {}, f"the source ({', '.join(remote)}) is read over the network, and a report fetches nothing"
    try:
        available = _read_audio(settings, language, split, set(requested))
    except (LabError, OSError) as error:
        return {}, f"the source is not available ({type(error).__name__})"
    uris, left = {}, MAX_BYTES
    for name in requested:
        uri = available.get(name, "")
        if uri and len(uri) <= left:
            uris[name], left = uri, left - len(uri)
    if len(uris) == len(set(requested)):
        return uris, ""
    return uris, "the clip is no longer in the source, cannot be decoded, or is too long for this page"


def _read_audio(settings: SourceSettings, language: str, split: str, ids: set[str]) -> dict[str, str]:
    uris: dict[str, str] = {}
    for example in open_source(settings, language).examples((split,)):
        if example.id in ids:
            uris[example.id] = audio_uri.data_uri(example.audio)
            if len(uris) == len(ids):
                break
    return uris


def _kinds(settings: SourceSettings) -> list[str]:
    return [settings.kind, *(kind for part in settings.parts for kind in _kinds(part))]
