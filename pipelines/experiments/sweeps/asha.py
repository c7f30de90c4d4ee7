"""ASHA: the asynchronous successive halving algorithm of Li et al. (2020), with promotions.

Trials pause at rungs: steps that grow by the factor `reduction`. Of the n trials that reached a rung, the
n // `reduction` with the lowest WER are promoted to the next rung. A free slot takes a trial from the highest rung that
has one to promote; if no rung has one, a new trial starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from itertools import pairwise

from pipelines.experiments.sweeps.trials import Trial
from pipelines.recipes.settings import Recipe


def rungs(recipe: Recipe) -> list[int]:
    """Return the steps at which trials pause, each a validation step, then the recipe's number of steps as the last."""
    settings, search = recipe.training, recipe.search
    steps, step = [], search.min_steps or settings.eval_every
    while (
        rung := math.ceil(step / settings.eval_every) * settings.eval_every
    ) < settings.steps and search.reduction > 1:
        steps.append(rung)
        step *= search.reduction
    return [*dict.fromkeys(steps), settings.steps]


def next_move(
    trials: Mapping[int, Trial], running: Set[int], rungs: list[int], reduction: int, may_start: bool
) -> tuple[int | None, int] | None:
    """Return the number of the trial to run next (None: a new trial) and its target step; None if nothing is left.

    Interrupted trials come first. If nothing else is left, the trial with the lowest WER continues, one rung at a time,
    to the last step: its model is the result of the sweep.
    """
    idle = [trial for number, trial in trials.items() if number not in running]
    for trial in idle:
        if trial.state == "begun":
            return trial.number, trial.target
    waiting = [trial for trial in idle if trial.state == "paused"]
    next_rung = dict(pairwise(rungs))
    for rung in reversed(next_rung):
        ranked = sorted((t for t in trials.values() if t.reached(rung)), key=lambda t: (t.wer_at(rung), t.number))
        for trial in ranked[: len(ranked) // reduction]:
            if trial in waiting and trial.target == rung:
                return trial.number, next_rung[rung]
    if may_start:
        return None, rungs[0]
    best = min(trials.values(), key=lambda trial: (trial.wer, trial.number), default=None)
    return (best.number, next_rung[best.target]) if best in waiting and not running else None
