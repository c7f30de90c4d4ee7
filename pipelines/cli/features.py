"""Commands of the feature pipeline: features and recipe."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipelines import recipes
from pipelines.cli.options import (
    CacheUri,
    DryRun,
    Json,
    Overrides,
    RecipeName,
    Runs,
    _again,
    _plan,
    _print,
    _recipe,
    app,
)


@app.command()
def features(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    publish: Annotated[str, typer.Option(help="Also copy the cache there: hub://…, hopsworks://… or a folder.")] = "",
    cluster: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Extract on a Ray cluster: auto (the one that runs here), host:6379, local."
        ),
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Stage 01: decode, check, extract and cache the recipe's speech.

    Example: python -m pipelines features --recipe tour
    """
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.infra import environment
    from pipelines.recipes import runs as recipe_runs

    settings, _ = _recipe(recipe, set_)
    if dry_run:
        return _plan(
            as_json,
            settings,
            cache or environment.runs_folder(runs) / "features",
            f"make a feature cache of the source {settings.source.kind!r}",
        )
    made = feature_pipeline.run(settings, runs=runs, cache_uri=cache, publish=publish, ray_address=cluster)
    told = {
        "cache_uri": made.uri,
        "digest": made.digest,
        "counts": made.counts,
        "curation": made.curation,
        "bytes": made.bytes,
        "padded_bytes": made.padded_bytes,
    }
    if publish:
        told["published_uri"] = recipe_runs.read_stages(settings, runs)["publication"]["cache_uri"]
    _print(
        as_json,
        told,
        f"{_curation(made.curation)}\ncache {made.uri}\ndigest {made.digest}, {made.counts}, {made.bytes / 1e6:.1f} MB "
        f"({made.bytes / made.padded_bytes:.1%} of padded float32)\n"
        f"Next: python -m pipelines train {_again(recipe, set_, runs)}",
    )


@app.command()
def recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .toml file of your own.")] = "tour",
    set_: Overrides = (),
    as_json: Json = False,
):
    """Show every setting of a recipe as it would run.

    Example: python -m pipelines recipe tour --set training.steps=60
    """
    chosen = _recipe(recipe, set_)[0]
    settings = chosen.settings() | (recipes.search_settings(chosen) if chosen.search.space else {})
    _print(as_json, settings, "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()))


def _curation(counts: list[dict[str, Any]]) -> str:
    """The steps of curation as lines: what came, what stayed."""
    return "\n".join(
        ["curation            before    after  dropped  changed"]
        + ["  {step:<16}{before:>8}{after:>9}{dropped:>9}{changed:>9}".format(**count) for count in counts]
    )
