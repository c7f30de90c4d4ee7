"""Commands that transcribe and serve: transcribe, serve, production, publish-space."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import DryRun, Json, Runs, _print, app
from pipelines.infra import console


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
    from pipelines.inference import pipeline as inference_pipeline
    from pipelines.inference.batch import job as batch_job
    from pipelines.inference.batch import run as batch_run
    from pipelines.inference.transcriber import Transcriber
    from pipelines.infra import environment
    from pipelines.whisper import model as whisper_model

    job = batch_job.plan(
        inputs,
        out,
        audio_column=audio_column,
        reference_column=reference_column,
        speaker_column=speaker_column,
        formats=[name.strip() for name in format_.split(",") if name.strip()],
    )
    uri, _ = inference_pipeline.choose_model(model or None, environment.runs_folder(runs))
    if dry_run:
        told = {"dry_run": True, "model": uri, **batch_run.outline(job)}
        return _print(as_json, told, f"model {uri}\n{batch_run.outline_in_words(told)}")
    console.configure(sys.stderr)  # standard output is for the transcripts
    transcriber = Transcriber(whisper_model.resolve(uri), language, engine)
    summary, results = batch_run.run(job, transcriber, again=again, retry=retry_errors)
    told, words = (say(job, summary, results) for say in (batch_run.as_dict, batch_run.in_words))
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
    from pipelines.inference import pipeline as inference_pipeline
    from pipelines.infra import environment

    uri, _ = inference_pipeline.choose_model(model or None, environment.runs_folder(runs))
    if dry_run:
        told = {"dry_run": True, "would": f"serve {uri} on {host} port {port}", "token": bool(token)}
        return _print(
            as_json, told, f"would {told['would']}, {'with' if token else 'without'} a token\nnothing was done"
        )
    from pipelines.inference.api import api as api_api
    from pipelines.inference.api import queue as api_queue
    from pipelines.inference.api import server
    from pipelines.inference.transcriber import Transcriber
    from pipelines.whisper import model as whisper_model

    listening = server.listen(host, port)
    transcriber = Transcriber(whisper_model.resolve(uri), language, engine)
    limits = api_queue.Limits(max_mb=max_mb, max_duration_s=max_duration_s, timeout_s=timeout_s, queue=queue)
    api = api_api.make_app(transcriber, limits, token)
    url = server.address(listening)
    if not token and host not in ("127.0.0.1", "::1", "localhost"):
        print("warning: whoever reaches this port may use it; LAB_API_TOKEN sets a token", file=sys.stderr)
    key = ' -H "Authorization: Bearer $LAB_API_TOKEN"' if token else ""
    _print(
        as_json,
        {
            "url": url,
            "model": inference_pipeline.model_title(transcriber.ref),
            "engine": transcriber.loaded.name,
            "token": bool(token),
        },
        f"model {inference_pipeline.model_title(transcriber.ref)} ({transcriber.loaded.name}) at {url}, documented at "
        f"{url}/docs; "
        f"Ctrl-C ends it\nNext: curl -F file=@talk.wav{key} {url}/v1/audio/transcriptions",
    )
    sys.stdout.flush()  # whoever started this waits for the address
    server.serve(api, listening)


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

    from pipelines.inference.deploy import space

    found = space.find_model(model)
    if folder or dry_run:
        with tempfile.TemporaryDirectory() as aside:
            written = space.write(Path(aside) / "space" if dry_run else folder, name, found, hardware)
        told = {"dry_run": dry_run, "model": found.uri, "writes": str(folder or name), "files": written}
        lines = [f"model {found.uri}", *written, "nothing was done" if dry_run else f"Next: python {folder}/app.py"]
        return _print(as_json, told, "\n".join(lines))
    told = {**space.publish(name, found, hardware), "model": found.uri}
    secret = "give it a secret HF_TOKEN in its settings, then " if found.private else ""
    _print(as_json, told, f"model {found.uri}\nspace {name} @ {told['commit']}\nNext: {secret}open {told['url']}")


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
    from pipelines.inference.deploy import package
    from pipelines.whisper import model as whisper_model

    if dry_run:
        told = {"dry_run": True, "would": f"put {model} as {form} into {to}", "writes": str(to)}
        return _print(as_json, told, f"would {told['would']}\nnothing was done")
    ref = whisper_model.resolve(model)
    proof = package.production(ref, form, to, language=language, recording=recording)
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
