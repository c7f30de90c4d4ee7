"""Leaderboard: models scored on one test set under one normaliser, with who trained what on what.

Entries come of the lab's reports and of model cards on the Hub. One whose training data shares a speaker, a sentence or
a recording with the test set is invalid: shown last, without a rank. Where that cannot be checked it is unverified,
never silently valid. What was scored otherwise is listed apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.experiments import lookup
from pipelines.experiments.compare import aligned
from pipelines.experiments.evaluation import EvalReport
from pipelines.features import cache as caches
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import leaks
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hub
from pipelines.speech import text
from pipelines.whisper import lineage as whisper_lineage

VALID, UNVERIFIED, INVALID = "valid", "unverified", "invalid"
NOT_TOLD = "not told"
_PER_CENT_FROM = 2.0
"""Cards tell a WER as share or as per cent without saying which: from this on it can only be per cent."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


@dataclass(frozen=True)
class Entry:
    """One model's WER on one test set."""

    model: str
    by: str
    """Who trained it: the owner on the Hub, or this lab and the recipe."""
    base: str
    trained_on: str
    wer: float
    """As a share."""
    ci95: tuple[float, float] | None
    n: int | None
    """Utterances; None where a card does not tell."""
    test_set: str
    """Digest of what was scored; of a card that does not tell one: data set, config and split."""
    normaliser: str
    status: str
    """valid, unverified or invalid: whether the training data is known to share nothing with the test set."""
    why: str
    source: str


@dataclass(frozen=True)
class Board:
    """What was scored as the first source was, ranked; and what was not."""

    test_set: str
    normaliser: str
    ranked: tuple[Entry, ...]
    """By WER, lowest first."""
    invalid: tuple[Entry, ...]
    not_comparable: tuple[Entry, ...]

    def as_dict(self) -> dict[str, Any]:
        groups = {name: [asdict(entry) for entry in getattr(self, name)] for name in _GROUPS}
        return {"test_set": self.test_set, "normaliser": self.normaliser, **groups, "next": self.next_step()}

    def table(self) -> pd.DataFrame:
        """Ranked entries, then the invalid ones without a rank."""
        ranks = [*map(str, range(1, len(self.ranked) + 1)), *["-"] * len(self.invalid)]
        rows = [_told(entry) for entry in (*self.ranked, *self.invalid)]
        return pd.DataFrame(rows, index=pd.Index(ranks, name="rank"))

    def apart(self) -> pd.DataFrame:
        """Entries of another test set or normaliser."""
        rows = [
            {"test set": entry.test_set, "normaliser": entry.normaliser, **_told(entry)}
            for entry in self.not_comparable
        ]
        return pd.DataFrame(rows).set_index("test set") if rows else pd.DataFrame()

    def in_words(self) -> str:
        """The tables as plain text, for a terminal."""
        parts = [f"test set {self.test_set}, normaliser {self.normaliser}", aligned(self.table())]
        if self.not_comparable:
            parts += ["not comparable: another test set or normaliser", aligned(self.apart())]
        return "\n\n".join(parts) + "\n"

    def next_step(self) -> str:
        """What to do now, in one line."""
        for entry in self.invalid:
            return f"train {entry.model} again without what it shares with the test set: curation.leaks=drop"
        if len(self.ranked) > 1:
            return "python -m pipelines compare, with the first two: ranks whose intervals overlap may be chance"
        return "name more models that were scored on this test set"


_GROUPS = ("ranked", "invalid", "not_comparable")


def board(sources: Sequence[str], *, runs: str | Path = "") -> Board:
    """Rank what `sources` name: recipes, run folders, report folders, or models on the Hub (hub://owner/name).

    The first entry of the first source says which test set and normaliser the board is of.
    """
    if not sources:
        raise LabError("name what is to be ranked: recipes, report folders, or models on the Hub (hub://owner/name)")
    entries = [entry for source in sources for entry in _entries(source, runs)]
    if not entries:
        raise LabError(f"no WER on a test set is told by {', '.join(sources)}: name a report, or another model")
    key = entries[0].test_set, entries[0].normaliser
    alike = sorted((e for e in entries if (e.test_set, e.normaliser) == key), key=lambda entry: entry.wer)
    others = [entry for entry in entries if (entry.test_set, entry.normaliser) != key]
    return Board(
        *key,
        tuple(entry for entry in alike if entry.status != INVALID),
        tuple(entry for entry in alike if entry.status == INVALID),
        tuple(sorted(others, key=lambda entry: (entry.test_set, entry.normaliser, entry.wer))),
    )


def _entries(source: str, runs: str | Path) -> Iterator[Entry]:
    here = Path(source).expanduser().exists() or (environment.runs_folder(runs) / source).is_dir()
    if source.startswith("hub://") or (_HUB_ID.fullmatch(source) and not here):
        yield from _of_card(source.removeprefix("hub://"))
        return
    for report in lookup.find(source, runs):
        yield _of_report(report, environment.runs_folder(runs))


def _told(entry: Entry) -> dict[str, str]:
    return {
        "model": entry.model,
        "by": entry.by,
        "base": entry.base,
        "trained on": entry.trained_on,
        "WER": f"{entry.wer:.3f}",
        "95 %": "{:.3f} to {:.3f}".format(*entry.ci95) if entry.ci95 else NOT_TOLD,
        "n": str(entry.n or NOT_TOLD),
        "status": f"{entry.status}: {entry.why}",
    }


# ---- the lab's own reports


def _of_report(report: EvalReport, runs: Path) -> Entry:
    told = report.lineage
    tuned = lookup.is_tuned(told)
    status, why = _checked(report, runs) if tuned else (UNVERIFIED, "what its makers trained it on is not known here")
    if status == VALID and told.get("fork"):
        status, why = UNVERIFIED, f"it started from run {told['fork']['run']}, whose training data is not checked"
    if status == VALID and set((told.get("teacher") or {}).get("caches", [])) - {told["cache"]}:
        status, why = UNVERIFIED, "what its teacher was trained on is not checked"
    if made_of := told.get("made_of"):
        why = f"an export of {made_of}: that model's own entry tells what it was trained on"
    return Entry(
        model=report.model.partition(" @ ")[0],
        by=f"this lab, recipe {told['recipe']}" if tuned else "its makers",
        base=told.get("base") or NOT_TOLD if tuned else "",
        trained_on=_data(told) if tuned else NOT_TOLD,
        wer=report.score.wer,
        ci95=report.score.ci95,
        n=report.score.n,
        test_set=report.test_set or NOT_TOLD,
        normaliser=report.normaliser or NOT_TOLD,
        status=status,
        why=why,
        source=str(report.folder),
    )


def _data(lineage: Mapping[str, Any]) -> str:
    train = (lineage.get("data") or {}).get("train") or {}
    size = f", {train['clips']:,} clips, {train['hours']:.2f} h" if train else ""
    return f"{whisper_lineage.data_of(lineage['settings']['source'])['name']}{size}, cache {lineage['cache']}"


def _checked(report: EvalReport, runs: Path) -> tuple[str, str]:
    """Whether the model was trained on something of the test set: by its cache, else by what its recipe saw to."""
    trained, scored = report.lineage["cache"], (manifest.read(report.folder) or {}).get("identity", {}).get("cache")
    train = _at_hand(trained, runs)
    if train is not None:
        return _compared(report, train, train if scored == trained else _at_hand(scored, runs))
    handled = (report.lineage["settings"].get("curation") or {}).get("leaks")
    if scored == trained and handled in ("refuse", "drop"):
        verb = {"refuse": "refuses", "drop": "drops"}[handled]
        return VALID, f"by its note: the recipe {verb} what shares a speaker, a sentence or audio with the test set"
    return UNVERIFIED, f"the cache {trained} that it was trained on is not at hand"


def _at_hand(digest: str | None, runs: Path) -> FeatureCache | None:
    """The cache with this digest, below the runs or among what was fetched."""
    folders = [*(runs / "features").glob("*/"), *(environment.cache_folder() / "fetched").glob("*/")]
    for folder in folders:
        sealed = manifest.read(folder)
        if digest and sealed and sealed.get("digest") == digest and "identity" in sealed:
            return caches.open_cache(folder)
    return None


def _compared(report: EvalReport, train: FeatureCache, scored: FeatureCache | None) -> tuple[str, str]:
    rows, test = train.rows.iloc[train.split("train")], report.predictions
    speakers, sentences = set(test["speaker"]) - {""}, set(map(text.normalise, test["reference"]))
    shared = {
        "speaker": int(rows["speaker"].isin(speakers).sum()),
        "sentence": int(rows["text"].map(text.normalise).isin(sentences).sum()),
    }
    if scored is not None and scored.n_mels == train.n_mels:
        shared["recording"] = _shared_recordings(train, scored, test["id"].tolist())
    if chosen := _chosen_by(test, train):
        return INVALID, f"its weights were chosen by {chosen} utterances of the test set"
    if any(shared.values()):
        told = ", ".join(f"{n} training clips a {what}" for what, n in shared.items() if n)
        return INVALID, f"it shares with the test set: {told}"
    if (test["speaker"] == "").any() or (rows["speaker"] == "").any():
        return UNVERIFIED, "who speaks is not told of every clip"
    if "recording" not in shared:
        return UNVERIFIED, "the scored recordings are not at hand: they were not compared"
    return VALID, f"no training clip shares a {', '.join(shared)} with the test set"


def _chosen_by(test: pd.DataFrame, train: FeatureCache) -> int:
    """Validation clips in which a speaker of the test says the sentence that is scored."""
    rows = train.rows.iloc[train.split("validation")]
    scored = set(zip(test["speaker"], test["reference"].map(text.normalise), strict=True))
    return sum(pair in scored for pair in zip(rows["speaker"], rows["text"].map(text.normalise), strict=True))


def _shared_recordings(train: FeatureCache, scored: FeatureCache, ids: list[str]) -> int:
    """Training clips that sound like a test clip to the last bit; few have the length and pad value of another."""
    coarse = ["frames", "pad_value"]
    held = scored.rows[scored.rows["id"].isin(ids)]
    lengths = pd.MultiIndex.from_frame(held[coarse])
    alike = [row for row in train.split("train") if tuple(train.rows[coarse].iloc[row]) in lengths]
    prints = {leaks.fingerprint(scored.log_mel(row)) for row in held.index} if alike else set()
    return sum(leaks.fingerprint(train.log_mel(row)) in prints for row in alike)


# ---- model cards on the Hub


def _of_card(uri: str) -> Iterator[Entry]:
    """The WER on test splits that a card's model-index tells."""
    found = hub.model_card(f"hub://{uri}")
    for result in found.eval_results or []:
        if (result.metric_type or "").lower() != "wer" or result.dataset_split in ("train", "validation"):
            continue
        args = result.metric_args if isinstance(result.metric_args, Mapping) else {}
        value = _share(result.metric_value, args)
        if value is None:
            continue
        named = [result.dataset_type, result.dataset_config, result.dataset_split]
        datasets = _listed(found.datasets)
        normaliser = str(args.get("normaliser") or NOT_TOLD)
        status, why = _claimed(result.dataset_type, datasets, normaliser)
        yield Entry(
            model=uri,
            by=uri.partition("/")[0],
            base=", ".join(_listed(found.base_model)) or NOT_TOLD,
            trained_on=", ".join(datasets) or NOT_TOLD,
            wer=value,
            ci95=_interval(args.get("ci95")),
            n=args["n"] if isinstance(args.get("n"), int) else None,
            test_set=str(args.get("test_set") or " ".join(str(name) for name in named if name)),
            normaliser=normaliser,
            status=status,
            why=why,
            source=f"hub://{uri}",
        )


def _share(value: Any, args: Mapping[str, Any]) -> float | None:
    """A card's WER as a share: the lab's cards say so by naming a normaliser."""
    try:
        told = float(str(value).strip().removesuffix("%"))
    except ValueError:
        return None
    if not 0 <= told < math.inf:
        return None
    per_cent = not args.get("normaliser") and (told > _PER_CENT_FROM or str(value).strip().endswith("%"))
    return told / 100 if per_cent else told


def _interval(told: Any) -> tuple[float, float] | None:
    try:
        low, high = (float(end) for end in told)
    except (TypeError, ValueError):
        return None
    return low, high


def _listed(value: Any) -> list[str]:
    """A field of a card that may be one name, several or none."""
    return [value] if isinstance(value, str) else [str(name) for name in value or []]


def _claimed(test: str, datasets: list[str], normaliser: str) -> tuple[str, str]:
    """What a card tells of its training data; it names data sets, and not which split of them."""
    if not datasets:
        return UNVERIFIED, "its card does not say what it was trained on"
    same = [name for name in datasets if _family(name) == _family(test)]
    if same:
        return UNVERIFIED, f"its card says that it was trained on {', '.join(same)}, and not on which split"
    if normaliser == NOT_TOLD:
        return UNVERIFIED, "its card does not name a normaliser"
    return UNVERIFIED, f"its card says that it was trained on {', '.join(datasets)}: nothing of that was checked"


def _family(name: str) -> str:
    """A data set's name without owner and release: releases of one corpus hold each other's clips."""
    return re.sub(r"[\d._-]+$", "", name.rpartition("/")[2].lower())
