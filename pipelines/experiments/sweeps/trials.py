"""trials.json: what a sweep has tried and what came of it, written anew, whole, with every change."""

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
    """One setting of the searched parameters, and how far it has come."""

    number: int
    """From 1, in the order in which they were begun."""
    settings: dict[str, Any]
    target: int
    """The step that it was sent to last."""
    state: Literal["begun", "paused", "finished", "diverged", "failed"] = "begun"
    """`begun`: sent to its target, with no answer yet. `paused`: there, with a checkpoint. `failed`: for another reason
    than its loss; it is tried again with the next call."""
    looks: dict[int, float] = field(default_factory=dict)
    """Step to WER on the validation split."""
    seconds: float = 0.0
    """Of training, over all sittings."""
    run: str = ""
    """Its folder's name, which its settings, data, base model and the lab's code decide."""
    reason: str = ""
    """Why it diverged or failed."""
    attempts: int = 0
    """While it is under way: how often it was sent off from the checkpoint of step `sent_from`. A process that was
    killed could not say so; that it was sent before and nothing came of it does."""
    sent_from: int = 0

    @property
    def steps(self) -> int:
        """The last step at which it was looked at."""
        return max(self.looks, default=0)

    @property
    def broke_off(self) -> bool:
        """Whether it came to an end that has no WER."""
        return self.state in ("diverged", "failed")

    @property
    def wer(self) -> float:
        """The best so far: that of the weights that are kept. Infinite where there is none."""
        return self.wer_at(self.steps)

    def wer_at(self, step: int) -> float:
        """The best up to `step`."""
        if self.broke_off:
            return math.inf
        return min((wer for at, wer in self.looks.items() if at <= step), default=math.inf)

    def reached(self, step: int) -> bool:
        """Whether its WER at `step` is known; a trial that has ended has come to every step."""
        return self.broke_off or self.state == "finished" or self.steps >= step


class Record:
    """The trials of the sweep in `folder` by number. LabError where its file is damaged."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        try:
            told = json.loads(self.path.read_text("utf-8")) if self.path.exists() else []
            self.trials = {row["number"]: _trial(row) for row in told}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LabError(
                f"the sweep's record {self.path} is damaged ({type(error).__name__}: {error}). Remove it and run the "
                "same command again: the same trials are drawn anew, and what was trained of them is found"
            ) from None

    def put(self, trial: Trial) -> None:
        """Note a trial, in the place of what was known of it."""
        self.trials[trial.number] = trial
        manifest.write_json(self.path, [asdict(trial) for trial in self.trials.values()])


def _trial(row: dict[str, Any]) -> Trial:
    return Trial(**{**row, "looks": {int(step): wer for step, wer in row["looks"].items()}})
