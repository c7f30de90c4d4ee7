"""Rank models that were scored on one test set with one normaliser.

Entries come from the lab's reports and from model cards on the Hub. An entry is invalid if its training data shares a
speaker, a sentence or a recording with the test set: it is listed last, without a rank. If that cannot be checked, the
entry is unverified. Entries with another test set or normaliser are listed separately.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.experiments.comparison import lookup
from pipelines.experiments.comparison.tables import align_columns
from pipelines.experiments.evaluation import EvalReport
from pipelines.features import cache as feature_cache
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import leaks
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hub_client
from pipelines.recipes.commands import command
from pipelines.speech import text
from pipelines.speech.intervals import CLIPS, SPEAKERS, Units
from pipelines.whisper import lineage as whisper_lineage

VALID, UNVERIFIED, INVALID = "valid", "unverified", "invalid"
UNKNOWN = "not told"
_PER_CENT_FROM = 2.0
"""Model cards state WER as a fraction or in per cent without a unit: larger values are taken as per cent."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


@dataclass(frozen=True)
class Entry:
    """WER of one model on one test set."""

    model: str
    by: str
    """Author of the model: the owner on the Hub, or this lab and the recipe."""
    base: str
    trained_on: str
    wer: float
    """As a fraction."""
    ci95: tuple[float, float] | None
    """95 % interval of `wer` over speakers; None if it or the test speakers are unknown."""
    n: int | None
    """Number of utterances; None if a card does not state it."""
    test_set: str
    """Digest of the scored utterances; if a card does not state it: data set, config and split."""
    normaliser: str
    status: str
    """valid (the training data shares nothing with the test set), unverified or invalid."""
    why: str
    """Reason for `status`."""
    source: str
    ci95_over_clips: tuple[float, float] | None = None
    """95 % interval of `wer` over clips, where there is none over speakers: it says nothing about other speakers."""


@dataclass(frozen=True)
class Board:
    """Ranked models with the test set and normaliser of the first source, and the other entries."""

    test_set: str
    normaliser: str
    ranked: tuple[Entry, ...]
    """Sorted by WER, lowest first."""
    invalid: tuple[Entry, ...]
    not_comparable: tuple[Entry, ...]
    runs: str | Path = ""

    def as_dict(self) -> dict[str, Any]:
        groups = {name: [asdict(entry) for entry in getattr(self, name)] for name in _GROUPS}
        return {"test_set": self.test_set, "normaliser": self.normaliser, **groups, "next": self.next_step()}

    def table(self) -> pd.DataFrame:
        """Return the ranked entries, then the invalid entries without a rank."""
        ranks = [*map(str, range(1, len(self.ranked) + 1)), *["-"] * len(self.invalid)]
        rows = [_row(entry) for entry in (*self.ranked, *self.invalid)]
        return pd.DataFrame(rows, index=pd.Index(ranks, name="rank"))

    def not_comparable_table(self) -> pd.DataFrame:
        """Return the entries with another test set or normaliser."""
        rows = [
            {"test set": entry.test_set, "normaliser": entry.normaliser, **_row(entry)} for entry in self.not_comparable
        ]
        return pd.DataFrame(rows).set_index("test set") if rows else pd.DataFrame()

    def __str__(self) -> str:
        parts = [f"test set {self.test_set}, normaliser {self.normaliser}", align_columns(self.table())]
        if self.not_comparable:
            parts += ["not comparable: another test set or normaliser", align_columns(self.not_comparable_table())]
        return "\n\n".join(parts) + "\n"

    def next_step(self) -> str:
        """Return a suggestion for the next experiment, in one line."""
        for entry in self.invalid:
            return f"train {entry.model} again without the clips that it shares with the test set: curation.leaks=drop"
        if len(self.ranked) > 1:
            reports = [entry.source for entry in self.ranked if not entry.source.startswith("hub://")][:2]
            if len(reports) == 2:
                return command("compare", *reports, runs=self.runs)
            return "evaluate the others here and compare them: ranks with overlapping intervals may be due to chance"
        return "name more models that were scored on this test set"


_GROUPS = ("ranked", "invalid", "not_comparable")


def rank(sources: Sequence[str], *, runs: str | Path = "") -> Board:
    """Rank recipes, run folders, report folders, or models on the Hub (hub://owner/name).

    The first entry of the first source determines the test set and normaliser. Raise LabError if there is no entry.
    """
    if not sources:
        raise LabError("name the models to rank: recipes, report folders, or models on the Hub (hub://owner/name)")
    entries = [entry for source in sources for entry in _entries(source, runs)]
    if not entries:
        raise LabError(f"found no WER on a test set in {', '.join(sources)}: name a report, or another model")
    key = entries[0].test_set, entries[0].normaliser
    comparable = sorted((e for e in entries if (e.test_set, e.normaliser) == key), key=lambda entry: entry.wer)
    others = [entry for entry in entries if (entry.test_set, entry.normaliser) != key]
    return Board(
        *key,
        tuple(entry for entry in comparable if entry.status != INVALID),
        tuple(entry for entry in comparable if entry.status == INVALID),
        tuple(sorted(others, key=lambda entry: (entry.test_set, entry.normaliser, entry.wer))),
        runs,
    )


def _entries(source: str, runs: str | Path) -> Iterator[Entry]:
    is_local = Path(source).expanduser().exists() or (environment.runs_folder(runs) / source).is_dir()
    if source.startswith("hub://") or (_HUB_ID.fullmatch(source) and not is_local):
        yield from _of_card(source.removeprefix("hub://"))
        return
    for report in lookup.find(source, runs):
        yield _of_report(report, environment.runs_folder(runs))


def _row(entry: Entry) -> dict[str, str]:
    return {
        "model": entry.model,
        "by": entry.by,
        "base": entry.base,
        "trained on": entry.trained_on,
        "WER": f"{entry.wer:.3f}",
        "95 %": _interval_cell(entry),
        "n": str(entry.n or UNKNOWN),
        "status": f"{entry.status}: {entry.why}",
    }


def _interval_cell(entry: Entry) -> str:
    over = CLIPS if entry.ci95 is None else SPEAKERS
    ends = entry.ci95 or entry.ci95_over_clips
    return Units(over, entry.n or 0, 0).interval(ends) if ends else UNKNOWN


# ---- the lab's own reports


def _of_report(report: EvalReport, runs: Path) -> Entry:
    lineage = report.lineage
    tuned = lookup.is_tuned(lineage)
    status, why = _report_status(report, runs)
    return Entry(
        model=report.model.partition(" @ ")[0],
        by=f"this lab, recipe {lineage['recipe']}" if tuned else "its makers",
        base=whisper_lineage.origin_of(lineage) or UNKNOWN if tuned else "",
        trained_on=_data(lineage) if tuned else UNKNOWN,
        wer=report.score.wer,
        ci95=report.score.ci95 if report.score.over == SPEAKERS else None,
        n=report.score.n,
        test_set=report.test_set or UNKNOWN,
        normaliser=report.normaliser or UNKNOWN,
        status=status,
        why=why,
        source=str(report.folder),
        ci95_over_clips=report.score.ci95 if report.score.over == CLIPS else None,
    )


def _report_status(report: EvalReport, runs: Path) -> tuple[str, str]:
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


def _data(lineage: Mapping[str, Any]) -> str:
    train = (lineage.get("data") or {}).get("train") or {}
    size = f", {train['clips']:,} clips, {train['hours']:.2f} h" if train else ""
    return f"{whisper_lineage.data_of(lineage['settings']['source'])['name']}{size}, cache {lineage['cache']}"


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


# ---- model cards on the Hub


def _of_card(uri: str) -> Iterator[Entry]:
    """Yield an entry for each WER on a test split in the card's model-index."""
    card = hub_client.read_model_card(f"hub://{uri}")
    for result in card.eval_results or []:
        if (result.metric_type or "").lower() != "wer" or result.dataset_split in ("train", "validation"):
            continue
        args = result.metric_args if isinstance(result.metric_args, Mapping) else {}
        value = _as_fraction(result.metric_value, args)
        if value is None:
            continue
        test_names = [result.dataset_type, result.dataset_config, result.dataset_split]
        datasets = _as_list(card.datasets)
        normaliser = str(args.get("normaliser") or UNKNOWN)
        interval, over_clips = _interval(args.get("ci95")), args.get("over") == CLIPS
        status, why = _card_status(result.dataset_type, datasets, normaliser)
        yield Entry(
            model=uri,
            by=uri.partition("/")[0],
            base=", ".join(_as_list(card.base_model)) or UNKNOWN,
            trained_on=", ".join(datasets) or UNKNOWN,
            wer=value,
            ci95=None if over_clips else interval,
            n=args["n"] if isinstance(args.get("n"), int) else None,
            test_set=str(args.get("test_set") or " ".join(str(name) for name in test_names if name)),
            normaliser=normaliser,
            status=status,
            why=why,
            source=f"hub://{uri}",
            ci95_over_clips=interval if over_clips else None,
        )


def _as_fraction(value: Any, args: Mapping[str, Any]) -> float | None:
    """Return a card's WER as a fraction. The lab's cards, which name a normaliser, always state fractions."""
    try:
        wer = float(str(value).strip().removesuffix("%"))
    except ValueError:
        return None
    if not 0 <= wer < math.inf:
        return None
    per_cent = not args.get("normaliser") and (wer > _PER_CENT_FROM or str(value).strip().endswith("%"))
    return wer / 100 if per_cent else wer


def _interval(value: Any) -> tuple[float, float] | None:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        return None
    return low, high


def _as_list(value: Any) -> list[str]:
    """Return a field of a card, which may be one name, several or None, as a list."""
    return [value] if isinstance(value, str) else [str(name) for name in value or []]


def _card_status(test: str, datasets: list[str], normaliser: str) -> tuple[str, str]:
    """Return UNVERIFIED and the reason: a card names its training data sets, but not their splits."""
    if not datasets:
        return UNVERIFIED, "its card does not state the training data"
    same = [name for name in datasets if _corpus(name) == _corpus(test)]
    if same:
        return UNVERIFIED, f"its card names {', '.join(same)} as training data, without the split"
    if normaliser == UNKNOWN:
        return UNVERIFIED, "its card does not name a normaliser"
    return UNVERIFIED, f"its card names {', '.join(datasets)} as training data, which was not checked"


def _corpus(name: str) -> str:
    """Return a data set's name without owner and release: releases of one corpus contain each other's clips."""
    return name.rpartition("/")[2].lower().rstrip("0123456789._-")
