"""The sound of single clips, where the source can give it without asking the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

from pipelines.features.sources.registry import open_source
from pipelines.infra.errors import LabError
from pipelines.recipes.settings import SourceSettings
from pipelines.speech import audio

MOST_BYTES = 1_200_000
"""Of all embedded sound together, as base64: a page stays below 2 MB."""
_LONGEST_S = 30.0
_ELSEWHERE = ("hub", "mozilla")
"""Kinds of sources that are downloaded, or read over the network: a report fetches nothing."""


def embedded(settings: SourceSettings, language: str, split: str, ids: Iterable[str]) -> tuple[dict[str, str], str]:
    """FLAC at 16 kHz as data URIs, by id, of those of `ids` that there is room for; and why others have none.

    Clips that come first in `ids` go first; the note is empty where none is lacking.
    """
    wanted = list(ids)
    if away := sorted({kind for kind in _kinds(settings) if kind in _ELSEWHERE}):
        return {}, f"the source ({', '.join(away)}) is read over the network, and a report fetches nothing"
    try:
        found = _sound(settings, language, split, set(wanted))
    except (LabError, OSError) as error:
        return {}, f"the source is not at hand ({type(error).__name__})"
    uris, left = {}, MOST_BYTES
    for name in wanted:
        uri = found.get(name, "")
        if uri and len(uri) <= left:
            uris[name], left = uri, left - len(uri)
    if len(uris) == len(set(wanted)):
        return uris, ""
    return uris, "the source has no such clip any more, it cannot be decoded, or it is too long for this page"


def _sound(settings: SourceSettings, language: str, split: str, wanted: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for example in open_source(settings, language).examples((split,)):
        if example.id in wanted:
            found[example.id] = _data_uri(example.audio)
            if len(found) == len(wanted):
                break
    return found


def _data_uri(sound: object) -> str:
    import soundfile

    try:
        waveform = audio.decode(sound, _LONGEST_S)
    except audio.AudioError:
        return ""
    file = io.BytesIO()
    soundfile.write(file, waveform.samples, audio.SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()


def _kinds(settings: SourceSettings) -> list[str]:
    return [settings.kind, *(kind for part in settings.parts for kind in _kinds(part))]
