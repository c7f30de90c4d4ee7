"""Commands that score, compare and search: evaluate, compare, leaderboard, experiments, sweep, export."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
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
    _assignment,
    _plan,
    _print,
    _recipe,
    app,
)
from pipelines.infra.errors import LabError


@app.command()
def evaluate(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    model: Annotated[str, typer.Option(help="Model URI; default: the one that `train` made last.")] = "",
    split: Annotated[ScoredSplit, typer.Option(help="What to score.")] = ScoredSplit.test,
    log: Annotated[
        Path | None,
        typer.Option(help="Write the transcripts to this file, with the columns of log_base.csv; replaces it."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Score a model on a split of a cache: WER and CER with 95 % intervals, and a page that tells where it fails.

    Example: python -m pipelines evaluate --recipe tour --model openai/whisper-tiny
    """
    from pipelines.experiments import evaluation, test_set_log
    from pipelines.experiments import pipeline as experiment_pipeline
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.infra import environment
    from pipelines.recipes import runs as recipe_runs

    settings, _ = _recipe(recipe, set_)
    if log:
        evaluation.refuse_listeners(log)
    uri = model or recipe_runs.read_stages(settings, runs).get("training", {}).get("model_uri") or settings.model.base
    if dry_run:
        return _plan(
            as_json, settings, recipe_runs.experiment_folder(settings, runs) / "reports", f"score {uri} on {split}"
        )
    report = experiment_pipeline.evaluate(
        settings,
        feature_pipeline.open_cache(settings, cache, runs=runs),
        uri,
        split.value,
        runs=runs,
    )
    if log:
        evaluation.write_log(log, report)
    told = {
        "model": report.model,
        "split": split.value,
        "score": report.score.as_dict(),
        "raw": report.raw.as_dict(),
        "report": str(report.folder),
        "page": str(report.page),
    }
    if looks := test_set_log.looks(environment.runs_folder(runs), report):
        told["looks"] = looks.as_dict()
    _print(
        as_json,
        told,
        f"{report.model} on {split}\n  normalised  {report.score}\n  as written  {report.raw}\nreport {report.folder}\n"
        f"Next: open {report.page} in a browser: on whom it fails, and where",
    )


@app.command()
def compare(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="Recipes, run folders or report folders; none: what was ever scored."),
    ] = None,
    baseline: Annotated[str, typer.Option(help="What all are held against; default: the first.")] = "",
    runs: Runs = "",
    out: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Where comparison.json and comparison.png go; default: below the runs."),
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Hold experiments on one test set against a baseline: ΔWER with 95 % interval and p, per slice, and the cost.

    Example: python -m pipelines compare tour tour-lora --baseline tour
    """
    from pipelines.experiments import compare as comparison
    from pipelines.experiments import figures as experiments_figures
    from pipelines.experiments import run_log
    from pipelines.infra import environment, manifest, plots

    place = environment.runs_folder(runs)
    if not (experiments or baseline):
        rows = run_log.read(place)
        return _print(as_json, {"experiments": rows}, run_log.in_words(rows))
    compared = comparison.compare(experiments or [], baseline, runs=runs)
    folder = Path(out) if out else place / "comparisons" / compared.digest
    if dry_run:
        names = ", ".join(finding.experiment.name for finding in compared.findings)
        told = {"dry_run": True, "would": f"compare {names}", "writes": str(folder)}
        return _print(as_json, told, f"would compare {names}\nwould write below {folder}\nnothing was done")
    folder.mkdir(parents=True, exist_ok=True)
    told = compared.as_dict()
    manifest.write_json(folder / "comparison.json", told)
    manifest.write_bytes(folder / "comparison.png", plots.png(experiments_figures.forest(compared)))
    words = f"{compared.in_words()}\n\ncomparison {folder}\nNext: {told['next']}"
    _print(as_json, {**told, "folder": str(folder)}, words)


@app.command()
def leaderboard(
    sources: Annotated[
        list[str], typer.Argument(help="Recipes, run folders, report folders, or models on the Hub (hub://owner/name).")
    ],
    runs: Runs = "",
    as_json: Json = False,
):
    """Rank models on the test set and normaliser of the first; one that was trained on the test set is struck.

    Example: python -m pipelines leaderboard tour tour-lora hub://me/whisper-sv
    """
    from pipelines.experiments import leaderboard as boards

    board = boards.board(sources, runs=runs)
    _print(as_json, board.as_dict(), f"{board.in_words()}\nNext: {board.next_step()}")


@app.command()
def experiments(
    recipes_: Annotated[
        str, typer.Option("--recipes", metavar="NAME,NAME", help="Default: the shipped series on the planted corpus.")
    ] = "",
    seeds: Annotated[str, typer.Option(metavar="SEED,SEED", help="Seeds of training.")] = "42,43",
    set_: Overrides = (),
    runs: Runs = "",
    export: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Run nothing; write tables of what is finished to this folder."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Run recipes with several seeds, one after another: features, training, test score; what is finished stays.

    Example: python -m pipelines experiments --recipes planted-raw,planted-clean --seeds 42,43
    """
    from pipelines.experiments import figures as experiments_figures
    from pipelines.experiments import series
    from pipelines.infra import environment, plots

    names = [*dict.fromkeys(name.strip() for name in recipes_.split(","))] if recipes_ else series.RECIPES
    overrides = dict(_assignment(text) for text in set_)
    chosen = series.planned(names, _numbers(seeds), overrides)
    if dry_run:
        lines = [f"{recipe.name}, seed {recipe.training.seed}" for recipe in chosen]
        place = export or environment.runs_folder(runs)
        would = f"export what is finished of {len(lines)} experiments" if export else f"run {len(lines)} experiments"
        told = {"dry_run": True, "would": would, "writes": str(place), "experiments": lines}
        return _print(as_json, told, "\n".join([f"would {would}, below {place}", *lines, "nothing was done"]))
    if export:
        series.export(chosen, export, runs=runs)
        claims, picture = series.claims(export), export / "experiments.png"
        if baseline := next((name for name in series.BASELINES if any(c["recipe"] == name for c in claims)), None):
            found = json.loads((export / series.FILTERS).read_text("utf-8"))
            picture.write_bytes(plots.png(experiments_figures.of_series(claims, baseline, found)))
        words = [line for claim in claims for line in (claim["recipe"], *(f"  {x}" for x in series.headline(claim)))]
        return _print(as_json, {"folder": str(export), "claims": claims}, "\n".join([*words, f"tables in {export}"]))
    reports, failed = series.run(chosen, runs=runs)
    told = {"reports": [str(report.folder) for report in reports], "failed": failed}
    following = shlex.join(["python", "-m", "pipelines", "compare", *names])
    where = f" --runs {shlex.quote(runs)}" if runs else ""
    _print(as_json, told, f"{len(reports)} finished, {len(failed)} failed\nNext: {following}{where}")
    if failed:
        raise typer.Exit(1)


@app.command()
def sweep(
    recipe: RecipeName = "tour-search",
    set_: Overrides = (),
    runs: Runs = "",
    cluster: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Trials on a Ray cluster: auto (the one running here), host:6379, local."),
    ] = "",
    devices: Annotated[
        int,
        typer.Option(
            min=0, help="With --cluster: so many trials at a time; default: as many as GPUs, or machines without any."
        ),
    ] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Try settings of the recipe's search space by their WER on validation; goes on where it was cut off.

    Example: python -m pipelines sweep --recipe tour-search --set search.trials=4
    """
    from pipelines.experiments import sweeps
    from pipelines.experiments.sweeps import results as sweeps_results

    settings, _ = _recipe(recipe, set_)
    if devices and not cluster:
        raise LabError("--devices needs --cluster: without one, one trial at a time trains in this process")
    if dry_run:
        plan = sweeps.outline(settings, runs)
        told = {"dry_run": True, "would": f"try up to {plan['trials']} settings", "writes": plan["folder"], **plan}
        lines = [f"  {name}: {words}" for name, words in plan["space"].items()]
        steps = ", ".join(map(str, plan["rungs"]))
        lines = [f"would {told['would']} ({plan['sampler']}), looked at after {steps} steps", *lines]
        return _print(as_json, told, "\n".join([*lines, f"would write below {plan['folder']}", "nothing was done"]))
    made = sweeps.run(settings, runs=runs, cluster=cluster, devices=devices)
    told = {
        "folder": str(made.folder),
        "best": dataclasses.asdict(made.best),
        "best_recipe": str(made.best_recipe),
        "trials": [dataclasses.asdict(trial) for trial in made.trials],
        "mattered": made.mattered,
    }
    _print(
        as_json,
        told,
        f"\n{sweeps_results.in_words(made.table, made.mattered)}\n\nbest: trial {made.best.number}, validation WER "
        f"{made.best.wer:.3f} (flattering: it was chosen by it)\ntable and picture in {made.folder}\n"
        f"Next: python -m pipelines train {made.options} && python -m pipelines evaluate {made.options}",
    )


@app.command()
def export(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model URIs; the first is the measure.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM,FORM",
            help="onnx-int8, ctranslate2-int8 (-float16, ...), onnx, safetensors-float16 (-float32).",
        ),
    ] = "ctranslate2-int8",
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    cache: CacheUri = "",
    split: Annotated[
        ScoredSplit, typer.Option(help="What they are held against each other on; a look at the test split counts.")
    ] = ScoredSplit.validation,
    threads: Annotated[int, typer.Option(min=0, help="Of the CPU, for the timing; 0 is all cores.")] = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Make exports of models, and hold each against the model it was made of: WER, agreement, size and speed.

    Example: python -m pipelines export runs/tour/train-1a2b3c4d5e6f/model --to ctranslate2-int8,onnx
    """
    from pipelines.experiments import exports
    from pipelines.features import pipeline as feature_pipeline
    from pipelines.infra import environment

    settings, _ = _recipe(recipe, set_)
    forms = [name.strip() for name in to.split(",") if name.strip()]
    if dry_run:
        what = f"export {', '.join(models)} to {', '.join(forms)} and score all on {split}"
        return _plan(as_json, settings, environment.cache_folder(), what)
    opened = feature_pipeline.open_cache(settings, cache, runs=runs)
    rows = exports.table(settings, opened, models, forms, split=split.value, runs=runs, threads=threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    following = (
        f"python -m pipelines production {shlex.quote(models[-1])} --form {forms[-1] if forms else ''} --to FOLDER"
    )
    told = {"split": split.value, "n": rows[0].score.n, "load": load, "rows": [row.as_dict() for row in rows]}
    places = "\n".join(f"{row.form or 'as it is'}: {row.folder}" for row in rows)
    words = f"{exports.in_words(rows)}\n\n{split.value}, {rows[0].score.n} clips; load of the machine {load}\n{places}"
    _print(as_json, told, f"{words}\nNext: {following}")


def _numbers(seeds: str) -> list[int]:
    """`42,43` as numbers, each once."""
    try:
        return [*dict.fromkeys(int(seed) for seed in seeds.split(","))]
    except ValueError:
        raise LabError(f"--seeds takes whole numbers such as 42,43, got {seeds!r}") from None
