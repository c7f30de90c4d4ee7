"""The files of a new project: two recipes, a plan and a README to fill in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import recipes
from pipelines.infra.errors import LabError

BASELINE, IDEA, PLAN, README, PAGE = "baseline.toml", "idea.toml", "plan.md", "README.md", "project.html"
TODO = "TODO"
"""Marks what the student has to replace. A section that contains it is not filled in."""
_NAME = re.compile(r"[a-z][a-z0-9-]{1,39}")

_PLAN = """# Plan

Write this before you train anything. What you decide afterwards is no longer a test.

## Hypothesis

TODO: what will change, in which direction, and why. Example: "Clips with noise like that of a kitchen lower the WER on
the kitchen test set, because the model has never heard a fan."

## Change

TODO: the one thing in which idea.toml differs from baseline.toml.

## Data

TODO: where the clips come from, how many hours and speakers, and how test speakers are kept out of training.

## Primary comparison

TODO: which figure decides, on which test set, with how many seeds for each recipe (at least two), and which ΔWER would
be large enough to matter.
"""

_README = """# {name}

## Idea

TODO: what it does, and for whom. Two or three sentences.

## Data

| | |
|---|---|
| source | TODO |
| hours and speakers | TODO |
| licence | TODO |
| consent of the speakers | TODO |
| known faults | TODO |

## Model-centric

TODO: what could be improved in the model or its settings, and what you tried.

## Data-centric

TODO: what could be improved in the data, and what you tried.

## Result

TODO: what the comparison shows, and what it does not show. `project train` prints the figures, and `project check` adds
them to the page.

## Errors

TODO: discuss five clips of the test set: listen to them in report.html (below runs/{name}/reports). Begin each with its
id. The page adds the sound, the reference and the transcripts.

- `clip-0001`: TODO what is wrong, and what you think is the reason.

## Demo

TODO: the address of your Space, or the name of a recording in this folder, such as demo.mp4.

## Cost

TODO: hours of computing and of your own time, and on which machine.
"""


def require_new(folder: Path, base: str, changes: Mapping[str, Any]) -> None:
    """Raise LabError unless a project can begin in this folder.

    The folder does not exist or is empty, its name can be that of a recipe, and the recipe `base` exists and takes
    `changes`, names of settings to values.
    """
    name = folder.resolve().name
    if not _NAME.fullmatch(name):
        raise LabError(
            "a project is named with 2 to 40 lower-case letters, digits and hyphens, such as kitchen-noise; "
            f"got {name[:60]!r}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"a new project needs an empty folder, {folder} is not empty: choose another name")
    if base.endswith(".toml"):
        raise LabError(f"--base takes a recipe of the lab, such as tour, got {base!r}: copy its lines into {BASELINE}")
    recipes.load(base, changes)


def create(folder: Path, base: str, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the files of a new project and return them. Raises LabError like `require_new`.

    The baseline is the shipped recipe `base` with another name; the idea extends the baseline, with `changes`.
    """
    require_new(folder, base, changes or {})
    name = folder.resolve().name
    lines = [f"{setting} = {json.dumps(value, ensure_ascii=False)}\n" for setting, value in (changes or {}).items()]
    files = {
        BASELINE: f"# What the idea is compared with: the recipe {base}. What you change here, changes for both.\n"
        f'extends = "{base}"\nname = "{name}-baseline"\n',
        IDEA: f'# The idea: the baseline with one change.\nextends = "{BASELINE}"\nname = "{name}"\n\n'
        + ("".join(lines) or "# Change one thing, such as:\n# augment.noise_share = 0.5\n"),
        PLAN: _PLAN,
        README: _README.format(name=name),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(content, "utf-8")
    return [folder / file for file in files]
