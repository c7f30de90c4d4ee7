"""ASHA, the asynchronous successive halving of Li et al. (2020), in its form with promotions.

Trials pause at rungs: steps that grow by the factor `reduction`. Of those that came to a rung, one in `reduction` is to
go on, by WER. Whenever somebody is free, the highest rung with a trial that is due sends it on; else a new one begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from itertools import pairwise

from pipelines.experiments.sweeps.trials import Trial
from pipelines.recipes.settings import Recipe


def rungs(recipe: Recipe) -> list[int]:
    """The steps at which trials pause, each a look at validation, and last the recipe's number of steps."""
    settings, search = recipe.training, recipe.search
    found, at = [], search.min_steps or settings.eval_every
    while search.reduction > 1 and (rung := math.ceil(at / settings.eval_every) * settings.eval_every) < settings.steps:
        found.append(rung)
        at *= search.reduction
    return [*dict.fromkeys(found), settings.steps]


def next_move(
    trials: Mapping[int, Trial], under_way: Set[int], rungs: list[int], reduction: int, may_begin: bool
) -> tuple[int | None, int] | None:
    """The number of the trial that is to go on, None for a new one, and the step to go to. None: nothing is to be done.

    What was cut off comes first. When nothing else is due, the trial with the lowest WER goes on to the end: it is what
    the sweep comes to.
    """
    idle = [trial for number, trial in trials.items() if number not in under_way]
    for trial in idle:
        if trial.state == "begun":
            return trial.number, trial.target
    waiting = [trial for trial in idle if trial.state == "paused"]
    following = dict(pairwise(rungs))
    for rung in reversed(following):
        there = sorted((t for t in trials.values() if t.reached(rung)), key=lambda t: (t.wer_at(rung), t.number))
        for trial in there[: len(there) // reduction]:
            if trial in waiting and trial.target == rung:
                return trial.number, following[rung]
    if may_begin:
        return None, rungs[0]
    best = min(trials.values(), key=lambda trial: (trial.wer, trial.number), default=None)
    return (best.number, following[best.target]) if best in waiting and not under_way else None
