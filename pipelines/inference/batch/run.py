"""Transcribe the recordings of a job one after another, and write the table."""

from __future__ import annotations

import json
import logging
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.inference.batch import archives, remote, stamps, tracks
from pipelines.inference.batch.job import COLUMNS, WER, BatchResult, Job, Result, Summary
from pipelines.inference.batch.journal import (
    encode_line,
    find_finished,
    find_interrupted,
    identity_of,
    lock_table,
    open_journal,
    read_journal,
    read_results,
    reusable_results,
)
from pipelines.inference.batch.subtitle_files import refuse_existing, subtitle_paths, write_subtitles
from pipelines.inference.batch.tables import Recording
from pipelines.inference.channels import ChannelTranscriber
from pipelines.inference.transcript import DamagedRecording
from pipelines.infra import manifest
from pipelines.infra.downloads.urls import DownloadError
from pipelines.infra.errors import LabError
from pipelines.infra.files import Unavailable
from pipelines.speech import scoring, text
from pipelines.speech.audio import AudioError
from pipelines.speech.edits import Edits, count_edits

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Transcriber

FLUSH_S = 5.0
"""A power failure loses the rows of at most this time; a killed process at most the last row."""
_REFRESH_S = 0.5

logger = logging.getLogger(__name__)


def run(job: Job, transcriber: Transcriber, *, again: bool = False, retry: bool = False) -> BatchResult:
    """Run a job. Raises LabError as `transcribe_table` does."""
    if again and retry:
        raise LabError("--again repeats all rows, --retry-errors only those with errors: give one of them")
    if job.style.highlight_words and not transcriber.times_words:
        raise LabError(f"{transcriber.ref.title} has no word times, which --highlight-words needs: leave it out")
    if job.out is None:
        if retry:
            raise LabError("--retry-errors is for tables, and audio files have none: name one with --out")
        result = transcribe_files(job, transcriber, again=again)
    else:
        result = BatchResult(job, transcribe_table(job, transcriber, again=again, retry=retry))
    if job.archive:
        archives.write_archive(job, transcriber.language)
    return result


def transcribe_files(job: Job, transcriber: Transcriber, *, again: bool = False) -> BatchResult:
    """Transcribe a job without a table. Existing subtitle files raise LabError, unless `again` replaces them."""
    paths = subtitle_paths(job)
    if not again:
        refuse_existing(job, paths)
    results = list(_transcribe(job, transcriber, paths, job.recordings.count()))
    return BatchResult(job, _summarise(transcriber, results, None), results)


def transcribe_table(job: Job, transcriber: Transcriber, *, again: bool = False, retry: bool = False) -> Summary:
    """Transcribe the rows that are not finished, then write the table.

    `again` repeats all rows, `retry` those with errors. Finished rows survive the end of the process. Raises LabError
    if the output was started with other input or settings, or was not written by this command.
    """
    n = job.recordings.count()
    if not n:
        raise LabError("there is no row to transcribe: the table has only a header")
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with lock_table(job.out):
        identity, paths = identity_of(job, transcriber), subtitle_paths(job)
        if again:
            job.earlier.unlink(missing_ok=True)
        interrupted = None if again else find_interrupted(job, identity, retry)
        if interrupted:
            stamps.refuse_changed(job, islice(read_results(job.partial), interrupted.rows))
            logger.info(f"continuing after {interrupted.rows} of {n} rows")
        elif not again and (summary := find_finished(job, identity, retry)):
            logger.info(f"{job.out} exists already, from the same table and model")
            return summary
        elif not again and (earlier := read_journal(job.earlier)):
            logger.info(f"keeping the good ones of {earlier.rows} rows")
        elif not again:
            refuse_existing(job, paths)
        skip = interrupted.rows if interrupted else 0
        with open_journal(job.partial, interrupted, identity) as file:
            flushed = time.monotonic()
            for result in _transcribe(job, transcriber, paths, n, skip, reusable_results(job.earlier, skip)):
                file.write(encode_line(_journal_fields(result)))
                file.flush()
                if time.monotonic() - flushed > FLUSH_S:
                    manifest.flush(job.partial)
                    flushed = time.monotonic()
        return _write_table(job, transcriber, identity)


def _journal_fields(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    return {name: value for name, value in fields.items() if name != "name" and (name, value) != ("plain", None)}


class Outline:
    """What a job would do."""

    def __init__(self, job: Job):
        recordings, journal = job.recordings, read_journal(job.partial) if job.out else None
        self.fields: dict[str, Any] = {
            "would": f"transcribe {recordings.count()} recordings",
            "writes": str(job.out) if job.out else "",
            "columns": {
                "audio": recordings.audio,
                "reference": recordings.reference,
                "speaker": recordings.speaker,
            },
            "formats": list(job.formats),
            "archive": str(job.archive or ""),
            "subtitles": str(job.folder or "beside each recording") if job.formats else "",
            "rows_done": journal.rows if journal else 0,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return self.fields

    def __str__(self) -> str:
        fields = self.fields
        columns = ", ".join(f"{role}: {name}" for role, name in fields["columns"].items() if name)
        lines = [f"would {fields['would']} ({columns})"]
        if fields["rows_done"]:
            lines.append(f"{fields['rows_done']} of them are finished already")
        if fields["writes"]:
            lines.append(f"would write {fields['writes']}")
        if fields["archive"]:
            lines.append(f"would write {fields['archive']}")
        if fields["formats"]:
            lines.append(f"would write {', '.join(fields['formats'])}: {fields['subtitles']}")
        return "\n".join([*lines, "nothing was done"])


def _transcribe(
    job: Job,
    transcriber: Transcriber,
    paths: list[Path | None],
    n: int,
    skip: int = 0,
    reusable: Iterable[Result | None] = repeat(None),
) -> Iterator[Result]:
    """Yield the results of the rows from `skip` on, with a progress bar; `reusable` are existing results of them."""
    from tqdm.auto import tqdm

    with tqdm(total=n, initial=skip, unit="clip", desc="transcribing") as bar:
        progress = _Progress(bar)
        rows = zip(islice(job.recordings, skip, None), reusable)
        for number, (recording, result) in enumerate(rows, skip):
            path = paths[number] if paths else None
            yield result or _transcribe_one(job, transcriber, recording, path, progress)
            bar.update()


def _transcribe_one(
    job: Job, transcriber: Transcriber, recording: Recording, path: Path | None, progress: _Progress
) -> Result:
    """Transcribe one recording and write its subtitle files."""
    error = None
    try:
        if recording.audio is None and not recording.name:
            raise AudioError("missing", "the row names no file")
        if recording.audio is None:
            raise AudioError("unreadable", f"the row contains {recording.name} instead of a path or audio")
        options: dict[str, Any] = {"word_times": True} if job.uses_word_times and transcriber.times_words else {}
        options["on_audio"] = progress.show_current
        stamp = stamps.stamp(recording) if job.out else None
        split = ChannelTranscriber(transcriber, job.channel_names) if job.split_channels else transcriber
        with remote.local_copy(recording.audio, job.downloads, progress.show_download) as local:
            audio = recording.excerpt.cut(local, job.split_channels) if recording.excerpt else local
            transcript = tracks.transcribe(split, audio, job.track, **options)
    except DamagedRecording as damage:
        transcript, error = damage.transcript, _one_line(damage)
    except (AudioError, DownloadError) as failure:
        return Result(recording.name, error=_one_line(failure))
    except Unavailable as failure:  # says nothing about the recording: a table's row stays unfinished
        if job.out:
            raise
        return Result(recording.name, error=_one_line(failure))
    for form in job.formats:
        write_subtitles(path, form, transcript, transcriber, job.style)
    progress.add(transcript.audio_s)
    has_words = any(segment.words for segment in transcript.segments)
    return Result(
        recording.name,
        transcript.text,
        round(transcript.confidence, 4) if has_words else None,
        round(transcript.audio_s, 3),
        round(transcript.elapsed_s, 3),
        error,
        stamp,
        transcript.plain_text if transcript.has_speakers else None,
    )


def _one_line(error: LabError) -> str:
    return " ".join(str(error).split())


class _Progress:
    """Seconds of audio and multiple of real time beside the progress bar, also within a long recording."""

    def __init__(self, bar: Any):
        self.bar, self.audio_s = bar, 0.0
        self.started = self.refreshed = time.monotonic()

    def show_current(self, seconds: float) -> None:
        """Show the current recording's progress, at most every _REFRESH_S."""
        if time.monotonic() - self.refreshed > _REFRESH_S:
            self._show(self.audio_s + seconds, refresh=True)

    def show_download(self, n_bytes: int) -> None:
        """Show the progress of a download, at most every _REFRESH_S."""
        if time.monotonic() - self.refreshed > _REFRESH_S:
            self.refreshed = time.monotonic()
            self.bar.set_postfix_str(f"downloading: {n_bytes / 1e6:,.1f} MB", refresh=True)

    def add(self, seconds: float) -> None:
        """Add a finished recording."""
        self.audio_s += seconds
        self._show(self.audio_s, refresh=False)

    def _show(self, audio_s: float, refresh: bool) -> None:
        self.refreshed = time.monotonic()
        speed = audio_s / max(self.refreshed - self.started, 1e-9)
        self.bar.set_postfix_str(f"{audio_s:,.0f} s of audio, {speed:.1f}x real time", refresh=refresh)


def _write_table(job: Job, transcriber: Transcriber, identity: dict[str, Any]) -> Summary:
    """Write the table and its summary, then remove the journal; with errors, keep it for a retry."""
    if job.recordings.table.digest() != identity["table"]:
        raise LabError("the table was changed while it was transcribed: restore it, or start again with --again")
    temporary = job.out.with_name(f".{job.out.stem}.partial{job.out.suffix}")
    rows = _ScoredRows(job)
    job.recordings.table.write(temporary, job.columns, rows.cells())
    manifest.flush(temporary)
    os.replace(temporary, job.out)
    manifest.sync_folder(job.out.parent)
    summary = _summarise(transcriber, read_results(job.partial), rows.score())
    recordings = stamps.digests(read_results(job.partial))
    content = {"summary": asdict(summary), "made_of": identity, "sha256": manifest.sha256(job.out)}
    content |= {"recordings": recordings} if recordings else {}
    manifest.write_json(job.summary, content)
    if summary.errors:
        os.replace(job.partial, job.earlier)
    else:
        job.earlier.unlink(missing_ok=True)
        job.partial.unlink()
    return summary


class _ScoredRows:
    """The cells added to each row, and the edit counts for the total score, without the texts."""

    def __init__(self, job: Job):
        self.job = job
        self._counts = array("q")
        self._speakers: list[str] = []
        self._names: dict[str, str] = {}

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yield the added cells of each row."""
        rows = zip(self.job.recordings.without_audio(), read_results(self.job.partial), strict=True)
        for recording, result in rows:
            yield {name: getattr(result, name) for name in COLUMNS} | {WER: self._wer(recording, result)}

    def _wer(self, recording: Recording, result: Result) -> float | None:
        """Return the WER of a row, or None if it has an error or a reference without words."""
        if result.error is not None or not text.normalise(recording.reference):
            return None
        edits = count_edits([recording.reference], [result.transcript if result.plain is None else result.plain])
        self._counts.extend(int(count[0]) for count in vars(edits).values())
        self._speakers.append(self._names.setdefault(recording.speaker, recording.speaker))
        return round(float(edits.word_edits[0] / edits.words[0]), 4)

    def score(self) -> scoring.Score | None:
        """Return the score of all scored rows after `cells` has been consumed; None if there are none."""
        if not self._speakers:
            return None
        counts = np.array(self._counts).reshape(len(self._speakers), -1).T
        return scoring.score_edits(Edits(*counts), self._speakers if self.job.recordings.speaker else None)


def _summarise(transcriber: Transcriber, results: Iterable[Result], score: scoring.Score | None) -> Summary:
    rows = errors = 0
    audio_s = elapsed_s = 0.0
    for result in results:
        rows, errors = rows + 1, errors + (result.error is not None)
        audio_s, elapsed_s = audio_s + (result.audio_s or 0.0), elapsed_s + result.elapsed_s
    fields = json.loads(json.dumps(score.as_dict())) if score else None
    return Summary(
        transcriber.ref.title, transcriber.loaded.name, rows, errors, round(audio_s, 3), round(elapsed_s, 3), fields
    )
