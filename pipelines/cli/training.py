"""Commands of the training pipeline: train, distill and merge."""

from __future__ import annotations

import os
import sys
from pathlib import Path
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
    split_list,
)
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import distributed
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import Recipe

PublishUri = Annotated[
    str, typer.Option("--publish", help="Also copy the model to this URI: hub://…, hopsworks://… or a folder.")
]
FastDevRun = Annotated[
    bool,
    typer.Option("--fast-dev-run", help="Train two steps to check that everything works; its scores mean nothing."),
]


def train(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    resume: Annotated[
        str,
        typer.Option(
            help="Copy checkpoints to this URI while training, and resume from its newest one: hub://…, hopsworks://… "
            "or a folder. One URI holds one run."
        ),
    ] = "",
    publish: PublishUri = "",
    fork: Annotated[
        str, typer.Option(help="Start a new run from these weights: URI of a run's folder, a checkpoint or a model.")
    ] = "",
    cluster: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Train on a Ray cluster: auto (running here), host:6379 or local."),
    ] = "",
    devices: Annotated[
        int,
        typer.Option(
            min=1, help="Number of training processes (one per GPU, or on the CPU); with --cluster, of workers."
        ),
    ] = 1,
    fast_dev_run: FastDevRun = False,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Stage 02: fine-tune the recipe's model on a feature cache; resumes an interrupted run.

    Example: python -m pipelines train --recipe tour --set training.steps=60

    On four GPUs of a machine: python -m pipelines train --recipe base --devices 4
    """
    if devices > 1 and not cluster and not dry_run and "WORLD_SIZE" not in os.environ:
        raise typer.Exit(distributed.launch(devices, [sys.executable, "-m", "pipelines", *sys.argv[1:]]))
    set_ = [*set_, "training.fast_dev_run=true"] if fast_dev_run else set_
    with distributed.process_group():
        settings = load_recipe(recipe, set_)
        if dry_run:
            return _print_plan(as_json, settings, runs, fork or settings.distillation.teacher or settings.model.base)
        from pipelines.features import pipeline as feature_pipeline
        from pipelines.training import pipeline
        from pipelines.training.callbacks import console

        model = pipeline.run(
            settings,
            feature_pipeline.open_cache(settings, cache, runs=runs),
            runs=runs,
            resume=resume,
            publish=publish,
            launch=pipeline.Launch(fork, cluster, devices if cluster else 1),
            progress=console.console_progress() if distributed.is_main_process() else None,
        )
        _print_model(as_json, model, settings, runs, publish, cache)


def distill(
    recipe: RecipeName = "tour-distil",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    teacher: Annotated[
        str,
        typer.Option(
            help="URI of a tuned model, or run:<recipe> for that recipe's model on the same data; default: the "
            "recipe's distillation.teacher."
        ),
    ] = "",
    resume: Annotated[
        str,
        typer.Option(
            help="Copy the student's checkpoints to this URI and resume from its newest one; those of a run:<recipe> "
            "teacher go to the same URI with -teacher appended."
        ),
    ] = "",
    publish: PublishUri = "",
    fast_dev_run: FastDevRun = False,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Stage 02 for a smaller model: train a student with fewer layers from a tuned teacher; train a missing
    run:<recipe> teacher first.

    Example: python -m pipelines distill --recipe tour-distil --set distillation.decoder_layers=1
    """
    set_ = [*set_, "training.fast_dev_run=true"] if fast_dev_run else set_
    set_ = [*set_, f"distillation.teacher={teacher}"] if teacher else set_
    with distributed.process_group():
        settings = load_recipe(recipe, set_)
        if dry_run:
            return _print_plan(as_json, settings, runs, settings.distillation.teacher or settings.model.base)
        from pipelines.features import pipeline as feature_pipeline
        from pipelines.training import pipeline
        from pipelines.training.callbacks import console

        model = pipeline.distill(
            settings,
            feature_pipeline.open_cache(settings, cache, runs=runs),
            runs=runs,
            resume=resume,
            publish=publish,
            progress=console.console_progress() if distributed.is_main_process() else None,
        )
        _print_model(as_json, model, settings, runs, publish, cache)


def merge(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Models or run folders; none: the recipe's newest model."),
    ] = None,
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    alphas: Annotated[
        str,
        typer.Option(
            metavar="SHARE,SHARE",
            help="Shares of the tuned weights to try, 0 (the base model) to 1; default: 0 to 1 in steps of 0.2 for one "
            "model, 1 for several.",
        ),
    ] = "",
    last: Annotated[
        int, typer.Option(min=0, help="Mix this number of newest checkpoints of the run, which must still have them.")
    ] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Mix weights: of a model and its base, of several runs, or of a run's last checkpoints. Validation clips of the
    recipe and of its guards select the mixture.

    Example: python -m pipelines merge --recipe tour --alphas 0.4,0.6,0.8,1

    Several seeds: python -m pipelines merge runs/tour/train-1a2b3c4d5e6f runs/tour/train-6f5e4d3c2b1a
    """
    from pipelines.recipes import commands
    from pipelines.recipes import runs as recipe_runs

    settings, numbers = load_recipe(recipe, set_), _parse_alphas(alphas)
    uris = models or [recipe_runs.read_stages(settings, runs).get("training", {}).get("model_uri", "")]
    if uris == [""]:
        raise LabError(f"recipe {settings.name} has no finished model yet: train it first, or name models to mix")
    if dry_run:
        what = f"the last {last} checkpoints of {uris[0]}" if last else ", ".join(uris)
        return print_plan(as_json, f"mix {what}", recipe_runs.experiment_folder(settings, runs), settings)
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.training.merging import merge as merging

    opened = feature_pipeline.open_cache(settings, cache, runs=runs)
    job = merging.plan(settings, opened, uris, runs=runs, alphas=numbers, last=last)
    merged = merging.run(job, runs)
    words = ["--model", merged.uri, *(["--cache", cache] if cache else [])]
    command = commands.command("evaluate", *words, recipe=settings, runs=runs)
    print_result(as_json, merged.as_dict(), f"{merged}\nNext: {command}")


def _parse_alphas(text: str) -> tuple[float, ...]:
    """Return the numbers of `--alphas`; raise LabError for anything but numbers from 0 to 1."""
    try:
        values = tuple(float(part) for part in split_list(text))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 1 for value in values):
        raise LabError(f"--alphas takes numbers from 0 to 1, separated by commas, got {text!r}")
    return values


def _print_plan(as_json: bool, settings: Recipe, runs: str | Path, start: str) -> None:
    from pipelines.recipes import runs as recipe_runs

    folder = recipe_runs.experiment_folder(settings, runs)
    steps = settings.training.steps
    how_long = "train" if steps == AUTO else f"train {steps} steps"
    print_plan(as_json, f"{how_long} from {start}", folder, settings)


def _print_model(as_json: bool, model, settings: Recipe, runs: str | Path, publish: str, cache: str) -> None:
    from pipelines.recipes import commands
    from pipelines.recipes import runs as recipe_runs

    if not distributed.is_main_process():
        return
    fields = model.as_dict()
    if publish:
        fields["published_uri"] = recipe_runs.read_stages(settings, runs)["model publication"]["model_uri"]
    copies = f"\n{model.copies}" if model.copies else ""
    command = commands.command("evaluate", *(["--cache", cache] if cache else []), recipe=settings, runs=runs)
    print_result(as_json, fields, f"{model}\nNext: {command}{copies}")
