"""Build and serve the page, and its command line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.app import assets, i18n
from pipelines.inference.app.handlers import Handlers
from pipelines.inference.app.service import Service
from pipelines.inference.app.uploads import EXAMPLES, example_path, temporary_folder
from pipelines.inference.http import rate_limits, server
from pipelines.inference.http.rate_limits import RateLimiter
from pipelines.infra import console, environment
from pipelines.infra.errors import LabError
from pipelines.recipes import languages

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.inference.transcriber import Transcriber

SESSION_S = 1_800
"""Time after which a session's recording and uploads that were not transcribed are deleted."""
_FRAME_PX = 900
"""Height of the page below a notebook's cell: from the recorder to the transcript."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PROXIES = "FORWARDED_ALLOW_IPS"
"""uvicorn's variable for the proxies that it believes."""
_MAX_SESSIONS = 100
"""Each may hold a minute of 16 kHz float32, 3.8 MB."""

logger = logging.getLogger("app")  # outside the lab's loggers: its messages are not printed


def build(
    transcriber: Transcriber,
    log: Path,
    *,
    why: str = "named",
    base: Callable[[], Transcriber] | None = None,
    limiter: RateLimiter | None = None,
    fetches_urls: bool = False,
) -> gr.Blocks:
    """Build the page around `transcriber`; feedback goes to the CSV file `log`.

    `why` is the reason of inference.pipeline.choose_model. `base` loads the model before fine-tuning when a visitor
    compares it. `limiter` limits what one address may send; None: no limit.
    `fetches_urls` lets visitors name a recording by its address.
    """
    import gradio as gr

    from pipelines.inference.app.events import connect_events
    from pipelines.inference.app.layout import create_components

    handlers = Handlers(Service(transcriber, log, base), limiter)
    # delete_cache: seconds between two checks, age in seconds of the uploads that are deleted
    with gr.Blocks(
        title=i18n.localized_texts("en", transcriber.language)["title"],
        analytics_enabled=False,
        delete_cache=(60, SESSION_S),
    ) as demo:
        page = create_components(
            inference_pipeline.model_info(transcriber.ref),
            transcriber.language,
            why,
            session_s=SESSION_S,
            can_compare=handlers.service.can_compare,
            is_ephemeral=inference_pipeline.is_lost_on_restart(log),
            fetches_urls=fetches_urls,
        )
        _, _, hotwords, _ = page.choices
        hotwords.visible = _takes_hotwords(transcriber)
        connect_events(demo, page, handlers, fetches_urls)
    demo.live_sessions, demo.rate_limiter = handlers.live_sessions, handlers.limiter
    demo.page_style, demo.page_script = assets.style(), assets.script(transcriber.language)
    return demo.queue(default_concurrency_limit=1, max_size=20)


def _takes_hotwords(transcriber: Transcriber) -> bool:
    """Return whether the engine can make words more probable."""
    try:
        transcriber.with_options(hotwords=("ord",))
    except LabError:
        return False
    return True


def launch(
    demo: gr.Blocks,
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool | None = False,
    trusted_proxies: Sequence[str] = (),
) -> str:
    """Serve a page in the background and return its address. It loads nothing from other servers.

    `demo` has the attributes that `build` sets; collection.record's page has no `live_sessions`.
    `trusted_proxies` (rate_limits.parse_proxies) name the client in X-Forwarded-For. Raises LabError if the port is
    taken.
    """
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware

    from pipelines.inference.app.middleware import MAX_UPLOAD_BYTES, AppMiddleware

    guard = Middleware(
        AppMiddleware,
        live_sessions=demo.live_sessions,
        limiter=demo.rate_limiter,
        uploads=Path(get_upload_folder()),
        max_age_s=SESSION_S,
    )
    # otherwise the browser stores every call; not every Gradio 6 has an argument for it
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        server.listen(host or _LOOPBACK[0], 0).close()  # Gradio would try a hundred ports of a wrong address
        with _limited_connections(trusted_proxies):
            demo.launch(
                server_name=host,
                server_port=port,
                share=share,
                height=_FRAME_PX,
                theme=assets.theme(),
                css=demo.page_style,
                js=demo.page_script,
                quiet=True,
                show_error=False,
                max_file_size=MAX_UPLOAD_BYTES,
                app_kwargs={"middleware": [guard]},
                allowed_paths=[example_path(name) for name in EXAMPLES],  # they may be outside the working directory
                state_session_capacity=_MAX_SESSIONS,
                footer_links=["api"] if demo.live_sessions else [],
                prevent_thread_lock=True,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
            )
    except (OSError, OverflowError, LabError) as error:
        logger.info("%s", error)
        raise LabError(
            f"the page cannot be served at {host or '127.0.0.1'}:{port or '7860-7959'}: the port is taken "
            "or the address does not belong to this machine. Give others with --port and --host"
        ) from None
    return demo.share_url or demo.local_url


def serve(
    build_page: Callable[[], gr.Blocks],
    announce: Callable[[str], None],
    **options: Any,
) -> None:
    """Serve the page of `build_page` until Ctrl-C or SIGTERM; its uploads are in a folder that is then deleted.

    `announce` receives its address; `options` are those of `launch`. Call it before Gradio is imported. Raises LabError
    if the port is taken.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the temporary folder
    with temporary_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when Gradio is imported
        demo = build_page()
        try:
            announce(launch(demo, **options))
            demo.block_thread()
        finally:
            demo.close(verbose=False)


@contextmanager
def _limited_connections(trusted_proxies: Sequence[str]) -> Iterator[None]:
    """Let the server that Gradio starts limit the heads of requests and believe only `trusted_proxies`.

    Gradio passes no such options to uvicorn, which by itself believes X-Forwarded-For from this machine.
    """
    from uvicorn import config

    from pipelines.inference.http.protocol import LimitedProtocol

    previous, proxies = config.HTTP_PROTOCOLS["auto"], os.environ.get(_PROXIES)
    config.HTTP_PROTOCOLS["auto"], os.environ[_PROXIES] = LimitedProtocol, ",".join(trusted_proxies)
    try:
        yield
    finally:
        config.HTTP_PROTOCOLS["auto"] = previous
        os.environ.pop(_PROXIES)
        if proxies is not None:
            os.environ[_PROXIES] = proxies


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of app.py."""
    if os.environ.get("SPACES_ZERO_GPU"):
        import spaces  # noqa: F401  must be imported before torch: it emulates CUDA until a GPU is assigned
    environment.share_cores()
    console.configure()
    options = parse_options(arguments)
    requested = options.model or os.environ.get("MODEL_URI") or inference_pipeline.space_model_uri(environment.ROOT)
    try:
        uri, why = inference_pipeline.choose_model(requested, environment.runs_folder())
        print(f"model: {uri} ({i18n.ENGLISH['why'][why]})", flush=True)
        if options.dry_run:
            print("next: python app.py without --dry-run serves it")
            return
        _serve(uri, why, options)
    except LabError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if not (line := environment.describe_disk_error(error)):
            raise
        sys.exit(f"error: {line}")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the options of app.py."""
    parser = argparse.ArgumentParser(prog="app.py", description="Serve a page that transcribes speech.")
    parser.add_argument(
        "--model",
        help="folder, hub://owner/name[@revision] or Hub id; default: MODEL_URI, else the model in "
        f"{inference_pipeline.SPACE_FILE}, else the newest finished run, else {inference_pipeline.BASE_MODEL}",
    )
    parser.add_argument(
        "--engine",
        default="auto",
        help="auto, transformers, ctranslate2 or onnx (default: %(default)s)",
        metavar="ENGINE",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; 0.0.0.0 for every network)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also create a public gradio.live link")
    parser.add_argument(
        "--log",
        type=Path,
        default=inference_pipeline.default_log(),
        help="feedback log; default: LAB_LOG, else %(default)s",
    )
    parser.add_argument(
        "--requests-per-minute",
        type=_parse_limit,
        default=os.environ.get("LAB_REQUESTS_PER_MINUTE"),
        metavar="N",
        help="recordings of one visitor's address per minute, 0: no limit; default: LAB_REQUESTS_PER_MINUTE, else "
        f"{rate_limits.REQUESTS_PER_MINUTE:g} if other machines can reach the page, else no limit",
    )
    parser.add_argument(
        "--audio-s-per-minute",
        type=_parse_limit,
        default=os.environ.get("LAB_AUDIO_S_PER_MINUTE"),
        metavar="SECONDS",
        help="seconds of audio of one visitor's address per minute; default: LAB_AUDIO_S_PER_MINUTE, else "
        f"{rate_limits.AUDIO_S_PER_MINUTE:g} in the same case",
    )
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        metavar="ADDRESS|NETWORK",
        help="proxy whose X-Forwarded-For names the visitor; repeatable; default: LAB_TRUSTED_PROXIES, else private "
        "networks in a Space, else none",
    )
    parser.add_argument(
        "--fetch-urls",
        action="store_true",
        default=os.environ.get("LAB_FETCH_URLS", "").lower() in ("1", "true", "yes", "on"),
        help="let visitors name a recording by its public address (ports 80 and 443); default: LAB_FETCH_URLS",
    )
    parser.add_argument("--dry-run", action="store_true", help="print which model would be served, and exit")
    return parser.parse_args(arguments)


def _parse_limit(text: str) -> float:
    limit = float(text)
    if not 0 <= limit < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return limit


def limits_of(options: argparse.Namespace) -> tuple[RateLimiter, list[str]]:
    """Return the limits per address and the trusted proxies. Raises LabError."""
    is_space = bool(os.environ.get("SPACE_ID"))
    # visitors of a gradio.live link all have the address of its tunnel, 127.0.0.1
    is_open = is_space or (options.host or "127.0.0.1") not in _LOOPBACK
    default_requests, default_audio_s = rate_limits.default_limits(is_open=is_open)
    requests, audio_s = options.requests_per_minute, options.audio_s_per_minute
    given = options.trusted_proxy or [os.environ.get("LAB_TRUSTED_PROXIES", "")]
    proxies = rate_limits.parse_proxies(given) or (list(rate_limits.PRIVATE_NETWORKS) if is_space else [])
    limiter = RateLimiter(
        default_requests if requests is None else requests, default_audio_s if audio_s is None else audio_s
    )
    return limiter, proxies


def _serve(uri: str, why: str, options: argparse.Namespace) -> None:
    limiter, proxies = limits_of(options)
    transcriber, log = _load_transcriber(uri, options.engine), options.log
    base = _base_loader(transcriber, options.engine)

    def announce(address: str) -> None:
        print(f"page: {address}")
        spoken = languages.NAMES[transcriber.language].title()
        print(f"next: open it and speak {spoken}; feedback goes to {log}; stop with Ctrl+C", flush=True)

    serve(
        lambda: build(transcriber, log, why=why, base=base, limiter=limiter, fetches_urls=options.fetch_urls),
        announce,
        host=options.host,
        port=options.port,
        share=options.share,
        trusted_proxies=proxies,
    )


def _load_transcriber(uri: str, engine: str, language: str = "") -> Transcriber:
    from pipelines.inference.transcriber import Transcriber
    from pipelines.whisper import model as whisper_model

    return Transcriber(whisper_model.resolve(uri), language, engine)


def _base_loader(transcriber: Transcriber, engine: str) -> Callable[[], Transcriber] | None:
    """Return a function that loads the model before fine-tuning, or None if it is unknown."""
    base = transcriber.ref.facts.get("base_model")
    return (lambda: _load_transcriber(base, engine, transcriber.language)) if base else None
