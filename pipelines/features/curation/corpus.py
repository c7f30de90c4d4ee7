"""Curation over a whole corpus: what is chosen before any audio is decoded, and what only a made cache can tell.

    before   survey(): leaks of speakers and sentences, votes, duplicates, balance: from the source's outline
    within   Gate.admit(): one clip at a time (curation/gate.py)
    after    finish(): leaks of audio, duplicate audio, label errors: over the cache, before it is sealed

A source without an outline (`Source.outline`, the examples without their audio) would have to be read twice for
`survey`: its metadata is judged after the extraction, by the same steps.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.features.cache import FeatureCache, open_cache
from pipelines.features.clips import Rejected
from pipelines.features.curation import label_errors, leaks, selection
from pipelines.features.curation.leaks import AudioLeak, HeldOut, SentenceLeak, SpeakerLeak
from pipelines.features.curation.quality import Limits
from pipelines.features.curation.selection import Count, Drop, Duplicates, Repair, Selection, Step
from pipelines.features.sources import Example, Source
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.recipes.settings import CurationSettings, Recipe
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

CODE = "1"
"""Version of the code that curates: raised whenever the same settings would keep other rows."""
REPAIRS = "2"
"""The same of repairs where leaks are looked for; version 1 let what was heard be a held-out sentence."""
_SENTENCE = ("sentence", "text", "transcript", "transcription")
_SPEAKER = ("client_id", "speaker", "speaker_id")


def identity(recipe: Recipe, label_model: Callable[[], ModelRef]) -> dict[str, Any]:
    """Flat: what curation adds to a cache's identity; nothing with the default settings, which change no row."""
    told = recipe.changed("curation")
    told.pop("curation.label_model", None)  # its weights stand in its place
    if not told:
        return {}
    if recipe.curation.held_out:
        told["curation.held_out"] = [_content(path) for path in recipe.curation.held_out]
    if recipe.curation.max_label_cer:
        found = label_model()
        weights = {f"curation.label_model.{name}": value for name, value in whisper_model.identity(found).items()}
        tokens = recipe.evaluation.max_new_tokens
        told |= {
            **weights,
            "curation.label_model.context": found.context,
            "curation.label_model.max_new_tokens": tokens,
        }
        if recipe.curation.label_errors == "repair" and recipe.curation.leaks != "ignore":
            told["code.repairs"] = REPAIRS
    return {**told, "code.curation": CODE}


def limits(settings: CurationSettings) -> Limits:
    """What the gate holds training clips against."""
    return Limits(
        settings.min_chars_per_s,
        settings.max_chars_per_s,
        settings.min_level_dbfs,
        settings.max_clipped_share,
        settings.max_silence_share,
        settings.min_snr_db,
    )


def survey(settings: CurationSettings, source: Source, held_out: HeldOut) -> Selection | None:
    """What the outline of the source decides; notes the corpus's own held-out rows in `held_out`.

    None for a source that has no outline. Raises LabError for a training split that leaks, where leaks are refused.
    """
    outline: Callable[[], Iterable[Example]] | None = getattr(source, "outline", None)
    if outline is None:
        return None
    chosen = selection.select(outline, _metadata_steps(settings, held_out))
    _refuse_leaks(settings, chosen)
    chosen.counts.insert(0, selection.text_count(outline))
    return chosen


def left(source: Source, chosen: Selection | None) -> Iterator[Example]:
    """The source's examples without those that `survey` dropped. LabError for an id that occurs twice among them."""
    dropped, skipped = chosen.dropped if chosen else {}, 0
    for example in source.examples():
        if example.id in dropped:
            skipped += 1
        else:
            yield example
    if skipped != len(dropped):
        raise LabError(
            f"ids must be unique within a source, got {skipped} examples for {len(dropped)} ids that curation dropped"
        )


def finish(
    settings: CurationSettings,
    cache: FeatureCache,
    rejected: list[dict[str, str]],
    before: Selection | None,
    held_out: HeldOut,
    hear: Callable[[np.ndarray], list[str]],
    label: Callable[[str], tuple[str, list[int]]],
) -> Selection:
    """All that curation dropped and counted: `before` the audio, in the gate (`rejected`), and now over the cache.

    `hear` maps row numbers to what a model hears in them, `label` such a transcript to what is trained on. Raises
    LabError for training audio that leaks, where leaks are refused, and for a recording that is in both validation
    and test, always.
    """
    table = _Table(cache, {name.partition(":")[0] for name in held_out.audio})
    _refuse_selection_by_test(table)
    steps = [] if before else _metadata_steps(settings, held_out)
    chosen = selection.select(table.examples, [*steps, *_audio_steps(settings, table, held_out)])
    _refuse_leaks(settings, chosen)
    if settings.max_label_cer:
        _mend_label_errors(settings, table, chosen, held_out, hear, label)
    started = len(cache.rows) + len(rejected)
    gate = selection.gate_counts(started, (row["reason"] for row in rejected))
    dropped = {**(before.dropped if before else {}), **chosen.dropped}
    _refuse_nothing_left(cache.rows, dropped)
    return Selection(dropped, [*(before.counts if before else []), *gate, *chosen.counts], chosen.repaired)


def load_held_out(paths: Iterable[str], n_mels: int) -> HeldOut:
    """Rows that a recipe holds out besides its source's own: of tables, and of caches (with their audio)."""
    held_out = HeldOut()
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            _hold_out_cache(held_out, path, n_mels)
        else:
            _hold_out_table(held_out, path)
    return held_out


class _Table:
    """A cache's rows as examples without audio, and what names the sound of each.

    Equal sounds have equally many frames and one pad value. Where no other clip has both, as with nearly every clip,
    they are name enough, and no frame is read; `elsewhere` holds such names of clips outside this cache.
    """

    def __init__(self, cache: FeatureCache, elsewhere: Container[str] = ()):
        self.cache, self.elsewhere = cache, elsewhere
        rows = cache.rows
        self.place = {name: row for row, name in enumerate(rows["id"])}
        self.coarse = [f"{frames} {pad}" for frames, pad in zip(rows["frames"], rows["pad_value"], strict=True)]
        self.often = Counter(self.coarse)

    def examples(self) -> Iterator[Example]:
        table = self.cache.rows
        meta = [name for name in ("gender", "accent", "age", "up_votes", "down_votes") if name in table]
        columns = [table[name].tolist() for name in ("id", "split", "text", "speaker", *meta)]
        for name, split, text, speaker, *told in zip(*columns, strict=True):
            known = {key: value for key, value in zip(meta, told, strict=True) if isinstance(value, str)}
            yield Example(name, split, text, b"", speaker, known)

    def fingerprint(self, name: str, thorough: bool = False) -> str:
        """Names the sound of the row with this id; `thorough` reads the frames in any case."""
        row = self.place[name]
        coarse = self.coarse[row]
        if not thorough and self.often[coarse] == 1 and coarse not in self.elsewhere:
            return coarse
        return f"{coarse}: {leaks.fingerprint(self.cache.log_mel(row))}"


def _metadata_steps(settings: CurationSettings, held_out: HeldOut) -> list[Step]:
    checked, seed = settings.leaks != "ignore", settings.seed
    voted = settings.min_up_votes > 0 or settings.max_down_votes >= 0
    wanted = [
        (checked, SpeakerLeak(held_out)),
        (checked, SentenceLeak(held_out)),
        (voted, selection.Votes(settings.min_up_votes, settings.max_down_votes)),
        (settings.unique_sentences, selection.duplicate_sentences()),
        (settings.max_per_speaker > 0, selection.speaker_cap(settings.max_per_speaker, seed)),
        (settings.balance_by != "", selection.balance(settings.balance_by, settings.balance_ratio, seed)),
    ]
    return [step for on, step in wanted if on]


def _audio_steps(settings: CurationSettings, table: _Table, held_out: HeldOut) -> list[Step]:
    wanted = [
        (settings.leaks != "ignore", AudioLeak(held_out, table.fingerprint)),
        (settings.unique_audio, Duplicates("duplicate_audio", lambda example: table.fingerprint(example.id))),
    ]
    return [step for on, step in wanted if on]


def _refuse_leaks(settings: CurationSettings, chosen: Selection) -> None:
    if settings.leaks == "refuse":
        leaks.refuse(chosen.dropped)


def _refuse_selection_by_test(table: _Table) -> None:
    """Training selects by validation: with test recordings in it, it would select on the test split."""
    names = table.cache.rows.groupby("split")["id"].agg(list)
    test = {table.fingerprint(name): name for name in names.get("test", [])}
    both = [(name, test[sound]) for name in names.get("validation", []) if (sound := table.fingerprint(name)) in test]
    if both:
        raise LabError(
            f"validation and test must have no recording in common, got {len(both)}: validation row {both[0][0]} is "
            f"test row {both[0][1]}. Training would select on the test split: take them out of one of the two"
        )


def _refuse_nothing_left(rows: pd.DataFrame, dropped: dict[str, Drop]) -> None:
    training = rows["id"][rows["split"] == "train"]
    if dropped and not (~training.isin(dropped.keys())).any():
        first = next(iter(dropped.values()))
        raise LabError(
            f"curation must leave at least one training clip, got none: {len(dropped)} were dropped, the first as "
            f"{first.reason}: {first.detail}. Loosen the settings of [curation]"
        )


def _mend_label_errors(
    settings: CurationSettings,
    table: _Table,
    chosen: Selection,
    held_out: HeldOut,
    hear: Callable[[np.ndarray], list[str]],
    label: Callable[[str], tuple[str, list[int]]],
) -> None:
    """Drop or repair what a model hears too differently, among the training rows that are left.

    A repair must not bring a leak in: where leaks are looked for, what is heard as a held-out sentence is dropped.
    """
    rows, most = table.cache.rows, settings.max_label_cer
    kept = ~rows["id"].isin(chosen.dropped.keys())
    asked = np.flatnonzero(kept & (rows["split"] == "train"))
    transcripts = rows["text"].iloc[asked].tolist()
    heard = hear(asked) if len(asked) else []
    cers = label_errors.label_cers(transcripts, heard) if heard else []
    drops = []
    for name, before, cer, now in zip(rows["id"].iloc[asked], transcripts, cers, heard, strict=True):
        if cer <= most:
            continue
        usable = _usable(now, label) if settings.label_errors == "repair" else None
        leaks_from = held_out.where_read(usable[0]) if usable and settings.leaks != "ignore" else None
        if usable and not leaks_from:
            chosen.repaired[name] = Repair(before, *usable)
        else:
            detail = f"CER {cer:.2f}, at most {most:g} wanted; heard {now!r}"
            detail += f", which is in {leaks_from}" if leaks_from else ""
            drops.append(Drop(name, "train", "label_error", detail))
    chosen.dropped.update((drop.id, drop) for drop in drops)
    n = int(kept.sum())
    chosen.counts.append(Count("label_error", n, n - len(drops), len(drops), len(chosen.repaired)))


def _usable(heard: str, label: Callable[[str], tuple[str, list[int]]]) -> tuple[str, list[int]] | None:
    try:
        return label(heard)
    except Rejected:
        return None


def _hold_out_cache(held_out: HeldOut, folder: Path, n_mels: int) -> None:
    cache = open_cache(folder)
    if cache.n_mels != n_mels:
        raise LabError(
            f"curation.held_out names the cache {folder}, which has {cache.n_mels} mel bands, and this one {n_mels}: "
            "audio cannot be compared. Name a cache for a model with the same number, or a table"
        )
    table = _Table(cache)
    for example in table.examples():
        if example.split in leaks.HELD_OUT:
            where = f"{folder.name}, {example.split} row {example.id}"
            held_out.add(where, example.speaker, example.text, table.fingerprint(example.id, thorough=True))


def _hold_out_table(held_out: HeldOut, path: Path) -> None:
    rows = _read_table(path)
    speaker, sentence = (next((name for name in names if name in rows), None) for names in (_SPEAKER, _SENTENCE))
    if not speaker and not sentence:
        raise LabError(
            f"{path} must have a column of speakers ({', '.join(_SPEAKER)}) or of sentences ({', '.join(_SENTENCE)}), "
            f"got {', '.join(map(str, rows.columns)) or 'none'}"
        )
    if "split" in rows:
        rows = rows[rows["split"] != "train"]
    blank = [""] * len(rows)
    for number, (who, what) in enumerate(
        zip(rows[speaker] if speaker else blank, rows[sentence] if sentence else blank, strict=True), 1
    ):
        held_out.add(f"{path.name}, row {number}", who, what)


def _read_table(path: Path) -> pd.DataFrame:
    """tsv without quotes, as Common Voice writes it; csv with them. Every cell is text."""
    if path.suffix not in (".tsv", ".csv"):
        raise LabError(f"curation.held_out takes tables (.tsv, .csv) and caches (folders), got {str(path)!r}")
    form = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", **form)
    except OSError as error:
        raise LabError(f"curation.held_out names {path}, which cannot be read: {error.strerror}") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise LabError(f"{path} is not a table that can be read: {str(error).splitlines()[0]}") from None


def _content(path: str) -> str:
    """What a held-out table or cache holds, whatever it is called."""
    place = Path(path).expanduser()
    sealed = manifest.read(place) if place.is_dir() else None
    if sealed:
        return str(sealed.get("digest"))
    if not place.is_file():
        raise LabError(f"curation.held_out names {path}, which is neither a table nor a finished cache: correct it")
    return manifest.sha256(place)[:16]
