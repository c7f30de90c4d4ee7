"""The journal of a table: finished rows of an interrupted call, and rows without errors of an earlier one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.inference.batch import stamps
from pipelines.inference.batch.job import Job, Result, Summary
from pipelines.inference.subtitles import DEFAULT
from pipelines.infra import manifest
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Transcriber


_ABSENT_BY_DEFAULT = ("track", "channels", "style of subtitles")


@dataclass(frozen=True)
class Journal:
    """The valid part of a journal file."""

    identity: dict[str, Any]
    """See `identity_of`; `made_of` in the file."""
    rows: int
    n_bytes: int
    """End of the last complete line."""


def identity_of(job: Job, transcriber: Transcriber) -> dict[str, Any]:
    """Return everything that determines the output, by the names that errors use."""
    recordings, ref = job.recordings, transcriber.ref
    return {
        "table": recordings.table.digest(),
        "audio column": recordings.audio,
        "reference column": recordings.reference,
        "speaker column": recordings.speaker,
        "model": ref.revision,
        "engine": transcriber.loaded.name,
        "language": transcriber.language,
        "decoding": json.loads(json.dumps(asdict(transcriber.options))),
        "format": list(job.formats),
        **({"segment columns": names} if (names := recordings.excerpt_columns) else {}),
        **({"track": job.track} if job.track else {}),
        **({"channels": ["split", *job.channel_names]} if job.split_channels else {}),
        **({"style of subtitles": asdict(job.style)} if job.style != DEFAULT else {}),
    }


def _check_identity(out: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    names = [*current, *(name for name in _ABSENT_BY_DEFAULT if name not in current)]
    if "decoding" not in recorded:  # a journal of an earlier version
        names.remove("decoding")
    if differing := [name for name in names if recorded.get(name) != current.get(name)]:
        raise LabError(
            f"{out} was started with another {' and '.join(differing)}: call it as before, start again with --again, "
            "or name another file with --out"
        )


def find_interrupted(job: Job, identity: dict[str, Any], retry: bool) -> Journal | None:
    """Return the journal of an interrupted call, or None. Raises LabError if its identity differs.

    For `retry` its rows are set aside first, to be reused or repeated. If there are such rows already, the interrupted
    call was itself a retry, which is continued.
    """
    journal = read_journal(job.partial)
    if journal:
        _check_identity(job.out, journal.identity, identity)
    if journal and retry and not job.earlier.exists():
        os.replace(job.partial, job.earlier)
        return None
    return journal


def find_finished(job: Job, identity: dict[str, Any], retry: bool) -> Summary | None:
    """Return the summary of a finished table, or None if there is none or if `retry` has rows to repeat.

    Raises LabError if the table was not written by this command, if its identity differs, or if the rows that a retry
    reuses are gone.
    """
    finished, earlier = _read_summary(job), read_journal(job.earlier)
    if job.out.exists() and not finished:
        raise LabError(
            f"{job.out} exists and was not written by this command, or was changed since: "
            "name another file with --out, or replace it with --again"
        )
    for recorded in (finished["made_of"] if finished else None, earlier.identity if earlier else None):
        if recorded is not None:
            _check_identity(job.out, recorded, identity)
    if earlier:
        stamps.refuse_changed(job, islice(read_results(job.earlier), earlier.rows))
    if not finished:
        return None
    stamps.refuse_other_files(job, finished.get("recordings", {}))
    if retry and finished["summary"]["errors"]:
        if earlier:
            return None
        raise LabError(f"{job.earlier.name}, which contained the good rows, is gone: start again with --again")
    return Summary(**finished["summary"])


def reusable_results(earlier: Path, skip: int) -> Iterator[Result | None]:
    """Yield for each row from `skip` on the earlier result without an error, or None; endless."""
    journal = read_journal(earlier)
    results = islice(read_results(earlier), skip, journal.rows) if journal else ()
    yield from (result if result.error is None else None for result in results)
    yield from repeat(None)


def read_journal(path: Path) -> Journal | None:
    """Read a journal up to its last complete line; return None if not even the first line is complete."""
    lines = _read_lines(path)
    first = next(lines, None)
    if first is None or not isinstance(first[0].get("made_of"), dict):
        return None
    rows, n_bytes = 0, first[1]
    for cells, end in lines:
        if "transcript" not in cells:
            break
        rows, n_bytes = rows + 1, end
    return Journal(first[0]["made_of"], rows, n_bytes)


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield content and end of each line, up to the first that is incomplete."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            try:
                fields = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(fields, dict):
                return
            yield fields, end


@contextmanager
def open_journal(path: Path, journal: Journal | None, identity: dict[str, Any]) -> Iterator[BinaryIO]:
    """Open a journal for appending: a new one with its first line, or an existing one cut to its complete lines."""
    with open(path, "r+b" if journal else "wb") as file:
        if journal:
            file.truncate(journal.n_bytes)
            file.seek(0, os.SEEK_END)
        else:
            file.write(encode_line({"made_of": identity}))
            file.flush()
        manifest.flush(path)
        yield file


def encode_line(fields: dict[str, Any]) -> bytes:
    """Return a line of the journal."""
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def read_results(path: Path) -> Iterator[Result]:
    """Yield the results in a journal."""
    return (Result(name="", **cells) for cells, _ in islice(_read_lines(path), 1, None))


def _read_summary(job: Job) -> dict[str, Any] | None:
    """Read the summary file of a table; return None if it is missing or does not belong to the table."""
    try:
        content = json.loads(job.summary.read_text("utf-8"))
        is_current = content["sha256"] == manifest.sha256(job.out)
        Summary(**content["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if is_current and isinstance(content.get("made_of"), dict) else None


@contextmanager
def lock_table(out: Path) -> Iterator[None]:
    """Lock a table against other processes. Raises LabError if it is locked."""
    import filelock

    try:
        path = out.with_name(f".{out.name}.lock")
        with filelock.FileLock(path, timeout=0):
            yield
            with suppress(OSError):  # Windows does not delete an open file
                path.unlink()
    except filelock.Timeout:
        raise LabError(f"another process is writing {out}: wait for it, or name another file with --out") from None
