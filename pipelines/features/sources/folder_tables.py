"""Rows of a folder of own recordings: from its table or tables, from other programs' layouts, or from `.txt` files."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.features.sources import layouts
from pipelines.features.sources.splits import name_split
from pipelines.infra.errors import LabError
from pipelines.infra.file_lookup import is_inside
from pipelines.infra.tables import Cells, is_missing, open_table, read_text
from pipelines.speech.audio_files import find_audio
from pipelines.speech.recordings.columns import FILE, META, SPEAKER, TEXT
from pipelines.speech.recordings.excerpts import Excerpt, find_columns

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".xlsx")
TABLES = tuple(f"{stem}{suffix}" for stem in ("transcripts", "metadata") for suffix in SUFFIXES)
_MANIFEST, _SPONTANEOUS = re.compile(r"(.*[-_])?manifest([-_].*)?\.jsonl?"), re.compile(r"ss-corpus-.*\.tsv")
"""Names of manifests of NeMo, and of the table of Common Voice Spontaneous Speech."""
_TRANSCRIBED = {"transcript", "confidence", "audio_s", "error"}
"""The columns that `transcribe` adds to a table."""


class Record(NamedTuple):
    """One row of a table."""

    where: str
    """Its position, for errors."""
    cells: dict[str, Any]
    """Its cells by column name in lower case."""
    base: Path = Path()
    """The folder of its table, relative to the folder of the corpus."""
    excerpt: Excerpt | None = None
    """The part of the recording that the row is about; None for the whole recording."""


def read_records(folder: Path) -> list[Record]:
    """Return the rows of the folder's table, or of its `.txt` files. Raises LabError if there is no transcript."""
    if not folder.is_dir():
        raise LabError(f"source.path must name a folder of audio files, got {str(folder)!r}, which is none: correct it")
    if tables := _tables(folder):
        records = [record for table in tables for record in _table_records(folder, table)]
        what = "no row in " + " and ".join(str(table.relative_to(folder)) for table in tables)
    elif kaldi := layouts.kaldi_folders(folder):
        records = [record for path in kaldi for record in _with_excerpts(layouts.kaldi_rows(path), folder, path)]
        what = "no utterance in wav.scp"
    else:
        layouts.refuse_foreign(folder)
        records, what = list(_txt_records(folder)), f"no {', '.join(TABLES)} and no .txt beside an audio file"
        records = records if any(record.cells["text"] for record in records) else []
    if not records:
        raise LabError(f"{folder} must hold at least one transcript, got {what}: add some")
    return records


def split_tables(folder: Path) -> list[Path]:
    """Return the tables `train.csv`, `metadata_dev.tsv`, `sv_test_manifest.json` and so on, sorted by path."""
    suffixes = (*SUFFIXES, ".json")
    files = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and _split_of(path)]
    return sorted(sorted(files), key=_table_key)


def cell(record: Record, columns: tuple[str, ...], default: str | None = None) -> str:
    """Return the first cell of the columns, else `default`; empty for None. Raises LabError if `default` is None."""
    row, where = record.cells, record.where
    name = next((name for name in columns if name in row), None)
    if name is None and default is None:
        raise LabError(
            f"{where}: a column must be named {' or '.join(columns[:4])}, got {', '.join(row)[:200]}: rename one"
        )
    value = default if name is None else row[name]
    content = "" if value is None else str(value).replace("\0", "")
    if isinstance(value, list | dict | bool) or content != content.encode(errors="ignore").decode():
        raise LabError(f"{where}: {name} must be a plain UTF-8 string, got {content[:60]!a}: correct it")
    return content


def metadata(record: Record, columns: tuple[str, ...]) -> str:
    """Return the first cell of the columns without blanks around it; empty if it is missing or says NaN or NA."""
    content = cell(record, columns, "").strip()
    return "" if is_missing(content) else content


def has_failed(record: Record) -> str:
    """Return the error of a row that `transcribe` wrote, else an empty string."""
    return cell(record, ("error",), "").strip() if record.cells.keys() >= _TRANSCRIBED else ""


def _tables(folder: Path) -> list[Path]:
    """Return the folder's table; else those named after splits; else those of its subfolders. Sorted by path."""
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    if not tables:
        by_split = split_tables(folder)
        others = sorted(path for path in folder.iterdir() if _is_other_table(path))
        tables = (
            [table for table in by_split if any(_split_of(path) == "train" for path in by_split)]
            or others
            or sorted(path for name in TABLES for path in folder.rglob(name) if not is_hidden(path.relative_to(folder)))
        )
    if inner := [path for name in TABLES for path in sorted(folder.glob(f"*/{name}")) if path not in tables]:
        logger.info(
            f"note: {inner[0].relative_to(folder)} and {len(inner) - 1} more tables of subfolders are not read, "
            f"because {folder.name} has {tables[0].name}: keep one of the two forms"
        )
    for (first, first_key), (second, second_key) in itertools.pairwise((path, _table_key(path)) for path in tables):
        if first_key == second_key:
            raise LabError(f"{first.parent} must hold one table, got {first.name} and {second.name}: keep one")
    return tables


def _is_other_table(path: Path) -> bool:
    if not _MANIFEST.fullmatch(path.name):
        return _SPONTANEOUS.fullmatch(path.name) is not None
    with open(path, "rb") as file:
        return b"audio_filepath" in file.read(4096)


def _split_of(table: Path) -> str:
    """Return the split that a table's name means, or an empty string."""
    return name_split(table.stem)


def _table_key(path: Path) -> tuple[Path, str]:
    """Return what no two tables may have in common: the folder and the split."""
    return path.parent, _split_of(path)


def _table_records(folder: Path, table: Path) -> Iterator[Record]:
    """Yield the rows of a table, with the split of its name if it has no column for it."""
    rows = layouts.ljspeech_rows(table)
    if rows is None:
        opened = open_table(table)
        _log_columns(str(table.relative_to(folder)), [name.lower() for name in opened.columns])
        rows = [(where, {name.lower(): value for name, value in row.items()}) for where, row in opened.rows()]
    split = {"split": split} if (split := _split_of(table)) else {}
    yield from _with_excerpts([(where, split | row) for where, row in rows], folder, table.parent)


def _with_excerpts(rows: list[tuple[str, Cells]], folder: Path, table_folder: Path) -> Iterator[Record]:
    base = table_folder.relative_to(folder)
    prefix = f"{base.as_posix()}/" if base.parts else ""
    excerpts = find_columns(dict.fromkeys(name for _, row in rows for name in row))
    for where, row in rows:
        yield Record(f"{prefix}{where}", row, base, excerpts.excerpt(row) if excerpts else None)


def _log_columns(table: str, columns: list[str]) -> None:
    """Log which columns are used if some are not."""
    excerpts = find_columns(columns)
    used = {"split", *META, *(excerpts.names if excerpts else ())} & {*columns}
    roles = {}
    for role, names in (("file", FILE), ("text", TEXT), ("speaker", SPEAKER)):
        if name := next((name for name in names if name in columns), None):
            roles[name] = role
    listed = [f"{role} = {name}" for name, role in roles.items()] + sorted(used)
    unused = [name for name in columns if name and name not in {*roles, *used}]
    if unused:
        logger.info(f"{table}: {', '.join(listed) or 'no known column'}; not used: {', '.join(unused)}")


def _txt_records(folder: Path) -> Iterator[Record]:
    """Yield every audio file that is not hidden, by path, with the text of its `.txt` file, else an empty text.

    What else the folder holds is logged.
    """
    refuse_outside_folders(folder)
    found = find_audio(folder)
    if skipped := found.describe_skipped():
        logger.info(f"note: {folder} holds {len(found.files)} recordings; skipped: {skipped}")
    for path in (path.relative_to(folder) for path in found.files):
        where = str(path).encode(errors="replace").decode()
        beside = folder / inside(folder, path.with_suffix(".txt"), where)
        yield Record(where, {"path": str(path), "text": read_text(beside) if beside.is_file() else None})


def refuse_outside_folders(folder: Path) -> None:
    """Raise LabError if the folder holds a link to a folder outside it."""
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir() and not is_inside(path, folder):
            raise LabError(
                f"{path.relative_to(folder)} is a link to {os.readlink(path)}, outside {folder}: name the folder that "
                "holds both as source.path, or copy the files"
            )


def inside(folder: Path, file: Path, where: str) -> Path:
    """Return `file`, relative to `folder`. Raises LabError if it leads out of it, also through links."""
    path = folder / file
    if file.name and ".." not in file.parts and not file.is_absolute() and is_inside(path, folder):
        return file
    link = next((part for part in (path, *path.parents) if part.is_symlink()), None)
    what = f"which is behind the link {link.name} to {os.readlink(link)}" if link else "which is not"
    raise LabError(
        f"{where}: a file must be a path inside the folder, got {str(file)!r}, {what}: copy the file there, or copy "
        "the table to the folder that holds the audio, and name that as source.path"
    )


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
