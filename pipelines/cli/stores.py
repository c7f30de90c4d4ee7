"""Commands that copy artefacts between this machine and stores: publish and fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import DryRun, Json, print_plan, print_result


def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished cache or model.")],
    uri: Annotated[str, typer.Argument(help="hub://owner/name, hopsworks://project/path or a folder.")],
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Copy a finished cache or model to a store, verify the copy, and print its URI.

    Example: python -m pipelines publish runs/tour/train-1a2b3c4d5e6f/model hub://me/whisper-sv
    """
    from pipelines.features.data_card import card
    from pipelines.infra import manifest, stores

    if dry_run:
        manifest.require_complete(folder, "artefact", "Name a finished cache or model")
        return print_plan(as_json, f"copy {folder} to {uri}", uri)
    card.add(folder)
    published = stores.open_store(uri).publish(folder, uri)
    print_result(as_json, {"uri": published}, f"published as {published}")


def fetch(
    uri: Annotated[str, typer.Argument(help="hub://owner/name[@revision], hopsworks://project/path or a folder.")],
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Download a published cache or model, verify every file, and print its folder.

    Example: python -m pipelines fetch hub://me/tour-cache
    """
    from pipelines.infra import environment, stores

    if dry_run:
        return print_plan(as_json, f"fetch {uri}", environment.cache_folder() / "fetched")
    folder = stores.open_store(uri).fetch(uri)
    print_result(as_json, {"folder": str(folder)}, str(folder))
