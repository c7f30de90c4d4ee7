"""Rows of other tables and caches that a recipe holds out, and keys that compare the audio of cached clips."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path

from pipelines.features import shards
from pipelines.features.cache import FeatureCache, open_cache
from pipelines.features.curation import leaks
from pipelines.features.curation.leaks import HeldOut
from pipelines.features.sources import Example, PartExample, Source
from pipelines.features.sources.splits import canonical_split
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.tables import is_missing, open_table
from pipelines.speech.audio import fingerprint

logger = logging.getLogger(__name__)

_SENTENCE = ("sentence", "text", "transcript", "transcription")
_SPEAKER = ("client_id", "speaker", "speaker_id")


class CachedAudio:
    """The clips of a cache as examples without audio, with keys that are equal for equal audio.

    Equal audio has the same number of frames and the same pad value. If no other clip has both, which is the usual
    case, they form the key and no frame is read. `other_keys` holds such short keys of clips outside this cache, and
    `held_out_parts` returns the recordings of clips that the source cuts from them, by id (`held_out_parts` below).
    """

    def __init__(
        self,
        cache: FeatureCache,
        other_keys: Container[str] = (),
        held_out_parts: Callable[[], Mapping[str, Path]] = dict,
    ):
        self.cache, self._other_keys = cache, other_keys
        rows = cache.rows
        self._row = {name: row for row, name in enumerate(rows["id"])}
        self._short_keys = [f"{frames} {pad}" for frames, pad in zip(rows["frames"], rows["pad_value"], strict=True)]
        self._counts = Counter(self._short_keys)
        self._file_keys = _file_keys(cache, held_out_parts)

    def examples(self) -> Iterator[Example]:
        table = self.cache.rows
        meta = [name for name in ("gender", "accent", "age", "up_votes", "down_votes") if name in table]
        columns = [table[name].tolist() for name in ("id", "split", "text", "speaker", *meta)]
        for name, split, text, speaker, *cells in zip(*columns, strict=True):
            filled = {key: value for key, value in zip(meta, cells, strict=True) if isinstance(value, str)}
            yield Example(name, split, text, b"", speaker, filled)

    def key(self, name: str, thorough: bool = False) -> str:
        """Return the key of the clip with this id; with `thorough` the frames are read in any case."""
        row = self._row[name]
        short = self._short_keys[row]
        if not thorough and self._counts[short] == 1 and short not in self._other_keys:
            return short
        return f"{short}: {leaks.fingerprint(self.cache.log_mel(row))}"

    def file_key(self, name: str) -> str:
        """Return a key of the file that a clip was cut from, or that it is; equal for files with equal content."""
        return self._file_keys.get(name, "")


def load_held_out(paths: Iterable[str], n_mels: int) -> HeldOut:
    """Load the rows that a recipe holds out besides its source's own: from tables, and from caches with their audio."""
    held_out = HeldOut()
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            _add_cache(held_out, path, n_mels)
        else:
            try:
                _add_table(held_out, path)
            except LabError as error:
                raise LabError(f"curation.held_out: {error}") from None
    return held_out


def held_out_parts(source: Source) -> dict[str, Path]:
    """Return id to recording of the validation and test clips that are parts of a recording."""
    outline = getattr(source, "outline", None)
    examples = outline() if outline else source.examples(leaks.HELD_OUT)
    return {one.id: one.file for one in examples if one.split in leaks.HELD_OUT and isinstance(one, PartExample)}


def _file_keys(cache: FeatureCache, held_out_parts: Callable[[], Mapping[str, Path]]) -> dict[str, str]:
    """Return id to the fingerprint of the recording that a clip was cut from, else to that of its own audio file.

    Empty for a cache without clips that name their recording.
    """
    if "recording" not in cache.rows:
        return {}
    keys: dict[str, str] = {}
    for number in shards.numbers(cache.folder):
        table, _ = shards.read(cache.folder, number, ["id", "audio"])
        names, hashes = table["id"].to_pylist(), table["audio"].to_pylist()
        keys |= {name: (own or b"").hex() for name, own in zip(names, hashes, strict=True)}
    parts = held_out_parts()
    prints = {path: fingerprint(path).hex() for path in {*parts.values()}}
    named = cache.rows[cache.rows["recording"].notna()]
    recordings = dict(zip(named["id"], named["recording"], strict=True))
    return keys | {name: prints[path] for name, path in parts.items()} | recordings


def content_digest(path: str) -> str:
    """Return a digest of a held-out table or cache that does not depend on its path."""
    file = Path(path).expanduser()
    sealed = manifest.read(file) if file.is_dir() else None
    if sealed:
        return str(sealed.get("digest"))
    if not file.is_file():
        raise LabError(f"curation.held_out names {path}, which is neither a table nor a finished cache: correct it")
    return manifest.sha256(file)[:16]


def _add_cache(held_out: HeldOut, folder: Path, n_mels: int) -> None:
    cache = open_cache(folder)
    if cache.n_mels != n_mels:
        raise LabError(
            f"curation.held_out names the cache {folder}, which has {cache.n_mels} mel bands, and this one {n_mels}: "
            "audio cannot be compared. Name a cache for a model with the same number, or a table"
        )
    audio = CachedAudio(cache)
    for example in audio.examples():
        if example.split in leaks.HELD_OUT:
            row = f"{folder.name}, {example.split} row {example.id}"
            held_out.add(row, example.speaker, example.text, audio.key(example.id, thorough=True))


def _add_table(held_out: HeldOut, path: Path) -> None:
    """Hold out the rows of a table that are not of its training split."""
    table = open_table(path)
    columns = [name.lower() for name in table.columns]
    speaker, sentence = (next((name for name in names if name in columns), None) for names in (_SPEAKER, _SENTENCE))
    if not speaker and not sentence:
        raise LabError(
            f"{path} must have a column of speakers ({', '.join(_SPEAKER)}) or of sentences ({', '.join(_SENTENCE)}), "
            f"got {', '.join(columns) or 'none'}"
        )
    n_held_out = 0
    for where, row in table.rows():
        cells = {name.lower(): "" if is_missing(value) else str(value) for name, value in row.items()}
        if canonical_split(cells.get("split", "")) != "train":
            n_held_out += 1
            held_out.add(where, cells.get(speaker, ""), cells.get(sentence, ""))
    if not n_held_out:
        logger.info(f"note: curation.held_out names {path}, which holds out nothing: all its rows are of train")
