"""Own recordings: audio files in a folder, with a table of transcripts or a `.txt` beside each file.

    my-speech/transcripts.csv       or .tsv, .jsonl; or metadata.*      path,text,split,speaker
              clips/0001.wav                                            clips/0001.wav,"Hej, hej!",train,anna

Columns: the file as path, file_name, file or audio, relative to the table; its transcript as text, sentence,
transcript or transcription; optional: split, speaker (client_id, speaker_id), gender, age, accent. Without a table, the
transcript of `a.wav` is `a.txt`. A missing file and an audio file without a transcript still become Examples: curation
rejects and counts them.

Instead of one table, there may be one in each subfolder, or one for each split (`train.csv`, `dev.csv`, `test.csv`).
Splits come from the column, else from such tables, else from folders (`train/`, `split=test/`), else they are drawn.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.features.sources import SPLITS, Example, lines_sha256
from pipelines.features.sources.splits import canonical_split, check_unambiguous, describe, path_splits
from pipelines.infra.errors import LabError
from pipelines.infra.manifest import sha256
from pipelines.speech.audio import AUDIO_SUFFIXES

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl")
TABLES = tuple(f"{stem}{suffix}" for stem in ("transcripts", "metadata") for suffix in SUFFIXES)
FILE = ("path", "file_name", "file", "audio")
TEXT = ("text", "sentence", "transcript", "transcription")
SPEAKER = ("speaker", "client_id", "speaker_id")
META = ("gender", "age", "accent")
HASHED_BYTES = 200_000_000
"""Below this size of all audio, `identity` hashes its content; from it on, sizes and modification times."""
Record = tuple[str, dict[str, Any]]
"""The position of a row, for errors, and its cells by column name."""


@dataclass(frozen=True)
class FolderSource:
    """The corpus in the folder `path`. Splits come from its table or its folders; else `seed` draws them."""

    path: str
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return a digest of the rows, and one of the audio: path, size and sha256 of every file.

        From HASHED_BYTES on, modification times replace the sha256: a copy with other times is another corpus.
        """
        audio = [example.audio for example in self._all]
        by_content = sum(os.path.getsize(path) for path in audio if os.path.isfile(path)) < HASHED_BYTES
        files = (f"{path.relative_to(self._folder)} {_stamp(path, by_content)}" for path in audio)
        rows = (json.dumps([row.id, row.split, row.text, row.speaker, row.meta]) for row in self._all)
        return {
            "kind": "folder",
            "seed": str(self.seed),
            "table_sha256": lines_sha256(rows),
            "files_by": "content" if by_content else "size and time",
            "files_sha256": lines_sha256(sorted(files)),
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the examples of these splits in the table's order (by path without a table).

        Rows with an unknown split are included only if `splits` are all of SPLITS: curation rejects them. Raises
        LabError at once for a table that cannot be used.
        """
        included = {*splits, *({row.split for row in self._all} - {*SPLITS} if {*SPLITS} <= {*splits} else ())}
        return (example for example in self._all if example.split in included)

    def outline(self) -> Iterator[Example]:
        """Return all examples; their audio is a path, and no file is opened."""
        return self.examples()

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def _all(self) -> list[Example]:
        records = _records(self._folder)
        files = _unique([(where, _inside(self._folder, _cell(row, FILE, where), where)) for where, row in records])
        stems = Counter(file.with_suffix("") for file in files)
        rule, splits = _splits(self._folder, records, files, self.seed)
        logger.info(f"{self.path}: splits by {rule}: {describe(splits)}")
        return [
            _example(self._folder, file, stems[file.with_suffix("")] == 1, record, split)
            for file, record, split in zip(files, records, splits, strict=True)
        ]


def _example(folder: Path, file: Path, stem_is_unique: bool, record: Record, split: str) -> Example:
    """Return the example of a row."""
    where, row = record
    stem, speaker = file.with_suffix("").as_posix(), _cell(row, SPEAKER, where, "").strip()
    meta = {name: cell for name in META if (cell := _cell(row, (name,), where, "").strip())}
    name = stem if stem_is_unique else file.as_posix()
    return Example(name, split, _cell(row, TEXT, where), folder / file, speaker, meta)


def _splits(folder: Path, records: list[Record], files: list[Path], seed: int) -> tuple[str, list[str]]:
    """Return the rule that decides the splits, in words, and the split of each row."""
    cells = [_cell(row, ("split",), where, "") for where, row in records]
    if any(cell.strip() for cell in cells):
        check_unambiguous(str(folder), cells)
        return "table (its column `split` or its name)", [canonical_split(cell) for cell in cells]
    if tables := _split_tables(folder):
        raise LabError(
            f"{folder} has a table without a `split` column beside {', '.join(path.name for path in tables)}: "
            "keep one of the two forms"
        )
    if by_folder := path_splits(str(folder), files):
        return "folder names", by_folder
    speakers = [_cell(row, SPEAKER, where, "").strip() for where, row in records]
    stems = [file.with_suffix("").as_posix() for file in files]
    drawn = [_drawn_split(speaker, stem, seed) for speaker, stem in zip(speakers, stems, strict=True)]
    return f"a draw of {'speakers' if any(speakers) else 'files'} (source.seed = {seed})", drawn


def _drawn_split(speaker: str, stem: str, seed: int) -> str:
    """Draw the split, 80/10/10, by a hash of the speaker, else of the file: independent of all other rows."""
    share = int(lines_sha256([str(seed), f"speaker {speaker}" if speaker else f"file {stem}"])[:12], 16) / 16**12
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def _records(folder: Path) -> list[Record]:
    """Return the rows of the folder's table, or of its `.txt` files. Raises LabError if there is no transcript."""
    if not folder.is_dir():
        raise LabError(f"source.path must name a folder of audio files, got {str(folder)!r}, which is none: correct it")
    tables = _tables(folder)
    if not tables:
        records, what = list(_txt_records(folder)), f"no {', '.join(TABLES)} and no .txt"
        records = records if any(row["text"] for _, row in records) else []
    else:
        records, what = [record for table in tables for record in _table_records(folder, table)], "no row in "
        what += " and ".join(str(table.relative_to(folder)) for table in tables)
    if not records:
        raise LabError(f"{folder} must hold at least one transcript, got {what}: add some")
    return records


def _tables(folder: Path) -> list[Path]:
    """Return the folder's table; else those named after splits; else those of its subfolders. Sorted by path."""
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    if not tables:
        tables = _split_tables(folder) or sorted(
            path for name in TABLES for path in folder.rglob(name) if not _is_hidden(path.relative_to(folder))
        )
    for (first, first_key), (second, second_key) in itertools.pairwise((path, _table_key(path)) for path in tables):
        if first_key == second_key:
            raise LabError(f"{first.parent} must hold one table, got {first.name} and {second.name}: keep one")
    return tables


def _split_tables(folder: Path) -> list[Path]:
    """Return the tables `train.csv`, `dev.tsv` and so on, if there is one for training."""
    files = (path for path in folder.iterdir() if path.suffix in SUFFIXES and canonical_split(path.stem) in SPLITS)
    tables = sorted(sorted(files), key=_table_key)
    return tables if any(canonical_split(path.stem) == "train" for path in tables) else []


def _table_key(path: Path) -> tuple[Path, str]:
    """Return what no two tables may have in common: the folder and the split."""
    split = canonical_split(path.stem)
    return path.parent, split if split in SPLITS else ""


def _table_records(folder: Path, table: Path) -> Iterator[Record]:
    """Yield the rows of a table: paths relative to `folder`, with the table's split if it has no column for it."""
    base, split = table.parent.relative_to(folder), canonical_split(table.stem)
    parse = _json_records if table.suffix == ".jsonl" else _csv_records
    for where, row in parse((base / table.name).as_posix(), _read(table)):
        name = next((name for name in FILE if name in row), None)
        if base.parts and name and (cell := _cell(row, FILE, where)):
            row[name] = str(base / cell)
        if split in SPLITS:
            row.setdefault("split", split)
        yield where, row


def _csv_records(name: str, content: str) -> Iterator[Record]:
    """Parse a .csv with `,` or (Swedish Excel) `;` and quotes, or a .tsv without quotes: there `"` is a letter."""
    first = content.partition("\n")[0]
    delimiter = "\t" if name.endswith(".tsv") else ";" if ";" in first and "," not in first else ","
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    try:
        for cells in filter(any, reader):
            if header and len(cells) != len(header):
                raise LabError(
                    f"{name} line {reader.line_num}: a row must have the header's {len(header)} cells, "
                    f"got {len(cells)}: put quotes round a text that holds {delimiter!r}, or write .jsonl"
                )
            if header:
                yield f"{name} line {reader.line_num}", dict(zip(header, map(str.strip, cells), strict=True))
            header = header or [cell.strip().lower() for cell in cells]
    except csv.Error as error:
        raise LabError(
            f"{name} line {reader.line_num}: quotes must be balanced, got: {error}. "
            "Double every quote inside a quoted text, or write .jsonl"
        ) from None


def _json_records(name: str, content: str) -> Iterator[Record]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise LabError(f"{name} line {number}: a line must be one JSON object, got {line[:60]!r}: correct it")
            yield f"{name} line {number}", {key.strip().lower(): value for key, value in row.items()}


def _txt_records(folder: Path) -> Iterator[Record]:
    """Yield every audio file that is not hidden, by path, with the text of its `.txt` file, else an empty text."""
    audio = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    for path in sorted(path for path in audio if not _is_hidden(path)):
        where = str(path).encode(errors="replace").decode()
        beside = folder / _inside(folder, str(path.with_suffix(".txt")), where)
        yield where, {"path": str(path), "text": _read(beside) if beside.is_file() else ""}


def _cell(row: dict[str, Any], names: tuple[str, ...], where: str, default: str | None = None) -> str:
    """Return the first cell of the columns `names`, else `default`. Raises LabError if that is None."""
    name = next((name for name in names if name in row), None)
    if name is None and default is None:
        raise LabError(f"{where}: a column must be named {' or '.join(names)}, got {', '.join(row)}: rename one")
    value = default if name is None else row[name]
    cell = "" if value is None else str(value).replace("\0", "")
    if isinstance(value, list | dict) or cell != cell.encode(errors="ignore").decode():
        raise LabError(f"{where}: {name} must be a plain UTF-8 string, got {cell[:60]!a}: correct it")
    return cell


def _inside(folder: Path, name: str, where: str) -> Path:
    """Return `name` as a path relative to `folder`. Raises LabError if it leads out of it, also through symlinks."""
    file = Path(os.path.normpath(name))
    if not is_inside(folder / file, folder) or file.is_absolute() or ".." in file.parts or not file.name:
        raise LabError(f"{where}: a file must be a path inside the folder, got {name!r}: copy it there")
    return file


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def is_inside(file: Path, folder: Path) -> bool:
    """Return True if `file`, with symlinks resolved, is in `folder`."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # circular links
        return False


def _unique(files: list[tuple[str, Path]]) -> list[Path]:
    first: dict[Path, str] = {}
    for where, file in files:
        if first.setdefault(file, where) != where:
            raise LabError(f"{where}: a file must have one row, got {str(file)!r} again, as {first[file]}: remove one")
    return list(first)


def _read(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark; NUL bytes are dropped."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\0", "")
    except UnicodeDecodeError as error:
        raise LabError(
            f"{path.name} must be UTF-8, got the byte 0x{error.object[error.start]:02x} at {error.start}: "
            "save it as UTF-8 (Excel: 'CSV UTF-8')"
        ) from None
    except OSError as error:
        raise LabError(f"{path.name} must be a readable file, got: {error.strerror}. Replace it") from None


def _stamp(path: Path, by_content: bool) -> str:
    try:
        return f"{path.stat().st_size} {sha256(path) if by_content else path.stat().st_mtime_ns}"
    except OSError:
        return "absent"
