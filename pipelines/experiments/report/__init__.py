"""Content of an evaluation report: one dictionary, stored as report.json and shown by report.html.

report.json, `format` 1. Rates are fractions (0.25 is 25 %), intervals 95 %, texts normalised unless noted; an unknown
value is null, no key is left out. `over` says what an interval resamples: speakers, or clips where speakers are few.

    format          1: raised when a key is removed or changes its meaning, not for new keys
    model           name and revision;  quantisation: null or q8
    split, language, utterances, speakers (known ones), audio_seconds
    caveats         what the intervals and scores do not say, one sentence each
    test_set        digest of the ids and references scored;  normaliser: version of text.normalise
    decoding        engine, precision, beam_size, timestamps (hypotheses.decoding_facts); empty if unknown
    lineage         origin of the model; absolute paths are cut to their last part
    score, raw      scoring.Score as a dictionary: normalised, and as written
    stock           score in transformers' pipeline (stock.facts): score, lab (the same clips in this lab), difference,
                    decoding, verdict; only if it was scored
    slices          slice, value, wer, low, high, n, speakers, over; slices are explained in `definitions`
    words           words of the references not recognised: words (seen or unseen in training), count, rate, ...
    worst           the utterances with the highest WER: id, speaker, reference, hypothesis, wer, duration_s, confidence
    confusions      substitutions, deletions, insertions, dots, letters, compounds: confusions.confusions
    inventions      for invented, repeating, empty: count, rate, examples: inventions.kinds
    calibration     mean_confidence, right, ece, ece_words, bins, coverage: calibration.calibration
    speed           decoding_seconds, real_time_factor (decoding over audio), times_real_time, device, threads
    definitions     explanation of each figure, as on the page
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipelines.experiments.report import calibration, confusions, inventions, slices
from pipelines.infra.redact import redact_values
from pipelines.speech import scoring, text
from pipelines.speech.alignment import Step, align

FORMAT = 1
WORST = 10
"""Number of worst utterances on the page, with audio if available."""


def alignments(predictions: pd.DataFrame) -> list[list[Step]]:
    """Align the words of each reference with those of its transcript, normalised."""
    texts = zip(predictions["reference"], predictions["hypothesis"], strict=True)
    return [
        align(text.normalise(reference).split(), text.normalise(hypothesis).split()) for reference, hypothesis in texts
    ]


def facts(predictions: pd.DataFrame, metadata: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of report.json: `metadata`, and the analysis of `predictions`.

    `metadata` has model, quantisation, split, language, test_set, normaliser, lineage, caveats, score, raw; `speed` has
    decoding_seconds, device and threads.
    """
    aligned = alignments(predictions)
    edits = scoring.count_edits(predictions["reference"].tolist(), predictions["hypothesis"].tolist())
    audio_s = float(predictions["duration_s"].sum())
    missed = np.array([_count_missed(steps) for steps in aligned])
    return {
        "format": FORMAT,
        **redact_values(metadata),
        "utterances": len(predictions),
        "speakers": metadata["score"]["speakers"],
        "audio_seconds": round(audio_s, 2),
        "slices": slices.rows(predictions),
        "words": slices.seen_and_unseen(predictions, missed),
        "worst": _worst(predictions),
        "confusions": confusions.confusions(aligned),
        "inventions": _inventions(predictions, edits.char_edits / edits.chars),
        "calibration": calibration.calibration(predictions["logprob"].to_numpy(), edits.word_edits, edits.words),
        "speed": {
            **speed,
            "real_time_factor": speed["decoding_seconds"] / audio_s,
            "times_real_time": audio_s / speed["decoding_seconds"],
        },
        "definitions": {
            **{f"slices.{name}": text for name, text in slices.DEFINITIONS.items()},
            **{f"inventions.{name}": text for name, text in inventions.DEFINITIONS.items()},
            **{f"calibration.{name}": text for name, text in calibration.DEFINITIONS.items()},
        },
    }


def _count_missed(steps: list[Step]) -> int:
    """Count the words of the reference that were substituted or deleted."""
    return sum(len(step.reference) for step in steps if step.is_error)


def _worst(predictions: pd.DataFrame) -> list[dict[str, Any]]:
    worst = predictions.nlargest(WORST, "wer").assign(confidence=lambda rows: np.exp(rows["logprob"]))
    worst = worst[worst["wer"] > 0]
    return worst[["id", "speaker", "reference", "hypothesis", "wer", "duration_s", "confidence"]].to_dict("records")


def _inventions(predictions: pd.DataFrame, cers: np.ndarray) -> dict[str, Any]:
    rows_of: dict[str, list[int]] = {name: [] for name in inventions.DEFINITIONS}
    texts = zip(predictions["reference"], predictions["hypothesis"], strict=True)
    for row, (reference, hypothesis) in enumerate(texts):
        for name in inventions.kinds(text.normalise(reference), text.normalise(hypothesis), cers[row]):
            rows_of[name].append(row)
    return {
        name: {
            "count": len(rows),
            "rate": len(rows) / len(predictions),
            "examples": predictions.iloc[rows[:WORST]][["id", "reference", "hypothesis"]].to_dict("records"),
        }
        for name, rows in rows_of.items()
    }
