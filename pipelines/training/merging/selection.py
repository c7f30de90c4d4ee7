"""Score mixtures on validation clips, of the target and of the guards, and select one. No test clip is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.infra import manifest

logger = logging.getLogger(__name__)

TARGET = "validation"
_FILE = "scores.json"


@dataclass(frozen=True)
class Scores:
    """Validation WERs of mixtures, by label and then by set; stored in a file, so that each is decoded once."""

    folder: Path
    measure: Callable[[str, Any], Mapping[str, float]]
    """Function from a label and a function that builds the model to the WER of each set."""
    wers: dict[str, dict[str, float]] = field(default_factory=dict)
    logged: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path, measure: Callable[[str, Any], Mapping[str, float]]) -> Scores:
        """Return the scores that an earlier call stored in `folder`."""
        return cls(folder, measure, manifest.read_json(folder / _FILE) or {})

    def of_mixture(self, label: str, build: Callable[[], Any]) -> dict[str, float]:
        """Return and log the WERs of a mixture; build and decode it only if they are not stored."""
        if label not in self.wers:
            self.wers[label] = dict(self.measure(label, build))
            manifest.write_json(self.folder / _FILE, self.wers)
        if label not in self.logged:
            logger.info(f"{label:<24}" + "  ".join(f"{name} {wer:.3f}" for name, wer in self.wers[label].items()))
            self.logged.add(label)
        return self.wers[label]


@dataclass(frozen=True)
class Limits:
    """Validation WER of the base model on each guard set, and the largest allowed increase."""

    base: Mapping[str, float]
    max_increase: Mapping[str, float]

    def excess(self, wers: Mapping[str, float]) -> float:
        """Return the largest increase of a guard's WER beyond the allowed one; 0 if every guard is kept."""
        return max([0.0, *(wers[name] - self.base[name] - most for name, most in self.max_increase.items())])

    def broken(self, wers: Mapping[str, float]) -> list[str]:
        """Return the names of the guards whose WER rose by more than is allowed."""
        return [name for name, most in self.max_increase.items() if wers[name] > self.base[name] + most]


def best(candidates: Iterable[tuple[str, Mapping[str, float]]], limits: Limits) -> str:
    """Return the label of the candidate with the lowest validation WER among those that keep every guard.

    If none does, it is the one that violates least. Of equal ones it is the first.
    """
    return min(candidates, key=lambda candidate: (limits.excess(candidate[1]), candidate[1][TARGET]))[0]
