"""The recordings of a folder and their transcripts, which `transcribe --format json` or another tool has written."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.inference.archive import transcripts
from pipelines.inference.archive.page import Entry
from pipelines.infra.errors import LabError
from pipelines.speech.audio_files import find_audio

NO_TRANSCRIPT = "no_transcript"
"""Key of a text in page.js, which the page shows in the language of its browser."""


def find_entries(folder: Path, transcripts_folder: Path | None = None) -> list[Entry]:
    """Return the recordings in `folder` and its subfolders with their transcripts.

    A transcript is beside its recording, or at the same place in `transcripts_folder`. Raises LabError if there is no
    folder or no recording.
    """
    if not folder.is_dir():
        raise LabError(f"there is no folder {folder}: name the folder of recordings")
    listing = find_audio(folder)
    if not listing.files:
        raise LabError(f"there is no recording in {folder}; skipped: {listing.describe_skipped() or 'nothing'}")
    target, used = transcripts_folder or folder, set()
    chosen: dict[Path, Path | None] = {}
    for with_suffix in (True, False):  # first a.mp3.json, which belongs to one recording, then a.json
        for audio in listing.files:
            if chosen.get(audio) is None:
                base = target / audio.relative_to(folder)
                chosen[audio] = _find(base if with_suffix else base.with_suffix(""), used)
                used.add(chosen[audio])
    return [read_entry(str(audio.relative_to(folder)), audio, chosen[audio]) for audio in listing.files]


def read_entry(name: str, audio: Path | None, transcript: Path | None, offset_s: float = 0.0) -> Entry:
    """Return the entry of a recording; a transcript that cannot be read is its problem."""
    name = name.replace(os.sep, "/")
    if transcript is None or not transcript.is_file():
        return Entry(name, audio, problem=NO_TRANSCRIPT)
    try:
        lines, damage = transcripts.read(transcript)
        return Entry(name, audio, lines, offset_s, damage)
    except LabError:
        return Entry(name, audio, problem=f"{transcript.name} is not a transcript with times")


def _find(base: Path, used: set[Path | None]) -> Path | None:
    candidates = (base.with_name(base.name + suffix) for suffix in transcripts.SUFFIXES)
    return next((path for path in candidates if path not in used and path.is_file()), None)
