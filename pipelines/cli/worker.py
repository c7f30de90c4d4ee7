"""The command that runs the fine-tuning worker."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipelines.cli.options import DryRun, Json, Overrides, RecipeName, Runs, _plan, _print, _recipe, app
from pipelines.infra.errors import LabError


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
    from pipelines.infra import environment
    from pipelines.worker import whisper_tasks

    settings, _ = _recipe(recipe, set_)
    folder = environment.runs_folder(runs) / "worker"
    others = [_recipe(name, ())[0] for name in dataset]
    tuned = whisper_tasks.WhisperFineTuning(
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
    from pipelines.inference.api import queue as api_queue
    from pipelines.inference.api import server
    from pipelines.worker import api as worker_api
    from pipelines.worker import jobs

    listening = server.listen(host, port)
    url = server.address(listening)
    limits = api_queue.Limits(max_mb=max_mb, max_duration_s=max_duration_s, timeout_s=timeout_s)
    if not token and host not in ("127.0.0.1", "::1", "localhost"):
        print("warning: whoever reaches this port may use it; LAB_API_TOKEN sets a token", file=sys.stderr)
    work = jobs.Jobs(tuned, folder)
    key = ' -H "Authorization: Bearer $LAB_API_TOKEN"' if token else ""
    asks = "-H 'Content-Type: application/json' -d '{\"task\": \"dataset\"}'"
    _print(
        as_json,
        {"url": url, "state": work.state, "folder": str(folder), "token": bool(token)},
        f"worker for {settings.model.base} at {url} ({offers}); {work.state}; Ctrl-C ends it, and the same command "
        f"goes on\nNext: open {url} in a browser, or: curl {asks}{key} {url}",
    )
    sys.stdout.flush()  # whoever started this waits for the address
    server.serve(worker_api.make_app(work, limits, token, allow_host), listening)


def _store(text: str) -> tuple[str, str]:
    """`NAME=URI` as a pair."""
    name, _, uri = text.partition("=")
    if not (name and uri):
        raise LabError(f"--store takes NAME=URI such as hub=hub://me/{{name}}, got {text!r}")
    return name, uri
