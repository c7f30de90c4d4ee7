"""Commands that transcribe and deploy: transcribe, publish-space and production."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.options import (
    BeamSize,
    DryRun,
    EngineName,
    Hotwords,
    Json,
    Language,
    LanguageOrAuto,
    LengthPenalty,
    ModelUri,
    Patience,
    Prompt,
    Runs,
    SuppressTokens,
    Task,
    Temperature,
    Vocabulary,
    decoding_changes,
    print_plan,
    print_result,
    split_list,
)
from pipelines.infra import console
from pipelines.recipes import languages

if TYPE_CHECKING:
    from pipelines.inference.batch import job as batch_job

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE|FOLDER|URL|TABLE...",
        help="Audio files, folders of them, addresses (http, https), or one table (csv, tsv, jsonl, xlsx, parquet).",
    ),
]
Archive = Annotated[
    Path | None,
    typer.Option(
        metavar="PAGE.html",
        help="Also write a page that searches all transcripts and plays the recordings; implies --format json.",
        show_default=False,
    ),
]
MaxDownloadMb = Annotated[float, typer.Option(min=0.001, help="Largest download in megabytes (10^6 bytes).")]
MaxDownloadS = Annotated[float, typer.Option(min=0.1, help="Time limit of a download in seconds.")]
AllowPort = Annotated[
    list[int], typer.Option(min=1, max=65535, help="Download from this port too, beside 80 and 443. Repeatable.")
]
AllowPrivate = Annotated[
    bool,
    typer.Option("--allow-private-addresses", help="Download from this machine and its networks too."),
]
ReferenceColumn = Annotated[
    str,
    typer.Option(help="Reference transcripts, for WER; default: text, sentence, transcript_reference or reference."),
]
Out = Annotated[
    str, typer.Option(help="Table to write, or its folder; default: <name>.transcribed.csv beside the input.")
]
Formats = Annotated[
    str,
    typer.Option("--format", metavar="FORM,FORM", help="Also write a file per recording: txt, srt, vtt, tsv, json."),
]
MaxLineWidth = Annotated[int, typer.Option(help="Most characters in a line of a subtitle.")]
MaxLineCount = Annotated[int, typer.Option(help="Most lines in a subtitle.")]
HighlightWords = Annotated[
    bool, typer.Option("--highlight-words", help="Underline each word of a subtitle while it is spoken.")
]
RetryErrors = Annotated[
    bool, typer.Option("--retry-errors", help="Transcribe only the rows of a table that had an error.")
]
Track = Annotated[
    str, typer.Option(help="Audio track of videos: 1, 2, ... or all; default: the first.", show_default=False)
]
ChannelMode = Annotated[
    str, typer.Option(help="split: transcribe each channel, and name it in front of what it says; mix: their mean.")
]
ChannelNames = Annotated[
    str, typer.Option(metavar="NAME,NAME", help="Names of split channels; default: Left,Right, or Channel 1, ...")
]


def transcribe(
    inputs: Inputs,
    out: Out = "",
    audio_column: Annotated[str, typer.Option(help="Default: audio, path, file or file_name.")] = "",
    reference_column: ReferenceColumn = "",
    speaker_column: Annotated[str, typer.Option(help="Default: speaker, client_id or speaker_id.")] = "",
    format_: Formats = "",
    max_line_width: MaxLineWidth = 42,
    max_line_count: MaxLineCount = 2,
    highlight_words: HighlightWords = False,
    model: ModelUri = "",
    language: LanguageOrAuto = "",
    engine: EngineName = "auto",
    task: Task = "transcribe",
    beam_size: BeamSize = None,
    patience: Patience = None,
    length_penalty: LengthPenalty = None,
    temperature: Temperature = "",
    prompt: Prompt = "",
    hotwords: Hotwords = "",
    vocabulary: Vocabulary = None,
    suppress_tokens: SuppressTokens = "",
    again: Annotated[bool, typer.Option("--again", help="Start over and replace earlier output.")] = False,
    retry_errors: RetryErrors = False,
    track: Track = "",
    archive: Archive = None,
    max_download_mb: MaxDownloadMb = 2_000.0,
    max_download_s: MaxDownloadS = 3_600.0,
    allow_port: AllowPort = (),
    allow_private: AllowPrivate = False,
    channels: ChannelMode = "mix",
    channel_names: ChannelNames = "",
    runs: Runs = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Transcribe audio files, addresses of them, or all rows of a table; an interrupted table is resumed.

    Example: python -m pipelines transcribe talk.wav --model openai/whisper-tiny

    A table, with WER if it has references: python -m pipelines transcribe talks.csv --format srt
    """
    from pipelines.inference import pipeline
    from pipelines.inference.batch import run as batch_run
    from pipelines.inference.transcriber import Transcriber
    from pipelines.infra import environment
    from pipelines.whisper import model as whisper_model

    console.configure(sys.stderr)  # standard output is for the transcripts
    changes, job = decoding_changes(locals()), _plan_job(locals())
    uri, _ = pipeline.choose_model(model or None, environment.runs_folder(runs))
    if dry_run:
        outline = batch_run.Outline(job)
        return print_result(as_json, {"dry_run": True, "model": uri, **outline.as_dict()}, f"model {uri}\n{outline}")
    transcriber = Transcriber(whisper_model.resolve(uri), language, engine).with_options(**changes)
    result = batch_run.run(job, transcriber, again=again, retry=retry_errors)
    print_result(as_json, result.as_dict(), str(result))
    if result.summary.errors:
        raise typer.Exit(1)


def _plan_job(arguments: dict[str, Any]) -> batch_job.Job:
    """Return the job that the arguments of `transcribe` describe."""
    from dataclasses import replace

    from pipelines.inference.batch import job as batch_job
    from pipelines.inference.subtitles import Style
    from pipelines.infra.downloads.download import Limits

    columns = {name: arguments[name] for name in ("audio_column", "reference_column", "speaker_column")}
    formats = [*split_list(arguments["format_"]), *["json"] * bool(arguments["archive"])]
    ports = tuple(arguments["allow_port"])
    return replace(
        batch_job.plan(arguments["inputs"], arguments["out"], **columns, formats=formats),
        style=Style(arguments["max_line_width"], arguments["max_line_count"], arguments["highlight_words"]),
        downloads=Limits(arguments["max_download_mb"], arguments["max_download_s"], ports, arguments["allow_private"]),
        archive=arguments["archive"],
        **_parts_of_recordings(arguments["track"], arguments["channels"], arguments["channel_names"]),
    )


def _parts_of_recordings(track: str, channels: str, channel_names: str) -> dict[str, Any]:
    """Return the fields of a job that say which track and channels are transcribed."""
    from pipelines.inference.batch import tracks
    from pipelines.inference.channels import parse_mode

    split_channels, names = parse_mode(channels, channel_names)
    return {"track": tracks.parse(track), "split_channels": split_channels, "channel_names": names}


def archive(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of recordings.")],
    to: Annotated[Path | None, typer.Option(metavar="PAGE.html", help="Default: archive.html in the folder.")] = None,
    transcripts: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the transcripts; default: beside the recordings.")
    ] = None,
    language: Annotated[
        str, typer.Option(callback=languages.parse_optional, help="Language of the transcripts, such as sv or Swedish.")
    ] = "sv",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Write a page that searches existing transcripts (json, vtt, srt) and plays the recordings; decodes nothing.

    Example: python -m pipelines archive interviews --to interviews/archive.html
    """
    from pipelines.inference.archive import folder as archive_folder
    from pipelines.inference.archive import page

    target = to or folder / "archive.html"
    entries = archive_folder.find_entries(folder, transcripts)
    without = [entry.name for entry in entries if not entry.lines]
    summary = f"{len(entries)} recordings, {len(without)} without a transcript"
    if dry_run:
        return print_plan(as_json, f"write a page of {summary}", target)
    page.write(target, entries, language)
    examples = f" (such as {without[0]})" if without else ""
    print_result(
        as_json,
        {"archive": str(target), "recordings": len(entries), "without_transcript": without},
        f"archive {target}: {summary}{examples}",
    )


def publish_space(
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Name of the Space; created as private if missing.")
    ],
    model: Annotated[str, typer.Option(help="hub://owner/name[@revision]; pinned to the current commit.")],
    hardware: Annotated[str, typer.Option(help="cpu or zerogpu.")] = "cpu",
    folder: Annotated[
        Path | None, typer.Option(help="Only write the files of the Space to this folder, empty or missing.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Publish the app as a Hugging Face Space, with the modules that it needs and a pinned model.

    Example: python -m pipelines publish-space me/swedish --model hub://me/whisper-sv --hardware zerogpu
    """
    import tempfile

    from pipelines.inference.deploy import space

    hub_model = space.find_model(model)
    if folder or dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            files = space.write(Path(temporary) / "space" if dry_run else folder, name, hub_model, hardware)
        fields = {"dry_run": dry_run, "model": hub_model.uri, "writes": str(folder or name), "files": files}
        last = "nothing was done" if dry_run else f"Next: {shlex.join(['python', f'{folder}/app.py'])}"
        return print_result(as_json, fields, "\n".join([f"model {hub_model.uri}", *files, last]))
    fields = {**space.publish(name, hub_model, hardware), "model": hub_model.uri}
    secret = "add a secret HF_TOKEN in its settings, then " if hub_model.private else ""
    text = f"model {hub_model.uri}\nspace {name} @ {fields['commit']}\nNext: {secret}open {fields['url']}"
    print_result(as_json, fields, text)


def production(
    model: Annotated[str, typer.Argument(help="Model URI.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write, empty or missing.")],
    form: Annotated[
        str, typer.Option(help="ctranslate2-int8 (-float16, ...), onnx-int8, onnx, safetensors-float16 (-float32).")
    ] = "ctranslate2-int8",
    language: Language = "",
    recording: Annotated[
        Path | None, typer.Option(help="Recording for the test transcription; default: a synthetic Swedish sentence.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Write a folder with only what serving a model needs, and test it in a new process.

    Example: python -m pipelines production runs/tour/train-1a2b3c4d5e6f/model --to served
    """
    from dataclasses import asdict

    from pipelines.inference.deploy import package
    from pipelines.recipes import commands
    from pipelines.whisper import model as whisper_model

    if dry_run:
        return print_plan(as_json, f"put {model} as {form} into {to}", to)
    ref = whisper_model.resolve(model)
    proof = package.production(ref, form, to, language=language, recording=recording)
    files = {path.name: path.stat().st_size for path in sorted(to.expanduser().iterdir())}
    listing = "\n".join(f"{size / 1e6:9.2f} MB  {name}" for name, size in files.items())
    absent = f", without {' and '.join(proof.without)}" if proof.without else ""
    print_result(
        as_json,
        {"folder": str(to), "files": files, "proof": asdict(proof)},
        f"{listing}\nserved by {proof.engine} in a fresh process{absent}: {proof.text!r}, loaded after "
        f"{proof.loading_s} s, {proof.elapsed_s} s for the recording, {proof.memory_mb:.0f} MB\n"
        f"Next: {commands.command('serve', '--model', to)}",
    )
