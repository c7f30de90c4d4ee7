"""Subtitle files for each recording of a job."""

from __future__ import annotations

import os
from itertools import chain, count
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pipelines.inference import subtitles
from pipelines.inference.batch.job import Job
from pipelines.infra import manifest
from pipelines.infra.downloads.urls import Url
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.batch.tables import Recording
    from pipelines.inference.transcriber import Transcriber
    from pipelines.inference.transcript import Transcript


def subtitle_paths(job: Job) -> list[Path | None]:
    """Return for each row the path of its subtitle files without suffix, or an empty list if none are requested.

    Two recordings of one stem get different paths: a.wav and a.mp3 become a.srt and a.mp3.srt; two of one name in
    different places become a.srt, a.wav.srt and a-2.wav.srt. A part of a recording becomes a@1.5-2.5.srt, whose times
    count from its start.
    """
    owners: dict[Path, Any] = {}
    paths: list[Path | None] = []
    for number, recording in enumerate(job.recordings if job.formats else (), 1):
        if recording.audio is None:
            paths.append(None)
            continue
        full = _path_with_suffix(job, recording, number)
        if recording.excerpt:
            full = full.with_name(f"{full.stem}@{recording.excerpt}{full.suffix}")
        owner = number if isinstance(recording.audio, bytes) else (recording.audio, str(recording.excerpt))
        numbered = (full.with_name(f"{full.stem}-{n}{full.suffix}") for n in count(2))
        candidates = chain((full.with_suffix(""), full), numbered)
        paths.append(next(path for path in candidates if owners.setdefault(path, owner) == owner))
    return paths


def _path_with_suffix(job: Job, recording: Recording, number: int) -> Path:
    """Return the path of the recording, or the corresponding path inside the job's folder."""
    is_file = isinstance(recording.audio, Path)
    if isinstance(recording.audio, Url):
        return (job.folder or (job.out.parent if job.out else Path())) / recording.audio.file_name
    if job.folder is None and not is_file:
        raise LabError("the rows contain audio instead of paths: name a folder for the subtitles with --out")
    if job.folder is None:
        return recording.audio
    if is_file:
        path = Path(os.path.normpath(recording.audio))
        base = Path(os.path.normpath(job.recordings.table.folder))
        return job.folder / (path.relative_to(base) if path.is_relative_to(base) and base != Path() else path.name)
    return job.folder / (PurePath(recording.name.replace("\\", "/")).name or f"row-{number:06d}")


def refuse_existing(job: Job, paths: list[Path | None]) -> None:
    """Raise LabError if one of the subtitle files exists."""
    for stem in filter(None, paths):
        for form in job.formats:
            if (path := subtitle_file(stem, form)).exists():
                raise LabError(f"{path} exists already: name a folder with --out, or replace it with --again")


def write_subtitles(
    stem: Path, form: str, transcript: Transcript, transcriber: Transcriber, style: subtitles.Style
) -> None:
    """Write the subtitle file of one format, one of subtitles.FORMATS."""
    content = subtitles.write(transcript, form, style, transcriber.language, transcriber.ref.folder)
    path = subtitle_file(stem, form)
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(path, content.encode())


def subtitle_file(stem: Path, form: str) -> Path:
    """Return the path of the file of one format."""
    return stem.with_name(f"{stem.name}.{form}")
