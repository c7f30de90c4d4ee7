"""A page that writes down spoken Swedish: microphone or file in, transcript out, and a listener's verdict kept.

    python app.py                     the newest finished run, or the base model
    python app.py --model runs/tour/train-…/model        or MODEL_URI=hub://owner/name
    python app.py --dry-run           only say which model it would be

Importing this file does nothing; the model is loaded and the server started by `main`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.inference import pipeline as inference_pipeline
from pipelines.inference.app import assets, html
from pipelines.inference.app import service as app_service
from pipelines.inference.app.handlers import DOWNLOADS, EXAMPLES, Buttons, example
from pipelines.inference.app.i18n import WORDS, preferred
from pipelines.infra import console, environment
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.inference.app.i18n import Words
    from pipelines.inference.app.service import SessionTranscript
    from pipelines.inference.transcriber import Transcriber


SESSION_S = 1_800
"""Seconds after which a session forgets its recording, and after which an upload nobody transcribed is deleted."""
_SESSIONS = 100  # each may hold a minute of 16 kHz float32, 3.8 MB

_LOG = logging.getLogger("app")


def build(transcriber: Transcriber, log: Path, *, why: str = "named", base: Any = None) -> gr.Blocks:
    """The page around `transcriber`, its feedback going to the CSV file `log`. `why`: see served.choose.

    `base`: loads the transcriber of the model before tuning, where somebody asks for it; see served.Service.
    """
    import gradio as gr

    buttons = Buttons(app_service.Service(transcriber, log, base))
    page = Page(gr)
    # delete_cache: (seconds between two looks, seconds after which an upload is deleted)
    with gr.Blocks(title=WORDS["en"]["title"], analytics_enabled=False, delete_cache=(60, SESSION_S)) as demo:
        heard = gr.State(None, time_to_live=SESSION_S)
        language, chosen = gr.State("en"), gr.State({"number": 0})  # how many recordings were chosen so far
        switch = page.add(
            gr.Radio,
            lambda words: {"label": words["language"]},
            choices=[("English", "en"), ("Svenska", "sv")],
            value="en",
            container=False,
            elem_id="language",
        )
        page.add(gr.Markdown, lambda words: {"value": f"# {words['title']}\n{words['lead']}"}, elem_id="head")
        with gr.Tabs():
            with page.add(gr.Tab, lambda words: {"label": words["file_tab"]}):
                recording, transcribe, examples = _recorder(gr, page)
            with page.add(gr.Tab, lambda words: {"label": words["live_tab"]}):
                speak, end = _microphone(gr, page)
        page.add(gr.Markdown, lambda words: {"value": words["privacy"]}, elem_id="privacy")
        transcript = page.add(
            gr.Textbox,
            lambda words: {"label": words["transcript"], "placeholder": words["transcript_hint"]},
            lines=3,
            max_lines=12,
            interactive=False,
            buttons=["copy"],
            elem_id="transcript",
        )
        timing = gr.Markdown("", elem_id="timing")
        gr.HTML(html.player(WORDS), elem_id="player", padding=False)
        details = gr.HTML("", elem_id="details", padding=False)
        files, sent = gr.JSON(None, visible=False), gr.JSON(None, visible=False)
        downloads = _downloads(gr, page, files)
        compare = page.add(
            gr.Button,
            lambda words: {"value": words["compare"]},
            size="sm",
            interactive=False,
            visible=buttons.service.can_compare,
            elem_id="compare",
        )
        compared = gr.HTML("", elem_id="compared", padding=False)
        known = inference_pipeline.model_info(transcriber.ref)
        page.add(gr.HTML, lambda words: {"value": html.card(known, why, words)}, elem_id="card", padding=False)
        correction, thanks = _feedback(
            gr, page, buttons, heard, language, fleeting=inference_pipeline.is_lost_on_restart(log)
        )

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        told = [details, files, *downloads, compare]
        fresh = [transcript, timing, heard, correction, thanks, compared, *told]

        def transcribed(
            recording: str | None,
            heard: SessionTranscript | None,
            language: str,
            chosen: dict[str, int],
            progress=gr.Progress(),
        ) -> tuple[Any, ...]:
            label, asked = WORDS[language]["transcribing"], chosen["number"]
            told = buttons.transcribe(recording, heard, language, lambda share: progress(share, desc=label))
            # another recording was chosen meanwhile: this answer is not its transcript
            return told if chosen["number"] == asked else (gr.skip(), gr.skip(), gr.skip())

        spoken = transcribe.click(
            transcribed,
            [recording, heard, language, chosen],
            [transcript, timing, heard],
            api_name="transcribe",
            show_progress_on=transcript,
        )
        for other in (recording.change, speak.click):
            other(lambda chosen: chosen.update(number=chosen["number"] + 1), chosen, None, queue=False, **quiet)
        # what must outlive a broken connection is between the page's script and the door: Gradio loads the page anew
        speak.click(
            buttons.open,
            [sent, language],
            fresh,
            js="async (_, language) => [await window.lab.start(), language]",
            queue=False,
            **quiet,
        )
        stopped = end.click(
            buttons.collect,
            [sent, language],
            [transcript, timing, heard],
            js="(_, language) => [window.lab.talk(), language]",
            trigger_mode="multiple",
            **quiet,
        )
        stopped.success(None, None, None, js="() => window.lab.collected(true)", api_visibility="private")
        stopped.failure(None, None, None, js="() => window.lab.collected(false)", api_visibility="private")
        for done in (spoken, stopped):
            done.success(None, transcript, correction, js="text => text", api_visibility="private")
            done.success(buttons.details, [heard, language], told, **quiet)
        recording.change(buttons.begin, recording, [transcribe, *fresh], queue=False, preprocess=False, **quiet)
        recording.change(None, recording, None, js="file => window.lab.load(file?.url)", api_visibility="private")
        for name, button in zip(EXAMPLES, examples, strict=True):
            button.click(lambda name=name: example(name), None, recording, queue=False, **quiet)
        compare.click(buttons.compare, [heard, language], compared, api_visibility="private", show_progress_on=compared)
        page.speaks(demo, switch, language, lambda heard, language: buttons.details(heard, language), heard, told)
    demo.talks = buttons.talks
    return demo.queue(default_concurrency_limit=1, max_size=20)


class Page:
    """The components that hold words, each with what it says in a language."""

    def __init__(self, gr: Any):
        self.gr = gr
        self._said: list[tuple[Any, Callable[[Words], dict[str, Any]]]] = []

    def add(self, kind: Any, says: Callable[[Words], dict[str, Any]], **more: Any) -> Any:
        """A component of this kind; `says` makes the arguments that are words."""
        component = kind(**says(WORDS["en"]), **more)
        self._said.append((component, says))
        return component

    def words(self, language: str) -> list[Any]:
        """What every component says in `language`."""
        return [self.gr.update(**says(WORDS[language])) for _, says in self._said]

    def speaks(self, demo: Any, switch: Any, language: Any, details: Any, heard: Any, told: list[Any]) -> None:
        """The browser's language to begin with, then that of the switch."""
        gr, components = self.gr, [component for component, _ in self._said]

        def first(request: Any) -> list[Any]:
            chosen = preferred(request.headers.get("accept-language", ""))
            return [chosen, *([gr.skip()] * len(components) if chosen == "en" else self.words(chosen)), chosen]

        first.__annotations__["request"] = gr.Request  # Gradio looks for it there, and cannot read it as a string

        def then(chosen: str, heard: SessionTranscript | None) -> list[Any]:
            chosen = chosen if chosen in WORDS else "en"
            return [chosen, *self.words(chosen), *details(heard, chosen)]

        quiet = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        say = {"js": "language => window.lab.speak(language)", "api_visibility": "private"}
        demo.load(first, None, [language, *components, switch], **quiet).then(None, switch, None, **say)
        switch.input(then, [switch, heard], [language, *components, *told], **quiet).then(None, switch, None, **say)


def _recorder(gr: Any, page: Page) -> tuple[Any, Any, list[Any]]:
    """Microphone or file, the button that sends it, and a button for each example."""
    recording = page.add(
        gr.Audio,
        lambda words: {"label": words["recording"]},
        sources=["microphone", "upload"],
        type="filepath",
        elem_id="recording",
        buttons=[],
        editable=False,
        waveform_options={"waveform_color": "#94a3b8", "waveform_progress_color": "#1d4ed8"},
    )
    # asleep until the audio has arrived: a recording takes a moment to upload
    transcribe = page.add(
        gr.Button,
        lambda words: {"value": words["transcribe"]},
        variant="primary",
        size="lg",
        interactive=False,
        elem_id="transcribe",
    )
    page.add(gr.Markdown, lambda words: {"value": words["examples"]}, elem_id="examples-label")
    with gr.Row(elem_id="examples"):
        examples = [gr.Button(said, size="sm", min_width=120) for said in EXAMPLES.values()]
    return recording, transcribe, examples


def _microphone(gr: Any, page: Page) -> tuple[Any, Any]:
    """Buttons to speak and to stop, one that only the script presses, and the place where the words appear."""
    page.add(gr.Markdown, lambda words: {"value": words["live_hint"]}, elem_id="live-hint")
    speak = page.add(gr.Button, lambda words: {"value": words["speak"]}, variant="primary", size="lg", elem_id="speak")
    page.add(gr.Button, lambda words: {"value": words["stop"]}, variant="stop", size="lg", elem_id="stop")
    end = gr.Button(elem_id="live-end")
    gr.HTML(html.LIVE, elem_id="live", padding=False)
    return speak, end


def _downloads(gr: Any, page: Page, files: Any) -> list[Any]:
    with gr.Row(elem_id="downloads"):
        made = [
            page.add(
                gr.Button,
                lambda words, ending=ending: {"value": words["download"].format(ending=ending)},
                size="sm",
                interactive=False,
                min_width=100,
            )
            for ending in DOWNLOADS
        ]
    for ending, button in zip(DOWNLOADS, made, strict=True):
        button.click(None, files, None, js=f"files => window.lab.save(files, '{ending}')", api_visibility="private")
    return made


def launch(demo: gr.Blocks, *, host: str | None = None, port: int | None = None, share: bool | None = False) -> str:
    """Serve the page in the background and return its address. Nothing on it comes from another server.

    Raises LabError where the port is taken.
    """
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware

    from pipelines.inference.app import middleware

    guard = Middleware(middleware.Door, talks=demo.talks, uploads=Path(get_upload_folder()), kept_s=SESSION_S)
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # else the browser keeps every call; not every 6.x has the argument
    try:
        demo.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=assets.theme(),
            css=assets.CSS,
            js=assets.script(),
            quiet=True,
            show_error=False,
            max_file_size=middleware.MAX_UPLOAD,
            app_kwargs={"middleware": [guard]},
            allowed_paths=[example(name) for name in EXAMPLES],  # else only those below the working directory
            state_session_capacity=_SESSIONS,
            footer_links=["api"],
            prevent_thread_lock=True,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
        )
    except (OSError, OverflowError) as error:
        _LOG.info("%s", error)
        raise LabError(
            f"the page cannot be served at {host or '127.0.0.1'}:{port or '7860-7959'}: the port is taken "
            "or the address is not this machine's. Name others with --port and --host"
        ) from None
    return demo.share_url or demo.local_url


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    if os.environ.get("SPACES_ZERO_GPU"):
        import spaces  # noqa: F401  before torch: it stands in for the GPU where none is lent
    environment.share_cores()
    console.configure()
    options = _options(arguments)
    named = options.model or os.environ.get("MODEL_URI") or inference_pipeline.space_model_uri(environment.ROOT)
    uri, why = inference_pipeline.choose_model(named, environment.runs_folder())
    print(f"model: {uri} ({WORDS['en']['why'][why]})", flush=True)
    if options.dry_run:
        print("next: python app.py without --dry-run serves it")
        return
    try:
        _serve(uri, why, options)
    except LabError as error:
        sys.exit(f"error: {error}")


def _serve(uri: str, why: str, options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder goes, too
    with tempfile.TemporaryDirectory(prefix="lab-app-", ignore_cleanup_errors=True) as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}  # read when Gradio is imported
        transcriber = _transcriber(uri, options.engine)
        demo = build(transcriber, options.log, why=why, base=_before_tuning(transcriber, options.engine))
        try:
            address = launch(demo, host=options.host, port=options.port, share=options.share)
            print(f"page: {address}")
            print(f"next: open it and speak Swedish; feedback goes to {options.log}; stop with Ctrl+C", flush=True)
            demo.block_thread()
        finally:
            demo.close(verbose=False)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description="Serve the page that transcribes Swedish speech.")
    parser.add_argument(
        "--model",
        help="folder, hub://owner/name[@revision] or Hub id; else MODEL_URI, else the "
        f"newest finished run, else {inference_pipeline.BASE_MODEL}",
    )
    parser.add_argument(
        "--engine",
        default="auto",
        help="auto, transformers, ctranslate2 or onnx (default: %(default)s)",
        metavar="ENGINE",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; 0.0.0.0 for every network)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="make a public gradio.live link, too")
    parser.add_argument(
        "--log",
        type=Path,
        default=inference_pipeline.default_log(),
        help="feedback log; else LAB_LOG in the environment (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say which model would be served, and end")
    return parser.parse_args(arguments)


def _transcriber(uri: str, engine: str, language: str = "") -> Transcriber:
    from pipelines.inference.transcriber import Transcriber
    from pipelines.whisper import model as whisper_model

    ref = whisper_model.resolve(uri)
    return Transcriber(ref, language or ref.facts.get("language") or "sv", engine)


def _before_tuning(transcriber: Transcriber, engine: str) -> Callable[[], Transcriber] | None:
    """What loads the model from which the page's own was tuned; None where that is not known."""
    base = transcriber.ref.facts.get("base_model")
    return (lambda: _transcriber(base, engine, transcriber.language)) if base else None


def _feedback(gr: Any, page: Page, buttons: Buttons, heard: Any, language: Any, *, fleeting: bool) -> tuple[Any, Any]:
    """The lower half of the page: the box with the correction, and the line that says thank you.

    `fleeting`: the log is lost when the server starts anew.
    """
    page.add(gr.Markdown, lambda words: {"value": f"## {words['question']}"}, elem_id="question")
    correction = page.add(
        gr.Textbox,
        lambda words: {"label": words["correction"], "placeholder": words["correction_hint"]},
        lines=1,
        max_lines=8,
        max_length=2_000,
        elem_id="correction",
    )
    username = page.add(gr.Textbox, lambda words: {"label": words["username"]}, max_length=100, elem_id="username")
    keep = page.add(gr.Checkbox, lambda words: {"label": words["keep"]}, value=False, elem_id="keep", container=False)
    page.add(
        gr.Markdown,
        lambda words: {"value": f"{words['stored']} {words['fleeting']}" if fleeting else words["stored"]},
        elem_id="stored",
    )
    with gr.Row():
        right = page.add(gr.Button, lambda words: {"value": words["right"]}, min_width=120, elem_id="right")
        wrong = page.add(gr.Button, lambda words: {"value": words["wrong"]}, min_width=120, elem_id="wrong")
    thanks = gr.Markdown("", elem_id="thanks")
    quiet = {"outputs": [thanks, heard], "api_visibility": "private", "show_progress": "hidden"}
    right.click(buttons.right, [heard, username, keep, language], **quiet)
    gr.on([wrong.click, correction.submit], buttons.wrong, [heard, correction, username, keep, language], **quiet)
    return correction, thanks


if __name__ == "__main__":
    main()
