"""Curation over a whole corpus, before, during and after the extraction of features.

    before   survey(): leaks of speakers and sentences, votes, duplicates, balance: from the source's outline
    during   ClipFilter.create_clip(): one clip at a time
    after    finish(): leaks of audio, duplicate audio, label errors: over the cache, before it is sealed

A source without an outline (`Source.outline`, the examples without their audio) would have to be read twice for
`survey`; its metadata is curated after the extraction, by the same steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.features.cache import FeatureCache
from pipelines.features.clips import Rejected
from pipelines.features.curation import corrections, label_errors, leaks, selection
from pipelines.features.curation import held_out as held_out_rows
from pipelines.features.curation.held_out import CachedAudio
from pipelines.features.curation.leaks import AudioLeak, HeldOut, SentenceLeak, SpeakerLeak
from pipelines.features.curation.quality import Limits
from pipelines.features.curation.selection import Count, Drop, Duplicates, Repair, Selection, Step
from pipelines.features.sources import Example, Source
from pipelines.infra.errors import LabError
from pipelines.recipes.data_settings import CurationSettings
from pipelines.recipes.settings import Recipe
from pipelines.whisper import model as whisper_model
from pipelines.whisper.model import ModelRef

logger = logging.getLogger(__name__)

CODE = "1"
"""Version of the curation code: raised when the same settings would keep other rows."""
REPAIRS = "2"
"""Version of repairs when leaks are checked; version 1 could repair a transcript to a held-out sentence."""


@dataclass(frozen=True)
class LabelErrors:
    """The two functions that find and repair label errors."""

    transcribe: Callable[[np.ndarray], list[str]]
    """Maps row numbers of the cache to the label model's transcripts."""
    label: Callable[[str], tuple[str, list[int]]]
    """Maps a transcript to the cleaned transcript and its label ids; raises Rejected."""


def identity(recipe: Recipe, label_model: Callable[[], ModelRef]) -> dict[str, Any]:
    """Return what curation adds to a cache's identity, flat; empty for the default settings, which change no row."""
    fields = recipe.changed("curation")
    fields.pop("curation.label_model", None)  # represented by its weights
    if not fields:
        return {}
    if recipe.curation.held_out:
        fields["curation.held_out"] = [held_out_rows.content_digest(path) for path in recipe.curation.held_out]
    if recipe.curation.corrections:
        fields["curation.corrections"] = corrections.digest_of(corrections.load(recipe.curation.corrections))
    if recipe.curation.max_label_cer:
        ref = label_model()
        fields |= {f"curation.label_model.{name}": value for name, value in whisper_model.identity(ref).items()}
        fields["curation.label_model.context"] = ref.context
        fields["curation.label_model.max_new_tokens"] = recipe.evaluation.max_new_tokens
        if recipe.curation.label_errors == "repair" and recipe.curation.leaks != "ignore":
            fields["code.repairs"] = REPAIRS
    return {**fields, "code.curation": CODE}


def limits(settings: CurationSettings) -> Limits:
    """Return the limits of the clip filter for training clips."""
    return Limits(
        settings.min_chars_per_s,
        settings.max_chars_per_s,
        settings.min_level_dbfs,
        settings.max_clipped_share,
        settings.max_silence_share,
        settings.min_snr_db,
    )


def survey(settings: CurationSettings, source: Source, held_out: HeldOut) -> Selection | None:
    """Run the metadata steps over the source's outline; add the corpus's own held-out rows to `held_out`.

    Returns None for a source without an outline. Raises LabError for leaks if `curation.leaks` is `refuse`.
    """
    outline: Callable[[], Iterable[Example]] | None = getattr(source, "outline", None)
    if outline is None:
        return None
    shared = getattr(source, "shared_speakers", frozenset())
    result = selection.select(outline, _metadata_steps(settings, held_out, shared))
    _check_leaks(settings, result)
    result.counts.insert(0, selection.text_count(outline))
    selection.log_marks(outline, settings.marks == "remove")
    return result


def selected(source: Source, surveyed: Selection | None) -> Iterator[Example]:
    """Yield the source's examples that `survey` kept. Raises LabError if a dropped id occurs twice."""
    dropped, n_skipped = surveyed.dropped if surveyed else {}, 0
    for example in source.examples():
        if example.id in dropped:
            n_skipped += 1
        else:
            yield example
    if n_skipped != len(dropped):
        raise LabError(
            f"ids must be unique within a source, got {n_skipped} examples for {len(dropped)} ids that curation dropped"
        )


def finish(
    settings: CurationSettings,
    cache: FeatureCache,
    rejected: list[dict[str, str]],
    surveyed: Selection | None,
    held_out: HeldOut,
    label_functions: LabelErrors,
    held_out_parts: Callable[[], Mapping[str, Path]] = dict,
) -> Selection:
    """Run the audio steps over the cache; return everything that curation dropped and counted.

    `surveyed` is the result of `survey`, `rejected` that of the clip filter; `held_out_parts` is for CachedAudio.
    Raises LabError for audio leaks if `curation.leaks` is `refuse`, and always for a recording that is in both
    validation and test.
    """
    audio = CachedAudio(cache, {key.partition(":")[0] for key in held_out.audio}, held_out_parts)
    _check_validation_apart_from_test(audio)
    steps = [] if surveyed else _metadata_steps(settings, held_out)
    result = selection.select(audio.examples, [*steps, *_audio_steps(settings, audio, held_out)])
    _check_leaks(settings, result)
    reviewed = _apply_corrections(settings, cache, result, held_out, label_functions)
    if settings.max_label_cer:
        _handle_label_errors(settings, cache, result, held_out, label_functions, reviewed)
    n_extracted = len(cache.rows) + len(rejected)
    clip_counts = selection.clip_step_counts(n_extracted, (row["reason"] for row in rejected))
    dropped = {**(surveyed.dropped if surveyed else {}), **result.dropped}
    _check_training_rows_left(cache.rows, dropped)
    counts = [*(surveyed.counts if surveyed else []), *clip_counts, *result.counts]
    return Selection(dropped, counts, result.repaired)


def _metadata_steps(
    settings: CurationSettings, held_out: HeldOut, shared_speakers: frozenset[str] = frozenset()
) -> list[Step]:
    check_leaks, seed = settings.leaks != "ignore", settings.seed
    check_votes = settings.min_up_votes > 0 or settings.max_down_votes >= 0
    steps = [
        (check_leaks, SpeakerLeak(held_out, shared_speakers)),
        (check_leaks, SentenceLeak(held_out)),
        (check_votes, selection.Votes(settings.min_up_votes, settings.max_down_votes)),
        (settings.unique_sentences, selection.duplicate_sentences()),
        (settings.max_per_speaker > 0, selection.speaker_cap(settings.max_per_speaker, seed)),
        (settings.balance_by != "", selection.balance(settings.balance_by, settings.balance_ratio, seed)),
        (settings.non_speech_share > 0, selection.non_speech(settings.non_speech_share, seed)),
    ]
    return [step for enabled, step in steps if enabled]


def _audio_steps(settings: CurationSettings, audio: CachedAudio, held_out: HeldOut) -> list[Step]:
    steps = [
        (settings.leaks != "ignore", AudioLeak(held_out, audio.key, audio.file_key)),
        (settings.unique_audio, Duplicates("duplicate_audio", lambda example: audio.key(example.id))),
    ]
    return [step for enabled, step in steps if enabled]


def _check_leaks(settings: CurationSettings, result: Selection) -> None:
    if settings.leaks == "refuse":
        leaks.refuse(result.dropped)


def _check_validation_apart_from_test(audio: CachedAudio) -> None:
    """Raise LabError for common recordings: training selects by validation, so it would select on the test split."""
    ids = audio.cache.rows.groupby("split")["id"].agg(list)
    test = {audio.key(name): name for name in ids.get("test", [])}
    both = [(name, test[key]) for name in ids.get("validation", []) if (key := audio.key(name)) in test]
    if both:
        raise LabError(
            f"validation and test must have no recording in common, got {len(both)}: validation row {both[0][0]} is "
            f"test row {both[0][1]}. Training would select on the test split: take them out of one of the two"
        )


def _check_training_rows_left(rows: pd.DataFrame, dropped: dict[str, Drop]) -> None:
    training = rows["id"][rows["split"] == "train"]
    if dropped and not (~training.isin(dropped.keys())).any():
        first = next(iter(dropped.values()))
        raise LabError(
            f"curation must leave at least one training clip, got none: {len(dropped)} were dropped, the first as "
            f"{first.reason}: {first.detail}. Loosen the settings of [curation]"
        )


def _handle_label_errors(
    settings: CurationSettings,
    cache: FeatureCache,
    result: Selection,
    held_out: HeldOut,
    label_functions: LabelErrors,
    reviewed: set[str],
) -> None:
    """Drop or repair the remaining training rows whose transcript differs too much from the label model's.

    The clips `reviewed`, by id, are not looked at: a person decided about them.
    If leaks are checked, a row whose new transcript is a held-out sentence is dropped instead of repaired.
    """
    rows, limit = cache.rows, settings.max_label_cer
    remaining = ~rows["id"].isin(result.dropped.keys())
    indices = np.flatnonzero(remaining & ~rows["id"].isin(reviewed) & (rows["split"] == "train") & (rows["text"] != ""))
    references = rows["text"].iloc[indices].tolist()
    hypotheses = label_functions.transcribe(indices) if len(indices) else []
    cers = label_errors.label_cers(references, hypotheses) if hypotheses else []
    drops = []
    for name, reference, cer, hypothesis in zip(rows["id"].iloc[indices], references, cers, hypotheses, strict=True):
        if cer <= limit:
            continue
        repair = _repair(hypothesis, label_functions) if settings.label_errors == "repair" else None
        leaks_from = held_out.row_of_sentence(repair[0]) if repair and settings.leaks != "ignore" else None
        if repair and not leaks_from:
            result.repaired[name] = Repair(reference, *repair)
        else:
            detail = f"CER {cer:.2f}, at most {limit:g} wanted; heard {hypothesis!r}"
            detail += f", which is in {leaks_from}" if leaks_from else ""
            drops.append(Drop(name, "train", "label_error", detail))
    result.dropped.update((drop.id, drop) for drop in drops)
    n = int(remaining.sum())
    result.counts.append(Count("label_error", n, n - len(drops), len(drops), len(result.repaired)))


def _apply_corrections(
    settings: CurationSettings, cache: FeatureCache, result: Selection, held_out: HeldOut, label_functions: LabelErrors
) -> set[str]:
    """Replace and drop training clips as `curation.corrections` says; return the ids that a person decided on.

    Rows of the table whose clip is gone or has another transcript now are logged and do nothing.
    """
    if not (decisions := corrections.load(settings.corrections)):
        return set()
    if cache.identity.get("curation.corrections") != corrections.digest_of(decisions):
        raise LabError("the table of curation.corrections has changed while the cache was made: run this again")
    kept = cache.rows[(cache.rows["split"] == "train") & ~cache.rows["id"].isin(result.dropped.keys())]
    texts = dict(zip(kept["id"], kept["text"], strict=True))
    reviewed = {name for name, one in decisions.items() if texts.get(name) == one.before}
    before, n_corrected = len(cache.rows) - len(result.dropped), 0
    drops = []
    for name in sorted(reviewed):
        one = decisions[name]
        repair = _repair(one.after, label_functions) if one.verdict == "correct" else None
        leaks_from = held_out.row_of_sentence(repair[0]) if repair and settings.leaks != "ignore" else None
        if repair and not leaks_from:
            result.repaired[name] = Repair(one.before, *repair)
            n_corrected += 1
        elif one.verdict != "accept":
            unusable = one.verdict == "correct" and "the correction is no transcript that can be used"
            why = f"the correction is in {leaks_from}" if leaks_from else unusable or "rejected by a person"
            drops.append(Drop(name, "train", "reviewed", why))
    result.dropped.update((drop.id, drop) for drop in drops)
    result.counts.append(Count("reviewed", before, before - len(drops), len(drops), n_corrected))
    if stale := len(decisions) - len(reviewed):
        logger.info(f"note: {stale:,} of {len(decisions):,} corrections do not fit a training clip of this corpus")
    return reviewed


def _repair(hypothesis: str, label_functions: LabelErrors) -> tuple[str, list[int]] | None:
    try:
        return label_functions.label(hypothesis)
    except Rejected:
        return None
