"""Precision and recall of curation on known faults, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from pipelines.experiments import fault_detection


def test_counts_give_precision_and_recall():
    found, planted = [True, True, True, False, False], [True, True, False, True, False]
    assert fault_detection.counts(found, planted) == {
        "found": 3,
        "planted": 3,
        "both": 2,
        "precision": 0.6667,
        "recall": 0.6667,
    }
    assert fault_detection.counts([False], [False]) == {
        "found": 0,
        "planted": 0,
        "both": 0,
        "precision": None,
        "recall": None,
    }


@pytest.fixture
def caches():
    """Return an uncurated cache of eight training clips, and the curated one."""
    faults = ["", "leak_speaker", "leak_renamed", "duplicate", "noise", "label_swap", "label_word", "noise"]
    whole = pd.DataFrame({"id": [f"c{n}" for n in range(8)], "split": "train", "planted": faults})
    test = pd.DataFrame({"id": ["t0"], "split": "test", "planted": [""]})
    dropped = {"c1": "leak_speaker", "c3": "duplicate_audio", "c4": "noisy", "c0": "noisy", "c5": "label_error"}
    dropped |= {"c7": "leak_audio"}
    rejected = pd.DataFrame({"id": list(dropped), "reason": list(dropped.values())})
    return SimpleNamespace(rows=pd.concat([whole, test])), SimpleNamespace(rejected=rejected)


def test_checks_are_scored_on_clips_that_reached_them(caches):
    told = fault_detection.score_checks(*caches)
    counts = {name: tuple(check[key] for key in ("found", "planted", "both")) for name, check in told.items()}
    assert counts == {
        "leaks": (2, 2, 1),  # c7 is found and is none; c2 is one and is not found
        "duplicates": (1, 1, 1),
        "noise": (2, 2, 1),  # c7 comes to the noise check: audio leaks are looked for after it
        "label_errors": (1, 2, 1),
    }
    assert told["leaks"]["recall_by_fault"]["leak_speaker"] == 1
    assert told["leaks"]["recall_by_fault"]["leak_renamed"] == 0
    assert told["leaks"]["recall_by_fault"]["leak_audio"] is None
    assert told["label_errors"]["recall_by_fault"] == {"label_swap": 1, "label_word": 0}
    assert "clipping" not in told


def test_late_check_ignores_clips_dropped_earlier(caches):
    whole, curated = caches
    whole.rows.loc[whole.rows["id"] == "c4", "planted"] = "duplicate"  # dropped as noisy before audio is compared
    assert fault_detection.score_checks(whole, curated)["duplicates"]["recall"] == 1


def test_label_filter_curve():
    rows = pd.DataFrame(
        {
            "text": ["abcdefghij", "abcdefghij", "abcdefghij", "abcdefghij"],
            "planted": ["", "label_swap", "label_word", "noise"],
        }
    )
    curve = fault_detection.score_label_filter(rows, ["abcdefghij", "xxxxxxxxxx", "abcdefghxx", "abcdexxxxx"])
    at = {entry["limit"]: entry for entry in curve}
    assert at[0.15]["dropped"] == {"label_swap": 1, "label_word": 1, "noise": 1}
    assert (at[0.15]["precision"], at[0.15]["recall"]) == (0.6667, 1)
    assert at[0.2]["dropped"] == {"label_swap": 1, "noise": 1}  # above the limit, not at it
    assert (at[0.2]["recall_gross"], at[0.2]["recall_subtle"]) == (1, 0)
    assert at[1.0]["found"] == 0 and at[1.0]["precision"] is None
    recalls = [entry["recall"] for entry in curve]
    assert recalls == sorted(recalls, reverse=True)


def test_repairs_are_scored_against_spoken_text():
    rows = pd.DataFrame(
        {"id": ["a", "b", "c"], "spoken": ["ett två", "tre fyra", "fem"], "planted": ["label_swap", "noise", ""]}
    )
    repaired = pd.DataFrame({"id": ["a", "b"], "before": ["hej då", "tre fyra"], "after": ["ett två", "tre fem"]})
    told = fault_detection.score_repairs(SimpleNamespace(rows=rows, repaired=repaired))
    assert told == {"clips": 2, "planted": 1, "wer_before": 0.5, "wer_after": 0.25}
    assert fault_detection.score_repairs(SimpleNamespace(rows=rows, repaired=repaired[:0]))["clips"] == 0
