"""`python -m pipelines …`: one thin sub-command per stage; the functions are those that the notebooks call."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import ranks
from pipelines import recipe as recipes
from pipelines.errors import UNFINISHED, LabError, Unfinished

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune Whisper for Swedish: features, training, evaluation, transcription.",
)

RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name, or a .toml file of your own.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Override a setting, e.g. training.steps=60. Repeatable."),
]
Runs = Annotated[
    str, typer.Option("--runs", help="Folder for artefacts; default: LAB_RUNS, else runs/ in the project.")
]
CacheUri = Annotated[str, typer.Option("--cache", help="Feature cache; default: the one that `features` made last.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and written, and end.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output; all else goes to standard error.")
]


class ScoredSplit(StrEnum):
    """Splits that are scored; training clips are not."""

    validation = "validation"
    test = "test"


@app.command()
def run(
    recipe: RecipeName = "tour", set_: Overrides = (), runs: Runs = "", dry_run: DryRun = False, as_json: Json = False
):
    """Execute the three notebooks in order by papermill.

    Example: python -m pipelines run --recipe tour --set training.steps=60
    """
    from pipelines import batch, environment

    settings, overrides = _recipe(recipe, set_)
    if dry_run:
        return _plan(
            as_json, settings, environment.runs_folder(runs) / settings.name, f"execute {', '.join(batch.NOTEBOOKS)}"
        )
    summary = batch.run(settings, recipe, overrides, runs=runs, log=_log(as_json), progress=not as_json)
    model = shlex.quote(summary["model_uri"])
    _print(as_json, summary, batch.in_words(summary) + f"\nNext: MODEL_URI={model} make app, then open its address")


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
    from pipelines import environment, lab

    settings, _ = _recipe(recipe, set_)
    if dry_run:
        return _plan(
            as_json,
            settings,
            cache or environment.runs_folder(runs) / "features",
            f"make a feature cache of the source {settings.source.kind!r}",
        )
    made = lab.features(settings, runs=runs, cache_uri=cache, publish=publish, ray_address=cluster, log=_log(as_json))
    told = {
        "cache_uri": made.uri,
        "digest": made.digest,
        "counts": made.counts,
        "curation": made.curation,
        "bytes": made.bytes,
        "padded_bytes": made.padded_bytes,
    }
    if publish:
        told["published_uri"] = lab.stages(settings, runs)["publication"]["cache_uri"]
    _print(
        as_json,
        told,
        f"{_curation(made.curation)}\ncache {made.uri}\ndigest {made.digest}, {made.counts}, {made.bytes / 1e6:.1f} MB "
        f"({made.bytes / made.padded_bytes:.1%} of padded float32)\n"
        f"Next: python -m pipelines train {_again(recipe, set_, runs)}",
    )


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
        raise typer.Exit(ranks.launch(devices, [sys.executable, "-m", "pipelines", *sys.argv[1:]]))
    set_ = [*set_, "training.fast_dev_run=true"] if fast_dev_run else set_
    with ranks.joined():
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
    with ranks.joined():
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
    from pipelines import lab

    settings, _ = _recipe(recipe, set_)
    if dry_run:
        start = how.get("fork") or settings.distillation.teacher or settings.model.base
        return _plan(
            as_json, settings, lab.stage_folder(settings, runs), f"train {settings.training.steps} steps from {start}"
        )
    from pipelines import figures

    opened = lab.open_features(settings, cache, runs=runs, log=_log(as_json))
    progress = figures.console_progress(_log(as_json)) if ranks.is_first() else None
    stage = lab.distil if taught else lab.train
    made = stage(settings, opened, runs=runs, publish=publish, progress=progress, **how)
    if not ranks.is_first():
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
        told["published_uri"] = lab.stages(settings, runs)["model publication"]["model_uri"]
    kept = f"\n{made.copies}" if made.copies else ""
    _print(
        as_json,
        told,
        f"model {made.uri}\nbest at step {made.best_step}: validation WER {made.validation['eval_wer']:.3f}\n"
        f"Next: python -m pipelines evaluate {_again(recipe, set_, runs)}{kept}",
    )


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
    from pipelines import environment, feedback, lab, ledger

    settings, _ = _recipe(recipe, set_)
    if log:
        feedback.refuse_listeners(log)
    uri = model or lab.stages(settings, runs).get("training", {}).get("model_uri") or settings.model.base
    if dry_run:
        return _plan(as_json, settings, lab.stage_folder(settings, runs) / "reports", f"score {uri} on {split}")
    report = lab.evaluate(
        settings,
        lab.open_features(settings, cache, runs=runs, log=_log(as_json)),
        uri,
        split.value,
        runs=runs,
        log=_log(as_json),
    )
    if log:
        feedback.write_log(log, report)
    told = {
        "model": report.model,
        "split": split.value,
        "score": report.score.as_dict(),
        "raw": report.raw.as_dict(),
        "report": str(report.folder),
        "page": str(report.page),
    }
    if looks := ledger.looks(environment.runs_folder(runs), report):
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
    from pipelines import comparison, environment, figures, history, manifest

    place = environment.runs_folder(runs)
    if not (experiments or baseline):
        rows = history.read(place)
        return _print(as_json, {"experiments": rows}, history.in_words(rows))
    compared = comparison.compare(experiments or [], baseline, runs=runs, log=_log(as_json))
    folder = Path(out) if out else place / "comparisons" / compared.digest
    if dry_run:
        names = ", ".join(finding.experiment.name for finding in compared.findings)
        told = {"dry_run": True, "would": f"compare {names}", "writes": str(folder)}
        return _print(as_json, told, f"would compare {names}\nwould write below {folder}\nnothing was done")
    folder.mkdir(parents=True, exist_ok=True)
    told = compared.as_dict()
    manifest.write_json(folder / "comparison.json", told)
    manifest.write_bytes(folder / "comparison.png", figures.png(figures.forest(compared)))
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
    from pipelines import leaderboard as boards

    board = boards.board(sources, runs=runs, log=_log(as_json))
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
    from pipelines import environment, figures, series

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
            picture.write_bytes(figures.png(figures.of_series(claims, baseline, found)))
        words = [line for claim in claims for line in (claim["recipe"], *(f"  {x}" for x in series.headline(claim)))]
        return _print(as_json, {"folder": str(export), "claims": claims}, "\n".join([*words, f"tables in {export}"]))
    reports, failed = series.run(chosen, runs=runs, log=_log(as_json))
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
    from pipelines import sweeps

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
    made = sweeps.run(settings, runs=runs, cluster=cluster, devices=devices, log=_log(as_json))
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
        f"\n{sweeps.results.in_words(made.table, made.mattered)}\n\nbest: trial {made.best.number}, validation WER "
        f"{made.best.wer:.3f} (flattering: it was chosen by it)\ntable and picture in {made.folder}\n"
        f"Next: python -m pipelines train {made.options} && python -m pipelines evaluate {made.options}",
    )


@app.command()
def transcribe(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|FOLDER|TABLE...",
            help="Audio files, folders of them, or one table (csv, tsv, parquet) with a column of audio.",
        ),
    ],
    out: Annotated[
        str, typer.Option(help="The table to write, or a folder; default: beside the input, as <name>.transcribed.csv.")
    ] = "",
    audio_column: Annotated[str, typer.Option(help="Default: audio, path, file or file_name.")] = "",
    reference_column: Annotated[
        str, typer.Option(help="What was said, for WER; default: text, sentence, transcript_reference or reference.")
    ] = "",
    speaker_column: Annotated[str, typer.Option(help="Default: speaker, client_id or speaker_id.")] = "",
    format_: Annotated[
        str,
        typer.Option("--format", metavar="FORM,FORM", help="Also a file beside each recording: txt, srt, vtt, json."),
    ] = "",
    model: Annotated[str, typer.Option(help="Model URI; default: the newest finished run, else the base model.")] = "",
    language: Annotated[str, typer.Option(help="Whisper's language code.")] = "sv",
    engine: Annotated[str, typer.Option(help="auto, transformers, ctranslate2 or onnx.")] = "auto",
    again: Annotated[bool, typer.Option("--again", help="Begin anew, over what an earlier call wrote.")] = False,
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="Do a table's rows with an error once more, keep the others."),
    ] = False,
    runs: Runs = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Transcribe audio files, or all rows of a table; a table goes on where it was cut off.

    Example: python -m pipelines transcribe talk.wav --model openai/whisper-tiny

    A table, with WER where it tells what was said: python -m pipelines transcribe talks.csv --format srt
    """
    from pipelines import environment, models, served, transcripts
    from pipelines.transcriber import Transcriber

    job = transcripts.plan(
        inputs,
        out,
        audio_column=audio_column,
        reference_column=reference_column,
        speaker_column=speaker_column,
        formats=[name.strip() for name in format_.split(",") if name.strip()],
    )
    uri, _ = served.choose(model or None, environment.runs_folder(runs))
    if dry_run:
        told = {"dry_run": True, "model": uri, **transcripts.outline(job)}
        return _print(as_json, told, f"model {uri}\n{transcripts.outline_in_words(told)}")
    aside = _log(True)  # standard output is for what was heard
    transcriber = Transcriber(models.resolve(uri, log=aside), language, engine, log=aside)
    summary, results = transcripts.run(job, transcriber, again=again, retry=retry_errors, log=_log(as_json))
    told, words = (say(job, summary, results) for say in (transcripts.as_dict, transcripts.in_words))
    _print(as_json, told, words)
    if summary.errors:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Model URI; default: the newest finished run, else the base model.")] = "",
    language: Annotated[str, typer.Option(help="Whisper's language code.")] = "sv",
    engine: Annotated[str, typer.Option(help="auto, transformers, ctranslate2 or onnx.")] = "auto",
    host: Annotated[str, typer.Option(help="0.0.0.0 is every network that this machine is on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    token: Annotated[
        str,
        typer.Option(
            envvar="LAB_API_TOKEN",
            show_default=False,
            help="What clients have to send as API key; others on this machine see what is written here, "
            "so better set the variable.",
        ),
    ] = "",
    max_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, in millions of bytes.")] = 100.0,
    max_duration_s: Annotated[float, typer.Option(min=0.1, help="Longest recording.")] = 3600.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="For a request from its first byte to its answer.")] = 600.0,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait while one is decoded.")] = 16,
    runs: Runs = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Serve a model over HTTP, in the shape that OpenAI's clients expect; until Ctrl-C or SIGTERM.

    Example: python -m pipelines serve --model openai/whisper-tiny --port 8000
    """
    from pipelines import environment, served

    uri, _ = served.choose(model or None, environment.runs_folder(runs))
    if dry_run:
        told = {"dry_run": True, "would": f"serve {uri} on {host} port {port}", "token": bool(token)}
        return _print(
            as_json, told, f"would {told['would']}, {'with' if token else 'without'} a token\nnothing was done"
        )
    from pipelines import models, serving
    from pipelines.transcriber import Transcriber

    listening = serving.listen(host, port)
    transcriber = Transcriber(models.resolve(uri, log=_log(as_json)), language, engine, log=_log(as_json))
    limits = serving.Limits(max_mb=max_mb, max_duration_s=max_duration_s, timeout_s=timeout_s, queue=queue)
    api = serving.make_app(transcriber, limits, token)
    url = serving.address(listening)
    if not token and host not in ("127.0.0.1", "::1", "localhost"):
        print("warning: whoever reaches this port may use it; LAB_API_TOKEN sets a token", file=sys.stderr)
    key = ' -H "Authorization: Bearer $LAB_API_TOKEN"' if token else ""
    _print(
        as_json,
        {"url": url, "model": served.title(transcriber.ref), "engine": transcriber.loaded.name, "token": bool(token)},
        f"model {served.title(transcriber.ref)} ({transcriber.loaded.name}) at {url}, told about at {url}/docs; "
        f"Ctrl-C ends it\nNext: curl -F file=@talk.wav{key} {url}/v1/audio/transcriptions",
    )
    sys.stdout.flush()  # whoever started this waits for the address
    serving.serve(api, listening)


@app.command()
def worker(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    dataset: Annotated[
        list[str],
        typer.Option(
            metavar="RECIPE", help="Clients may also ask for the data of this recipe, by its name. Repeatable."
        ),
    ] = (),
    language: Annotated[
        list[str], typer.Option(metavar="CODE", help="Clients may also ask for this language. Repeatable.")
    ] = (),
    store: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=URI",
            help="Clients may save models there, by this name; {name} in the URI is the model's. Repeatable. "
            "Default: saved/ among the worker's own artefacts.",
        ),
    ] = (),
    host: Annotated[str, typer.Option(help="0.0.0.0 is every network that this machine is on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8001,
    token: Annotated[
        str,
        typer.Option(
            envvar="LAB_API_TOKEN",
            show_default=False,
            help="What clients have to send; others on this machine see what is written here, so better set the "
            "variable.",
        ),
    ] = "",
    allow_host: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Without a token: a name by which clients know this machine. Repeatable."),
    ] = (),
    max_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, in millions of bytes.")] = 25.0,
    max_duration_s: Annotated[float, typer.Option(min=0.1, help="Longest recording that is tried.")] = 600.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long test may take, and save be waited for.")] = 600.0,
    runs: Runs = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Fine-tune over HTTP, one job at a time, until Ctrl-C or SIGTERM; the same command goes on with the job.

    Example: python -m pipelines worker --recipe tour --port 8001
    """
    from pipelines import environment
    from pipelines.finetuning import whisper

    settings, _ = _recipe(recipe, set_)
    folder = environment.runs_folder(runs) / "worker"
    others = [_recipe(name, ())[0] for name in dataset]
    tuned = whisper.WhisperFineTuning(
        settings,
        folder,
        datasets={data.name: data for data in others},
        languages=tuple(language),
        stores=dict(_store(text) for text in store),
        max_duration_s=max_duration_s,
    )
    offers = f"data sets {', '.join(tuned.datasets)}; stores {', '.join(tuned.stores)}"
    if dry_run:
        return _plan(as_json, settings, folder, f"tune {settings.model.base} on {host} port {port}, {offers}")
    from pipelines import serving
    from pipelines.finetuning import api, jobs

    listening = serving.listen(host, port)
    url = serving.address(listening)
    limits = serving.Limits(max_mb=max_mb, max_duration_s=max_duration_s, timeout_s=timeout_s)
    if not token and host not in ("127.0.0.1", "::1", "localhost"):
        print("warning: whoever reaches this port may use it; LAB_API_TOKEN sets a token", file=sys.stderr)
    work = jobs.Jobs(tuned, folder, log=lambda line: print(line, file=sys.stderr))
    key = ' -H "Authorization: Bearer $LAB_API_TOKEN"' if token else ""
    asks = "-H 'Content-Type: application/json' -d '{\"task\": \"dataset\"}'"
    _print(
        as_json,
        {"url": url, "state": work.state, "folder": str(folder), "token": bool(token)},
        f"worker for {settings.model.base} at {url} ({offers}); {work.state}; Ctrl-C ends it, and the same command "
        f"goes on\nNext: open {url} in a browser, or: curl {asks}{key} {url}",
    )
    sys.stdout.flush()  # whoever started this waits for the address
    serving.serve(api.make_app(work, limits, token, allow_host), listening)


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
    from pipelines import manifest, stores

    if dry_run:
        manifest.require_whole(folder, "artefact", "Name a finished cache or model")
        told = {"dry_run": True, "would": f"copy {folder} to {uri}", "writes": uri}
        return _print(as_json, told, f"would {told['would']}\nnothing was done")
    published = stores.open_store(uri).publish(folder, uri, log=_log(as_json))
    _print(as_json, {"uri": published}, f"published as {published}")


@app.command("publish-space")
def publish_space(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The Space; it is made, private, if need be.")],
    model: Annotated[str, typer.Option(help="hub://owner/name[@revision]; pinned to the commit that this means now.")],
    hardware: Annotated[str, typer.Option(help="cpu or zerogpu.")] = "cpu",
    folder: Annotated[
        Path | None, typer.Option(help="Only write the files of the Space to this folder, which is empty or absent.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Publish the page as a Space of the Hugging Face Hub, with the modules that it needs and its model pinned.

    Example: python -m pipelines publish-space me/swedish --model hub://me/whisper-sv --hardware zerogpu
    """
    import tempfile

    from pipelines import space

    found = space.find_model(model)
    if folder or dry_run:
        with tempfile.TemporaryDirectory() as aside:
            written = space.write(Path(aside) / "space" if dry_run else folder, name, found, hardware)
        told = {"dry_run": dry_run, "model": found.uri, "writes": str(folder or name), "files": written}
        lines = [f"model {found.uri}", *written, "nothing was done" if dry_run else f"Next: python {folder}/app.py"]
        return _print(as_json, told, "\n".join(lines))
    told = {**space.publish(name, found, hardware, log=_log(as_json)), "model": found.uri}
    secret = "give it a secret HF_TOKEN in its settings, then " if found.private else ""
    _print(as_json, told, f"model {found.uri}\nspace {name} @ {told['commit']}\nNext: {secret}open {told['url']}")


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
    from pipelines import delivery, environment, lab

    settings, _ = _recipe(recipe, set_)
    forms = [name.strip() for name in to.split(",") if name.strip()]
    if dry_run:
        what = f"export {', '.join(models)} to {', '.join(forms)} and score all on {split}"
        return _plan(as_json, settings, environment.cache_folder(), what)
    opened = lab.open_features(settings, cache, runs=runs, log=_log(as_json))
    rows = delivery.table(
        settings, opened, models, forms, split=split.value, runs=runs, threads=threads, log=_log(as_json)
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    following = (
        f"python -m pipelines production {shlex.quote(models[-1])} --form {forms[-1] if forms else ''} --to FOLDER"
    )
    told = {"split": split.value, "n": rows[0].score.n, "load": load, "rows": [row.as_dict() for row in rows]}
    places = "\n".join(f"{row.form or 'as it is'}: {row.folder}" for row in rows)
    words = f"{delivery.in_words(rows)}\n\n{split.value}, {rows[0].score.n} clips; load of the machine {load}\n{places}"
    _print(as_json, told, f"{words}\nNext: {following}")


@app.command()
def production(
    model: Annotated[str, typer.Argument(help="Model URI.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Empty or absent.")],
    form: Annotated[
        str, typer.Option(help="ctranslate2-int8 (-float16, ...), onnx-int8, onnx, safetensors-float16 (-float32).")
    ] = "ctranslate2-int8",
    language: Annotated[str, typer.Option(help="Whisper's language code.")] = "sv",
    recording: Annotated[
        Path | None, typer.Option(help="What the folder has to transcribe; default: a spoken Swedish sentence.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Put what serving a model needs, and nothing else, into a folder, after a fresh process has served it.

    Example: python -m pipelines production runs/tour/train-1a2b3c4d5e6f/model --to served
    """
    from pipelines import delivery, models

    if dry_run:
        told = {"dry_run": True, "would": f"put {model} as {form} into {to}", "writes": str(to)}
        return _print(as_json, told, f"would {told['would']}\nnothing was done")
    ref = models.resolve(model, log=_log(as_json))
    proof = delivery.production(ref, form, to, language=language, recording=recording, log=_log(as_json))
    files = {path.name: path.stat().st_size for path in sorted(to.expanduser().iterdir())}
    listed = "\n".join(f"{size / 1e6:9.2f} MB  {name}" for name, size in files.items())
    absent = f", without {' and '.join(proof.without)}" if proof.without else ""
    _print(
        as_json,
        {"folder": str(to), "files": files, "proof": dataclasses.asdict(proof)},
        f"{listed}\nserved by {proof.engine} in a fresh process{absent}: {proof.text!r}, loaded after "
        f"{proof.loading_s} s, {proof.elapsed_s} s for the recording, {proof.memory_mb:.0f} MB\n"
        f"Next: python -m pipelines serve --model {shlex.quote(str(to))}",
    )


@app.command()
def fetch(
    uri: Annotated[str, typer.Argument(help="hub://owner/name[@revision], hopsworks://project/path or a folder.")],
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Bring a published cache or model to this machine, verify every byte, and print its folder.

    Example: python -m pipelines fetch hub://me/tour-cache
    """
    from pipelines import environment, stores

    if dry_run:
        place = environment.cache_folder() / "fetched"
        told = {"dry_run": True, "would": f"fetch {uri}", "writes": str(place)}
        return _print(as_json, told, f"would fetch {uri}\nwould write below {place}\nnothing was done")
    folder = stores.open_store(uri).fetch(uri, log=_log(as_json))
    _print(as_json, {"folder": str(folder)}, str(folder))


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


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Model for the forward pass.")] = "openai/whisper-tiny",
    as_json: Json = False,
):
    """Check this machine: Python, packages, device, disk, audio, Hub, and one real forward pass.

    Example: python -m pipelines doctor
    """
    from pipelines import doctor as physician

    checks = physician.examine(model)
    wrong = [check for check in checks if check.state == "wrong"]
    lines = [
        f"{check.state:<6}{check.name:<18}{check.found}" + (f"\n{'':24}-> {check.mend}" if check.mend else "")
        for check in checks
    ]
    verdict = f"{len(wrong)} thing(s) to mend" if wrong else "ready. Next: make run"
    _print(as_json, {"checks": physician.as_dicts(checks), "ready": not wrong}, "\n".join([*lines, verdict]))
    if wrong:
        raise typer.Exit(1)


def _recipe(name: str, assignments: list[str]) -> tuple[recipes.Recipe, dict[str, Any]]:
    """The recipe with `NAME=VALUE` overrides, and the overrides as a dictionary."""
    overrides = dict(_assignment(text) for text in assignments)
    return recipes.load(name, overrides), overrides


def _again(recipe: str, set_: list[str], runs: str) -> str:
    """The options that name the same experiment in the next command."""
    told = ["--recipe", recipe, *(word for assignment in set_ for word in ("--set", assignment))]
    return shlex.join([*told, *(("--runs", runs) if runs else ())])


def _assignment(text: str) -> tuple[str, Any]:
    """`a.b=1` as ("a.b", 1): the value is JSON where it parses as such, else a string.

    A setting that is a string takes the text as it stands, `2024` and `true` included; quotes around it are JSON's.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise LabError(f"--set takes NAME=VALUE such as training.steps=60, got {text!r}")
    name = name.strip()
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, value if recipes.takes_text(name) and not isinstance(parsed, str) else parsed


def _store(text: str) -> tuple[str, str]:
    """`NAME=URI` as a pair."""
    name, _, uri = text.partition("=")
    if not (name and uri):
        raise LabError(f"--store takes NAME=URI such as hub=hub://me/{{name}}, got {text!r}")
    return name, uri


def _numbers(seeds: str) -> list[int]:
    """`42,43` as numbers, each once."""
    try:
        return [*dict.fromkeys(int(seed) for seed in seeds.split(","))]
    except ValueError:
        raise LabError(f"--seeds takes whole numbers such as 42,43, got {seeds!r}") from None


def _curation(counts: list[dict[str, Any]]) -> str:
    """The steps of curation as lines: what came, what stayed."""
    return "\n".join(
        ["curation            before    after  dropped  changed"]
        + ["  {step:<16}{before:>8}{after:>9}{dropped:>9}{changed:>9}".format(**count) for count in counts]
    )


def _plan(as_json: bool, settings: recipes.Recipe, where: str | Path, what: str) -> None:
    _print(
        as_json,
        {"dry_run": True, "would": what, "writes": str(where), "recipe": settings.settings()},
        f"would {what}\nwould write below {where}\nnothing was done",
    )


def _log(as_json: bool):
    if not ranks.is_first():
        return lambda line: None
    return (lambda line: print(line, file=sys.stderr)) if as_json else print


def _print(as_json: bool, told: dict[str, Any], words: str) -> None:
    print(json.dumps(told, ensure_ascii=False) if as_json else words)


def main() -> None:
    """Run a command; what a user can mend is one line on standard error and exit code 1, or 75 where the same command
    is to be run again."""
    from pipelines import environment

    environment.share_cores()
    try:
        app()
    except Unfinished as error:
        _fail(f"unfinished: {error}", UNFINISHED)
    except LabError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:
        if not error.filename:
            raise
        _fail(f"error: {error.filename}: {error.strerror}. Name another place, or make room there", 1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _fail(line: str, code: int) -> None:
    if ranks.is_first_to_fail():
        print(line, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
