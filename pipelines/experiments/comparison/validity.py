"""Whether a scored model may be ranked: its training data must share nothing with the test set."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pipelines.experiments.comparison import lookup
from pipelines.experiments.evaluation import EvalReport
from pipelines.features import cache as feature_cache
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import leaks
from pipelines.infra import environment, manifest
from pipelines.speech import text

VALID, UNVERIFIED, INVALID = "valid", "unverified", "invalid"


def of_report(report: EvalReport, runs: Path) -> tuple[str, str]:
    """Return the status of a report's model and the reason for it."""
    lineage = report.lineage
    if exported_from := lineage.get("made_of"):
        return UNVERIFIED, f"an export of {exported_from}: see the entry of that model for its training data"
    if not lookup.is_tuned(lineage):
        return UNVERIFIED, "its training data is not known here"
    status, why = _check_training_data(report, runs)
    if status == VALID and lineage.get("fork"):
        return UNVERIFIED, f"it started from run {lineage['fork']['run']}, whose training data is not checked"
    if status == VALID and set((lineage.get("teacher") or {}).get("caches", [])) - {lineage["cache"]}:
        return UNVERIFIED, "the training data of its teacher is not checked"
    return status, why


def _check_training_data(report: EvalReport, runs: Path) -> tuple[str, str]:
    """Compare the training data with the test set: by the cache if it is available, else by the recipe's settings."""
    trained, scored = report.lineage["cache"], (manifest.read(report.folder) or {}).get("identity", {}).get("cache")
    train = _find_cache(trained, runs)
    if train is not None:
        return _compare_with_test(report, train, train if scored == trained else _find_cache(scored, runs))
    setting = (report.lineage["settings"].get("curation") or {}).get("leaks")
    if not report.score.units.enough:  # curation keeps training clips of few speakers
        return UNVERIFIED, f"test speakers may be in its training data ({report.score.units.who})"
    if scored == trained and setting in ("refuse", "drop"):
        verb = {"refuse": "refuses", "drop": "drops"}[setting]
        return VALID, f"by its settings: the recipe {verb} clips that share a speaker, sentence or audio with the test"
    return UNVERIFIED, f"its training cache {trained} is not available"


def _find_cache(digest: str | None, runs: Path) -> FeatureCache | None:
    """Return the cache with this digest from the runs folder or the fetched caches, or None."""
    folders = [*(runs / "features").glob("*/"), *(environment.cache_folder() / "fetched").glob("*/")]
    for folder in folders:
        sealed = manifest.read(folder)
        if digest and sealed and sealed.get("digest") == digest and "identity" in sealed:
            return feature_cache.open_cache(folder)
    return None


def _compare_with_test(report: EvalReport, train: FeatureCache, scored: FeatureCache | None) -> tuple[str, str]:
    rows, test = train.rows.iloc[train.split("train")], report.predictions
    shared = {}
    for kind, key, names in (("speaker", text.speaker_key, "speaker"), ("sentence", text.normalise, "reference")):
        held_out = set(map(key, test[names])) - {""}
        shared[kind] = int(rows["text" if kind == "sentence" else kind].map(key).isin(held_out).sum())
    if scored is not None and scored.n_mels == train.n_mels:
        shared["recording"] = _count_shared_recordings(train, scored, test["id"].tolist())
    if selected := _count_test_clips_in_validation(test, train):
        return INVALID, f"its weights were selected by {selected} utterances of the test set"
    if any(shared.values()):
        counts = ", ".join(f"{n} training clips a {kind}" for kind, n in shared.items() if n)
        return INVALID, f"it shares with the test set: {counts}"
    if (test["speaker"] == "").any() or (rows["speaker"] == "").any():
        return UNVERIFIED, "some clips have no speaker"
    if "recording" not in shared:
        return UNVERIFIED, "the scored recordings are not available for comparison"
    return VALID, f"no training clip shares a {', '.join(shared)} with the test set"


def _count_test_clips_in_validation(test: pd.DataFrame, train: FeatureCache) -> int:
    """Count validation clips with the speaker and sentence of a test utterance."""
    rows = train.rows.iloc[train.split("validation")]
    scored = set(zip(test["speaker"].map(text.speaker_key), test["reference"].map(text.normalise), strict=True))
    pairs = zip(rows["speaker"].map(text.speaker_key), rows["text"].map(text.normalise), strict=True)
    return sum(pair in scored for pair in pairs)


def _count_shared_recordings(train: FeatureCache, scored: FeatureCache, ids: list[str]) -> int:
    """Count training clips that are identical to a test clip. Only clips of equal length and pad value are compared."""
    columns = ["frames", "pad_value"]
    test = scored.rows[scored.rows["id"].isin(ids)]
    keys = pd.MultiIndex.from_frame(test[columns])
    candidates = [row for row in train.split("train") if tuple(train.rows[columns].iloc[row]) in keys]
    fingerprints = {leaks.fingerprint(scored.log_mel(row)) for row in test.index} if candidates else set()
    return sum(leaks.fingerprint(train.log_mel(row)) in fingerprints for row in candidates)
