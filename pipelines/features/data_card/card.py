"""Write the data card of a finished feature cache: its README.md, in the form of the Hub's data set cards.

The card counts clips, speakers and rejections. It quotes no transcript, and names no speaker and no path. It is not
part of the cache's identity; a card that a person has edited stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.features import cache as caches
from pipelines.features import rejections
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import leaks
from pipelines.features.data_card.markdown import inline
from pipelines.features.data_card.terms import Terms, hub_licence, read_terms, stored_terms
from pipelines.features.sources import SPLITS
from pipelines.infra import manifest
from pipelines.infra.redact import redact_values
from pipelines.recipes.settings import Recipe
from pipelines.speech import marks

logger = logging.getLogger(__name__)

FILE = "README.md"
_PERSONAL, _MIN_SPEAKERS = ("age", "accent"), 3
"""Columns about a person whose values a card lists only if this many speakers share them."""
SLICES = ("gender", "age", "accent", "variant", "origin", "sentence_domain", "locale", "label", "label_model")
"""Columns of a source whose values are counted."""
_MAX_VALUES = 12
"""Values of a column that are listed; the others are one row."""
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_COLUMNS = {
    "id": "names the clip within its source",
    "split": "train, validation or test",
    "text": "the transcript",
    "speaker": "the speaker's id in the source; empty if unknown",
    "duration_s": "seconds of audio",
    "frames": "number of stored log-mel frames of 10 ms",
    "pad_value": "the log-mel value of silence, which pads the clip to 30 s",
    "labels": "token ids of the transcript",
    "offset": "the clip's first frame in its shard's `.bin`",
    "audio": "the first 16 bytes of the sha256 of the audio file, not its audio",
    "label": "`pseudo`: the transcript was written by a model, not by a person",
    "label_model": "the model that wrote it",
    "confidence": "the expected share of right words in it, by that model",
    "recording": "the first 16 bytes of the sha256 of the recording that the clip was cut from",
    "start_s": "start in the recording, in seconds",
}
_COMPUTED = ("shard", "label_offset", "label_count")
"""Columns that a reader adds."""
_REASONS = {
    "missing": "the recording is not there",
    "empty": "the recording holds no sound",
    "unreadable": "the recording cannot be decoded",
    "lfs_pointer": "the file is a pointer of Git LFS, not a recording",
    "not_finite": "the samples are no numbers, or overflow",
    "no_text": "there is no transcript, or none with a letter or digit",
    "long_label": "the transcript has more tokens than the decoder has positions",
    "unknown_split": "the split is none of train, validation and test",
    "too_short": "shorter than features.min_duration_s, or than 1 s between pauses of a long recording",
    "too_long": "longer than features.max_duration_s, or than 30 s without a pause at a line's end",
    "silent": "below features.min_peak throughout",
    "votes": "too few votes for it, or too many against it",
    "leak_speaker": "a speaker of the validation or test split",
    "leak_sentence": "a sentence of the validation or test split",
    "leak_audio": "a recording of the validation or test split",
    "duplicate_sentence": "the same speaker said the sentence before",
    "duplicate_audio": "the same samples as an earlier clip",
    "speaker_cap": "more clips of the speaker than curation.max_per_speaker",
    "balance": "thinned to balance the groups of curation.balance_by",
    "non_speech": "more clips without speech than curation.non_speech_share",
    "slow_speech": "fewer letters per second than curation.min_chars_per_s",
    "fast_speech": "more letters per second than curation.max_chars_per_s",
    "quiet": "below curation.min_level_dbfs",
    "clipped": "more samples at full scale than curation.max_clipped_share",
    "silence": "more silence around the speech than curation.max_silence_share",
    "noisy": "a lower signal-to-noise ratio than curation.min_snr_db",
    "label_error": "the transcript differs from what a model recognises",
    "no_match": "speech of a long recording without a line of its text, or a line that is not spoken there",
    "paraphrased": "a line of the text says it in other words",
    "music": "sound without speech in a long recording",
    "bad_segment": "the recording has no such part",
    "not_transcribed": "`transcribe` wrote no complete transcript",
    "excluded": "a recording of source.exclude",
    "no_speech": "no speech is detected in it, or the model writes nothing",
    "repetition": "the model repeats itself",
    "wrong_language": "source.language_model, or the untuned aligner of a long recording, detects another language",
    "low_confidence": "the pseudo-label is less certain than source.min_confidence",
    "models_disagree": "two models differ by more than source.max_disagreement",
    "damaged": "a part of it cannot be read",
    "reviewed": "rejected by a person who listened to the clip",
}


def pseudo_labels(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return for each model whose pseudo-labels are in the rows of a cache: model, clips, hours."""
    if "label" not in rows:
        return []
    pseudo = rows[rows["label"] == "pseudo"]
    models = pseudo["label_model"].fillna("a model") if "label_model" in pseudo else pd.Series("a model", pseudo.index)
    return [
        {"model": str(name), "clips": len(group), "hours": round(float(group["duration_s"].sum()) / 3600, 4)}
        for name, group in pseudo.groupby(models)
    ]


def add(folder: Path, recipe: Recipe | None = None) -> None:
    """Write the card of a finished cache that has none; any other folder, and a folder with a card, stays as it is.

    `recipe` names the folders of recordings on this machine, whose `collection.toml` states licence and consent. The
    manifest keeps them: a card that is written again without the recipe, to publish a cache, states the same.
    """
    sealed = manifest.read(folder)
    if sealed is None or not {"identity", "counts", "shards"} <= sealed.keys():
        return
    path = folder / FILE
    if path.exists() and (FILE in sealed["files"] or manifest.GENERATED not in path.read_text("utf-8", "replace")):
        return
    terms = (None if recipe else stored_terms(sealed)) or read_terms(sealed["identity"], recipe)
    if not recipe and "terms" not in sealed and any(one.kind in ("folder", "aligned") for one in terms):
        logger.info(
            f"note: licence and consent of the recordings are not stored in {folder}: run `features` with its recipe "
            "first, and the data card states them"
        )
    content = _card(caches.load(folder, sealed), sealed, terms)
    fields = {"terms": [asdict(one) for one in terms]} if recipe or "terms" in sealed else {}
    try:
        manifest.replace(folder, FILE, content.encode(), **fields)
    except OSError as error:  # a cache of an older version in a place that cannot be written to
        logger.info(f"note: {folder} gets no data card: {error.strerror}")


def _card(cache: FeatureCache, sealed: Mapping[str, Any], terms: list[Terms]) -> str:
    identity = cache.identity
    table = "\n".join(
        f"| {inline(name)} | {_COLUMNS.get(name, 'as in the source')} |" for name in cache.rows if name not in _COMPUTED
    )
    lineage = "\n".join(f"| {inline(name)} | {_value(value)} |" for name, value in sorted(identity.items()))
    return f"""---
{_metadata(cache, terms)}
---
{manifest.GENERATED}

# Feature cache {sealed["digest"]}

Log-mel features for Whisper and transcripts, made by the feature pipeline of the Swedish Whisper lab.

## Content

{_splits(cache.rows)}
{_slices(cache.rows)}
## Source, licence and consent

{_terms(terms)}

The cache contains no audio. Speech can still be reconstructed from log-mel frames, well enough to be understood and to
recognise a voice: protect them like the recordings.{_rehosting(terms)}

## Curation

{_curation(cache)}

## Rejected clips

{_rejected(cache)}

## Known faults

{_faults(cache, terms)}

## Files

`shard-*.bin` holds the frames of its clips one after another, {inline(str(identity["features.dtype"]))}
[frames, {inline(str(identity["features.n_mels"]))}]; `shard-*.parquet` one row per clip; `rejected.csv` the clips that
were not used, with the reason; `manifest.json` size and sha256 of every file. Train on it with `--cache` and the URI of
this copy.

| column | content |
|---|---|
{table}

## Lineage

Digest {sealed["digest"]} of the settings, the source and the versions that determine rows and frames:

| field | value |
|---|---|
{lineage}
"""


def _metadata(cache: FeatureCache, terms: list[Terms]) -> str:
    from huggingface_hub import DatasetCardData

    n, kinds = len(cache.rows), {one.kind for one in terms}
    synthetic = kinds <= {"tour", "tour-english", "planted"}
    return DatasetCardData(
        **hub_licence(terms),
        language=[cache.identity["language"]],
        task_categories=["automatic-speech-recognition"],
        source_datasets=sorted({one.name for one in terms if one.kind == "hub"}) or None,
        size_categories=next((name for limit, name in _SIZES if n < limit), "n>1M"),
        tags=["whisper", "log-mel", "swedish-whisper-lab", *(["synthetic-speech"] if synthetic else [])],
        viewer=False,
    ).to_yaml()


def _splits(rows: pd.DataFrame) -> str:
    lines = ["| split | clips | hours | speakers | seconds (median, longest) | words |", "|---|---|---|---|---|---|"]
    for split in (*SPLITS, "all"):
        part = rows if split == "all" else rows[rows["split"] == split]
        lengths = f"{part['duration_s'].median():.1f}, {part['duration_s'].max():.1f}" if len(part) else ""
        words = int(part["text"].str.split().str.len().sum())
        lines.append(f"| {split} | {len(part):,} | {_hours(part)} | {_speakers(part)} | {lengths} | {words:,} |")
    return "\n".join(lines) + "\n"


def _slices(rows: pd.DataFrame) -> str:
    """Return a table of clips, hours and speakers for each value of SLICES; empty if the source has none of them."""
    lines = []
    for column in (name for name in SLICES if name in rows):
        values = rows[column].fillna("").astype(str)
        counts = values[values != ""].value_counts()
        listed = [value for value in counts.index[:_MAX_VALUES] if not _may_identify(column, rows[values == value])]
        groups = [(inline(value[:60]), rows[values == value]) for value in listed]
        if others := len(counts) - len(listed):
            groups.append((f"{others:,} other values", rows[(values != "") & ~values.isin(listed)]))
        if len(counts) and (values == "").any():
            groups.append(("not stated", rows[values == ""]))
        lines += [f"| {column} | {name} | {len(g):,} | {_hours(g)} | {_speakers(g)} |" for name, g in groups]
    if not lines:
        return ""
    return "\n".join(["", "| column | value | clips | hours | speakers |", "|---|---|---|---|---|", *lines, ""])


def _may_identify(column: str, rows: pd.DataFrame) -> bool:
    """Return whether a value that people stated about themselves is that of too few speakers to be published."""
    return column in _PERSONAL and rows["speaker"].nunique() < _MIN_SPEAKERS


def _hours(rows: pd.DataFrame) -> str:
    return f"{rows['duration_s'].sum() / 3600:.2f}"


def _speakers(rows: pd.DataFrame) -> str:
    n = rows["speaker"][rows["speaker"] != ""].nunique()
    return f"{n:,}" if n or not len(rows) else "unknown"


def _terms(terms: list[Terms]) -> str:
    lines = ["| source | licence | consent | how it was collected |", "|---|---|---|---|"]
    for one in terms:
        cells = (one.name, one.licence or "not stated", one.consent or "not stated", one.method or "not stated")
        lines.append(f"| {' | '.join(map(inline, cells))} |")
    return "\n".join(lines)


def _rehosting(terms: list[Terms]) -> str:
    if not any(one.kind in ("common_voice", "mozilla") for one in terms):
        return ""
    return " Common Voice may not be re-hosted: keep this repository private."


def _curation(cache: FeatureCache) -> str:
    if not cache.curation:
        return "None: every clip that can be used is in the cache."
    lines = ["| step | clips before | dropped | transcripts changed |", "|---|---|---|---|"]
    for step in cache.curation:
        lines.append(f"| {inline(step['step'])} | {step['before']:,} | {step['dropped']:,} | {step['changed']:,} |")
    settings = [f"`{name}` = {_value(value)}" for name, value in cache.identity.items() if name.startswith("curation.")]
    lines += ["", f"Settings that differ from the defaults: {', '.join(settings) or 'none'}."]
    return "\n".join([*lines, "Validation and test clips are never filtered."])


def _rejected(cache: FeatureCache) -> str:
    reasons = rejections.of(cache)
    if not reasons:
        return "None."
    n = len(cache.rows) + sum(one.clips for one in reasons)
    lines = ["| reason | clips | share | what it means | |", "|---|---|---|---|---|"]
    for one in reasons:
        kind = "cannot be used" if one.fault else "filtered, as the recipe asks"
        meaning = _REASONS.get(one.reason, "see rejected.csv")
        lines.append(f"| {inline(one.reason)} | {one.clips:,} | {one.clips / n:.1%} | {meaning} | {kind} |")
    return "\n".join(lines)


def _faults(cache: FeatureCache, terms: list[Terms]) -> str:
    """Return what limits the use of the cache, as far as its rows and settings show it."""
    rows, identity = cache.rows, cache.identity
    lines = []
    if any(one.kind == "planted" for one in terms):
        lines.append("Faults were planted in the training clips on purpose: use it for experiments on curation only.")
    if any(one.kind in ("tour", "tour-english", "planted") for one in terms):
        lines.append("Synthetic voices: scores do not apply to human speech.")
    if missing := [split for split in SPLITS if not (rows["split"] == split).any()]:
        lines.append(f"No {' and no '.join(missing)} clips.")
    if n := int((rows["speaker"] == "").sum()):
        lines.append(f"{n:,} clips name no speaker: the same voices may be in train and test.")
    lines += [f"{note[0].upper()}{note[1:]}." for split in SPLITS[1:] if (note := leaks.shared_speakers(rows, split))]
    if identity.get("curation.leaks") == "ignore":
        lines.append("Training clips that share something with held-out clips were kept (curation.leaks = ignore).")
    if n := int(rows["text"].map(lambda text: any(True for _ in marks.find(text))).sum()):
        lines.append(f"{n:,} transcripts have marks that may not be spoken, such as brackets or tags.")
    if any(one.kind == "aligned" for one in terms):
        lines.append(
            "Transcripts of long recordings are texts that a model matched with the sound: a few may differ from what "
            "is said. No person has checked them, unless curation.corrections names a table."
        )
    for one in pseudo_labels(rows):
        lines.append(
            f"{one['clips']:,} transcripts ({one['hours']:.2f} hours) were written by {inline(one['model'])}, and no "
            "person has checked them."
        )
    if not identity.get("curation.max_label_cer"):
        lines.append("Transcripts were not compared with what a model recognises (curation.max_label_cer).")
    if n := len(cache.repaired):
        lines.append(f"{n:,} transcripts were replaced: see repaired.csv.")
    if any(not one.licence for one in terms):
        lines.append("A source states no licence: ask before you pass it on.")
    return "\n".join(f"- {line}" for line in lines)


def _value(value: Any) -> str:
    """Return a field of the identity as text in a table cell, without paths of this machine."""
    return inline(str(redact_values(value)))
