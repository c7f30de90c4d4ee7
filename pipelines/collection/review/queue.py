"""The queue of a review: which clip comes next, decisions of several reviewers, and the share of errors found.

Clips come in the order of their score, the least believable first. Every RANDOM_EVERY-th clip is drawn from all that
wait instead, by a hash of its id: without them nothing would be known about the clips that the model believes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipelines.features.curation import corrections
from pipelines.infra.errors import LabError
from pipelines.speech import text as speech_text

RANDOM_EVERY = 10
MIN_DECISIONS = 20
"""Decisions before a share is estimated."""
MAX_CHARS = 1_000
"""Longest transcript that a reviewer may write."""
CLAIM_S = 600.0
"""Time for which a clip that one reviewer sees is shown to no other."""
_STEPS, _RIDGE = 50, 1e-2


@dataclass(frozen=True)
class Item:
    """A clip to review."""

    id: str
    text: str
    """Its transcript in the corpus."""
    heard: str
    """What the model recognised."""
    score: float
    """How much better the model explains the recording by `heard`; see scores.py."""


@dataclass(frozen=True)
class Progress:
    """How far a review is."""

    reviewed: int
    wrong: int
    """Reviewed clips that were corrected or rejected."""
    clips: int
    share: float | None
    """Estimated share of all errors that has been found, 0 to 1; None before MIN_DECISIONS."""


class Queue:
    """Clips in order, and the table of decisions. Thread-safe; several processes may share one table."""

    def __init__(self, items: Sequence[Item], path: Path, model: str):
        """Order `items`; decisions go to the table `path` with the name of the `model`. Raises LabError."""
        ordered = sorted(items, key=lambda item: (-item.score, item.id))
        self.items = {item.id: item for item in ordered}
        self._drawn = sorted(self.items, key=lambda name: hashlib.sha256(name.encode()).digest())
        self._log, self._path, self._model = corrections.open_log(path), path, model
        self._lock, self._claims = threading.Lock(), dict[str, tuple[str, float]]()
        corrections.read(path)
        with self._log.locked():
            corrections.take_over(path)
            if not path.exists():
                path.write_bytes(self._log.header_line())

    def next(self, session: str, skipped: Collection[str] = ()) -> Item | None:
        """Return the clip that this session reviews now: the one that it has, or the next one that is not `skipped`.

        None if there is none, or others have it.
        """
        with self._lock:
            done = self._decided().keys()
            now = time.monotonic()
            self._claims = {
                name: claim for name, claim in self._claims.items() if name not in done and claim[1] > now - CLAIM_S
            }
            mine = next((name for name, claim in self._claims.items() if claim[0] == session), None)
            if mine is None:
                order = self._drawn if len(done) % RANDOM_EVERY == RANDOM_EVERY - 1 else self.items
                taken = {*done, *self._claims, *skipped}
                mine = next((name for name in order if name not in taken), None)
            if mine is None:
                return None
            self._claims[mine] = (session, now)
            return self.items[mine]

    def release(self, session: str) -> None:
        """Offer the clip that a session has to others."""
        with self._lock:
            self._claims = {name: claim for name, claim in self._claims.items() if claim[0] != session}

    def decide(self, name: str, verdict: str, after: str, reviewer: str) -> None:
        """Append a decision about a clip of this queue. Raises LabError for one that cannot be stored."""
        item = self.items.get(name)
        if item is None or verdict not in corrections.VERDICTS:
            raise LabError("this clip is not in the queue: reload the page")
        after = speech_text.clean(after) if verdict == "correct" else ""
        if verdict == "correct" and not speech_text.normalise(after):
            raise LabError("a correction needs a text: write what is said, or reject the clip")
        if len(after) > MAX_CHARS:
            raise LabError(f"a transcript has at most {MAX_CHARS:,} characters, got {len(after):,}: shorten it")
        if verdict == "correct" and after == item.text:
            verdict, after = "accept", ""
        row = {
            "id": item.id,
            "before": item.text,
            "verdict": verdict,
            "after": after,
            "reviewer": " ".join(reviewer.split())[:60],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self._model,
            "heard": item.heard,
        }
        with self._lock, self._log.locked():
            corrections.take_over(self._path)
            self._log.append(row)

    def progress(self) -> Progress:
        """Return how far the review is, decisions of other processes included."""
        decided = self._decided()
        wrong = {name: one.verdict != "accept" for name, one in decided.items()}
        return Progress(len(wrong), sum(wrong.values()), len(self.items), self._share(wrong))

    def decision(self, name: str) -> corrections.Correction | None:
        """Return the last decision about a clip; None if there is none about its present transcript."""
        return self._decided().get(name)

    def _decided(self) -> dict[str, corrections.Correction]:
        """Return the decisions that fit a clip of this queue and its transcript."""
        read = corrections.read(self._path)
        return {name: one for name, one in read.items() if name in self.items and self.items[name].text == one.before}

    def _share(self, wrong: dict[str, bool]) -> float | None:
        if len(wrong) < MIN_DECISIONS:
            return None
        found = sum(wrong.values())
        scores = np.array([self.items[name].score for name in wrong])
        rest = np.array([item.score for name, item in self.items.items() if name not in wrong])
        expected = float(error_probabilities(scores, np.array([*wrong.values()]), rest).sum()) if len(rest) else 0.0
        return found / (found + expected) if found + expected > 0 else 1.0


def error_probabilities(scores: np.ndarray, wrong: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the probability that each of `others` is wrong, given reviewed clips and their verdicts, float64 [n].

    A logistic regression on the score, fitted to the reviewed clips with a small ridge. The order depends on the scores
    alone, so the reviewed clips say, at each score, what the others are like; the clips drawn at random cover the low
    scores. Targets are slightly inside 0 and 1 (Platt 1999).
    """
    centre, width = scores.mean(), max(float(scores.std()), 1e-9)
    design = np.stack([(scores - centre) / width, np.ones(len(scores))], axis=1)
    n_wrong, n = int(wrong.sum()), len(wrong)
    targets = np.where(wrong, (n_wrong + 1) / (n_wrong + 2), 1 / (n - n_wrong + 2))
    weights = np.zeros(2)
    for _ in range(_STEPS):
        predicted = _sigmoid(design @ weights)
        gradient = design.T @ (predicted - targets) + _RIDGE * weights
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + _RIDGE * np.eye(2)
        weights = weights - np.clip(np.linalg.solve(curvature, gradient), -1, 1)
    return _sigmoid(max(weights[0], 0.0) * (others - centre) / width + weights[1])


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
