"""Commands that score, compare and search: evaluate, compare, leaderboard, experiments, sweep and export."""

from __future__ import annotations

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
    ScoredSplit,
    load_recipe,
    parse_overrides,
    parse_seeds,
    print_plan,
    print_result,
    split_list,
)
from pipelines.infra.errors import LabError

_TRAIN_AND_SCORE = ("train", "evaluate")
Decoder = Annotated[
    str, typer.Option(metavar="lab|stock", help="By the scores of this lab, or of transformers' own pipeline.")
]


def evaluate(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    model: Annotated[str, typer.Option(help="Model URI; default: the recipe's newest model.")] = "",
    split: Annotated[ScoredSplit, typer.Option(help="Split to score.")] = ScoredSplit.test,
    log: Annotated[
        Path | None,
        typer.Option(help="Write the transcripts to this file, with the columns of log_base.csv; replaces it."),
    ] = None,
    strict_guards: Annotated[
        bool, typer.Option("--strict-guards", help="Exit with code 1 if a guard set of the recipe is violated.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Score a model on a split: WER and CER with 95 % intervals, and a report that shows where it fails.

    Example: python -m pipelines evaluate --recipe tour --model openai/whisper-tiny
    """
    from pipelines.experiments import pipeline, test_set_log, transcript_log
    from pipelines.experiments.report import guards
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.infra import environment
    from pipelines.recipes import runs as recipe_runs

    settings = load_recipe(recipe, set_)
    if log:
        transcript_log.refuse_listeners(log)
    uri = model or recipe_runs.read_stages(settings, runs).get("training", {}).get("model_uri") or settings.model.base
    if dry_run:
        folder = recipe_runs.experiment_folder(settings, runs) / "reports"
        return print_plan(as_json, f"score {uri} on {split}", folder, settings)
    opened = feature_pipeline.open_cache(settings, cache, runs=runs)
    report = pipeline.evaluate(settings, opened, uri, split.value, runs=runs)
    if log:
        transcript_log.write(log, report)
    fields = report.as_dict()
    if scorings := test_set_log.counts_of(environment.runs_folder(runs), report):
        fields["looks"] = scorings.as_dict()
    text = f"{report}\nNext: open {report.page} in a browser to see on whom and where it fails"
    warning = guards.warning(report.guards)
    print_result(as_json, fields, f"{text}\n{warning}".rstrip())
    if warning and strict_guards:
        raise typer.Exit(1)


def compare(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="Recipes, run folders or report folders; none: list all past scores."),
    ] = None,
    baseline: Annotated[str, typer.Option(help="Experiment to compare with; default: the first.")] = "",
    by: Decoder = "lab",
    runs: Runs = "",
    out: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Folder for comparison.json and comparison.png; default: below the runs."),
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Compare experiments with a baseline on one test set: ΔWER with 95 % interval and p, per slice, and the cost.

    Example: python -m pipelines compare tour tour-lora --baseline tour
    """
    from pipelines.experiments import run_log
    from pipelines.experiments.comparison import compare
    from pipelines.infra import environment

    runs_folder = environment.runs_folder(runs)
    if not (experiments or baseline):
        rows = run_log.read(runs_folder)
        return print_result(as_json, {"experiments": rows}, run_log.format_table(rows, runs))
    comparison = compare.compare(experiments or [], baseline, by=by, runs=runs)
    folder = Path(out) if out else runs_folder / "comparisons" / comparison.digest
    if dry_run:
        names = ", ".join(finding.experiment.name for finding in comparison.findings)
        return print_plan(as_json, f"compare {names}", folder)
    comparison.write(folder)
    text = f"{comparison}\n\ncomparison {folder}\nNext: {comparison.next_step()}"
    print_result(as_json, {**comparison.as_dict(), "folder": str(folder)}, text)


def leaderboard(
    sources: Annotated[
        list[str], typer.Argument(help="Recipes, run folders, report folders, or models on the Hub (hub://owner/name).")
    ],
    by: Decoder = "lab",
    runs: Runs = "",
    as_json: Json = False,
):
    """Rank models on the test set and normaliser of the first; list models trained on that test set as invalid.

    Example: python -m pipelines leaderboard tour tour-lora hub://me/whisper-sv
    """
    from pipelines.experiments import leaderboard

    board = leaderboard.rank(sources, by=by, runs=runs)
    print_result(as_json, board.as_dict(), f"{board}\nNext: {board.next_step()}")


def experiments(
    recipes_: Annotated[
        str,
        typer.Option(
            "--recipes",
            metavar="NAME,NAME",
            help="Names, .toml files, or a folder of them. Default: the planted-* recipes.",
        ),
    ] = "",
    seeds: Annotated[str, typer.Option(metavar="SEED,SEED", help="Training seeds.")] = "42,43",
    set_: Overrides = (),
    runs: Runs = "",
    export: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Run nothing; write tables of the finished experiments to this folder."),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Skip experiments whose results are in the tables of this folder, and add each new result to them: a "
            "series goes on after its machine is gone.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Run several recipes with several seeds: features, training and test score; skip finished ones.

    Example: python -m pipelines experiments --recipes planted-raw,planted-clean --seeds 42,43
    """
    from pipelines.experiments.comparison import next_command
    from pipelines.experiments.series import run as series
    from pipelines.experiments.series import tables as series_tables
    from pipelines.infra import environment

    if export and tables:
        raise LabError("give --tables or --export, not both: --export runs nothing, and --tables adds what is run")
    names = [*dict.fromkeys(split_list(recipes_))] if recipes_ else series.RECIPES
    planned = series.plan(names, parse_seeds(seeds), parse_overrides(set_))
    in_tables = series_tables.names_in_tables(planned, tables) if tables else set()
    if dry_run:
        listed = planned if export else series.pending(planned, in_tables)
        lines = [f"{recipe.name}, seed {recipe.training.seed}" for recipe in listed]
        folder = export or environment.runs_folder(runs)
        action = f"export what is finished of {len(lines)} experiments" if export else f"run {len(lines)} experiments"
        fields = {"dry_run": True, "would": action, "writes": str(folder), "experiments": lines}
        fields |= {"in_tables": sorted(in_tables)}
        return print_result(as_json, fields, "\n".join([f"would {action}, below {folder}", *lines, "nothing was done"]))
    if export:
        exported = series_tables.export(planned, export, runs=runs)
        exported.write_figure()
        return print_result(as_json, exported.as_dict(), str(exported))
    callbacks = series_tables.callbacks(tables, runs) if tables else {}
    result = series.run(planned, runs=runs, in_tables=in_tables, **callbacks)
    compared = f"the same command with --export {tables} instead of --tables writes the comparison"
    next_ = compared if tables else next_command.compare_reports(result.reports, runs)
    print_result(as_json, result.as_dict(), f"{result}\nNext: {next_}")
    if result.failed:
        raise typer.Exit(1)


def sweep(
    recipe: RecipeName = "tour-search",
    set_: Overrides = (),
    runs: Runs = "",
    cluster: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Train on a Ray cluster: auto (running here), host:6379 or local."),
    ] = "",
    devices: Annotated[
        int,
        typer.Option(
            min=0, help="With --cluster: trials at a time; default: the number of GPUs, or of machines without GPUs."
        ),
    ] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Search the recipe's space of settings by validation WER; resumes an interrupted sweep.

    Example: python -m pipelines sweep --recipe tour-search --set search.trials=4
    """
    from pipelines.experiments.sweeps import sweep as sweeps
    from pipelines.recipes import commands

    settings = load_recipe(recipe, set_)
    if devices and not cluster:
        raise LabError("--devices needs --cluster: without a cluster, one trial at a time trains in this process")
    if dry_run:
        outline = sweeps.outline(settings, runs)
        return print_result(as_json, outline.as_dict(), str(outline))
    result = sweeps.run(settings, runs=runs, cluster=cluster, devices=devices)
    steps = [
        commands.command(name, recipe=load_recipe(str(result.best_recipe), []), runs=runs) for name in _TRAIN_AND_SCORE
    ]
    print_result(as_json, result.as_dict(), f"\n{result}\nNext: {' && '.join(steps)}")


def export(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model URIs; the first is the baseline.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM,FORM",
            help="onnx-int8, ctranslate2-int8 (-float16, ...), onnx, safetensors-float16 (-float32), ggml-f16 (-q8_0, "
            "-q5_0).",
        ),
    ] = "ctranslate2-int8",
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    split: Annotated[
        ScoredSplit, typer.Option(help="Split to score; each scoring of the test split is counted.")
    ] = ScoredSplit.validation,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the timing; 0 is all cores.")] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Export models and compare each export with its model: WER, agreement, size and speed.

    Example: python -m pipelines export runs/tour/train-1a2b3c4d5e6f/model --to ctranslate2-int8,onnx
    """
    from pipelines.experiments import exports
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.infra import environment
    from pipelines.recipes import commands
    from pipelines.whisper.export import FOREIGN_FORMS

    settings, forms = load_recipe(recipe, set_), split_list(to)
    if dry_run:
        action = f"export {', '.join(models)} to {', '.join(forms)} and score all on {split}"
        return print_plan(as_json, action, environment.cache_folder(), settings)
    opened = feature_pipeline.open_cache(settings, cache, runs=runs)
    table = exports.compare_exports(settings, opened, models, forms, split=split.value, runs=runs, threads=threads)
    served = [row.form for row in table.rows if row.form not in ("", *FOREIGN_FORMS)]
    form = ["--form", served[-1]] if served else []
    command = commands.command("production", models[-1], *form, "--to", "served")
    print_result(as_json, table.as_dict(), f"{table}\nNext: {command}")
