"""Tables of recordings: which columns contain the audio, the reference and the speaker.

    audio,sentence,client_id          audio,sentence,client_id,transcript,confidence,audio_s,error,wer
    clips/1.mp3,Hej på dig!,anna      clips/1.mp3,Hej på dig!,anna,Hej på dig.,0.97,1.2,,0.0

The recording is in a column `audio`, `path`, `file` or `file_name`: a path relative to the table's folder, an address
of http or https, in Parquet also bytes or the struct of Hugging Face data sets.
Columns such as `start` and `end` name a part of it. Rows are read one after another, so that a table may have any
length.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines.infra.downloads.urls import Url, is_url
from pipelines.infra.errors import LabError
from pipelines.infra.file_lookup import FileLookup
from pipelines.infra.tables import Cells, is_missing
from pipelines.speech import audio_cells
from pipelines.speech.audio import AudioError
from pipelines.speech.recordings.columns import FILE
from pipelines.speech.recordings.excerpts import Excerpt, ExcerptColumns, find_columns

AUDIO = tuple(dict.fromkeys(("audio", "path", "file", "file_name", *FILE)))
REFERENCE = ("text", "sentence", "transcript_reference", "reference")
SPEAKER = ("speaker", "client_id", "speaker_id")


class Table(Protocol):
    """Rows in a fixed order, which can be read repeatedly."""

    columns: Sequence[str]
    suffixes: tuple[str, ...]
    """Suffixes of the files that `write` can create."""
    folder: Path
    """Folder to which its paths are relative."""

    def digest(self) -> str:
        """Return a digest of the content."""

    def count(self) -> int:
        """Return the number of rows. Raises LabError as `rows` does."""

    def rows(self, columns: Sequence[str]) -> Iterator[Cells]:
        """Yield these columns of every row. Raises LabError for an invalid row."""

    def write(self, path: Path, names: Sequence[str], added: Iterable[Cells]) -> None:
        """Write the same rows with the additional columns `names`, whose cells `added` yields row by row."""


@dataclass(frozen=True)
class Recording:
    """The recording of one row."""

    audio: Path | bytes | Url | None
    """None if the row has none."""
    name: str
    """Path or name in the table, or the unusable content of the cell; empty for audio without a name."""
    reference: str = ""
    speaker: str = ""
    excerpt: Excerpt | None = None
    """The part that the row is about; None: the whole recording."""


@dataclass(frozen=True)
class Recordings:
    """The recordings of a table, and the names of the columns used."""

    table: Table
    audio: str
    reference: str | None = None
    speaker: str | None = None
    excerpts: ExcerptColumns | None = None

    def __iter__(self) -> Iterator[Recording]:
        lookup = FileLookup(self.table.folder)
        for cells in self.table.rows([self.audio, *self._text_columns, *self.excerpt_columns]):
            audio, name = _parse_audio(cells[self.audio], lookup)
            excerpt = self.excerpts.excerpt(cells) if self.excerpts else None
            excerpt = excerpt if excerpt and (excerpt.is_part or excerpt.problem) else None
            yield Recording(audio, name, _text(cells, self.reference), _text(cells, self.speaker), excerpt)

    @property
    def excerpt_columns(self) -> list[str]:
        """The columns that state parts of recordings."""
        return self.excerpts.names if self.excerpts else []

    def without_audio(self) -> Iterator[Recording]:
        """Yield references and speakers only: the audio column, often most of a table, is not read."""
        if not self._text_columns:
            yield from (Recording(None, "") for _ in range(self.count()))
            return
        for cells in self.table.rows(self._text_columns):
            yield Recording(None, "", _text(cells, self.reference), _text(cells, self.speaker))

    def count(self) -> int:
        """Return the number of rows."""
        return self.table.count()

    @property
    def _text_columns(self) -> list[str]:
        return [name for name in (self.reference, self.speaker) if name]


def find_recordings(
    table: Table, audio: str = "", reference: str = "", added: Sequence[str] = (), speaker: str = ""
) -> Recordings:
    """Return the recordings of a table, whose columns are given or found by their usual names.

    Raises LabError if a column is missing, or if one of the columns `added` exists already.
    """
    if existing := [name for name in added if name in table.columns]:
        raise LabError(f"the table has a column {existing[0]} already, which would be written: rename it there")
    audio_column = _find_column(table, AUDIO, audio, "--audio-column")
    if audio_column is None:
        raise LabError(
            f"no column of audio: expected one of {', '.join(AUDIO[:4])}, got {', '.join(table.columns)}. "
            "Name it with --audio-column"
        )
    return Recordings(
        table,
        audio_column,
        _find_column(table, REFERENCE, reference, "--reference-column"),
        _find_column(table, SPEAKER, speaker, "--speaker-column"),
        find_columns(name for name in table.columns if name != audio_column),
    )


def _find_column(table: Table, usual_names: Sequence[str], requested: str, option: str) -> str | None:
    if requested:
        if requested in table.columns:
            return requested
        raise LabError(f"{option}: no column {requested!r}, the table has {', '.join(table.columns)}")
    columns = {name.strip().lower(): name for name in reversed(table.columns)}
    return next((columns[name] for name in usual_names if name in columns), None)


def _parse_audio(cell: Any, lookup: FileLookup) -> tuple[Path | bytes | Url | None, str]:
    """Return the audio in a cell, and its name."""
    if isinstance(cell, dict) and not cell.get("bytes") and cell.get("array") is not None:
        try:
            return audio_cells.parse(cell), str(cell.get("path") or "")
        except AudioError:
            return None, "decoded samples that are none, or without their sampling rate,"
    if isinstance(cell, dict):
        name, content = cell.get("path"), cell.get("bytes")
        return (content, str(name or "")) if isinstance(content, bytes) else _parse_audio(name, lookup)
    if isinstance(cell, bytes):
        return cell, ""
    if isinstance(cell, Url) or (isinstance(cell, str) and is_url(cell)):
        url = cell if isinstance(cell, Url) else Url(cell)
        return url, str(url)
    if isinstance(cell, str) and cell:
        path = lookup.folder / expand_user(Path(cell))
        found = None if os.path.exists(path) else lookup.find(cell)
        return lookup.folder / found if found else path, cell
    return None, "" if cell in (None, "") else str(cell)


def expand_user(path: Path) -> Path:
    """Expand `~`, unless it names an unknown user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _text(cells: Cells, column: str | None) -> str:
    value = cells[column] if column else None
    return "" if is_missing(value) else str(value)
