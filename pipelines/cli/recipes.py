"""The command that shows a recipe: recipe."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipelines.cli.options import Json, Overrides, load_recipe, print_result


def recipe(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a .toml file.")] = "tour",
    set_: Overrides = (),
    as_json: Json = False,
):
    """Show all settings of a recipe, with overrides applied.

    Example: python -m pipelines recipe tour --set training.steps=60
    """
    loaded = load_recipe(recipe, set_)
    settings = loaded.settings() | (loaded.search_settings() if loaded.search.space else {})
    print_result(as_json, settings, "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()))
