"""Mozilla Common Voice, releases 11 to 26: the `.tar.gz` as it was downloaded, or its unpacked folder.

    cv-corpus-25.0-2026-03-09/sv-SE/clips/*.mp3                            48 kHz
                                    dev.tsv test.tsv train.tsv validated.tsv ...

An archive is never unpacked. It holds `clips` before the tables, so it is read twice: once to the end for the tables,
which compares every checksum of the gzip, so that no clip of a damaged archive is used; and once for the clips, in the
archive's order, up to the last selected one. Each pass takes 4 to 5 s per GB (20,000 clips of 27 kB, one core; gunzip
alone is half of it). Memory is that of the tables and of the clips' names; one clip is held at a time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.common_voice import archive
from pipelines.features.sources.common_voice.tables import POOLS, Row, Selection, Table, read, select
from pipelines.features.sources.splits import SYNONYMS
from pipelines.infra.errors import LabError
from pipelines.infra.file_lookup import is_inside
from pipelines.recipes import languages

logger = logging.getLogger(__name__)

MAX_CLIP_BYTES = 1 << 26
"""A larger member below `clips` would exhaust the memory: 30 s of mp3 are 2 MB at most."""
_SYNONYMS = {"train": SYNONYMS["train"], "dev": SYNONYMS["validation"], "test": SYNONYMS["test"]}
"""Table to the names that it may have in an unpacked folder."""
_RELEASE = re.compile(r"cv-corpus-(\d+(?:\.\d+)?(?:-delta)?-\d{4}-\d{2}-\d{2})")


@dataclass(frozen=True)
class Release:
    """Tables and listing of a release, collected in the first pass."""

    name: str
    """Number and date, such as `25.0-2026-03-09`; `unknown` if no folder has Mozilla's name."""
    locale: str
    """Common Voice's name of the language, such as `sv-SE`."""
    base: PurePosixPath | Path
    """The folder of that language, in the archive or on disk."""
    tables: dict[str, Table]
    clips: int
    clips_sha256: str
    """sha256 of names and sizes of all clips in the order of reading."""
    order: dict[str, int]
    """An archive's clips to their position in it; empty for a folder, whose order is that of its tables."""


@dataclass(frozen=True)
class CommonVoiceSource:
    """The release at `path` for a Whisper language (`sv` finds the folder `sv-SE`).

    Pools of training clips:

    - `train`: `train.tsv`; validation is `dev.tsv`, test is `test.tsv`, in every pool but the next.
    - `train+validation`: both, as in the common fine-tuning recipes. 5 % of these clips are held out as validation by
      whole speakers, drawn by `seed`, so that models are not selected on the test split.
    - `validated`: every clip that listeners approved, without the speakers and the sentences of validation and test.
      A release puts each sentence into its splits once: 55 % of the approved clips of release 25 are in none.
    """

    path: str
    language: str = "sv"
    pool: str = "train"
    seed: int = 7

    def identity(self) -> dict[str, str]:
        """Return release, size and sha256 of the tables, and options; of the clips names and sizes, not the bytes.

        An archive and its unpacked folder are two corpora, because the order of their clips differs.
        """
        drawn = {"seed": str(self.seed)} if self.pool == "train+validation" else {}
        tables = self.release.tables.items()
        return {
            "kind": "common_voice",
            "release": self.release.name,
            "locale": self.release.locale,
            "pool": self.pool,
            **drawn,
            **{f"{name}_tsv": f"{table.bytes} bytes, sha256 {table.sha256}" for name, table in tables},
            "clips": str(self.release.clips),
            "clips_sha256": self.release.clips_sha256,
        }

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Return the examples of these splits: an archive's in its order, a folder's in that of the tables.

        A missing clip becomes an example with a path that does not exist, in an archive after all others, so that it
        is rejected as missing. Raises LabError at once for a release that cannot be used.
        """
        clips = self._clips(splits)
        if self._path.is_dir():
            return _from_folder(self.release, clips)
        return _from_tar(self._path, self.release, clips)

    def outline(self) -> Iterator[Example]:
        """Return the examples of all splits in the same order, without their audio: only the tables are read."""
        return (_example(split, row, b"") for split, row in self._clips(SPLITS).values())

    @cached_property
    def release(self) -> Release:
        """Tables and listing; the first access reads the release."""
        if self.pool not in POOLS:
            raise LabError(f"source.pool must be one of {', '.join(POOLS)}, got {self.pool!r}: correct it")
        if self._path.name.startswith("sps-corpus-") or any(self._path.glob("ss-corpus-*.tsv")):
            raise LabError(
                f"{self._path.name} must be a release of scripted speech, got Spontaneous Speech: unpack it (tar xzf), "
                "then set source.kind=folder and source.path to its folder"
            )
        if self._path.is_dir():
            return _folder_release(self._path, self.language, POOLS[self.pool])
        if not self._path.is_file():
            raise LabError(
                f"source.path must name a Common Voice archive (cv-corpus-….tar.gz) or its folder, got "
                f"{self.path!r}, which is none: correct it"
            )
        return _tar_release(self._path, self.language, POOLS[self.pool])

    @cached_property
    def selection(self) -> Selection:
        """The clips of each split; logged on first access."""
        selected = select(self.release.tables, self.pool, self.seed)
        logger.info(self._summary(selected))
        return selected

    def _clips(self, splits: tuple[str, ...]) -> dict[str, tuple[str, Row]]:
        if unknown := sorted({*splits} - {*SPLITS}):
            raise LabError(f"splits must be some of {', '.join(SPLITS)}, got {', '.join(unknown)}: correct them")
        order, rows = self.release.order, self.selection.rows
        clips = (clip for clip, (split, _) in rows.items() if split in splits)
        return {clip: rows[clip] for clip in sorted(clips, key=lambda clip: order.get(clip, len(order)))}

    def _summary(self, selected: Selection) -> str:
        splits = [split for split, _ in selected.rows.values()]
        counts = ", ".join(f"{splits.count(split)} {split}" for split in SPLITS)
        left_out = " and ".join(f"{n} by {why}" for why, n in selected.left_out.items() if n)
        summary = f"Common Voice {self.release.name} {self.release.locale}, pool {self.pool!r}: {counts}"
        return f"{summary}; left out, because validation or test has it too: {left_out}" if left_out else summary

    @property
    def _path(self) -> Path:
        return Path(self.path).expanduser()


class _LanguageFolder:
    """Tables and clips of one language's folder, collected in the first pass."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.clips: dict[str, int] = {}
        self.listing = hashlib.sha256()


def _tar_release(path: Path, language: str, names: tuple[str, ...]) -> Release:
    folders: dict[PurePosixPath, _LanguageFolder] = {}
    locales: set[str] = set()
    with archive.damage_named(path):
        for member in archive.members(path):
            in_clips = member.name.parent.name == "clips"
            base = member.name.parents[1] if in_clips else member.name.parent
            if in_clips or member.name.suffix == ".tsv":
                locales.add(base.name)
                if _is_of_language(base.name, language):
                    _add_member(path, folders.setdefault(base, _LanguageFolder()), member, in_clips, names)
    base = _only(path, list(folders), language, locales)
    folder = folders[base]
    _check_complete(path, names, folder.tables)
    release = _release_name([*base.parts, path.name])
    tables = {name: folder.tables[name] for name in names}
    return Release(release, base.name, base, tables, len(folder.clips), folder.listing.hexdigest(), folder.clips)


def _add_member(
    path: Path, folder: _LanguageFolder, member: archive.Member, in_clips: bool, names: tuple[str, ...]
) -> None:
    """Record a clip's name and size, or read a table if it is one of `names`."""
    name, stem = member.name.name, member.name.stem
    if name in folder.clips if in_clips else stem in folder.tables:
        raise LabError(f"{path.name} must hold each file once, got {str(member.name)!a} twice: download it again")
    if in_clips:
        _check_size(path, member)
        folder.clips[name] = len(folder.clips)
        folder.listing.update(f"{name} {member.bytes}\n".encode(errors="surrogateescape"))
    elif stem in names:
        folder.tables[stem] = read(name, member.open(), member.name.parent.name)


def _from_tar(path: Path, release: Release, selected: dict[str, tuple[str, Row]]) -> Iterator[Example]:
    """Yield the selected clips in the archive's order (the second pass), then those that are missing from it."""
    clips = release.base / "clips"
    if selected:
        with archive.damage_named(path):
            for member in archive.members(path):
                if member.name.parent == clips and (clip := selected.pop(member.name.name, None)):
                    yield _example(*clip, member.open().read())
                    if not selected:
                        break
    for split, row in selected.values():
        yield _example(split, row, path / clips / row.clip)  # a path below a file: it does not exist


def _folder_release(path: Path, language: str, names: tuple[str, ...]) -> Release:
    base = _folder_base(path, language)
    tables = {}
    by_stem = {table.stem.lower(): table for table in sorted(base.glob("*.tsv")) if table.is_file()}
    for name in names:
        table = next((by_stem[stem] for stem in (name, *_SYNONYMS.get(name, ())) if stem in by_stem), None)
        if table:
            _check_inside(path, table)
            try:
                with open(table, "rb") as file:
                    tables[name] = read(table.name, file, base.name)
            except OSError as error:
                raise LabError(f"{table.name} must be a readable file, got: {error.strerror}. Replace it") from None
    _check_complete(path, names, tables)
    sizes = sorted(_clip_sizes(path, base / "clips"))
    listing = "".join(f"{name} {size}\n" for name, size in sizes).encode(errors="surrogateescape")
    release = _release_name([base.resolve().parent.name, path.resolve().name])
    return Release(release, base.name, base, tables, len(sizes), hashlib.sha256(listing).hexdigest(), {})


def _from_folder(release: Release, selected: dict[str, tuple[str, Row]]) -> Iterator[Example]:
    for split, row in selected.values():
        yield _example(split, row, release.base / "clips" / row.clip)


def _folder_base(path: Path, language: str) -> Path:
    """Find the folder of the language: `path` itself, a child or a grandchild."""
    depths = [[path.resolve()], sorted(path.glob("*/")), sorted(path.glob("*/*/"))]
    folders = [folder for depth in depths for folder in depth]
    folders = [folder for folder in folders if any(folder.glob("*.tsv")) or (folder / "clips").is_dir()]
    bases = [folder for folder in folders if _is_of_language(folder.name, language)]
    return _only(path, bases, language, {folder.name for folder in folders})


def _clip_sizes(path: Path, clips: Path) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(clips) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _check_inside(path, Path(entry))
                if entry.is_file():
                    yield entry.name, entry.stat().st_size
    except OSError as error:
        raise LabError(f"{clips} must be a readable folder of clips, got: {error.strerror}. Unpack it again") from None


def _example(split: str, row: Row, audio: bytes | Path) -> Example:
    return Example(row.clip.removesuffix(".mp3"), split, row.text, audio, row.speaker, row.meta)


def _is_of_language(locale: str, language: str) -> bool:
    return languages.find(locale) == language  # nb-NO, too, is Whisper's `no`


def _only(path: Path, bases: list, language: str, locales: set[str]) -> PurePosixPath | Path:
    """Return the only folder of the language; an exact name is preferred to one with a region."""
    bases = [base for base in bases if base.name == language] or bases
    if len(bases) == 1:
        return bases[0]
    listed = ", ".join(sorted(str(base) for base in bases) or sorted(locales - {""}) or ["no table and no clip"])
    expected = f"must hold one folder {language!r} or {language + '-…'!r} with tables and clips"
    raise LabError(f"{path.name} {expected}, got {listed[:200]!a}: name the corpus of recipe.language, a whole release")


def _check_complete(path: Path, names: tuple[str, ...], tables: dict[str, Table]) -> None:
    if missing := [f"{name}.tsv" for name in names if name not in tables]:
        raise LabError(
            f"{path.name} must hold {', '.join(f'{name}.tsv' for name in names)}, got no {' and no '.join(missing)}: "
            "choose another source.pool, or a whole release (a delta release has no splits)"
        )


def _check_size(path: Path, member: archive.Member) -> None:
    if member.bytes > MAX_CLIP_BYTES:
        raise LabError(
            f"{path.name} must hold clips of at most {MAX_CLIP_BYTES} bytes, got {str(member.name)!a} of "
            f"{member.bytes}: download the corpus from its publisher"
        )


def _check_inside(path: Path, file: Path) -> None:
    if not is_inside(file, path):
        raise LabError(f"{file.name} must be stored in {path}, got a link that leads out of it: copy the file there")


def _release_name(candidates: Iterable[str]) -> str:
    return next((match[1] for name in candidates if (match := _RELEASE.search(name))), "unknown")
