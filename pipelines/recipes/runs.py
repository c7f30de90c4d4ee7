"""TODO: describe this module."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines.infra import environment, manifest, progress_file
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe

REHEARSAL_FOLDER = "thrown_away"
"""Folder of what a rehearsal makes; each one begins by removing it."""


def experiment_folder(recipe: Recipe, runs: str | Path = "") -> Path:
    """Where everything lies that runs of this recipe made."""
    return environment.runs_folder(runs) / folder_name(recipe)


def read_stages(recipe: Recipe, runs: str | Path = "") -> dict[str, Any]:
    """What the stages noted: name to facts; empty where none ran. A rehearsal takes the features of the real thing."""
    try:
        noted = json.loads((experiment_folder(recipe, runs) / "stages.json").read_text("utf-8"))
    except (OSError, ValueError):
        noted = {}
    if recipe.training.fast_dev_run and "features" not in noted:
        plain = recipe.model_copy(update={"training": recipe.training.model_copy(update={"fast_dev_run": False})})
        noted |= {name: facts for name, facts in read_stages(plain, runs).items() if name == "features"}
    return noted


@contextlib.contextmanager
def record_stage(recipe: Recipe, runs: str | Path, name: str) -> Iterator[dict[str, Any]]:
    """Note what the stage made and how long it took, once it has ended well."""
    started, facts = time.monotonic(), {}
    yield facts
    if not distributed.is_main_process():
        return
    folder = experiment_folder(recipe, runs)
    folder.mkdir(parents=True, exist_ok=True)
    facts["seconds"] = round(time.monotonic() - started, 2)
    manifest.write_json(folder / "stages.json", {**read_stages(recipe, runs), name: facts})


@contextlib.contextmanager
def clip_progress_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in clips and write its lines to the progress file; yield the function that advances it."""
    from tqdm.auto import tqdm

    written_at = float("-inf")

    def advance(n: int) -> None:
        nonlocal written_at
        bar.update(n)
        if time.monotonic() - written_at >= progress_file.INTERVAL_S or bar.n == total:
            written_at = time.monotonic()
            progress_file.append(f"{label}: {bar.n}/{total or '?'} clips")

    with tqdm(desc=label, total=total, unit="clip") as bar:
        yield advance


def newest_finished_model(runs: Path) -> Path | None:
    """The sealed model folder `<runs>/*/train-*/model` that was finished last; unfinished ones do not count."""
    found = [folder for folder in runs.glob("*/train-*/model") if _is_finished_model(folder)]
    return max(found, key=lambda folder: ((folder / manifest.MANIFEST).stat().st_mtime_ns, folder.name), default=None)


def _is_finished_model(folder: Path) -> bool:
    return manifest.problem(folder, thorough=False) is None and manifest.read(folder).get("kind") == "model"


def folder_name(recipe: Recipe) -> str:
    """Where the runs of a recipe lie: a rehearsal leaves the real ones alone."""
    return f"{recipe.name}-fast-dev-run" if recipe.training.fast_dev_run else recipe.name


def newest_model_of_seed(folder: Path, seed: int) -> Path | None:
    """The model, among the runs in a recipe's folder with this `training.seed`, that was finished last.

    LabError where two of them were trained with other settings: which one is meant, nobody can know.
    """
    told = {
        run / "model": json.loads((run / "model" / "recipe.json").read_text("utf-8"))
        for run in sorted(folder.glob("train-*"))
        if _is_finished_model(run / "model")
    }
    of_seed = [model for model, recipe in told.items() if recipe["training"]["seed"] == seed]
    if other := [model for model in of_seed[1:] if told[model] != told[of_seed[0]]]:
        raise LabError(
            f"expected one recipe behind the runs with training.seed={seed} in {folder}, got {of_seed[0]} and "
            f"{other[0]} with other settings: name the model that is meant, or remove one"
        )
    return max(of_seed, key=lambda model: (model / manifest.MANIFEST).stat().st_mtime_ns, default=None)
