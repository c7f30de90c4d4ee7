"""A recording inside an HTML page."""

from __future__ import annotations

import base64
import io

from pipelines.speech import audio

LONGEST_S = 30.0
"""Longer recordings are not embedded."""


def data_uri(content: object) -> str:
    """Return a recording as a data URI of FLAC at 16 kHz; empty if it cannot be decoded or is longer than LONGEST_S."""
    import soundfile

    try:
        waveform = audio.decode(content, LONGEST_S)
    except audio.AudioError:
        return ""
    file = io.BytesIO()
    soundfile.write(file, waveform.samples, audio.SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()


def player(content: object) -> str:
    """Return an HTML player of a recording, or an empty text if it cannot be played."""
    uri = data_uri(content)
    return player_of(uri) if uri else ""


def player_of(uri: str) -> str:
    """Return an HTML player of the recording at an address."""
    return f'<audio controls preload="none" style="height: 2em; width: 14em" src="{uri}"></audio>'
