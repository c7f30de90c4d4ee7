"""Own recordings: audio files in a folder, with a table of transcripts or a `.txt` beside each file.

    my-speech/transcripts.csv       or .tsv, .jsonl, .xlsx; or metadata.*     path,text,split,speaker
              clips/0001.wav                                                  clips/0001.wav,"Hej, hej!",train,anna

Columns: the file as path, file_name, file or audio, relative to the table; its transcript as text, sentence,
transcript or transcription; optional: split, speaker (client_id, speaker_id), gender, age, accent, and start and end
for a part of a recording (speech/recordings/). Without a table, the transcript of `a.wav` is `a.txt`. A missing file
and an audio file without a transcript still become Examples: curation rejects and counts them.

Instead of one table, there may be one in each subfolder, or one for each split (`train.csv`, `dev.csv`, `test.csv`), or
the files of NeMo, Kaldi or LJSpeech (layouts.py). Splits come from the column, else from such tables, else from folders
(`train/`, `split=test/`) or file names (`train_01.wav`), else they are drawn.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pipelines.features.sources import SPLITS, Example, NoTranscript, PartExample, lines_sha256
from pipelines.features.sources.draw import Draw, draw_splits
from pipelines.features.sources.folder_tables import (
    Record,
    cell,
    has_failed,
    inside,
    metadata,
    read_records,
    split_tables,
)
from pipelines.features.sources.splits import (
    canonical_split,
    check_unambiguous,
    describe,
    file_name_splits,
    path_splits,
    refuse_other_columns,
)
from pipelines.features.sources.stamps import stamp_all
from pipelines.infra.errors import LabError
from pipelines.infra.file_lookup import FileLookup, spellings
from pipelines.infra.tables import is_missing
from pipelines.speech.recordings.columns import FILE, META, SPEAKER, TEXT
from pipelines.speech.recordings.excerpts import Excerpt
from pipelines.speech.text import same_speakers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource:
    """The corpus in the folder `path`. Splits come from its table or its folders; else `seed` draws them."""

    path: str
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return a digest of the rows, and one of the audio: path, size and sha256, or time, of every file."""
        files_by, digest = stamp_all(self._folder, list({_file(example) for example in self._all}))
        rows = (json.dumps([row.id, row.split, row.text, row.speaker, row.meta, *_part(row)]) for row in self._all)
        return {
            "kind": "folder",
            "seed": str(self.seed),
            "table_sha256": lines_sha256(rows),
            "files_by": files_by,
            "files_sha256": digest,
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the examples of these splits in the table's order (by path without a table).

        Rows with an unknown split are included only if `splits` are all of SPLITS: curation rejects them. Raises
        LabError at once for a table that cannot be used.
        """
        included = {*splits, *({row.split for row in self._all} - {*SPLITS} if {*SPLITS} <= {*splits} else ())}
        return (example for example in self._all if example.split in included)

    def outline(self) -> Iterator[Example]:
        """Return all examples; their audio is a path or is read on access, and no file is opened."""
        return self.examples()

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def shared_speakers(self) -> frozenset[str]:
        """Speakers in several splits, because sentences were drawn and not speakers."""
        return self._corpus[1]

    @property
    def _all(self) -> list[Example]:
        return self._corpus[0]

    @cached_property
    def _corpus(self) -> tuple[list[Example], frozenset[str]]:
        """The examples, and `shared_speakers`."""
        records = read_records(self._folder)
        files = _locate(self._folder, records)
        _check_unique(records, files)
        stems = Counter(file.with_suffix("") for file in {*files})
        speakers = same_speakers(metadata(record, SPEAKER) for record in records)
        rule, drawn = _splits(self._folder, records, files, speakers, self.seed)
        logger.info(f"{self.path}: splits by {rule}: {describe(drawn.splits)}")
        examples = [
            _example(self._folder / file, _name(file, stems), record, split, speaker)
            for file, record, split, speaker in zip(files, records, drawn.splits, speakers, strict=True)
        ]
        return examples, drawn.shared_speakers


def _example(file: Path, name: str, record: Record, split: str, speaker: str) -> Example:
    """Return the example of a row, which may be a part of its file, or a row that `transcribe` could not write."""
    meta = {name: value for name in META if (value := metadata(record, (name,)))}
    text, excerpt = cell(record, TEXT), record.excerpt
    if all(record.cells.get(name) is None for name in TEXT):
        text = NoTranscript()
    if error := has_failed(record):
        excerpt = Excerpt(problem=f"`transcribe` wrote no complete transcript: {error}", reason="not_transcribed")
    if excerpt is None:
        return Example(name, split, text, file, speaker, meta)
    name = f"{name}@{excerpt}" if excerpt.is_part else name
    return PartExample(name, split, text, file, speaker, meta, excerpt)


def _name(file: Path, stems: Counter[Path]) -> str:
    """Return the id of a file: its path without the suffix, if no other file has the same."""
    stem = file.with_suffix("")
    return (stem if stems[stem] == 1 else file).as_posix()


def _file(example: Example) -> Path:
    return example.file if isinstance(example, PartExample) else example.audio


def _part(example: Example) -> list[str]:
    """Return what the identity of a row includes only if it is a part of a recording."""
    return [repr(example.excerpt)] if isinstance(example, PartExample) else []


def _splits(folder: Path, records: list[Record], files: list[Path], speakers: list[str], seed: int) -> tuple[str, Draw]:
    """Return the rule that decides the splits, in words, and the split of each row."""
    cells = [metadata(record, ("split",)) for record in records]
    if any(cells):
        check_unambiguous(str(folder), cells)
        return "table (its column `split` or its name)", Draw([canonical_split(name) for name in cells], "")
    if tables := split_tables(folder):
        raise LabError(
            f"{folder} has a table without a `split` column beside {', '.join(path.name for path in tables)}: "
            "keep one of the two forms"
        )
    in_table_folders = [record.base / file.name for record, file in zip(records, files, strict=True)]
    if by_folder := path_splits(str(folder), in_table_folders) or path_splits(str(folder), files):
        return "folder names", Draw(by_folder, "")
    if by_name := file_name_splits(str(folder), files):
        return "file names", Draw(by_name, "")
    _refuse_other_split_column(folder, records)
    stems = [file.with_suffix("").as_posix() for file in files]
    drawn = draw_splits(speakers, stems, [cell(record, TEXT) for record in records], seed)
    return f"a draw of {drawn.units} (source.seed = {seed})", drawn


def _refuse_other_split_column(folder: Path, records: list[Record]) -> None:
    values: dict[str, set[str]] = {}
    for record in records:
        for name, value in record.cells.items():
            if name not in (*FILE, *TEXT) and not is_missing(value):
                values.setdefault(name, set()).add(str(value))
    refuse_other_columns(str(folder), values)


def _locate(folder: Path, records: list[Record]) -> list[Path]:
    """Return the file of each row, relative to the folder; a file that does not exist where its row names it."""
    lookups = {base: FileLookup(folder / base) for base in {record.base for record in records} | {Path()}}
    files = []
    for record in records:
        if not (name := cell(record, FILE)).strip():
            raise LabError(f"{record.where}: a file must be a path inside the folder, got an empty cell: correct it")
        bases = dict.fromkeys((record.base, Path()))
        found = next((base / path for base in bases if (path := lookups[base].find(name))), None)
        files.append(inside(folder, found or _absent(folder, record.base, name), record.where))
    return files


def _absent(folder: Path, base: Path, name: str) -> Path:
    """Return where a file should be that does not exist; its path itself if it leads out of the folder."""
    literal = Path(os.path.normpath(base / name.replace("\0", "")))
    if os.path.lexists(folder / literal) or not literal.name:
        return literal
    parts = PurePosixPath(os.path.normpath([*spellings(name)][-1])).parts
    return base.joinpath(*(part.strip("/:") for part in parts if part.strip("/:") not in ("", "..")))


def _check_unique(records: list[Record], files: list[Path]) -> None:
    """Raise LabError if two rows are about the same part of a file."""
    first: dict[tuple[Path, str], str] = {}
    for record, file in zip(records, files, strict=True):
        part = f" from {record.excerpt} s" if record.excerpt and record.excerpt.is_part else ""
        other = first.setdefault((file, part), record.where)
        if other != record.where:
            raise LabError(
                f"{record.where}: a file must have one row, got {str(file)!r}{part} again, as {other}: remove one"
            )
