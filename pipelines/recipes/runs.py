"""The folders of a recipe's runs, and the record of its stages in stages.json."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from pipelines.infra import console, environment, manifest, progress_file
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.settings import Recipe

REHEARSAL_FOLDER = "thrown_away"
"""Folder for the results of a rehearsal (training.fast_dev_run), which removes it first."""


def experiment_folder(recipe: Recipe, runs: str | Path = "") -> Path:
    """Return the folder with all artefacts of this recipe."""
    return environment.runs_folder(runs) / folder_name(recipe)


def read_stages(recipe: Recipe, runs: str | Path = "") -> dict[str, Any]:
    """Return the records of finished stages, by stage; empty if there are none.

    A rehearsal without features uses those of the full experiment.
    """
    stages = manifest.read_json(experiment_folder(recipe, runs) / "stages.json") or {}
    if recipe.training.fast_dev_run and "features" not in stages:
        full = recipe.model_copy(update={"training": recipe.training.model_copy(update={"fast_dev_run": False})})
        stages |= {name: record for name, record in read_stages(full, runs).items() if name == "features"}
    return stages


@contextlib.contextmanager
def record_stage(recipe: Recipe, runs: str | Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield a dictionary for the stage's results; add the seconds and save it if the block succeeds."""
    started, record = time.monotonic(), {}
    yield record
    if not distributed.is_main_process():
        return
    folder = experiment_folder(recipe, runs)
    folder.mkdir(parents=True, exist_ok=True)
    record["seconds"] = round(time.monotonic() - started, 2)
    with filelock.FileLock(folder / ".stages.json.lock"):  # stages of other processes
        manifest.write_json(folder / "stages.json", {**read_stages(recipe, runs), name: record})


@contextlib.contextmanager
def clip_progress_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in clips and write its lines to the progress file; yield the function that advances it."""
    written_at = float("-inf")

    def advance(n: int) -> None:
        nonlocal written_at
        bar.update(n)
        if time.monotonic() - written_at >= progress_file.INTERVAL_S or bar.n == total:
            written_at = time.monotonic()
            progress_file.append(f"{label}: {bar.n}/{total or '?'} clips")

    with console.progress_bar(desc=label, total=total, unit="clip") as bar:
        yield advance


def newest_finished_model(runs: Path) -> Path | None:
    """Return the finished model folder `<runs>/*/train-*/model` that was made last, or None."""
    models = [folder for folder in runs.glob("*/train-*/model") if _is_finished_model(folder)]
    return max(models, key=lambda folder: (manifest.made_at(folder), str(folder)), default=None)


def _is_finished_model(folder: Path) -> bool:
    return manifest.problem(folder, thorough=False) is None and manifest.read(folder).get("kind") == "model"


def folder_name(recipe: Recipe) -> str:
    """Return the name of the recipe's folder; a rehearsal has a separate one."""
    return f"{recipe.name}-fast-dev-run" if recipe.training.fast_dev_run else recipe.name


def newest_model_of_seed(folder: Path, seed: int) -> Path | None:
    """Return the newest finished model with this `training.seed` in a recipe's folder, or None.

    Raises LabError if two of them were trained with different settings.
    """
    recipes = {
        run / "model": json.loads((run / "model" / "recipe.json").read_text("utf-8"))
        for run in sorted(folder.glob("train-*"))
        if _is_finished_model(run / "model")
    }
    of_seed = [model for model, recipe in recipes.items() if recipe["training"]["seed"] == seed]
    if other := [model for model in of_seed[1:] if recipes[model] != recipes[of_seed[0]]]:
        raise LabError(
            f"expected one recipe behind the runs with training.seed={seed} in {folder}, got {of_seed[0]} and "
            f"{other[0]} with other settings: name the model that is meant, or remove one"
        )
    return max(of_seed, key=manifest.made_at, default=None)
