"""The command of the feature pipeline, and the one that shows a recipe: features and recipe."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipelines.cli.options import (
    CacheUri,
    DryRun,
    Json,
    Overrides,
    RecipeName,
    Runs,
    load_recipe,
    print_plan,
    print_result,
)


def features(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    publish: Annotated[
        str, typer.Option(help="Also copy the cache to this URI: hub://…, hopsworks://… or a folder.")
    ] = "",
    cluster: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Extract on a Ray cluster: auto (running here), host:6379 or local."),
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Stage 01: build the recipe's feature cache from speech and text.

    Example: python -m pipelines features --recipe tour
    """
    from pipelines.features import pipeline, rejections
    from pipelines.infra import environment
    from pipelines.recipes import commands
    from pipelines.recipes import runs as recipe_runs

    settings = load_recipe(recipe, set_)
    if dry_run:
        folder = cache or environment.runs_folder(runs) / "features"
        return print_plan(as_json, f"make a feature cache of the source {settings.source.kind!r}", folder, settings)
    try:
        result = pipeline.run(settings, runs=runs, cache_uri=cache, publish=publish, ray_address=cluster)
    except rejections.TooManyRejected as error:
        print_result(as_json, error.cache.as_dict() | rejections.as_dict(error.cache), str(error.cache))
        raise
    fields = result.as_dict() | rejections.as_dict(result)
    if publish:
        fields["published_uri"] = recipe_runs.read_stages(settings, runs)["publication"]["cache_uri"]
    print_result(as_json, fields, f"{result}\nNext: {commands.command('train', recipe=settings, runs=runs)}")


def recipe(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a .toml file.")] = "tour",
    set_: Overrides = (),
    as_json: Json = False,
):
    """Show all settings of a recipe, with overrides applied.

    Example: python -m pipelines recipe tour --set training.steps=60
    """
    from pipelines.recipes.commands import LATE_SETTINGS

    loaded = load_recipe(recipe, set_)
    settings = loaded.settings() | (loaded.search_settings() if loaded.search.space else {})
    settings |= {name: value for name, value in LATE_SETTINGS.items() if name not in settings}
    print_result(as_json, settings, "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()))
