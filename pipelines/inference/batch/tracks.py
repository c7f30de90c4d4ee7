"""Audio tracks of videos: one of them, or all as one transcript."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference import channels
from pipelines.inference.transcript import DamagedRecording, Transcript
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError

if TYPE_CHECKING:
    from pipelines.inference.channels import ChannelTranscriber
    from pipelines.inference.transcriber import Transcriber

ALL = -1
"""All tracks, with their segments in order of time."""


def parse(track: str) -> int:
    """Return the number of a track, 0 for "" and ALL for "all". Raises LabError for anything else."""
    if track in ("", "all"):
        return ALL if track else 0
    if not track.isdecimal() or not int(track):
        raise LabError(f"--track takes 1, 2, ... or all, got {track!r}")
    return int(track)


def transcribe(
    transcriber: Transcriber | ChannelTranscriber, recording: Path | bytes, track: int, **options: Any
) -> Transcript:
    """Return the transcript of a track, or of all. Raises AudioError and DamagedRecording."""
    if track != ALL:
        return transcriber.transcribe(recording, **options, **({"track": track} if track else {}))
    transcripts: list[Transcript] = []
    damage = None
    while True:
        number = len(transcripts) + 1
        try:
            transcripts.append(transcriber.transcribe(recording, **options, track=number))
        except DamagedRecording as error:
            transcripts.append(error.transcript)
            damage = damage or AudioError(error.reason, f"{error.detail} (track {number})")
        except AudioError as error:
            if error.reason != "no_track" or not transcripts:
                raise
            break
    transcript = channels.merge(transcripts)
    if damage:
        raise DamagedRecording(damage, replace(transcript, damage=damage.detail))
    return transcript
