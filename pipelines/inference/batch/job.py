"""The input and output of one call, and its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.inference import subtitles
from pipelines.inference.archive import page as archive_page
from pipelines.inference.batch import table_files
from pipelines.inference.batch.tables import Recordings, expand_user, find_recordings
from pipelines.inference.subtitles import DEFAULT, Style
from pipelines.infra.downloads import urls
from pipelines.infra.downloads.download import Limits
from pipelines.infra.downloads.urls import Url
from pipelines.infra.errors import LabError
from pipelines.infra.tables import FOREIGN_SUFFIXES
from pipelines.speech import scoring

_WRITTEN_AS = {".json": ".jsonl", ".xlsx": ".csv", ".xlsm": ".csv"}
"""Suffix of an input to that of its output, where they differ."""
COLUMNS = ("transcript", "confidence", "audio_s", "error")
WER = "wer"


@dataclass(frozen=True)
class Job:
    """Recordings to transcribe, and the files to write."""

    recordings: Recordings
    out: Path | None
    """The table to write; None if the transcripts are only returned."""
    formats: tuple[str, ...] = ()
    """Formats of the subtitle files for each recording, of subtitles.FORMATS."""
    folder: Path | None = None
    """Folder of the subtitle files; None: beside each recording."""
    style: Style = DEFAULT
    """Of the cues in srt and vtt."""
    track: int = 0
    """Audio track of videos, see tracks.py; 0: the first."""
    downloads: Limits = field(default_factory=Limits)
    """Of recordings at addresses."""
    split_channels: bool = False
    """Transcribe each channel with its name as the speaker, see inference/channels.py."""
    channel_names: tuple[str, ...] = ()
    archive: Path | None = None
    """Page with all transcripts (archive/), made from the json files; None: no page."""

    def __post_init__(self) -> None:
        if self.archive:
            archive_page.check_target(self.archive)
        if self.style != DEFAULT and not {*self.formats} & {*subtitles.CUE_FORMATS}:
            raise LabError(
                "--max-line-width, --max-line-count and --highlight-words are for subtitles: add --format srt or vtt"
            )

    @property
    def uses_word_times(self) -> bool:
        """Return whether a file contains the times of words, or cues, which are cut better with them."""
        return bool({"json", *subtitles.CUE_FORMATS} & {*self.formats})

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are added to the table."""
        return (*COLUMNS, WER) if self.recordings.reference else COLUMNS

    @property
    def partial(self) -> Path:
        """The journal of an unfinished table."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def earlier(self) -> Path:
        """The journal of the previous call, if some of its rows have errors."""
        return self.out.with_name(f"{self.out.name}.earlier")

    @property
    def summary(self) -> Path:
        """The summary of the finished table."""
        return self.out.with_name(f"{self.out.name}.json")


@dataclass(frozen=True)
class Result:
    """The result for one recording."""

    name: str
    transcript: str = ""
    confidence: float | None = None
    """None if no word was recognised."""
    audio_s: float | None = None
    elapsed_s: float = 0.0
    error: str | None = None
    """With a transcript: that of what can be read of a damaged recording."""
    stamp: str | None = None
    """See stamps.stamp."""
    plain: str | None = None
    """The transcript without names of speakers, for WER; None if it has none."""


@dataclass(frozen=True)
class Summary:
    """Totals over all recordings."""

    model: str
    engine: str
    rows: int
    errors: int
    audio_s: float
    elapsed_s: float
    """Seconds of transcribing, over all calls."""
    score: dict[str, Any] | None = None
    """scoring.Score of the rows with a reference and without an error."""

    @property
    def speed(self) -> float:
        """Seconds of audio per second."""
        return self.audio_s / self.elapsed_s if self.elapsed_s else 0.0


@dataclass(frozen=True)
class BatchResult:
    """The outcome of a job; `results` is empty if they are in a table."""

    job: Job
    summary: Summary
    results: list[Result] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the summary and the table's path, or the transcripts."""
        archive = {"archive": str(self.job.archive)} if self.job.archive else {}
        if self.job.out:
            fields = {**asdict(self.summary), "speed": round(self.summary.speed, 2), "table": str(self.job.out)}
            return fields | archive
        transcripts = []
        for result in self.results:
            fields: dict[str, Any] = {"file": result.name}
            if result.error:
                fields["error"] = result.error
            if result.audio_s is not None:
                fields |= {
                    "text": result.transcript,
                    "audio_s": result.audio_s,
                    "elapsed_s": result.elapsed_s,
                    "confidence": result.confidence,
                }
            transcripts.append(fields)
        return {"model": self.summary.model, "engine": self.summary.engine, "transcripts": transcripts} | archive

    def __str__(self) -> str:
        return "\n".join([self._described(), *([f"archive {self.job.archive}"] if self.job.archive else [])])

    def _described(self) -> str:
        summary = self.summary
        if self.job.out is None:
            lines = (f"{one.name}:{_indented(one.transcript, one.error)}" for one in self.results)
            return "\n".join([f"model {summary.model}", *lines])
        lines = [
            f"model {summary.model}, {summary.engine}",
            f"{summary.rows} rows, {summary.errors} with an error: {summary.audio_s:,.1f} s of audio "
            f"in {summary.elapsed_s:,.1f} s, {summary.speed:.1f}x real time",
        ]
        if summary.score:
            lines.append(str(scoring.Score(**summary.score)))
        hint = "; see its column `error`, and repeat these rows with --retry-errors" if summary.errors else ""
        return "\n".join([*lines, f"table {self.job.out}{hint}"])


def _indented(transcript: str, error: str | None) -> str:
    """Return transcript and error in one line, or each turn of several speakers in a line."""
    lines = [*transcript.splitlines(), *([error] if error else [])]
    return "".join(f"\n  {line}" for line in lines) if "\n" in transcript else f" {'; '.join(lines)}"


def plan(
    inputs: Sequence[str | Path],
    out: str = "",
    *,
    audio_column: str = "",
    reference_column: str = "",
    speaker_column: str = "",
    formats: Sequence[str] = (),
) -> Job:
    """Return the job for audio files, folders of them, addresses, or one table. Raises LabError for invalid input.

    `out` is the table to write or, without a table's suffix, a folder for the table and subtitle files. By default the
    table is written beside its input; audio files have none.
    """
    if unknown := [name for name in formats if name not in subtitles.FORMATS]:
        raise LabError(f"--format takes {', '.join(subtitles.FORMATS)}, got {unknown[0]!r}")
    suffixes = (*table_files.SUFFIXES, *FOREIGN_SUFFIXES)
    sources = [_parse_input(text) for text in inputs]
    paths = [path for path in sources if isinstance(path, Path)]
    input_tables = [path for path in paths if path.suffix.lower() in suffixes and not path.is_dir()]
    if input_tables and len(inputs) > 1:
        raise LabError(
            f"a table is transcribed alone, got {input_tables[0]} and {len(inputs) - 1} more: call it for each"
        )
    target, folder = _resolve_out(out)
    target = target or _default_target(sources, input_tables, folder)
    if input_tables:
        table = table_files.open_table(input_tables[0])
        if target.absolute() == input_tables[0].absolute():
            raise LabError(f"--out {target} is the table itself, which is never replaced: name another file")
    else:
        files = [file for source in sources for file in _files(source)]
        table = table_files.FileList(files, target.absolute().parent if target else None)
    if target and target.suffix.lower() not in table.suffixes:
        raise LabError(f"--out must end in {' or '.join(table.suffixes)} here, got {target}: name another")
    recordings = find_recordings(table, audio_column, reference_column, (*COLUMNS, WER), speaker_column)
    return Job(recordings, target, tuple(dict.fromkeys(formats)), folder)


def _resolve_out(out: str) -> tuple[Path | None, Path | None]:
    """Return the table or the folder that --out names, each None if it names the other or nothing."""
    if not out:
        return None, None
    path = expand_user(Path(out))
    if path.suffix.lower() in table_files.WRITTEN_SUFFIXES and not path.is_dir():
        return path, None
    if not path.is_dir() and (path.exists() or path.suffix[1:] in subtitles.FORMATS):
        raise LabError(
            f"--out takes a table ({', '.join(table_files.WRITTEN_SUFFIXES)}) or a folder, got {path}: name another"
        )
    return None, path


def _parse_input(text: str | Path) -> Path | Url:
    """Return a path or an address. Raises DownloadError for an address that cannot be used."""
    if isinstance(text, Path) or not urls.is_url(text):
        return Path(text)
    urls.parse(Url(text))
    return Url(text)


def _files(source: Path | Url) -> Sequence[Path | Url]:
    """Return the recordings that one input names."""
    return table_files.find_audio_files(source) if isinstance(source, Path) and source.is_dir() else [source]


def _default_target(sources: Sequence[Path | Url], input_tables: list[Path], folder: Path | None) -> Path | None:
    """Return the table to write if --out does not name it: beside the one table or folder; None for files."""
    path = expand_user(sources[0]) if isinstance(sources[0], Path) else None
    if not input_tables and (len(sources) > 1 or not path or not path.is_dir()):
        return folder / "transcribed.csv" if folder else None
    stem = path.stem if input_tables else path.absolute().name
    suffix = _WRITTEN_AS.get(path.suffix.lower(), path.suffix) if input_tables else ".csv"
    return (folder or path.absolute().parent) / f"{stem}.transcribed{suffix}"
