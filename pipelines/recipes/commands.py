"""Commands that messages suggest: pasted into a shell, they select the same recipe, settings and runs folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pipelines.infra import environment
from pipelines.infra.errors import LabError
from pipelines.recipes.base_settings import flatten
from pipelines.recipes.data_settings import GuardSettings
from pipelines.recipes.loading import load, names
from pipelines.recipes.settings import Recipe

LATE_SETTINGS = {"curation.corrections": ""}
"""Settings that a dump leaves out with their default."""


def command(name: str, *words: object, recipe: Recipe | None = None, runs: str | Path = "") -> str:
    """Return `python -m pipelines NAME` with the options for `recipe` and `runs`, and `words`, quoted for a shell."""
    options = recipe_options(recipe) if recipe else []
    return shlex.join(["python", "-m", "pipelines", name, *options, *map(str, words), *runs_options(runs)])


def runs_options(runs: str | Path) -> list[str]:
    """Return `--runs FOLDER`; an empty list for the folder that is the default."""
    is_default = environment.runs_folder(runs) == environment.runs_folder()
    return [] if is_default else ["--runs", str(runs)]


def recipe_options(recipe: Recipe) -> list[str]:
    """Return `--recipe NAME` and a `--set NAME=VALUE` for each setting in which `recipe` differs from it.

    The name is the one that the recipe was loaded by. If that file is gone, it is the recipe of the lab with the same
    name, else the one with the fewest differences.
    """
    settings = recipe.settings()
    options = _options_from(recipe.origin, settings) if recipe.origin else None
    if options is None and recipe.name in names():
        options = _options_from(recipe.name, settings)
    if options is None:
        options = min((_options_from(name, settings) or [] for name in names()), key=len)
    return options


def _options_from(name: str, settings: dict[str, Any]) -> list[str] | None:
    """Return the options that turn the recipe `name` into `settings`; None if there is no such recipe."""
    try:
        start = LATE_SETTINGS | load(name).settings()
    except LabError:
        return None
    settings = LATE_SETTINGS | settings
    start |= _guard_defaults(settings, start)
    changed = [f"{setting}={_as_text(value)}" for setting, value in settings.items() if start[setting] != value]
    return ["--recipe", name, *(word for assignment in changed for word in ("--set", assignment))]


def _guard_defaults(settings: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the guards in `settings` that `start` lacks, by name of the setting."""
    defaults = flatten(GuardSettings().model_dump(mode="json"))
    guards = {name.split(".")[1] for name in settings.keys() - start.keys() if name.startswith("guards.")}
    return {f"guards.{guard}.{name}": value for guard in guards for name, value in defaults.items()}


def _as_text(value: Any) -> str:
    """Return a setting's value as `--set` reads it: text that is valid JSON is quoted, other text stays as it is."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, ensure_ascii=False)
