"""Mozilla Common Voice, releases 11 to 26: the `.tar.gz` as it was downloaded, or its unpacked folder.

    cv-corpus-25.0-2026-03-09/sv-SE/clips/*.mp3                            48 kHz
                                    dev.tsv test.tsv train.tsv validated.tsv ...

An archive is never unpacked. Its bundler packs `clips` before the tables, so it is read twice: once to the end for the
tables (which compares every checksum of the gzip, and hands out no clip of a damaged archive), and once for the clips,
in the archive's order, until the last one that is wanted. Each pass costs 4 to 5 s a GB (20,000 clips of 27 kB, one
core; gunzip alone is half of it). Memory is that of the tables and of the clips' names; one clip is held at a time.
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
from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)

MAX_CLIP_BYTES = 1 << 26
"""A larger member below `clips` is an attack on memory: 30 s of mp3 are 2 MB at most."""
_RELEASE = re.compile(r"cv-corpus-(\d+(?:\.\d+)?(?:-delta)?-\d{4}-\d{2}-\d{2})")


@dataclass(frozen=True)
class Release:
    """What is known of a release once it has been looked through."""

    name: str
    """Number and date, such as `25.0-2026-03-09`; `unknown` where no folder is named as Mozilla names it."""
    locale: str
    """Common Voice's name of the language, such as `sv-SE`."""
    base: PurePosixPath | Path
    """The folder of that language: in the archive, or on the disk."""
    tables: dict[str, Table]
    clips: int
    clips_sha256: str
    """Of names and sizes of all clips in the order of reading."""
    order: dict[str, int]
    """An archive's clips to their places in it; empty for a folder, whose order is that of its tables."""


@dataclass(frozen=True)
class CommonVoiceSource:
    """The release at `path` for a Whisper language (`sv` finds the folder `sv-SE`).

    Pools of training clips:

    - `train`: `train.tsv`; validation is `dev.tsv`, test is `test.tsv`, in every pool but the next.
    - `train+validation`: both, as the blog posts and the first lab have it. So that something other than the test split
      can select, 5 % of these clips are held out as validation by whole speakers, drawn by `seed`.
    - `validated`: every clip that listeners approved, without the speakers and the sentences of validation and test.
      A release puts each sentence into its splits once: 55 % of the approved clips of release 25 are in none.
    """

    path: str
    language: str = "sv"
    pool: str = "train"
    seed: int = 7

    """Told once what each split holds and how many rows were left out for whose sake."""

    def identity(self) -> dict[str, str]:
        """Release, size and sha256 of the tables, options; of the clips the names and sizes in order, not the bytes.

        An archive's clips lie in its own order, a folder's in that of the tables: these are two corpora.
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
        """The examples of these splits: an archive's in its order, a folder's in that of the tables.

        A clip that a table names and that is not there comes with a path at which there is no file, in an archive
        after all others: it is rejected as missing. Raises LabError at once for a release that cannot be used.
        """
        wanted = self._wanted(splits)
        if self._path.is_dir():
            return _from_folder(self.release, wanted)
        return _from_tar(self._path, self.release, wanted)

    def outline(self) -> Iterator[Example]:
        """The examples of all splits in the same order, without their audio: nothing but the tables is read."""
        return (_example(split, row, b"") for split, row in self._wanted(SPLITS).values())

    @cached_property
    def release(self) -> Release:
        """What the first pass finds."""
        if self.pool not in POOLS:
            raise LabError(f"source.pool must be one of {', '.join(POOLS)}, got {self.pool!r}: correct it")
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
        """Which clip is in which split."""
        chosen = select(self.release.tables, self.pool, self.seed)
        logger.info(self._in_words(chosen))
        return chosen

    def _wanted(self, splits: tuple[str, ...]) -> dict[str, tuple[str, Row]]:
        if unknown := sorted({*splits} - {*SPLITS}):
            raise LabError(f"splits must be some of {', '.join(SPLITS)}, got {', '.join(unknown)}: correct them")
        order, rows = self.release.order, self.selection.rows
        clips = (clip for clip, (split, _) in rows.items() if split in splits)
        return {clip: rows[clip] for clip in sorted(clips, key=lambda clip: order.get(clip, len(order)))}

    def _in_words(self, chosen: Selection) -> str:
        splits = [split for split, _ in chosen.rows.values()]
        counts = ", ".join(f"{splits.count(split)} {split}" for split in SPLITS)
        left_out = " and ".join(f"{n} by {why}" for why, n in chosen.left_out.items() if n)
        told = f"Common Voice {self.release.name} {self.release.locale}, pool {self.pool!r}: {counts}"
        return f"{told}; left out, because validation or test has it too: {left_out}" if left_out else told

    @property
    def _path(self) -> Path:
        return Path(self.path).expanduser()


class _Seen:
    """What the first pass has seen of one language's folder."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.clips: dict[str, int] = {}
        self.listing = hashlib.sha256()


def _tar_release(path: Path, language: str, names: tuple[str, ...]) -> Release:
    seen: dict[PurePosixPath, _Seen] = {}
    locales: set[str] = set()
    with archive.damage_named(path):
        for member in archive.members(path):
            in_clips = member.name.parent.name == "clips"
            base = member.name.parents[1] if in_clips else member.name.parent
            if in_clips or member.name.suffix == ".tsv":
                locales.add(base.name)
                if _speaks(language, base.name):
                    _see(path, seen.setdefault(base, _Seen()), member, in_clips, names)
    base = _only(path, list(seen), language, locales)
    found = seen[base]
    _refuse_incomplete(path, names, found.tables)
    release = _release_name([*base.parts, path.name])
    tables = {name: found.tables[name] for name in names}
    return Release(release, base.name, base, tables, len(found.clips), found.listing.hexdigest(), found.clips)


def _see(path: Path, seen: _Seen, member: archive.Member, in_clips: bool, names: tuple[str, ...]) -> None:
    """Note a clip's name and size, or read a table if it is one of `names`."""
    name, stem = member.name.name, member.name.stem
    if name in seen.clips if in_clips else stem in seen.tables:
        raise LabError(f"{path.name} must hold each file once, got {str(member.name)!a} twice: download it again")
    if in_clips:
        _refuse_large(path, member)
        seen.clips[name] = len(seen.clips)
        seen.listing.update(f"{name} {member.bytes}\n".encode(errors="surrogateescape"))
    elif stem in names:
        seen.tables[stem] = read(name, member.open(), member.name.parent.name)


def _from_tar(path: Path, release: Release, wanted: dict[str, tuple[str, Row]]) -> Iterator[Example]:
    """The second pass: clips as they come, until all are found; then those that never came."""
    clips = release.base / "clips"
    if wanted:
        with archive.damage_named(path):
            for member in archive.members(path):
                if member.name.parent == clips and (chosen := wanted.pop(member.name.name, None)):
                    yield _example(*chosen, member.open().read())
                    if not wanted:
                        break
    for split, row in wanted.values():
        yield _example(split, row, path / clips / row.clip)  # below a file there is no file


def _folder_release(path: Path, language: str, names: tuple[str, ...]) -> Release:
    base = _folder_base(path, language)
    tables = {}
    for name in names:
        table = base / f"{name}.tsv"
        if table.is_file():
            _refuse_outward(path, table)
            try:
                with open(table, "rb") as file:
                    tables[name] = read(table.name, file, base.name)
            except OSError as error:
                raise LabError(f"{table.name} must be a readable file, got: {error.strerror}. Replace it") from None
    _refuse_incomplete(path, names, tables)
    sizes = sorted(_clip_sizes(path, base / "clips"))
    listing = "".join(f"{name} {size}\n" for name, size in sizes).encode(errors="surrogateescape")
    release = _release_name([base.resolve().parent.name, path.resolve().name])
    return Release(release, base.name, base, tables, len(sizes), hashlib.sha256(listing).hexdigest(), {})


def _from_folder(release: Release, wanted: dict[str, tuple[str, Row]]) -> Iterator[Example]:
    for split, row in wanted.values():
        yield _example(split, row, release.base / "clips" / row.clip)


def _folder_base(path: Path, language: str) -> Path:
    """The folder of the language: `path` itself, below it, or one deeper."""
    depths = [[path.resolve()], sorted(path.glob("*/")), sorted(path.glob("*/*/"))]
    found = [folder for depth in depths for folder in depth if any(folder.glob("*.tsv")) or (folder / "clips").is_dir()]
    bases = [folder for folder in found if _speaks(language, folder.name)]
    return _only(path, bases, language, {folder.name for folder in found})


def _clip_sizes(path: Path, clips: Path) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(clips) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _refuse_outward(path, Path(entry))
                if entry.is_file():
                    yield entry.name, entry.stat().st_size
    except OSError as error:
        raise LabError(f"{clips} must be a readable folder of clips, got: {error.strerror}. Unpack it again") from None


def _example(split: str, row: Row, audio: bytes | Path) -> Example:
    return Example(row.clip.removesuffix(".mp3"), split, row.text, audio, row.speaker, row.meta)


def _speaks(language: str, locale: str) -> bool:
    return locale == language or locale.startswith(f"{language}-")


def _only(path: Path, bases: list, language: str, locales: set[str]) -> PurePosixPath | Path:
    """The one folder of the language. An exact name goes before one with a region."""
    bases = [base for base in bases if base.name == language] or bases
    if len(bases) == 1:
        return bases[0]
    found = ", ".join(sorted(str(base) for base in bases) or sorted(locales - {""}) or ["no table and no clip"])
    wanted = f"must hold one folder {language!r} or {language + '-…'!r} with tables and clips"
    raise LabError(f"{path.name} {wanted}, got {found[:200]!a}: name the corpus of recipe.language, a whole release")


def _refuse_incomplete(path: Path, names: tuple[str, ...], tables: dict[str, Table]) -> None:
    if lacking := [f"{name}.tsv" for name in names if name not in tables]:
        raise LabError(
            f"{path.name} must hold {', '.join(f'{name}.tsv' for name in names)}, got no {' and no '.join(lacking)}: "
            "choose another source.pool, or a whole release (a delta release has no splits)"
        )


def _refuse_large(path: Path, member: archive.Member) -> None:
    if member.bytes > MAX_CLIP_BYTES:
        raise LabError(
            f"{path.name} must hold clips of at most {MAX_CLIP_BYTES} bytes, got {str(member.name)!a} of "
            f"{member.bytes}: download the corpus from its publisher"
        )


def _refuse_outward(path: Path, file: Path) -> None:
    try:
        stays = file.resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError):  # links in a circle lead nowhere
        stays = False
    if not stays:
        raise LabError(f"{file.name} must lie in {path}, got a link that leads out of it: copy the file there")


def _release_name(candidates: Iterable[str]) -> str:
    return next((found[1] for name in candidates if (found := _RELEASE.search(name))), "unknown")
