"""Precision and recall of curation on a corpus whose faults are known (sources/planted.py).

Only this module reads the truth: the columns `planted` and `spoken` of a cache's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipelines.features.cache import FeatureCache
from pipelines.features.curation import label_errors
from pipelines.features.curation.selection import CLIP_STEPS, ORDER
from pipelines.speech import scoring

GROSS, SUBTLE = "label_swap", "label_word"
CHECKS = {
    "leaks": (
        ("leak_speaker", "leak_sentence", "leak_audio"),
        ("leak_speaker", "leak_sentence", "leak_audio", "leak_renamed"),
    ),
    "duplicates": (("duplicate_sentence", "duplicate_audio"), ("duplicate",)),
    "clipping": (("clipped",), ("clipping",)),
    "noise": (("noisy",), ("noise",)),
    "label_errors": (("label_error",), (GROSS, SUBTLE)),
}
"""Per check, the reasons by which it drops, and the planted faults that it is to find."""
LIMITS = tuple(round(0.05 * step, 2) for step in range(1, 31))
"""Character error rates above which a clip counts as a label error, for the curve."""


def counted(found: Sequence[bool], planted: Sequence[bool]) -> dict[str, float | int | None]:
    """Found, planted, both; precision (both over found) and recall (both over planted), None where nothing was."""
    found, planted = np.asarray(found, bool), np.asarray(planted, bool)
    both, n_found, n_planted = int((found & planted).sum()), int(found.sum()), int(planted.sum())
    return {
        "found": n_found,
        "planted": n_planted,
        "both": both,
        "precision": round(both / n_found, 4) if n_found else None,
        "recall": round(both / n_planted, 4) if n_planted else None,
    }


def of_checks(whole: FeatureCache, curated: FeatureCache) -> dict[str, dict[str, Any]]:
    """What each check of a curated cache found, against the truth in the uncurated cache of the same corpus.

    Counted are the clips that came to the check: those that an earlier step had dropped are not. A check that dropped
    nothing, or was not asked for, is not told. `recall_by_fault` is the recall of each kind of fault.
    """
    truth = whole.rows[whole.rows["split"] == "train"].set_index("id")["planted"]
    reasons = curated.rejected.set_index("id")["reason"].reindex(truth.index, fill_value="")
    told = {}
    for check, (dropped_as, faults) in CHECKS.items():
        occurring = [reason for reason in dropped_as if (reasons == reason).any()]
        if not occurring:
            continue
        came = ~reasons.isin(_reasons_before(occurring))
        found, kinds = reasons[came].isin(dropped_as), truth[came]
        told[check] = {
            **counted(found, kinds.isin(faults)),
            "recall_by_fault": {fault: counted(found, kinds == fault)["recall"] for fault in faults},
        }
    return told


def of_label_errors(rows: pd.DataFrame, heard: Sequence[str]) -> list[dict[str, Any]]:
    """Precision and recall of the label-error filter at each of LIMITS, from what a model heard in training rows.

    `rows` have text and planted. Each entry tells `limit`, the counts over both kinds of label errors, the recall of
    gross and of subtle ones, and how many clips of each kind are dropped (`""`: clean ones).
    """
    cers, kinds = label_errors.label_cers(rows["text"].tolist(), list(heard)), rows["planted"].to_numpy()
    curve = []
    for limit in LIMITS:
        found = cers > limit
        dropped = pd.Series(kinds[found]).value_counts().sort_index()
        curve.append(
            {
                "limit": limit,
                **counted(found, np.isin(kinds, (GROSS, SUBTLE))),
                "recall_gross": counted(found, kinds == GROSS)["recall"],
                "recall_subtle": counted(found, kinds == SUBTLE)["recall"],
                "dropped": {str(kind): int(n) for kind, n in dropped.items()},
            }
        )
    return curve


def of_repairs(repaired: FeatureCache) -> dict[str, Any]:
    """How near to what is said the repaired transcripts were before, and are after: WER over the repaired clips.

    `planted` of them had a label error.
    """
    rows = repaired.rows.merge(repaired.repaired, on="id")
    if not len(rows):
        return {"clips": 0, "planted": 0, "wer_before": None, "wer_after": None}
    spoken = rows["spoken"].tolist()
    wer = {name: scoring.count_edits(spoken, rows[name].tolist()) for name in ("before", "after")}
    return {
        "clips": len(rows),
        "planted": int(rows["planted"].isin((GROSS, SUBTLE)).sum()),
        **{f"wer_{name}": round(float(e.word_edits.sum() / e.words.sum()), 4) for name, e in wer.items()},
    }


def _reasons_before(reasons: Sequence[str]) -> set[str]:
    """Reasons of every step before the first of these."""
    told = [reason for step in ORDER for reason in (CLIP_STEPS.get(step) or (step,))]
    return set(told[: min(told.index(reason) for reason in reasons)])
