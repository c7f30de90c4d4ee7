"""Commands that continue a comparison: with another training seed, or with a report that is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import recipes
from pipelines.experiments.comparison import lookup
from pipelines.experiments.comparison.lookup import Experiment
from pipelines.experiments.evaluation import EvalReport
from pipelines.infra import manifest, redact
from pipelines.infra.errors import LabError
from pipelines.recipes.commands import command
from pipelines.recipes.runs import read_stages
from pipelines.recipes.settings import Recipe


def train_with_other_seed(experiment: Experiment, others: Iterable[Experiment], runs: Path) -> str:
    """Return the commands that train an experiment with the next seed, score it and compare again; in words if a file
    that they need is not on this machine."""
    lineage, seed = experiment.lineages[0], experiment.seeds[-1] + 1
    recipe, fork = recipe_of(lineage, runs), _fork_options(lineage, runs)
    if recipe is None or fork is None:
        origin = f", from {origin_of(lineage['fork'])} (--fork)" if lineage.get("fork") else ""
        return f"train {experiment.name} again with training.seed={seed}{origin}, evaluate it, and compare again"
    training = recipe.training.model_copy(update={"seed": seed})
    recipe = recipe.model_copy(update={"training": training})
    steps = [
        *_open_cache(recipe, lineage["cache"], runs),
        command("train", *fork, recipe=recipe, runs=runs),
        command("evaluate", recipe=recipe, runs=runs),
        compare_reports([report for one in others for report in one.reports], runs, recipe.name),
    ]
    return " && ".join(steps)


def _evaluate(report: EvalReport, model: str, runs: Path) -> str | None:
    """Return the commands that score `model` as `report` was scored; None without the settings of the report."""
    recipe = recipe_of(report.lineage, runs)
    if recipe is None:
        return None
    scored = (manifest.read(report.folder) or {}).get("identity", {}).get("cache", "")
    recipe = recipe.model_copy(update={"name": report.folder.absolute().parents[1].name})
    return " && ".join(
        [*_open_cache(recipe, scored, runs), command("evaluate", "--model", model, recipe=recipe, runs=runs)]
    )


def score_untuned(report: EvalReport, runs: Path) -> str:
    """Return how to score the model that `report`'s model was tuned from, or the teacher of a student."""
    teacher = (report.lineage.get("teacher") or {}).get("digest")
    if teacher:
        title, model = f"its teacher (run {teacher})", _teacher_folder(teacher, runs)
    else:
        recipe = recipe_of(report.lineage, runs)
        title, model = f"the base model {report.lineage.get('base', '')}", recipe.model.base if recipe else None
    commands = _evaluate(report, str(model), runs) if model else None
    return commands or f"evaluate {title} with the same recipe and settings"


def compare_reports(reports: Sequence[EvalReport], runs: str | Path, *more: str) -> str:
    """Return the command that compares reports, and the recipes `more`.

    Reports that a recipe's name stands for (`lookup.find`) are replaced by that name.
    """
    words: list[str] = []
    for report in reports:
        name = str(report.lineage.get("recipe", ""))
        folders = {one.folder for one in _found(name, runs)} if name else set()
        is_named = report.folder in folders and folders <= {one.folder for one in reports}
        words.append(name if is_named else str(report.folder))
    return command("compare", *dict.fromkeys([*words, *more]), runs=runs)


def recipe_of(lineage: Mapping[str, Any], runs: Path) -> Recipe | None:
    """Return the recipe that trained a model: from its run's folder, else from its lineage.

    None if the run is not below `runs` and its recipe named files, which are left out of a lineage.
    """
    run = _run_folder(lineage.get("digest"), runs)
    path = run / "recipe.toml" if run else None
    try:
        if path and path.is_file():
            recipe = recipes.load(path)
            # a recipe of the lab by its name: its command is shorter and can be read
            return recipes.resolve(recipe.model_dump(mode="json"), {}) if recipe.name in recipes.names() else recipe
        if redact.LOCAL_PATH in json.dumps(lineage.get("settings")):
            return None
        return recipes.resolve(lineage["settings"], {})
    except (LabError, KeyError):  # an older lab wrote it
        return None


def origin_of(fork: Mapping[str, Any]) -> str:
    """Return the weights that a fork started from, for messages."""
    return f"run {fork['run']} step {fork['step']}"


def _teacher_folder(digest: str, runs: Path) -> Path | None:
    """Return the folder of a teacher's model below `runs`, or None."""
    run = _run_folder(digest, runs)
    return run / "model" if run and (run / "model").is_dir() else None


def _found(name: str, runs: str | Path) -> list[EvalReport]:
    try:
        return lookup.find(name, runs, log_older=False)
    except LabError:
        return []


def _run_folder(digest: str | None, runs: Path) -> Path | None:
    return next(iter(sorted(runs.glob(f"*/train-{digest}"))), None) if digest else None


def _fork_options(lineage: Mapping[str, Any], runs: Path) -> list[str] | None:
    """Return the options that start from the same weights; None if these are not below `runs`."""
    fork = lineage.get("fork")
    if not fork:
        return []
    run = _run_folder(fork["run"], runs)
    for folder in (run / "model", run / "checkpoints" / f"checkpoint-{fork['step']}") if run else ():
        weights = (manifest.read(folder) or {"files": {}})["files"].get("model.safetensors", {})
        if weights.get("sha256") == fork["weights_sha256"]:
            return ["--fork", str(folder)]
    return None


def _open_cache(recipe: Recipe, digest: str, runs: Path) -> list[str]:
    """Return the command that makes the recipe's cache the newest one, unless it already is."""
    newest = read_stages(recipe, runs).get("features", {}).get("digest")
    return [] if newest == digest else [command("features", recipe=recipe, runs=runs)]
