"""The archive of a job: a page with all of its transcripts, from the json files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.inference.archive import page
from pipelines.inference.archive.folder import read_entry
from pipelines.inference.archive.page import Entry
from pipelines.inference.batch.job import Job
from pipelines.inference.batch.subtitle_files import subtitle_file, subtitle_paths


def write_archive(job: Job, language: str) -> None:
    """Write the archive of a job whose json files are written; a recording without one is listed as such."""
    page.write(job.archive, _entries(job), "" if language == "auto" else language)  # an empty lang is unknown


def _entries(job: Job) -> Iterator[Entry]:
    for recording, path in zip(job.recordings, subtitle_paths(job), strict=True):
        audio = recording.audio if isinstance(recording.audio, Path) and recording.audio.is_file() else None
        excerpt = recording.excerpt
        name = f"{recording.name} ({excerpt} s)" if excerpt else recording.name
        transcript = subtitle_file(path, "json") if path else None
        yield read_entry(name, audio, transcript, excerpt.start_s if excerpt else 0.0)
