"""What a report tells of a model on a split: one dictionary, which is report.json, and the page that shows it.

report.json, `format` 1. Rates are shares (0.25 is 25 %), intervals 95 % over speakers, texts normalised where not told
otherwise; a key that cannot be known is null, none is ever left out.

    format          1: raised when a key changes its meaning or goes; new keys do not raise it
    model           name and revision;  quantisation: null or q8
    split, language, utterances, speakers, audio_seconds
    test_set        digest of the ids and references scored;  normaliser: version of text.normalise
    lineage         what made the model; absolute paths are cut to their last part
    score, raw      scoring.Score as a dictionary: normalised, and as written
    slices          slice, value, wer, low, high, n, speakers; slices are explained in `definitions`
    words           words of the references that did not come out: words (seen or unseen in training), count, rate, ...
    worst           the utterances with the highest WER: id, speaker, reference, hypothesis, wer, duration_s, confidence
    confusions      substitutions, deletions, insertions, dots, letters, compounds: confusions.confusions
    inventions      for invented, repeating, empty: count, rate, examples: inventions.kinds
    calibration     mean_confidence, right, ece, ece_words, bins, coverage: calibration.calibration
    speed           decoding_seconds, real_time_factor (decoding over audio), times_real_time, device, threads
    definitions     what each figure means, in words, as the page has it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipelines.experiments.report import calibration, confusions, inventions, slices
from pipelines.experiments.report.alignment import Step, align
from pipelines.infra.redact import redact_values
from pipelines.speech import scoring, text

FORMAT = 1
WORST = 10
"""Utterances among the worst that the page shows, with their sound where it is to be had."""


def alignments(predictions: pd.DataFrame) -> list[list[Step]]:
    """The words of each reference beside those of its transcript, normalised."""
    texts = zip(predictions["reference"], predictions["hypothesis"], strict=True)
    return [align(text.normalise(said).split(), text.normalise(written).split()) for said, written in texts]


def facts(predictions: pd.DataFrame, told: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, Any]:
    """The content of report.json: what can be told of `predictions`, after what was told of the model.

    `told` holds model, quantisation, split, language, test_set, normaliser, lineage, score and raw; `speed` holds
    decoding_seconds, device and threads.
    """
    aligned = alignments(predictions)
    edits = scoring.count_edits(predictions["reference"].tolist(), predictions["hypothesis"].tolist())
    audio_s = float(predictions["duration_s"].sum())
    lost = np.array([_lost(steps) for steps in aligned])
    return {
        "format": FORMAT,
        **redact_values(told),
        "utterances": len(predictions),
        "speakers": told["score"]["speakers"],
        "audio_seconds": round(audio_s, 2),
        "slices": slices.table(predictions).to_dict("records"),
        "words": slices.seen_and_unseen(predictions, lost),
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
            **{f"slices.{name}": told for name, told in slices.DEFINITIONS.items()},
            **{f"inventions.{name}": told for name, told in inventions.DEFINITIONS.items()},
            **{f"calibration.{name}": told for name, told in calibration.DEFINITIONS.items()},
        },
    }


def _lost(steps: list[Step]) -> int:
    """Words of the reference that were substituted or deleted."""
    return sum(len(step.reference) for step in steps if step.is_error)


def _worst(predictions: pd.DataFrame) -> list[dict[str, Any]]:
    worst = predictions.nlargest(WORST, "wer").assign(confidence=lambda rows: np.exp(rows["logprob"]))
    worst = worst[worst["wer"] > 0]
    return worst[["id", "speaker", "reference", "hypothesis", "wer", "duration_s", "confidence"]].to_dict("records")


def _inventions(predictions: pd.DataFrame, cers: np.ndarray) -> dict[str, Any]:
    found: dict[str, list[int]] = {name: [] for name in inventions.DEFINITIONS}
    for place, (said, written) in enumerate(zip(predictions["reference"], predictions["hypothesis"], strict=True)):
        for name in inventions.kinds(text.normalise(said), text.normalise(written), cers[place]):
            found[name].append(place)
    return {
        name: {
            "count": len(places),
            "rate": len(places) / len(predictions),
            "examples": predictions.iloc[places[:WORST]][["id", "reference", "hypothesis"]].to_dict("records"),
        }
        for name, places in found.items()
    }
