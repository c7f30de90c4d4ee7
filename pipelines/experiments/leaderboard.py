"""Rank models that were scored on one test set with one normaliser.

Entries come from the lab's reports and from model cards on the Hub. An entry is invalid if its training data shares a
speaker, a sentence or a recording with the test set: it is listed last, without a rank. If that cannot be checked, the
entry is unverified. Entries with another test set or normaliser are listed separately.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.experiments.comparison import compare, lookup, validity
from pipelines.experiments.comparison.tables import align_columns
from pipelines.experiments.comparison.validity import INVALID, UNVERIFIED
from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.infra.stores import hub_client
from pipelines.recipes.commands import command
from pipelines.speech import scoring
from pipelines.speech.intervals import CLIPS, SPEAKERS, Units
from pipelines.training import model_card
from pipelines.whisper import lineage as whisper_lineage

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
    delta: float | None = None
    """WER minus that of the first entry on the same utterances; None without its transcripts, as for cards."""
    delta_ci95: tuple[float, float] | None = None
    """Paired 95 % interval of `delta`."""


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
    by: str = compare.LAB
    """Whose transcripts are ranked: this lab's, or those of transformers' pipeline."""

    def as_dict(self) -> dict[str, Any]:
        groups = {name: [asdict(entry) for entry in getattr(self, name)] for name in _GROUPS}
        first = {"by": self.by, "test_set": self.test_set, "normaliser": self.normaliser}
        return {**first, **groups, "next": self.next_step()}

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
        decoder = "" if self.by == compare.LAB else ", decoded by transformers' own pipeline"
        parts = [f"test set {self.test_set}, normaliser {self.normaliser}{decoder}", align_columns(self.table())]
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
                by = [] if self.by == compare.LAB else ["--by", self.by]
                return command("compare", *reports, *by, runs=self.runs)
            return "evaluate the others here and compare them: ranks with overlapping intervals may be due to chance"
        return "name more models that were scored on this test set"


_GROUPS = ("ranked", "invalid", "not_comparable")


def rank(sources: Sequence[str], *, by: str = compare.LAB, runs: str | Path = "") -> Board:
    """Rank recipes, run folders, report folders, or models on the Hub (hub://owner/name).

    `by` compare.STOCK ranks what transformers' pipeline writes, on the clips that it decoded. The first entry of the
    first source determines the test set and normaliser. Raise LabError if there is no entry.
    """
    compare.check_decoder(by)
    if not sources:
        raise LabError("name the models to rank: recipes, report folders, or models on the Hub (hub://owner/name)")
    reports: dict[str, EvalReport] = {}
    entries = [entry for source in sources for entry in _entries(source, by, reports, runs)]
    if not entries:
        of = "" if by == compare.LAB else " in the stock pipeline"
        raise LabError(f"found no WER on a test set{of} in {', '.join(sources)}: name a report, or another model")
    key = entries[0].test_set, entries[0].normaliser
    comparable = sorted((e for e in entries if (e.test_set, e.normaliser) == key), key=lambda entry: entry.wer)
    others = [entry for entry in entries if (entry.test_set, entry.normaliser) != key]
    ranked = [entry for entry in comparable if entry.status != INVALID]
    return Board(
        *key,
        tuple(_with_difference(entry, ranked[0], reports) for entry in ranked),
        tuple(entry for entry in comparable if entry.status == INVALID),
        tuple(sorted(others, key=lambda entry: (entry.test_set, entry.normaliser, entry.wer))),
        runs,
        by,
    )


def _entries(source: str, by: str, reports: dict[str, EvalReport], runs: str | Path) -> Iterator[Entry]:
    """Yield the entries of a source; its reports are added to `reports`, by the `source` of their entry."""
    is_local = Path(source).expanduser().exists() or (environment.runs_folder(runs) / source).is_dir()
    if source.startswith("hub://") or (_HUB_ID.fullmatch(source) and not is_local):
        yield from _of_card(source.removeprefix("hub://"), by)
        return
    for report in lookup.find(source, runs):
        scored = report if by == compare.LAB else lookup.in_stock_pipeline(report)
        reports[str(report.folder)] = scored
        yield _of_report(scored, validity.of_report(report, environment.runs_folder(runs)))


def _with_difference(entry: Entry, first: Entry, reports: Mapping[str, EvalReport]) -> Entry:
    """Return the entry with its paired difference to the first one, if the transcripts of both are here."""
    if entry is first or not {entry.source, first.source} <= reports.keys():
        return entry
    ours, theirs = (lookup.ordered(reports[one.source]) for one in (entry, first))
    edits = [scoring.count_edits(one["reference"].tolist(), one["hypothesis"].tolist()) for one in (ours, theirs)]
    difference = scoring.difference(*edits, ours["speaker"].tolist())
    return replace(entry, delta=difference.delta, delta_ci95=difference.ci95)


def _row(entry: Entry) -> dict[str, str]:
    return {
        "model": entry.model,
        "by": entry.by,
        "base": entry.base,
        "trained on": entry.trained_on,
        "WER": f"{entry.wer:.3f}",
        "95 %": _interval_cell(entry),
        "Δ to first (95 %)": _difference_cell(entry),
        "n": str(entry.n or UNKNOWN),
        "status": f"{entry.status}: {entry.why}",
    }


def _interval_cell(entry: Entry) -> str:
    over = CLIPS if entry.ci95 is None else SPEAKERS
    ends = entry.ci95 or entry.ci95_over_clips
    return Units(over, entry.n or 0, 0).interval(ends) if ends else UNKNOWN


def _difference_cell(entry: Entry) -> str:
    if entry.delta is None:
        return ""
    over = CLIPS if entry.ci95 is None else SPEAKERS
    return f"{entry.delta:+.3f} ({Units(over, entry.n or 0, 0).interval(entry.delta_ci95, '{:+.3f}')})"


# ---- the lab's own reports


def _of_report(report: EvalReport, status: tuple[str, str]) -> Entry:
    lineage = report.lineage
    tuned = lookup.is_tuned(lineage)
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
        status=status[0],
        why=status[1],
        source=str(report.folder),
        ci95_over_clips=report.score.ci95 if report.score.over == CLIPS else None,
    )


def _data(lineage: Mapping[str, Any]) -> str:
    train = (lineage.get("data") or {}).get("train") or {}
    size = f", {train['clips']:,} clips, {train['hours']:.2f} h" if train else ""
    if pseudo := lineage.get("pseudo_labels"):
        size += f", of which {sum(one['hours'] for one in pseudo):.2f} h pseudo-labelled"
    return f"{whisper_lineage.data_of(lineage['settings']['source'])['name']}{size}, cache {lineage['cache']}"


# ---- model cards on the Hub


def _of_card(uri: str, by: str) -> Iterator[Entry]:
    """Yield an entry for each WER on a test split in the card's model-index, of this lab or of transformers' pipeline.

    Cards that other projects wrote do not name a decoder: they count as scored by their own.
    """
    card = hub_client.read_model_card(f"hub://{uri}")
    for result in card.eval_results or []:
        if (result.metric_type or "").lower() != "wer" or result.dataset_split in ("train", "validation"):
            continue
        args = result.metric_args if isinstance(result.metric_args, Mapping) else {}
        value = _as_fraction(result.metric_value, args)
        if value is None or (args.get("decoder") == model_card.STOCK_DECODER) != (by == compare.STOCK):
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
