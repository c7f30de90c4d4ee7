"""The folder of takes, which `source.kind=folder` reads as it is.

    my_recordings/collection.toml            language, licence and consent; made when the folder is created
                  metadata.csv               one row for each take, with its split
                  unused.csv                 takes whose sentence is held out by another split; nothing reads it
                  clips/SPEAKER/SENTENCE.wav 16 kHz, mono, 16 bits
                  .speakers.key              turns nicknames into speaker ids, which cannot be turned back without it

A take is stored in two steps: its audio is written and flushed, then the table is replaced by one with its row. If the
process is killed in between, the audio has no row: no table names it, and the page asks for the sentence again. Rows
may be deleted by hand at any time. A speaker who withdraws is removed by deleting their folder of clips.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import hmac
import io
import json
import logging
import secrets
import threading
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from pipelines.features.sources import SPLITS, lines_sha256
from pipelines.features.sources.draw import draw_splits
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.tables.formulas import decode_cell, encode_cell
from pipelines.recipes import languages
from pipelines.speech import marks, text
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform

SETTINGS, TABLE, UNUSED, CLIPS = "collection.toml", "metadata.csv", "unused.csv", "clips"
COLUMNS = (
    *("path", "text", "speaker", "gender", "age", "accent", "split", "problems", "hypothesis", "difference"),
    *("level_dbfs", "snr_db", "recorded_at", "consented_at"),
)
"""`problems` are those of checks.Check that the speaker kept; `hypothesis` is what the model heard."""
MAX_BYTES = 20_000_000_000
"""Size of all takes above which none is stored: some 170 hours."""
_FORMAT = 1
_METHOD = "read speech: sentences recorded one by one in a browser"
_KEY, _LOCK = ".speakers.key", ".record.lock"
UNUSED_SPLIT = "unused"
_SENTENCE_SHARES = {"test": 1, "validation": 1, "train": 4}
"""How sentences that several splits have read are divided; each split gets one of the first."""
_SEED = 7
"""Of the draw of splits; that of source.seed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """What speakers agree to."""

    language: str
    """Whisper's code of the language of the sentences."""
    licence: str
    consent: Mapping[str, str]
    """The text that speakers agree to, by language of the page."""


class TakeFolder:
    """The folder of takes of one collection; one process at a time uses it. Thread-safe."""

    def __init__(self, path: Path, terms: Terms):
        """Use `open_folder`."""
        self.path, self.terms = path, terms
        self._key = (path / _KEY).read_bytes()
        self._lock = threading.Lock()
        self._rows, self._stamps = self._read_rows(), self._stamp()
        self._remove_partial_files()
        self._n_bytes = sum(file.stat().st_size for file in path.glob(f"{CLIPS}/*/*.wav"))
        if self._rows or (path / TABLE).exists():
            self._rows = self._write_tables(self._rows)

    def speaker_id(self, nickname: str) -> str:
        """Return the id of a speaker: the same for the same nickname in this folder, regardless of case and blanks."""
        name = text.clean(nickname.encode("utf-8", "replace").decode()).casefold()
        return f"s{hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()[:11]}"

    def takes(self) -> list[dict[str, str]]:
        """Return the rows of all takes, oldest first."""
        with self._lock:
            return [*self._rows.values()]

    def add(self, speaker: str, sentence: str, waveform: Waveform, fields: Mapping[str, str]) -> bool:
        """Store a take and return True; return False if the speaker has one of this sentence already.

        `fields` are further cells, by column. Raises LabError if the folder is full, and OSError if the disk is.
        """
        path = f"{CLIPS}/{speaker}/{sentence_id(sentence)}.wav"
        content = _wav(waveform)
        with self._lock:
            if self._stamp() != self._stamps:
                self._rows = self._read_rows()
            if path in self._rows:
                return False
            if self._n_bytes + len(content) > MAX_BYTES:
                raise LabError(f"{self.path} holds {MAX_BYTES / 1e9:g} GB of takes, its maximum: use another folder")
            file = self.path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            row = dict.fromkeys(COLUMNS, "") | {"recorded_at": now()} | fields
            row |= {"path": path, "text": sentence, "speaker": speaker}
            manifest.write_bytes(file, content)
            try:
                self._rows = self._write_tables(self._rows | {path: row})
            except OSError:
                file.unlink(missing_ok=True)  # audio without a row would use up the space that is freed
                raise
            self._n_bytes += len(content)
        return True

    def _write_tables(self, rows: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        """Write the tables and return the rows with their splits. After a crash, each row is in one of the tables."""
        splits = assign_splits([*rows.values()])
        rows = {path: row | {"split": split} for (path, row), split in zip(rows.items(), splits, strict=True)}
        unused = [row for row in rows.values() if row["split"] == UNUSED_SPLIT]
        leaving = [row for path, row in self._rows.items() if row["split"] == UNUSED_SPLIT and row != rows[path]]
        if unused or leaving:
            manifest.write_bytes(self.path / UNUSED, _table([*unused, *leaving]))
        manifest.write_bytes(self.path / TABLE, _table(row for row in rows.values() if row["split"] != UNUSED_SPLIT))
        if leaving:
            manifest.write_bytes(self.path / UNUSED, _table(unused))
        self._stamps = self._stamp()
        return rows

    def _read_rows(self) -> dict[str, dict[str, str]]:
        """Return the rows of both tables by path, oldest first, without those whose audio was deleted.

        Raises LabError if a table is damaged, or if the folder was removed or has lost all its clips.
        """
        rows = [row for name in (UNUSED, TABLE) for row in _read_table(self.path / name)]
        if not (self.path / SETTINGS).exists() or (rows and not (self.path / CLIPS).is_dir()):
            raise LabError(f"{self.path} must hold {SETTINGS} and {CLIPS}/, and one is missing: restore it")
        present = [row for row in rows if (self.path / row["path"]).is_file()]
        if len(present) < len(rows):
            logger.warning(f"{self.path}: {len(rows) - len(present)} takes were removed, since their audio was deleted")
        return {row["path"]: row for row in sorted(present, key=lambda row: row["recorded_at"])}

    def _stamp(self) -> list[tuple[int, int] | None]:
        """Return the time and size of the files that may be changed by hand; None for a missing one."""
        files = [self.path / name for name in (SETTINGS, TABLE, UNUSED)]
        return [(file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else None for file in files]

    def _remove_partial_files(self) -> None:
        """Delete files that a killed process left half written."""
        for pattern in (f"{CLIPS}/*/.*.partial", ".*.partial"):
            for file in self.path.glob(pattern):
                file.unlink()


def open_folder(path: Path, terms: Terms, given: Iterable[str] = ()) -> tuple[TakeFolder, filelock.FileLock]:
    """Open the folder of a collection, or create it with `terms`; return it with its lock, which the caller holds.

    `given` are the names of the terms that the user stated: an existing folder must have the same, and keeps its
    others. Raises LabError if the folder is not of a collection, has other terms, cannot be written or is in use.
    """
    stored = read_terms(path)
    for name in given if stored else ():
        if getattr(stored, name) != getattr(terms, name):
            raise LabError(
                f"{path} was begun with another {name}, to which its speakers agreed: name another folder with --to, "
                f"or leave --{name} out"
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / _LOCK, timeout=0)
        lock.acquire()
        if not (path / _KEY).exists():
            manifest.write_bytes(path / _KEY, secrets.token_bytes(32))
            (path / _KEY).chmod(0o600)
            manifest.write_bytes(path / ".gitignore", f"{_KEY}\n{_LOCK}\n".encode())  # the key must not be published
        if stored is None:
            manifest.write_bytes(path / SETTINGS, _settings(terms).encode())
        return TakeFolder(path, stored or terms), lock
    except filelock.Timeout:
        raise LabError(f"{path} is in use by another `record`: stop that, or open its page") from None
    except OSError as error:
        raise LabError(f"{path} cannot be written ({error.strerror or error}): name another folder with --to") from None


def read_terms(path: Path) -> Terms | None:
    """Return the terms of a folder, or None if it is absent or empty. Raises LabError if it is not of a collection."""
    if path.exists() and not path.is_dir():
        raise LabError(f"--to takes a folder, got {str(path)!r}, which is a file: name another")
    if not (path / SETTINGS).exists():
        if others := sorted(item.name for item in path.glob("[!.]*")):
            raise LabError(
                f"{path} holds {others[0]!r} but no {SETTINGS}, so it belongs to something else: name a new folder"
            )
        return None
    try:
        settings = tomllib.loads((path / SETTINGS).read_text("utf-8"))
        if settings.get("format") != _FORMAT:
            raise ValueError(f"format {settings.get('format')!r}, expected {_FORMAT}")
        language, licence, consent = (settings[name] for name in ("language", "licence", "consent"))
        texts = [licence, *(consent[tag] for tag in ("en", "sv"))] if isinstance(consent, dict) else [None]
        if language not in languages.NAMES or not all(isinstance(one, str) and one.strip() for one in texts):
            raise ValueError("language, licence, and en and sv of [consent] must be a known language and texts")
        return Terms(language, licence, consent)
    except (OSError, ValueError, KeyError) as error:
        raise LabError(f"{path / SETTINGS} cannot be read ({error}): restore it, or name a new folder") from None


def sentence_id(sentence: str) -> str:
    """Return the file name of a sentence, without suffix."""
    return lines_sha256([sentence])[:12]


def assign_splits(rows: list[dict[str, str]]) -> list[str]:
    """Return the split of each row if there are enough speakers to hold some out, else empty texts.

    An empty split is drawn by `source.kind=folder` itself, by sentences, with the knowledge that speakers are shared.
    A sentence that speakers of several splits have read belongs to one of these splits, since a model must not be
    trained on a sentence of the test; the rows of the others are `unused`.
    """
    speakers = list(dict.fromkeys(row["speaker"] for row in rows))
    drawn = draw_splits(speakers, speakers, [""] * len(speakers), _SEED)
    if drawn.units != "speakers" or not {*SPLITS} <= {*drawn.splits}:
        return [""] * len(rows)
    split_of = dict(zip(speakers, drawn.splits, strict=True))
    read = [(_sentence_key(row["text"]), split_of[row["speaker"]]) for row in rows]
    splits_of: dict[str, set[str]] = {}
    for key, split in read:
        splits_of.setdefault(key, set()).add(split)
    n_sentences, owners = dict.fromkeys(_SENTENCE_SHARES, 0), {}
    for key, splits in splits_of.items():
        candidates = [split for split in _SENTENCE_SHARES if split in splits]
        owners[key] = min(candidates, key=lambda split: n_sentences[split] / _SENTENCE_SHARES[split])
        n_sentences[owners[key]] += 1
    return [split if split == owners[key] else UNUSED_SPLIT for key, split in read]


@functools.lru_cache(maxsize=50_000)
def _sentence_key(sentence: str) -> str:
    return marks.sentence_key(sentence)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise LabError(f"{path} cannot be read ({error}): restore it") from None
    if any({*row} != {*COLUMNS} or None in row.values() for row in rows):
        raise LabError(f"{path} must have the columns {', '.join(COLUMNS)} in each row: restore it")
    return [{name: decode_cell(cell) for name, cell in row.items()} for row in rows]


def _table(rows: Iterable[Mapping[str, str]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([encode_cell(row[name]) for name in COLUMNS] for row in rows)
    return out.getvalue().encode()


def _settings(terms: Terms) -> str:
    """Return collection.toml; JSON's strings are TOML's."""

    def quoted(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

    lines = {"format": _FORMAT, "method": quoted(_METHOD), "created": quoted(now())}
    lines |= {"language": quoted(terms.language), "licence": quoted(terms.licence)}
    consent = "".join(f"{language} = {quoted(given)}\n" for language, given in terms.consent.items())
    return "".join(f"{name} = {value}\n" for name, value in lines.items()) + f"\n[consent]\n{consent}"


def _wav(waveform: Waveform) -> bytes:
    import soundfile

    wav = io.BytesIO()
    soundfile.write(wav, waveform.samples, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return wav.getvalue()
