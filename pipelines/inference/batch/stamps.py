"""Notice that a recording was replaced after it was transcribed: its size, time and content are kept with its row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from pipelines.inference.batch.job import Job, Result
from pipelines.inference.batch.tables import Recording
from pipelines.infra import manifest
from pipelines.infra.errors import LabError


def stamp(recording: Recording) -> str | None:
    """Return size, modification time and sha256 of a recording's file; None if its row holds the audio or no file."""
    try:
        if not isinstance(recording.audio, Path) or not recording.audio.is_file():
            return None
        return f"{_size_and_time(recording.audio)} {manifest.sha256(recording.audio)}"
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return None


def refuse_changed(job: Job, results: Iterable[Result]) -> None:
    """Raise LabError if the file of one of the first rows has other content than when it was transcribed."""
    stamped = [(number, result.stamp) for number, result in enumerate(results) if result.stamp]
    if not stamped:
        return
    expected = dict(stamped)
    for number, recording in enumerate(islice(job.recordings, stamped[-1][0] + 1)):
        if number in expected and not _is_same(recording.audio, expected[number]):
            raise LabError(
                f"{recording.name} was changed since it was transcribed for {job.out}: restore it, or start again "
                "with --again"
            )


def digests(results: Iterable[Result]) -> dict[str, str]:
    """Return digests of the sizes and times, and of the contents, of all recordings; empty if one has no stamp."""
    stamps = [result.stamp for result in results]
    if not all(stamps):
        return {}
    contents = (text.rpartition(" ")[2] for text in stamps)
    return {"files": _digest(text.rpartition(" ")[0] for text in stamps), "contents": _digest(contents)}


def refuse_other_files(job: Job, recorded: dict[str, str]) -> None:
    """Raise LabError if the recordings of a finished table differ from those with the digests `recorded`.

    Without one of them, nothing is compared.
    """
    if not recorded or _digest(_sizes_and_times(job)) == recorded["files"]:
        return
    stamps = [stamp(recording) for recording in job.recordings]
    if all(stamps) and _digest(text.rpartition(" ")[2] for text in stamps) != recorded["contents"]:
        raise LabError(
            f"a recording was changed since {job.out} was written: start again with --again, or name another file "
            "with --out"
        )


def _sizes_and_times(job: Job) -> Iterator[str]:
    for recording in job.recordings:
        if isinstance(recording.audio, Path) and recording.audio.is_file():
            yield _size_and_time(recording.audio)


def _size_and_time(path: Path) -> str:
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _is_same(path: Path | bytes | None, recorded: str) -> bool:
    """Return whether a file has the recorded content; it is only read if its size or time differ.

    A recording that was removed after it was transcribed counts as unchanged.
    """
    if not isinstance(path, Path) or not path.is_file():
        return True
    size_and_time, _, sha256 = recorded.rpartition(" ")
    return _size_and_time(path) == size_and_time or manifest.sha256(path) == sha256


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
