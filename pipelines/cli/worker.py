"""The command that runs the fine-tuning worker: worker."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipelines.cli.options import (
    DryRun,
    Host,
    Json,
    Overrides,
    RecipeName,
    Runs,
    load_recipe,
    print_address,
    print_plan,
    warn_without_token,
)
from pipelines.infra import console
from pipelines.infra.errors import LabError

StoreUris = Annotated[
    list[str],
    typer.Option(
        "--store",
        metavar="NAME=URI",
        help="Let clients save models to this URI, by this name; {name} stands for the model's name. Repeatable. "
        "Default: saved/ in the worker's folder.",
    ),
]


def worker(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    dataset: Annotated[
        list[str], typer.Option(metavar="RECIPE", help="Offer the data of this recipe too, by its name. Repeatable.")
    ] = (),
    language: Annotated[list[str], typer.Option(help="Offer this language too. Repeatable.")] = (),
    store: StoreUris = (),
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any free port.")] = 8001,
    token: Annotated[
        str,
        typer.Option(
            envvar="LAB_API_TOKEN",
            show_default=False,
            help="Token that clients must send. Other users of this machine can read options: prefer the variable.",
        ),
    ] = "",
    allow_host: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Without a token: accept this name of the machine from clients. Repeatable."),
    ] = (),
    max_mb: Annotated[float, typer.Option(min=0.001, help="Largest request in megabytes (10^6 bytes).")] = 25.0,
    max_duration_s: Annotated[float, typer.Option(min=0.1, help="Longest recording in seconds.")] = 600.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Time limit in seconds for test and save.")] = 600.0,
    runs: Runs = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Serve fine-tuning over HTTP, one job at a time; a restart resumes the job. Ctrl-C or SIGTERM ends it.

    Example: python -m pipelines worker --recipe tour --port 8001
    """
    from pipelines.infra import environment
    from pipelines.worker import api, jobs, whisper_tasks

    settings = load_recipe(recipe, set_)
    folder = environment.runs_folder(runs) / "worker"
    tasks = whisper_tasks.WhisperFineTuning(
        settings,
        folder,
        datasets={data.name: data for data in (load_recipe(name, ()) for name in dataset)},
        languages=tuple(language),
        stores=dict(_parse_store(text) for text in store),
        max_duration_s=max_duration_s,
    )
    offers = f"data sets {', '.join(tasks.datasets)}; stores {', '.join(tasks.stores)}"
    if dry_run:
        return print_plan(as_json, f"tune {settings.model.base} on {host} port {port}, {offers}", folder, settings)
    from pipelines.inference.api import queue
    from pipelines.inference.http import server

    console.configure(sys.stderr)  # standard output is for the address
    listening = server.listen(host, port)
    limits = queue.Limits(max_mb=max_mb, max_duration_s=max_duration_s, timeout_s=timeout_s)
    warn_without_token(token, host)
    job_queue = jobs.Jobs(tasks, folder)
    fields = {"url": server.address(listening), "state": job_queue.state, "folder": str(folder), "token": bool(token)}
    print_address(as_json, fields, _address_text(fields, settings.model.base, offers))
    server.serve(api.make_app(job_queue, limits, token, allow_host), listening)


def _address_text(fields: dict, base: str, offers: str) -> str:
    key = ' -H "Authorization: Bearer $LAB_API_TOKEN"' if fields["token"] else ""
    request = f"-H 'Content-Type: application/json' -d '{{\"task\": \"dataset\"}}'{key} {fields['url']}"
    return (
        f"worker for {base} at {fields['url']} ({offers}); {fields['state']}; Ctrl-C stops it, the same "
        f"command resumes it\nNext: open {fields['url']} in a browser, or: curl {request}"
    )


def _parse_store(text: str) -> tuple[str, str]:
    """Return `NAME=URI` as a pair."""
    name, _, uri = text.partition("=")
    if not (name and uri):
        raise LabError(f"--store takes NAME=URI such as hub=hub://me/{{name}}, got {text!r}")
    return name, uri
