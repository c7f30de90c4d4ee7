"""Keep what the model writes for a few validation clips at each validation: a file of the run for notebook 02.

<run>/samples.jsonl    {"step": 100, "texts": {"<clip id>": "<hypothesis>", ...}}, one line per validation
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FILE = "samples.jsonl"
CLIPS = 5


def positions(n: int) -> list[int]:
    """Return the positions of at most CLIPS of `n` clips, spread evenly."""
    return sorted({int(position) for position in np.linspace(0, n - 1, min(CLIPS, n))})


def append(run: Path, step: int, ids: Sequence[str], hypotheses: Sequence[str]) -> None:
    """Add the texts of the chosen clips to the run's file. A disk that is full stops no training."""
    texts = {ids[position]: hypotheses[position] for position in positions(len(ids))}
    line = json.dumps({"step": step, "texts": texts}, ensure_ascii=False)
    with contextlib.suppress(OSError), (run / FILE).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def read(run: Path) -> dict[int, dict[str, str]]:
    """Return the texts by step and clip id, in order of the steps; empty if the run has no file.

    A step that was validated again after an interruption counts once, and a line that was cut is left out.
    """
    by_step: dict[int, dict[str, str]] = {}
    try:
        lines = (run / FILE).read_text("utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):
            entry = json.loads(line)
            by_step[entry["step"]] = entry["texts"]
    return dict(sorted(by_step.items()))
