"""Commands of the training pipeline: train and distill."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated, Any

import typer

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
from pipelines.infra.parallel import distributed


@app.command()
def train(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    resume: Annotated[
        str,
        typer.Option(
            help="Copy checkpoints there while training, and go on from the newest one there: hub://…, hopsworks://… "
            "or a folder. One URI holds one run."
        ),
    ] = "",
    publish: Annotated[str, typer.Option(help="Also copy the model there: hub://…, hopsworks://… or a folder.")] = "",
    fork: Annotated[
        str,
        typer.Option(help="Start a new run from the weights of another: its folder, a checkpoint or a model, as URI."),
    ] = "",
    cluster: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Train on a Ray cluster: auto (the one running here), host:6379, local."),
    ] = "",
    devices: Annotated[
        int,
        typer.Option(
            min=1,
            help="So many processes train together, each with a GPU or on cores; with --cluster, so many workers.",
        ),
    ] = 1,
    fast_dev_run: Annotated[
        bool, typer.Option("--fast-dev-run", help="Two steps, to see that all works; the figures mean nothing.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Stage 02: tune the recipe's model on a cache; goes on by itself where it was cut off.

    Example: python -m pipelines train --recipe tour --set training.steps=60

    On four GPUs of a machine: python -m pipelines train --recipe base --devices 4
    """
    if devices > 1 and not cluster and not dry_run and "WORLD_SIZE" not in os.environ:
        raise typer.Exit(distributed.launch(devices, [sys.executable, "-m", "pipelines", *sys.argv[1:]]))
    set_ = [*set_, "training.fast_dev_run=true"] if fast_dev_run else set_
    with distributed.process_group():
        _train(
            recipe,
            set_,
            runs,
            cache,
            dry_run,
            as_json,
            resume=resume,
            publish=publish,
            fork=fork,
            cluster=cluster,
            devices=devices if cluster else 1,
        )


@app.command()
def distill(
    recipe: RecipeName = "tour-distil",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    teacher: Annotated[
        str,
        typer.Option(
            help="A tuned model's URI, or run:<recipe>: what that recipe makes of the same data; default: the "
            "recipe's distillation.teacher."
        ),
    ] = "",
    resume: Annotated[
        str,
        typer.Option(
            help="Copy the student's checkpoints there, a run:<recipe> teacher's to the same with -teacher behind, "
            "and go on from the newest ones there."
        ),
    ] = "",
    publish: Annotated[str, typer.Option(help="Also copy the student there: hub://…, hopsworks://… or a folder.")] = "",
    fast_dev_run: Annotated[
        bool, typer.Option("--fast-dev-run", help="Two steps, to see that all works; the figures mean nothing.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Stage 02 for a smaller model: a student with fewer layers, taught by a tuned teacher; that is trained first where
    the recipe is to make it and has not yet.

    Example: python -m pipelines distill --recipe tour-distil --set distillation.decoder_layers=1
    """
    set_ = [*set_, "training.fast_dev_run=true"] if fast_dev_run else set_
    set_ = [*set_, f"distillation.teacher={teacher}"] if teacher else set_
    with distributed.process_group():
        _train(recipe, set_, runs, cache, dry_run, as_json, resume=resume, publish=publish, taught=True)


def _train(
    recipe: str,
    set_: list[str],
    runs: str,
    cache: str,
    dry_run: bool,
    as_json: bool,
    *,
    publish: str,
    taught: bool = False,
    **how: Any,
) -> None:
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.recipes import runs as recipe_runs
    from pipelines.training import pipeline as training_pipeline

    settings, _ = _recipe(recipe, set_)
    if dry_run:
        start = how.get("fork") or settings.distillation.teacher or settings.model.base
        return _plan(
            as_json,
            settings,
            recipe_runs.experiment_folder(settings, runs),
            f"train {settings.training.steps} steps from {start}",
        )
    from pipelines.training.callbacks import console

    opened = feature_pipeline.open_cache(settings, cache, runs=runs)
    progress = console.console_progress() if distributed.is_main_process() else None
    stage = training_pipeline.distill if taught else training_pipeline.run
    made = stage(settings, opened, runs=runs, publish=publish, progress=progress, **how)
    if not distributed.is_main_process():
        return
    told = {
        "model_uri": made.uri,
        "digest": made.digest,
        "best_step": made.best_step,
        "validation": made.validation,
        "seconds": made.seconds,
    }
    if made.copies:
        told["copies"] = dataclasses.asdict(made.copies)
    if publish:
        told["published_uri"] = recipe_runs.read_stages(settings, runs)["model publication"]["model_uri"]
    kept = f"\n{made.copies}" if made.copies else ""
    _print(
        as_json,
        told,
        f"model {made.uri}\nbest at step {made.best_step}: validation WER {made.validation['eval_wer']:.3f}\n"
        f"Next: python -m pipelines evaluate {_again(recipe, set_, runs)}{kept}",
    )
