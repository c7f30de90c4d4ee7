"""Keep what the model writes for a few validation clips, before training and at each validation: for notebook 02.

<run>/samples.jsonl    {"step": 100, "texts": {"<clip id>": "<hypothesis>", ...}}, one line per step, in order

The file is replaced whole, so a checkpoint may hold a hard link to it. A resumed run goes on with the file of its
checkpoint, on this or another machine.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.infra import manifest

FILE = "samples.jsonl"
CLIPS = 5


def positions(n: int) -> list[int]:
    """Return the positions of at most CLIPS of `n` clips, spread evenly."""
    return sorted({int(position) for position in np.linspace(0, n - 1, min(CLIPS, n))})


def add(run: Path, step: int, ids: Sequence[str], hypotheses: Sequence[str]) -> None:
    """Add the texts of the chosen clips of a split to the run's file; an earlier entry of the step is replaced."""
    if ids:
        _write(run, {**read(run), step: {ids[position]: hypotheses[position] for position in positions(len(ids))}})


def restore(run: Path, checkpoint: Path | None, step: int = 0) -> None:
    """Make the run's file what it was when `checkpoint` was written at `step`; remove it if there is no checkpoint.

    A checkpoint of an older version has no such file: the run's own entries up to `step` are kept then.
    """
    by_step = checkpoint and (read(checkpoint) or read(run))
    _write(run, {earlier: texts for earlier, texts in (by_step or {}).items() if earlier <= step})


def read(folder: Path) -> dict[int, dict[str, str]]:
    """Return the texts by step and clip id, in order of the steps; empty if the run or checkpoint has no file.

    A line that was cut is left out, and of a step that has two lines the last one counts: older versions appended.
    """
    by_step: dict[int, dict[str, str]] = {}
    try:
        lines = (folder / FILE).read_text("utf-8").split("\n")  # a text may hold other line breaks of Unicode
    except (OSError, ValueError):
        return {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            by_step[entry["step"]] = entry["texts"]
    return dict(sorted(by_step.items()))


def _write(run: Path, by_step: dict[int, dict[str, str]]) -> None:
    """Replace the run's file; remove it if there is nothing to write. A disk that is full stops no training."""
    entries = ({"step": step, "texts": texts} for step, texts in sorted(by_step.items()))
    lines = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)
    with contextlib.suppress(OSError):
        if lines:
            manifest.write_bytes(run / FILE, lines.encode())
        else:
            (run / FILE).unlink(missing_ok=True)
