"""trials.json: the settings and results of a sweep's trials. The complete file is rewritten with every change."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.infra import manifest
from pipelines.infra.errors import LabError

FILE = "trials.json"


@dataclass(frozen=True)
class Trial:
    """One combination of searched settings and its results."""

    number: int
    """From 1, in the order in which trials started."""
    settings: dict[str, Any]
    target: int
    """Last step that it was to train to."""
    state: Literal["begun", "paused", "finished", "diverged", "failed"] = "begun"
    """`begun`: no result yet. `paused`: reached its target, with a checkpoint. `diverged`: NaN or infinite loss.
    `failed`: any other error; it is tried again with the next call."""
    looks: dict[int, float] = field(default_factory=dict)
    """Step to WER on the validation split."""
    seconds: float = 0.0
    """Training time, over all calls."""
    run: str = ""
    """Name of its folder, determined by its settings, data, base model and the lab's code."""
    reason: str = ""
    """Why it diverged or failed."""
    attempts: int = 0
    """Number of starts from the checkpoint of step `sent_from` without a result: detects processes that were killed."""
    sent_from: int = 0

    @property
    def steps(self) -> int:
        """Last step with a validation score."""
        return max(self.looks, default=0)

    @property
    def has_no_score(self) -> bool:
        """True if it ended without a WER."""
        return self.state in ("diverged", "failed")

    @property
    def wer(self) -> float:
        """Lowest WER so far, which is that of the kept weights; infinite if there is none."""
        return self.wer_at(self.steps)

    def wer_at(self, step: int) -> float:
        """Return the lowest WER up to `step`."""
        if self.has_no_score:
            return math.inf
        return min((wer for at, wer in self.looks.items() if at <= step), default=math.inf)

    def reached(self, step: int) -> bool:
        """Return True if it was scored at `step`, or has ended."""
        return self.has_no_score or self.state == "finished" or self.steps >= step


class Record:
    """The trials of the sweep in `folder` by number. Raises LabError if its file is damaged."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        try:
            rows = json.loads(self.path.read_text("utf-8")) if self.path.exists() else []
            self.trials = {row["number"]: _trial(row) for row in rows}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LabError(
                f"the sweep's record {self.path} is damaged ({type(error).__name__}: {error}). Remove it and run the "
                "same command again: the same trials are drawn again, and their finished training is reused"
            ) from None

    def put(self, trial: Trial) -> None:
        """Add a trial, or replace its earlier record, and write the file."""
        self.trials[trial.number] = trial
        manifest.write_json(self.path, [asdict(trial) for trial in self.trials.values()])


def _trial(row: dict[str, Any]) -> Trial:
    return Trial(**{**row, "looks": {int(step): wer for step, wer in row["looks"].items()}})
