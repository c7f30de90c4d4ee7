"""TODO: describe this module."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pipelines.inference import subtitles
from pipelines.inference.batch import tables
from pipelines.inference.batch.tables import Recording, Recordings
from pipelines.infra import manifest
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.inference.transcriber import Transcript


COLUMNS = ("transcript", "confidence", "audio_s", "error")
WER = "wer"


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
