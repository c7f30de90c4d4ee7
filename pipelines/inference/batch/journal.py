"""TODO: describe this module."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.inference.batch.job import Job, Result, Summary
from pipelines.infra import manifest
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Transcriber


# ---- what is done


@dataclass(frozen=True)
class _Begun:
    """What an earlier call left."""

    made_of: dict[str, Any]
    rows: int
    n_bytes: int
    """Up to the end of the last whole line."""


def _made_of(job: Job, transcriber: Transcriber) -> dict[str, Any]:
    """What decides the table that is written, under the names by which an error calls it."""
    found, ref = job.recordings, transcriber.ref
    return {
        "table": found.table.digest(),
        "audio column": found.audio,
        "reference column": found.reference,
        "speaker column": found.speaker,
        "model": ref.revision,
        "engine": transcriber.loaded.name,
        "language": transcriber.language,
        "format": list(job.formats),
    }


def _refuse_unlike(out: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if other := [name for name, value in now.items() if then.get(name) != value]:
        raise LabError(
            f"{out} was begun with another {' and '.join(other)}: call it as before, begin anew with --again, "
            "or name another file with --out"
        )


def _going_on(job: Job, made_of: dict[str, Any], retry: bool) -> _Begun | None:
    """Where an earlier call was cut off. For `retry` its lines are set aside, to be kept or done once more; where some
    are aside already, such a retry was cut off, and goes on."""
    begun = _begun(job.partial)
    if begun:
        _refuse_unlike(job.out, begun.made_of, made_of)
    if begun and retry and not job.earlier.exists():
        os.replace(job.partial, job.earlier)
        return None
    return begun


def _done(job: Job, made_of: dict[str, Any], retry: bool) -> Summary | None:
    """The figures of a table that is there already, unless some of its rows are to be tried once more.

    LabError where it is not this command's, or of something else, or the good rows that a retry keeps are gone.
    """
    finished, earlier = _finished(job), _begun(job.earlier)
    if job.out.exists() and not finished:
        raise LabError(
            f"{job.out} exists and was not made by this command, or was changed since: "
            "name another file with --out, or replace it with --again"
        )
    for then in (finished["made_of"] if finished else None, earlier.made_of if earlier else None):
        if then is not None:
            _refuse_unlike(job.out, then, made_of)
    if not finished or (retry and finished["summary"]["errors"] and earlier):
        return None
    if retry and finished["summary"]["errors"]:
        raise LabError(f"{job.earlier.name}, which held the good rows, is gone: begin anew with --again")
    return Summary(**finished["summary"])


def _kept(earlier: Path, skip: int) -> Iterator[Result | None]:
    """For each row from `skip` on what an earlier call heard in it; None where it did not, or had an error."""
    begun = _begun(earlier)
    told = islice(_results(earlier), skip, begun.rows) if begun else ()
    yield from (result if result.error is None else None for result in told)
    yield from repeat(None)


def _begun(partial: Path) -> _Begun | None:
    """What lies there, up to the last line that is whole; None where not even the first is."""
    lines = _lines(partial)
    head = next(lines, None)
    if head is None or not isinstance(head[0].get("made_of"), dict):
        return None
    rows, n_bytes = 0, head[1]
    for cells, end in lines:
        if "transcript" not in cells:
            break
        rows, n_bytes = rows + 1, end
    return _Begun(head[0]["made_of"], rows, n_bytes)


def _lines(partial: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line, and where it ends; the first that is not ends them all."""
    if not partial.is_file():
        return
    end = 0
    with open(partial, "rb") as file:
        for line in file:
            end += len(line)
            try:
                told = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(told, dict):
                return
            yield told, end


@contextmanager
def _journal(partial: Path, begun: _Begun | None, made_of: dict[str, Any]) -> Iterator[BinaryIO]:
    """The file open at its end: new with its first line, or cut to the lines that are whole."""
    with open(partial, "r+b" if begun else "wb") as file:
        if begun:
            file.truncate(begun.n_bytes)
            file.seek(0, os.SEEK_END)
        else:
            file.write(_line({"made_of": made_of}))
            file.flush()
        manifest.flush(partial)
        yield file


def _line(told: dict[str, Any]) -> bytes:
    return json.dumps(told, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _finished(job: Job) -> dict[str, Any] | None:
    """The notes on a table that is whole; None where there are none, or the table is not the one they speak of."""
    try:
        told = json.loads(job.summary.read_text("utf-8"))
        whole = told["sha256"] == manifest.sha256(job.out)
        Summary(**told["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return told if whole and isinstance(told.get("made_of"), dict) else None


def _results(place: Path) -> Iterator[Result]:
    return (Result(name="", **cells) for cells, _ in islice(_lines(place), 1, None))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time writes a table."""
    import filelock

    try:
        place = out.with_name(f".{out.name}.lock")
        with filelock.FileLock(place, timeout=0):
            yield
            with suppress(OSError):  # nobody waits for it; Windows does not let it go
                place.unlink()
    except filelock.Timeout:
        raise LabError(f"another process is writing {out}: wait for it, or name another file with --out") from None
