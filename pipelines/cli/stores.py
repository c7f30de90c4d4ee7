"""Commands that move artefacts between stores: publish and fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import DryRun, Json, _print, app


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A finished cache or model.")],
    uri: Annotated[str, typer.Argument(help="hub://owner/name, hopsworks://project/path or a folder.")],
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Copy a finished cache or model to a store, read it back, and print its URI.

    Example: python -m pipelines publish runs/tour/train-1a2b3c4d5e6f/model hub://me/whisper-sv
    """
    from pipelines.infra import manifest, stores

    if dry_run:
        manifest.require_whole(folder, "artefact", "Name a finished cache or model")
        told = {"dry_run": True, "would": f"copy {folder} to {uri}", "writes": uri}
        return _print(as_json, told, f"would {told['would']}\nnothing was done")
    published = stores.open_store(uri).publish(folder, uri)
    _print(as_json, {"uri": published}, f"published as {published}")


@app.command()
def fetch(
    uri: Annotated[str, typer.Argument(help="hub://owner/name[@revision], hopsworks://project/path or a folder.")],
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Bring a published cache or model to this machine, verify every byte, and print its folder.

    Example: python -m pipelines fetch hub://me/tour-cache
    """
    from pipelines.infra import environment, stores

    if dry_run:
        place = environment.cache_folder() / "fetched"
        told = {"dry_run": True, "would": f"fetch {uri}", "writes": str(place)}
        return _print(as_json, told, f"would fetch {uri}\nwould write below {place}\nnothing was done")
    folder = stores.open_store(uri).fetch(uri)
    _print(as_json, {"folder": str(folder)}, str(folder))
