"""The TSV tables of a Common Voice release, and their rows for training, validation and test.

CorporaCreator writes them without quoting and puts a backslash before a tab inside a sentence. Some of its input
sentences were already quoted as CSV; they are unquoted here.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO

from pipelines.infra.errors import LabError
from pipelines.infra.tables.text_table import unquoted
from pipelines.speech import text as speech_text

POOLS = {
    "train": ("train", "dev", "test"),
    "train+validation": ("train", "dev", "test"),
    "validated": ("validated", "dev", "test"),
}
"""Pool of training clips to the tables it is made of."""
HELD_OUT_SHARE = 0.05
"""Share of the clips of `train+validation` that is held out as validation, by whole speakers."""
MAX_LINE_BYTES = 1 << 20
_REQUIRED = ("client_id", "path", "sentence")
_META = {
    "gender": ("gender",),
    "age": ("age",),
    "accent": ("accents", "accent"),
    "variant": ("variant",),
    "segment": ("segment",),
    "sentence_id": ("sentence_id",),
    "sentence_domain": ("sentence_domain",),
    "up_votes": ("up_votes",),
    "down_votes": ("down_votes",),
}
"""Key in an Example's meta to the columns of releases 11 to 26 (`accent` became `accents`)."""
_GENDERS = {"male_masculine": "male", "female_feminine": "female"}
"""Names since release 17 to those before it, so that slices of two releases are comparable."""
_TAB = re.compile(r"(?<!\\)\t")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table."""

    clip: str
    """The clip's file name, with its suffix."""
    text: str
    speaker: str
    meta: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table that was read completely."""

    rows: list[Row]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Selection:
    """The clips of each split."""

    rows: dict[str, tuple[str, Row]] = field(default_factory=dict)
    """Clip to its split and its row: training first, each in its table's order."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many rows of the pool were left out, by `speaker` or `sentence` of validation and test."""


def read(name: str, file: IO[bytes], locale: str) -> Table:
    """Read a table completely. Raises LabError naming the line for malformed content."""
    digest, size, number = hashlib.sha256(), 0, 0
    header: list[str] = []
    rows: list[Row] = []
    while line := file.readline(MAX_LINE_BYTES + 1):
        digest.update(line)
        size, number = size + len(line), number + 1
        cells = _cells(f"{name} line {number}", line)
        if not header:
            header = _header(name, cells)
        elif cells != [""]:
            rows.append(_row(f"{name} line {number}", dict(_pairs(name, number, header, cells)), locale))
    if not rows:
        raise LabError(f"{name} must hold at least one clip, got no row: choose another pool, or a whole release")
    _check_unique_clips(name, rows)
    return Table(rows, size, digest.hexdigest())


def select(tables: dict[str, Table], pool: str, seed: int) -> Selection:
    """Return the rows of each split. Raises LabError for a clip in two of train, dev and test."""
    tables = {name: tables[name] for name in POOLS[pool]}
    test = tables["test"].rows
    if pool == "train+validation":
        validation = _held_out(tables["train"].rows + tables["dev"].rows, seed)
        candidates = tables["train"].rows + tables["dev"].rows
    else:
        validation, candidates = tables["dev"].rows, tables[pool].rows
    if pool == "train":
        train, left_out = candidates, {}
    else:
        train, left_out = _apart_from(candidates, [*validation, *test])
    if not train:
        raise LabError(f"pool {pool!r} must leave clips to train on, got none: choose source.pool = 'train'")
    _check_unique_clips("train, dev and test", [*train, *validation, *test])
    splits = (("train", train), ("validation", validation), ("test", test))
    return Selection({row.clip: (split, row) for split, rows in splits for row in rows}, left_out)


def _apart_from(rows: list[Row], held: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """Return the rows without a common speaker or sentence with `held`, and the number of others.

    Rows of `held` itself are left out and not counted.
    """
    clips = {row.clip for row in held}
    speakers = {row.speaker for row in held} - {""}
    sentences = {speech_text.normalise(row.text) for row in held}
    separate, left_out = [], Counter(speaker=0, sentence=0)
    for row in rows:
        if row.clip in clips:
            continue
        if row.speaker in speakers:
            left_out["speaker"] += 1
        elif speech_text.normalise(row.text) in sentences:
            left_out["sentence"] += 1
        else:
            separate.append(row)
    return separate, dict(left_out)


def _held_out(rows: list[Row], seed: int) -> list[Row]:
    """Return the rows of speakers drawn by `seed` up to HELD_OUT_SHARE; at least those of the smallest speaker."""
    clips = Counter(row.speaker for row in rows)
    order = sorted(clips, key=lambda speaker: hashlib.sha256(f"{seed} {speaker}".encode()).digest())
    remaining, drawn = len(rows) * HELD_OUT_SHARE, set()
    for speaker in order:
        if clips[speaker] <= remaining:
            remaining -= clips[speaker]
            drawn.add(speaker)
    drawn = drawn or {min(order, key=clips.__getitem__)}
    return [row for row in rows if row.speaker in drawn]


def _cells(where: str, line: bytes) -> list[str]:
    if len(line) > MAX_LINE_BYTES:
        raise LabError(f"{where}: a line must be at most {MAX_LINE_BYTES} bytes, got more: the table is damaged")
    try:
        decoded = line.decode("utf-8-sig").replace("\0", "").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise LabError(
            f"{where}: must be UTF-8, got the byte 0x{line[error.start]:02x}: save it as UTF-8, or download it again"
        ) from None
    return decoded.split("\t")


def _header(name: str, cells: list[str]) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    missing = [column for column in _REQUIRED if column not in header]
    if missing or len(set(header)) < len(header):
        fault = f"no {' and no '.join(missing)}" if missing else "a column twice"
        raise LabError(
            f"{name} must have the columns {', '.join(_REQUIRED)} once each, separated by tabs, got {fault} among "
            f"{', '.join(header)[:200]!a}: take the table of the release"
        )
    return header


def _pairs(name: str, number: int, header: list[str], cells: list[str]) -> Iterable[tuple[str, str]]:
    if len(cells) > len(header):  # a tab inside a sentence has a backslash before it
        cells = [cell.replace("\\\t", "\t") for cell in _TAB.split("\t".join(cells))]
    if len(cells) != len(header):
        raise LabError(
            f"{name} line {number}: a row must have the header's {len(header)} cells, got {len(cells)}: "
            "take the table of the release"
        )
    return zip(header, cells, strict=True)


def _row(where: str, cells: dict[str, str], locale: str) -> Row:
    clip = cells["path"].strip()
    if not clip or clip in (".", "..") or re.search(r"[/\\:\x00-\x1f]", clip):
        raise LabError(f"{where}: path must be the bare name of a clip, got {clip[:80]!a}: take the release's table")
    if cells.get("locale", locale) not in ("", locale):
        raise LabError(f"{where}: locale must be {locale}, got {cells['locale'][:20]!a}: this is another language")
    meta = {name: value for name, columns in _META.items() if (value := _first(cells, columns))}
    if meta.get("gender") in _GENDERS:
        meta["gender"] = _GENDERS[meta["gender"]]
    return Row(clip, unquoted(cells["sentence"]), sys.intern(cells["client_id"].strip()), meta)


def _first(cells: dict[str, str], columns: tuple[str, ...]) -> str:
    """Return the first value of `columns` that is not empty, interned to save memory."""
    values = (cells.get(column, "").strip() for column in columns)
    return sys.intern(next(filter(None, values), ""))


def _check_unique_clips(name: str, rows: list[Row]) -> None:
    duplicate = next((clip for clip, n in Counter(row.clip for row in rows).items() if n > 1), None)
    if duplicate is not None:
        raise LabError(f"{name} must name a clip once, got {duplicate!a} twice: take the tables of one release")
