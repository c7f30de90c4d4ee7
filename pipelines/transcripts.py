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
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipelines import manifest, scoring, subtitles, tables, text
from pipelines.audio import AudioError
from pipelines.errors import LabError
from pipelines.tables import Recording, Recordings
from pipelines.transcriber import Damaged

if TYPE_CHECKING:
    from pipelines.transcriber import Transcriber, Transcript

COLUMNS = ("transcript", "confidence", "audio_s", "error")
WER = "wer"
FLUSH_S = 5.0
"""A loss of power costs the rows of so many seconds; the end of the process, however hard, at most the last one."""
_TELL_S = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be transcribed, and where it goes."""

    recordings: Recordings
    out: Path | None
    """The table that is written; None where transcripts are only handed back."""
    formats: tuple[str, ...] = ()
    """Subtitle files for each recording: keys of subtitles.FORMATS."""
    folder: Path | None = None
    """Where they go; None: beside each recording."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the table gets."""
        return (*COLUMNS, WER) if self.recordings.reference else COLUMNS

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def earlier(self) -> Path:
        return self.out.with_name(f"{self.out.name}.earlier")

    @property
    def summary(self) -> Path:
        return self.out.with_name(f"{self.out.name}.json")


@dataclass(frozen=True)
class Result:
    """What became of one recording."""

    name: str
    transcript: str = ""
    confidence: float | None = None
    """None where no word was heard."""
    audio_s: float | None = None
    elapsed_s: float = 0.0
    error: str | None = None
    """A transcript beside it is that of what comes before the damage."""


@dataclass(frozen=True)
class Summary:
    """What became of all."""

    model: str
    engine: str
    rows: int
    errors: int
    audio_s: float
    elapsed_s: float
    """Seconds of transcribing, over all sittings."""
    score: dict[str, Any] | None = None
    """scoring.Score of the rows with a reference and without an error."""

    @property
    def speed(self) -> float:
        """Seconds of sound for a second of time."""
        return self.audio_s / self.elapsed_s if self.elapsed_s else 0.0


def plan(
    inputs: Sequence[Path],
    out: str = "",
    *,
    audio_column: str = "",
    reference_column: str = "",
    speaker_column: str = "",
    formats: Sequence[str] = (),
) -> Job:
    """The job for audio files, folders of them, or one table.

    `out` names the table that is written, or, where it has no table's ending, a folder for table and subtitle files.
    Without it the table lies beside its input; files have none.
    """
    if unknown := [name for name in formats if name not in subtitles.FORMATS]:
        raise LabError(f"--format takes {', '.join(subtitles.FORMATS)}, got {unknown[0]!r}")
    named = [path for path in inputs if path.suffix.lower() in tables.SUFFIXES and not path.is_dir()]
    if named and len(inputs) > 1:
        raise LabError(f"a table is transcribed alone, got {named[0]} and {len(inputs) - 1} more: call it for each")
    place = tables.at_home(Path(out)) if out else None
    is_table = place is not None and place.suffix.lower() in tables.SUFFIXES and not place.is_dir()
    folder = None if is_table else place
    if place and not is_table and not place.is_dir() and (place.exists() or place.suffix[1:] in subtitles.FORMATS):
        raise LabError(f"--out takes a table ({', '.join(tables.SUFFIXES)}) or a folder, got {place}: name another")
    target = place if is_table else _target(inputs, named, folder)
    if named:
        table = tables.open_table(named[0])
    else:
        files = [file for path in inputs for file in (tables.audio_in(path) if path.is_dir() else [path])]
        table = tables.Listing(files, target.absolute().parent if target else None)
    if named and target.absolute() == named[0].absolute():
        raise LabError(f"--out {target} is the table itself, which is never replaced: name another file")
    if target and target.suffix.lower() not in table.kinds:
        raise LabError(f"--out must end in {' or '.join(table.kinds)} here, got {target}: name another")
    added = (*COLUMNS, WER)
    found = tables.recordings(table, audio_column, reference_column, added, speaker_column)
    return Job(found, target, tuple(dict.fromkeys(formats)), folder)


def _target(inputs: Sequence[Path], named: list[Path], folder: Path | None) -> Path | None:
    """Where the table goes that nobody named: beside the one table or folder; files have none."""
    one = tables.at_home(inputs[0])
    if not named and (len(inputs) > 1 or not one.is_dir()):
        return folder / "transcribed.csv" if folder else None
    stem, suffix = (one.stem, one.suffix) if named else (one.absolute().name, ".csv")
    return (folder or one.absolute().parent) / f"{stem}.transcribed{suffix}"


def run(
    job: Job,
    transcriber: Transcriber,
    *,
    again: bool = False,
    retry: bool = False,
    log: Callable[[str], None] = print,
) -> tuple[Summary, list[Result]]:
    """The figures; and what was heard, where no table holds it. Raises LabError as `transcribe_table` does."""
    if again and retry:
        raise LabError("--again begins anew, --retry-errors keeps what is good: give one of them")
    if job.out is None:
        if retry:
            raise LabError("--retry-errors is for tables, and files have none: name one with --out")
        return transcribe_files(job, transcriber, again=again)
    return transcribe_table(job, transcriber, again=again, retry=retry, log=log), []


def transcribe_files(job: Job, transcriber: Transcriber, *, again: bool = False) -> tuple[Summary, list[Result]]:
    """Every recording of a job without a table. Subtitle files that are there already are refused, or written anew."""
    places = _places(job)
    if not again:
        _refuse_existing(job, places)
    results = [*_transcribed(job, transcriber, places, job.recordings.count(), 0)]
    return _summary(transcriber, results, None), results


def transcribe_table(
    job: Job,
    transcriber: Transcriber,
    *,
    again: bool = False,
    retry: bool = False,
    log: Callable[[str], None] = print,
) -> Summary:
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
            log(f"going on after {begun.rows} of {n} rows")
        elif not again and (done := _done(job, made_of, retry)):
            log(f"{job.out} is there already, made of the same table by the same model")
            return done
        elif not again and (earlier := _begun(job.earlier)):
            log(f"keeping the good ones of {earlier.rows} rows")
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


# ---- subtitle files


def _places(job: Job) -> list[Path | None]:
    """For each row the path of its subtitle files, without their ending: that of the recording, where no other has it.

    Nothing where no subtitle files are asked for.
    """
    taken: dict[Path, Path] = {}
    places = []
    for number, recording in enumerate(job.recordings if job.formats else (), 1):
        if recording.audio is None:
            places.append(None)
            continue
        path = _beside(job, recording, number)
        place = path.with_suffix("")
        # a.wav and a.mp3: a.srt and a.mp3.srt
        places.append(place if taken.setdefault(place, path) == path else path)
    return places


def _beside(job: Job, recording: Recording, number: int) -> Path:
    """Where the recording lies, or its like below the folder of the job: never outside it."""
    is_file = isinstance(recording.audio, Path)
    if job.folder is None and not is_file:
        raise LabError("the rows hold sound, not files, so that nothing lies beside it: name a folder with --out")
    if job.folder is None:
        return recording.audio
    if is_file:
        path = Path(os.path.normpath(recording.audio))
        base = Path(os.path.normpath(job.recordings.table.folder))
        return job.folder / (path.relative_to(base) if path.is_relative_to(base) and base != Path() else path.name)
    return job.folder / (PurePath(recording.name.replace("\\", "/")).name or f"row-{number:06d}")


def _refuse_existing(job: Job, places: list[Path | None]) -> None:
    for place in filter(None, places):
        for form in job.formats:
            if (path := _file(place, form)).exists():
                raise LabError(f"{path} exists already: name a folder with --out, or replace it with --again")


def _write(place: Path, form: str, heard: Transcript, language: str) -> None:
    told = subtitles.FORMATS[form](heard)
    if form == "json":
        told = json.dumps(subtitles.as_dict(heard, language), ensure_ascii=False, indent=1) + "\n"
    path = _file(place, form)
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(path, told.encode())


def _file(place: Path, form: str) -> Path:
    return place.with_name(f"{place.name}.{form}")


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


def _results(place: Path) -> Iterator[Result]:
    return (Result(name="", **cells) for cells, _ in islice(_lines(place), 1, None))


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
        return scoring.score_of(scoring.Edits(*counts), self._speakers if self.job.recordings.speaker else None)


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
