"""The claims that follow from the exported tables of a series: WER, differences to the baselines, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.experiments.comparison.findings import holm, is_significant
from pipelines.experiments.series import table_files
from pipelines.speech import scoring
from pipelines.speech.intervals import CLIPS, Units
from pipelines.speech.scoring import Edits

BASELINES = ("planted-checked", "planted-raw")
"""Recipes that the others are compared with: a fair baseline, and one without any curation. In a series without them
it is the first recipe."""


def of_tables(folder: Path, baselines: Sequence[str] = BASELINES) -> list[dict[str, Any]]:
    """Compute the results of each recipe from the exported tables alone, with the functions of `compare`.

    A claim has `recipe`, `seeds`, `wer` and its `ci95`, `n`, `speakers`, `over` (what intervals resample), and
    `against`: for each baseline `delta` (WER minus the baseline's), its `ci95`, `p`, and `p_holm`, corrected for the
    number of recipes.
    """
    edits, speakers = _read_edits(table_files.read_utterances(folder))
    named = [baseline for baseline in baselines if baseline in edits] or [next(iter(edits))]
    against = {baseline: _differences(edits, speakers, baseline) for baseline in named}
    rows = []
    for recipe, by_seed in edits.items():
        rest = [list(third.values()) for other, third in edits.items() if other != recipe]
        score = scoring.score_over_seeds(list(by_seed.values()), speakers, others=rest)
        rows.append(
            {
                "recipe": recipe,
                "seeds": list(by_seed),
                "wer": score.wer,
                "ci95": score.ci95,
                "n": len(speakers),
                "speakers": score.speakers,
                "over": score.over,
                "against": {name: by_recipe[recipe] for name, by_recipe in against.items() if recipe in by_recipe},
            }
        )
    return rows


def _read_edits(table: pd.DataFrame) -> tuple[dict[str, dict[int, Edits]], list[str]]:
    """Return word edits per recipe and seed, and the speaker of each utterance; character counts are zero."""
    words = table["words"].to_numpy(np.int64)
    zeros = np.zeros_like(words)
    edits: dict[str, dict[int, Edits]] = {}
    for column in table_files.results(table):
        recipe, _, seed = column.partition("/")
        counts = np.array([cell.split() for cell in table[column]], dtype=np.int64)
        edits.setdefault(recipe, {})[int(seed)] = Edits(*counts.T, words, zeros, zeros)
    return edits, table["speaker"].tolist()


def _differences(edits: dict[str, dict[int, Edits]], speakers: list[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Return the difference of each other recipe to the baseline; the seed variance is estimated from all of them."""
    by_recipe = {recipe: list(by_seed.values()) for recipe, by_seed in edits.items()}
    theirs = by_recipe.pop(baseline)
    differences = {
        recipe: scoring.difference_over_seeds(
            ours, theirs, speakers, others=[third for other, third in by_recipe.items() if other != recipe]
        )
        for recipe, ours in by_recipe.items()
    }
    corrected = holm([difference.p for difference in differences.values()])
    return {
        recipe: {"delta": difference.delta, "ci95": difference.ci95, "p": difference.p, "p_holm": p_holm}
        for (recipe, difference), p_holm in zip(differences.items(), corrected, strict=True)
    }


def headline(claim: dict[str, Any]) -> list[str]:
    """Return a claim as the comment lines at the top of a recipe."""
    units, n_seeds = Units.of(claim), len(claim["seeds"])
    lines = [
        f"WER {claim['wer']:.3f} (95 % {units.interval(claim['ci95'])}); normalised, {claim['n']} utterances, "
        f"{units.who}, {n_seeds} seed{'s' if n_seeds > 1 else ''}."
    ]
    for baseline, difference in claim["against"].items():
        direction = "better" if difference["delta"] < 0 else "worse"
        verdict = direction if is_significant(difference["ci95"], difference["p_holm"]) else "no difference shown"
        if units.over == CLIPS:
            verdict = f"no conclusion, {units.who}"
        lines.append(
            f"Against `{baseline}`: {difference['delta']:+.3f} (95 % {units.interval(difference['ci95'], '{:+.3f}')}, "
            f"p = {difference['p']:.2g}, corrected {difference['p_holm']:.2g}): {verdict}."
        )
    return lines
