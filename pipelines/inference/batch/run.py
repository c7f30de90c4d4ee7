"""Many recordings to text: row after row of a table, in constant memory, and where it is cut off it goes on.

    talks.csv                       what was asked for
    talks.transcribed.csv.partial   one line of JSON for each row that is done; the first names table, model, settings
    talks.transcribed.csv           made of both when all rows are done: whole or absent
    talks.transcribed.csv.json      the same names, figures, and the sha256 of the table: it is finished
    talks.transcribed.csv.earlier   the lines of the call before, where some have an error: a retry keeps the others

A recording that cannot be used is a row with an error. A reference column gives WER, row by row and over all.
"""

from __future__ import annotations

import json
import logging
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.inference.batch.job import COLUMNS, WER, Job, Result, Summary, _places, _refuse_existing, _write
from pipelines.inference.batch.journal import (
    _alone,
    _begun,
    _done,
    _going_on,
    _journal,
    _kept,
    _line,
    _made_of,
    _results,
)
from pipelines.inference.batch.tables import Recording
from pipelines.inference.transcriber import Damaged
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.speech import scoring, text
from pipelines.speech.audio import AudioError

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Transcriber

logger = logging.getLogger(__name__)


FLUSH_S = 5.0
"""A loss of power costs the rows of so many seconds; the end of the process, however hard, at most the last one."""
_TELL_S = 0.5


def run(
    job: Job, transcriber: Transcriber, *, again: bool = False, retry: bool = False
) -> tuple[Summary, list[Result]]:
    """The figures; and what was heard, where no table holds it. Raises LabError as `transcribe_table` does."""
    if again and retry:
        raise LabError("--again begins anew, --retry-errors keeps what is good: give one of them")
    if job.out is None:
        if retry:
            raise LabError("--retry-errors is for tables, and files have none: name one with --out")
        return transcribe_files(job, transcriber, again=again)
    return transcribe_table(job, transcriber, again=again, retry=retry), []


def transcribe_files(job: Job, transcriber: Transcriber, *, again: bool = False) -> tuple[Summary, list[Result]]:
    """Every recording of a job without a table. Subtitle files that are there already are refused, or written anew."""
    places = _places(job)
    if not again:
        _refuse_existing(job, places)
    results = [*_transcribed(job, transcriber, places, job.recordings.count(), 0)]
    return _summary(transcriber, results, None), results


def transcribe_table(job: Job, transcriber: Transcriber, *, again: bool = False, retry: bool = False) -> Summary:
    """Transcribe the rows that are not done yet, then write the table.

    Raises LabError where the table that is to be written was made of, or begun with, something else, or is of unknown
    origin; `again` begins anew in its place, `retry` does the rows with an error once more. Rows that are done stay
    done, whatever ends the process.
    """
    n = job.recordings.count()
    if not n:
        raise LabError("there is no row to transcribe: the table is a header alone")
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(job.out):
        made_of, places = _made_of(job, transcriber), _places(job)
        if again:
            job.earlier.unlink(missing_ok=True)
        begun = None if again else _going_on(job, made_of, retry)
        if begun:
            logger.info(f"going on after {begun.rows} of {n} rows")
        elif not again and (done := _done(job, made_of, retry)):
            logger.info(f"{job.out} is there already, made of the same table by the same model")
            return done
        elif not again and (earlier := _begun(job.earlier)):
            logger.info(f"keeping the good ones of {earlier.rows} rows")
        elif not again:
            _refuse_existing(job, places)
        skip = begun.rows if begun else 0
        with _journal(job.partial, begun, made_of) as file:
            flushed = time.monotonic()
            for result in _transcribed(job, transcriber, places, n, skip, _kept(job.earlier, skip)):
                file.write(_line({name: value for name, value in asdict(result).items() if name != "name"}))
                file.flush()
                if time.monotonic() - flushed > FLUSH_S:
                    manifest.flush(job.partial)
                    flushed = time.monotonic()
        return _finish(job, transcriber, made_of)


# ---- in words


def outline(job: Job) -> dict[str, Any]:
    """What would be done and written."""
    found, begun = job.recordings, _begun(job.partial) if job.out else None
    return {
        "would": f"transcribe {found.count()} recordings",
        "writes": str(job.out) if job.out else "",
        "columns": {"audio": found.audio, "reference": found.reference, "speaker": found.speaker},
        "formats": list(job.formats),
        "subtitles": str(job.folder or "beside each recording") if job.formats else "",
        "rows_done": begun.rows if begun else 0,
    }


def outline_in_words(outline: dict[str, Any]) -> str:
    columns = ", ".join(f"{what}: {name}" for what, name in outline["columns"].items() if name)
    lines = [f"would {outline['would']} ({columns})"]
    if outline["rows_done"]:
        lines.append(f"{outline['rows_done']} of them are done already")
    if outline["writes"]:
        lines.append(f"would write {outline['writes']}")
    if outline["formats"]:
        lines.append(f"would write {', '.join(outline['formats'])}: {outline['subtitles']}")
    return "\n".join([*lines, "nothing was done"])


def as_dict(job: Job, summary: Summary, results: Sequence[Result]) -> dict[str, Any]:
    """What programs are told: the figures, the table's path or the transcripts."""
    if job.out:
        return {**asdict(summary), "speed": round(summary.speed, 2), "table": str(job.out)}
    heard = ("audio_s", "elapsed_s", "confidence")
    rows = []
    for result in results:
        rows.append({"file": result.name} | ({"error": result.error} if result.error else {}))
        if result.audio_s is not None:
            rows[-1] |= {"text": result.transcript, **{name: getattr(result, name) for name in heard}}
    return {"model": summary.model, "engine": summary.engine, "transcripts": rows}


def in_words(job: Job, summary: Summary, results: Sequence[Result]) -> str:
    """What people are told; the last line says what came of it."""
    if job.out is None:
        told = (f"{one.name}: {'; '.join(filter(None, (one.transcript, one.error)))}" for one in results)
        return "\n".join([f"model {summary.model}", *told])
    lines = [
        f"model {summary.model}, {summary.engine}",
        f"{summary.rows} rows, {summary.errors} with an error: {summary.audio_s:,.1f} s of sound "
        f"in {summary.elapsed_s:,.1f} s, {summary.speed:.1f}x real time",
    ]
    if summary.score:
        lines.append(str(scoring.Score(**summary.score)))
    mend = "; its column `error` says why, --retry-errors tries these rows once more" if summary.errors else ""
    return "\n".join([*lines, f"table {job.out}{mend}"])


# ---- one recording after another


def _transcribed(
    job: Job,
    transcriber: Transcriber,
    places: list[Path | None],
    n: int,
    skip: int,
    kept: Iterable[Result | None] = repeat(None),
) -> Iterator[Result]:
    """The results from row `skip` on, below a progress bar; `kept` are those of these rows that are known already."""
    from tqdm.auto import tqdm

    with tqdm(total=n, initial=skip, unit="clip", desc="transcribing") as bar:
        pace = _Pace(bar)
        rows = zip(islice(job.recordings, skip, None), kept)
        for number, (recording, known) in enumerate(rows, skip):
            yield known or _result(job, transcriber, recording, places[number] if places else None, pace)
            bar.update()


def _result(job: Job, transcriber: Transcriber, recording: Recording, place: Path | None, pace: _Pace) -> Result:
    """What is heard in one recording; its subtitle files are written before the row counts."""
    error = None
    try:
        if recording.audio is None and not recording.name:
            raise AudioError("missing", "the row names no file")
        if recording.audio is None:
            raise AudioError("unreadable", f"the row holds {recording.name} instead of a path or sound")
        heard = transcriber.transcribe(recording.audio, on_audio=pace.within)
    except Damaged as damage:
        heard, error = damage.heard, _one_line(damage)
    except AudioError as failure:
        return Result(recording.name, error=_one_line(failure))
    for form in job.formats:
        _write(place, form, heard, transcriber.language)
    pace.after(heard.audio_s)
    sure = round(heard.confidence, 4) if any(segment.words for segment in heard.segments) else None
    return Result(recording.name, heard.text, sure, round(heard.audio_s, 3), round(heard.elapsed_s, 3), error)


def _one_line(error: AudioError) -> str:
    return " ".join(str(error).split())


class _Pace:
    """Seconds of sound and the multiple of real time, beside the bar; within a long recording, too."""

    def __init__(self, bar: Any):
        self.bar, self.audio_s = bar, 0.0
        self.started = self.told = time.monotonic()

    def within(self, seconds: float) -> None:
        if time.monotonic() - self.told > _TELL_S:
            self._tell(self.audio_s + seconds, refresh=True)

    def after(self, seconds: float) -> None:
        self.audio_s += seconds
        self._tell(self.audio_s, refresh=False)

    def _tell(self, audio_s: float, refresh: bool) -> None:
        self.told = time.monotonic()
        speed = audio_s / max(self.told - self.started, 1e-9)
        self.bar.set_postfix_str(f"{audio_s:,.0f} s of sound, {speed:.1f}x real time", refresh=refresh)


def _finish(job: Job, transcriber: Transcriber, made_of: dict[str, Any]) -> Summary:
    """Table, notes, and only then the rows that both are made of are gone."""
    if job.recordings.table.digest() != made_of["table"]:
        raise LabError("the table was changed while it was transcribed: put it back, or begin anew with --again")
    aside = job.out.with_name(f".{job.out.stem}.partial{job.out.suffix}")
    tally = _Tally(job)
    job.recordings.table.write(aside, job.columns, tally.cells())
    manifest.flush(aside)
    os.replace(aside, job.out)
    manifest.sync_folder(job.out.parent)
    summary = _summary(transcriber, _results(job.partial), tally.score())
    told = {"summary": asdict(summary), "made_of": made_of, "sha256": manifest.sha256(job.out)}
    manifest.write_json(job.summary, told)
    if summary.errors:
        os.replace(job.partial, job.earlier)
    else:
        job.earlier.unlink(missing_ok=True)
        job.partial.unlink()
    return summary


class _Tally:
    """The cells that each row gets; and of all rows together what scores them: numbers, not their words."""

    def __init__(self, job: Job):
        self.job = job
        self._counts = array("q")
        self._speakers: list[str] = []
        self._names: dict[str, str] = {}

    def cells(self) -> Iterator[dict[str, Any]]:
        rows = zip(self.job.recordings.without_audio(), _results(self.job.partial), strict=True)
        for recording, result in rows:
            yield {name: getattr(result, name) for name in COLUMNS} | {WER: self._wer(recording, result)}

    def _wer(self, recording: Recording, result: Result) -> float | None:
        if not _is_scored(recording, result):
            return None
        edits = scoring.count_edits([recording.reference], [result.transcript])
        self._counts.extend(int(count[0]) for count in vars(edits).values())
        self._speakers.append(self._names.setdefault(recording.speaker, recording.speaker))
        return round(float(edits.word_edits[0] / edits.words[0]), 4)

    def score(self) -> scoring.Score | None:
        """Of all rows that can be scored, once their cells were made; None where there is none."""
        if not self._speakers:
            return None
        counts = np.array(self._counts).reshape(len(self._speakers), -1).T
        return scoring.score_edits(scoring.Edits(*counts), self._speakers if self.job.recordings.speaker else None)


def _is_scored(recording: Recording, result: Result) -> bool:
    """A recording that could not be heard says nothing of the model, a reference without words nothing at all."""
    return result.error is None and bool(text.normalise(recording.reference))


def _summary(transcriber: Transcriber, results: Iterable[Result], score: scoring.Score | None) -> Summary:
    rows = errors = 0
    audio_s = elapsed_s = 0.0
    for result in results:
        rows, errors = rows + 1, errors + (result.error is not None)
        audio_s, elapsed_s = audio_s + (result.audio_s or 0.0), elapsed_s + result.elapsed_s
    told = json.loads(json.dumps(score.as_dict())) if score else None
    return Summary(
        transcriber.ref.title, transcriber.loaded.name, rows, errors, round(audio_s, 3), round(elapsed_s, 3), told
    )
