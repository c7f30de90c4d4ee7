"""Precision and recall of curation on a corpus with planted faults (sources/synthetic/planted.py).

Only this module reads the ground truth: the columns `planted` and `spoken` of a cache's rows.
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
"""Per check: the reasons with which it drops clips, and the planted faults that it should detect."""
LIMITS = tuple(round(0.05 * step, 2) for step in range(1, 31))
"""Character error rates above which a clip counts as a label error, for the curve."""


def counts(detected: Sequence[bool], planted: Sequence[bool]) -> dict[str, float | int | None]:
    """Return found, planted, both; precision (both / found) and recall (both / planted), None if undefined."""
    detected, planted = np.asarray(detected, bool), np.asarray(planted, bool)
    both, n_detected, n_planted = int((detected & planted).sum()), int(detected.sum()), int(planted.sum())
    return {
        "found": n_detected,
        "planted": n_planted,
        "both": both,
        "precision": round(both / n_detected, 4) if n_detected else None,
        "recall": round(both / n_planted, 4) if n_planted else None,
    }


def score_checks(uncurated: FeatureCache, curated: FeatureCache) -> dict[str, dict[str, Any]]:
    """Score each check of a curated cache against the ground truth in the uncurated cache of the same corpus.

    Only clips that reached the check count: clips dropped by an earlier step do not. A check that dropped nothing is
    left out. `recall_by_fault` is the recall of each kind of fault.
    """
    truth = uncurated.rows[uncurated.rows["split"] == "train"].set_index("id")["planted"]
    reasons = curated.rejected.set_index("id")["reason"].reindex(truth.index, fill_value="")
    scores = {}
    for check, (dropped_as, faults) in CHECKS.items():
        occurring = [reason for reason in dropped_as if (reasons == reason).any()]
        if not occurring:
            continue
        reached = ~reasons.isin(_earlier_reasons(occurring))
        detected, kinds = reasons[reached].isin(dropped_as), truth[reached]
        scores[check] = {
            **counts(detected, kinds.isin(faults)),
            "recall_by_fault": {fault: counts(detected, kinds == fault)["recall"] for fault in faults},
        }
    return scores


def score_label_filter(rows: pd.DataFrame, hypotheses: Sequence[str]) -> list[dict[str, Any]]:
    """Score the label-error filter at each of LIMITS, given the label model's hypotheses for training rows.

    `rows` have text and planted. Each entry has `limit`, the counts over both kinds of label errors, the recall of
    gross and of subtle ones, and the number of dropped clips of each kind (`""`: clips without a fault).
    """
    cers, kinds = label_errors.label_cers(rows["text"].tolist(), list(hypotheses)), rows["planted"].to_numpy()
    curve = []
    for limit in LIMITS:
        detected = cers > limit
        dropped = pd.Series(kinds[detected]).value_counts().sort_index()
        curve.append(
            {
                "limit": limit,
                **counts(detected, np.isin(kinds, (GROSS, SUBTLE))),
                "recall_gross": counts(detected, kinds == GROSS)["recall"],
                "recall_subtle": counts(detected, kinds == SUBTLE)["recall"],
                "dropped": {str(kind): int(n) for kind, n in dropped.items()},
            }
        )
    return curve


def score_repairs(repaired: FeatureCache) -> dict[str, Any]:
    """Return the WER of repaired transcripts against the spoken text, before and after repair.

    `clips` is the number of repaired clips, `planted` the number of those with a planted label error.
    """
    rows = repaired.rows.merge(repaired.repaired, on="id")
    if not len(rows):
        return {"clips": 0, "planted": 0, "wer_before": None, "wer_after": None}
    references = rows["spoken"].tolist()
    edits = {name: scoring.count_edits(references, rows[name].tolist()) for name in ("before", "after")}
    return {
        "clips": len(rows),
        "planted": int(rows["planted"].isin((GROSS, SUBTLE)).sum()),
        **{f"wer_{name}": round(float(e.word_edits.sum() / e.words.sum()), 4) for name, e in edits.items()},
    }


def _earlier_reasons(reasons: Sequence[str]) -> set[str]:
    """Return the reasons of all steps before the first of these."""
    order = [reason for step in ORDER for reason in (CLIP_STEPS.get(step) or (step,))]
    return set(order[: min(order.index(reason) for reason in reasons)])
