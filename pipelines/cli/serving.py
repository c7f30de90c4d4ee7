"""Commands that start servers: serve (a model over HTTP) and worker (fine-tuning as a service)."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from pipelines.cli.options import (
    LOCAL_HOSTS,
    DryRun,
    EngineName,
    Host,
    Json,
    LanguageOrAuto,
    ModelUri,
    Overrides,
    RecipeName,
    Runs,
    load_recipe,
    print_address,
    print_plan,
    print_result,
    warn_without_token,
)
from pipelines.infra import console
from pipelines.infra.errors import LabError

ROUTES = ("/v1", "/predict", "/health", "/docs", "/openapi.json")
"""First parts of the API's paths, which no prefix may have."""

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any free port.")]
Token = Annotated[
    str,
    typer.Option(
        envvar="LAB_API_TOKEN",
        show_default=False,
        help="API key that clients must send. Other users of this machine can read options: prefer the variable.",
    ),
]
AllowOrigin = Annotated[
    list[str],
    typer.Option(
        metavar="URL",
        help="Let pages of this origin, such as https://my.page, call the API from a browser (CORS); * for all. "
        "Repeatable. Default: all if there is a token, else none.",
    ),
]
RootPath = Annotated[
    str, typer.Option(metavar="/PREFIX", help="Path under which a proxy serves the API, whether it removes it or not.")
]
Alias = Annotated[
    list[str],
    typer.Option(metavar="NAME", help="Another model name that clients may send. Repeatable; whisper-1 is one."),
]
TrustedProxy = Annotated[
    list[str],
    typer.Option(
        envvar="LAB_TRUSTED_PROXIES",
        metavar="ADDRESS|NETWORK",
        help="Proxy whose X-Forwarded-For names the client. Repeatable. Default: none.",
    ),
]
RequestsPerMinute = Annotated[
    float,
    typer.Option(
        envvar="LAB_REQUESTS_PER_MINUTE",
        min=0,
        show_default=False,
        help="Requests per minute of one client address; 0 is no limit. Default: 60 if other machines can reach the "
        "server without a token, else no limit.",
    ),
]
AudioPerMinute = Annotated[
    float,
    typer.Option(
        envvar="LAB_AUDIO_S_PER_MINUTE",
        min=0,
        show_default=False,
        help="Seconds of audio per minute of one client address; 0 is no limit. Default: 600 in the same case.",
    ),
]
FetchUrls = Annotated[
    bool,
    typer.Option(
        "--fetch-urls",
        envvar="LAB_FETCH_URLS",
        help="Let clients name a recording by its address (field url): public addresses, ports 80 and 443.",
    ),
]
StoreUris = Annotated[
    list[str],
    typer.Option(
        "--store",
        metavar="NAME=URI",
        help="Let clients save models to this URI, by this name; {name} stands for the model's name. Repeatable. "
        "Default: saved/ in the worker's folder.",
    ),
]


def serve(
    model: ModelUri = "",
    language: LanguageOrAuto = "",
    engine: EngineName = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token: Token = "",
    max_mb: Annotated[float, typer.Option(min=0.001, help="Largest request in megabytes (10^6 bytes).")] = 100.0,
    max_duration_s: Annotated[float, typer.Option(min=0.1, help="Longest recording in seconds.")] = 3600.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Time limit of a request in seconds.")] = 600.0,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait while one is decoded.")] = 16,
    live_sessions: Annotated[int, typer.Option(min=0, help="WebSockets that may be open at the same time.")] = 8,
    allow_origin: AllowOrigin = (),
    root_path: RootPath = "",
    alias: Alias = (),
    trusted_proxy: TrustedProxy = (),
    requests_per_minute: RequestsPerMinute = None,
    audio_s_per_minute: AudioPerMinute = None,
    fetch_urls: FetchUrls = False,
    runs: Runs = "",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Serve a model over HTTP with an OpenAI-compatible API; Ctrl-C or SIGTERM ends it.

    Example: python -m pipelines serve --model openai/whisper-tiny --port 8000
    """
    from pipelines.inference import pipeline
    from pipelines.infra import environment

    uri, _ = pipeline.choose_model(model or None, environment.runs_folder(runs))
    if dry_run:
        return _print_plan(as_json, uri, f"{host} port {port}", token)
    from pipelines.inference.api import api, middleware, model_names
    from pipelines.inference.api.queue import Limits
    from pipelines.inference.http import rate_limits, remote, server
    from pipelines.inference.transcriber import Transcriber
    from pipelines.infra.downloads import download
    from pipelines.whisper import model as whisper_model

    limits = rate_limits.default_limits(is_open=not token and host not in LOCAL_HOSTS)
    access = middleware.Access(
        token=token,
        origins=_parse_origins(allow_origin, token),
        root_path=_parse_root_path(root_path),
        requests_per_minute=limits[0] if requests_per_minute is None else requests_per_minute,
        audio_s_per_minute=limits[1] if audio_s_per_minute is None else audio_s_per_minute,
    )
    aliases, proxies = model_names.parse_aliases(alias), rate_limits.parse_proxies(trusted_proxy)
    listening = server.listen(host, port)
    transcriber = Transcriber(whisper_model.resolve(uri), language, engine)
    sizes = {"max_mb": max_mb, "max_duration_s": max_duration_s, "timeout_s": timeout_s}
    downloads = download.Limits(max_mb, min(timeout_s, remote.DOWNLOAD_S)) if fetch_urls else None
    queue_limits = Limits(**sizes, queue=queue, live_sessions=live_sessions, downloads=downloads)
    served = api.make_app(transcriber, queue_limits, access, aliases)
    warn_without_token(token, host)
    _print_served(as_json, server.address(listening), transcriber, token)
    server.serve(served, listening, proxies)


def _print_plan(as_json: bool, uri: str, where: str, token: str) -> None:
    plan = {"dry_run": True, "would": f"serve {uri} on {where}", "token": bool(token)}
    text = f"would {plan['would']}, {'with' if token else 'without'} a token\nnothing was done"
    print_result(as_json, plan, text)


def _print_served(as_json: bool, url: str, transcriber, token: str) -> None:
    from pipelines.inference import pipeline

    title, name = pipeline.model_title(transcriber.ref), transcriber.loaded.name
    key = ' -H "Authorization: Bearer $LAB_API_TOKEN"' if token else ""
    print_address(
        as_json,
        {"url": url, "model": title, "engine": name, "token": bool(token)},
        f"model {title} ({name}) at {url}, documented at {url}/docs; Ctrl-C stops it\n"
        f"Next: curl -F file=@talk.wav{key} {url}/v1/audio/transcriptions",
    )


def _parse_origins(given: list[str], token: str) -> list[str]:
    """Return the allowed origins, by default those of every page if a token is required."""
    origins = [origin.rstrip("/") for origin in given] or (["*"] if token else [])
    for origin in origins:
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise LabError(
                f"--allow-origin takes an address without a path such as https://my.page, or *, got {origin!r}"
            )
    return origins


def _parse_root_path(given: str) -> str:
    """Return the prefix of a proxy with a slash at its start only; "" if there is none."""
    prefix = "/" + given.strip("/") if given.strip("/") else ""
    if not re.fullmatch(r"(/[\w.~-]+)*", prefix, re.ASCII) or f"{prefix}/".startswith(tuple(f"{r}/" for r in ROUTES)):
        raise LabError(
            f"--root-path takes a prefix such as /speech that is none of the API's own ({', '.join(ROUTES)}), "
            f"got {given!r}"
        )
    return prefix


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
