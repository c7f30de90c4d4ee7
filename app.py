"""A page that writes down spoken Swedish: microphone or file in, transcript out, and a listener's verdict kept.

    python app.py                     the newest finished run, or the base model
    python app.py --model runs/tour/train-…/model        or MODEL_URI=hub://owner/name
    python app.py --dry-run           only say which model it would be

Importing this file does nothing; the model is loaded and the server started by `main`.
"""

from __future__ import annotations

import argparse
import html
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import environment, served
from pipelines.errors import LabError

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.served import Heard, Service
    from pipelines.transcriber import Segment, Transcriber

    Noted = tuple[str, Heard | None]

TEXTS: dict[str, Any] = {
    "title": "Svenska, nedskriven",
    "lead": "Say something in Swedish, or choose a file, and read what the model heard.",
    "recording": "Your voice",
    "privacy": "Your audio is turned into text on this server and the file is deleted at once; a copy stays in memory "
    "for up to half an hour after your last click, and is stored only if you tick the box below.",
    "transcribe": "Transcribe",
    "transcript": "Transcript",
    "transcript_hint": "The transcript appears here.",
    "took": "{audio_s:.1f} s of speech in {elapsed_s:.2f} s",
    "unsure": "Marked words are more likely wrong than right: the model is less than half sure of them.",
    "sure": "The model is more than half sure of every word.",
    "word": "{confidence:.0%} sure",
    "details": "When it was said, and how sure the model is",
    "download": "Download .{ending}",
    "nothing_heard": "no words heard in {audio_s:.1f} s of sound ({elapsed_s:.2f} s)",
    "model": {
        "name": "Model",
        "revision": "Revision",
        "base": "Tuned from",
        "quantisation": "Weights",
        "test": "Test",
        "why": "Chosen as",
    },
    "q8": "dequantised from 8 bits (q8)",
    "not_scored": "not scored",
    "why": {
        "named": "the model that was asked for",
        "newest": "the newest finished run on this machine",
        "base": "the base model, as no run on this machine is finished yet",
    },
    "question": "Was it right?",
    "correction": "If not: what was said?",
    "correction_hint": "Correct the words, then press Wrong",
    "username": "Your name (optional)",
    "keep": "Keep my recording with this feedback",
    "right": "Right · Rätt",
    "wrong": "Wrong · Fel",
    "thanks": "**Tack!** Noted as {flag}. Your feedback helps the next model.",
    "thanks_kept": "**Tack!** Noted as {flag}, and your recording is kept with it.",
    "thanks_too_long": "**Tack!** Noted as {flag}. The recording was over a minute long and is not kept.",
    "nothing_to_judge": "There is no transcript yet: record something and press Transcribe first.",
    "text_too_long": "That text is too long to keep: at most 2,000 characters, please.",
    "not_noted": "Your feedback could not be saved just now. Please try again later.",
    "sorry": "Sorry",
    "failed": "Something went wrong on the server. Please try again.",
    "refused": {
        "no_recording": "Record something or choose a file first.",
        "missing": "This recording is no longer on the server. Please record or choose it again.",
        "empty": "This file is empty. Please record or choose another one.",
        "unreadable": "This file is not audio that can be read here. Please choose a wav, flac, mp3 or ogg file.",
        "not_finite": "This file holds broken samples (not numbers). Please choose another one.",
        "silent": "The recording is silent. Is the right microphone chosen and switched on?",
        "too_long": "This recording is longer than 10 minutes. Please choose a shorter one.",
    },
}
"""Every word of the page: another language is another dictionary."""

MAX_UPLOAD = "25mb"
SESSION_S = 1_800
"""Seconds after which a session forgets its recording, and after which an upload nobody transcribed is deleted."""
DOWNLOADS = ("txt", "srt", "vtt")
"""Endings of the files that the page offers: subtitles.FORMATS."""
_SAVE = """files => {
  if (!files) return
  const link = document.createElement("a")
  link.href = URL.createObjectURL(new Blob([files["%s"]], {type: "text/plain;charset=utf-8"}))
  link.download = "transcript.%s"
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 10000)
}"""
"""Saves a file that the page has already: nothing of it lies on the server."""
_SESSIONS = 100  # each may hold a minute of 16 kHz float32, 3.8 MB

CSS = """
.gradio-container {max-width: 720px !important; margin: 0 auto !important}
#head h1 {font-size: 1.9rem; letter-spacing: -.01em; margin: .5rem 0 .2rem}
#head p, #privacy p, #timing p, #card dt {color: var(--muted)}
#privacy p, #timing p {font-size: .85rem; line-height: 1.45; margin: 0}
#transcript textarea {font-size: 1.2rem; line-height: 1.55}
@supports (field-sizing: content) {#transcript textarea {field-sizing: content; height: auto !important}}
#card {border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .8rem 1rem}
#card dl {display: grid; grid-template-columns: 7rem 1fr; gap: .3rem .75rem; margin: 0; font-size: .85rem}
#card dd {margin: 0; overflow-wrap: anywhere}
#question h2 {font-size: 1.2rem; margin: .9rem 0 0}
#thanks:not(:has(p)) {display: none}
#details summary {cursor: pointer; font-size: .9rem; color: var(--muted)}
#details ol {list-style: none; margin: .5rem 0 0; padding: 0; max-height: 22rem; overflow-y: auto}
#details li {display: grid; grid-template-columns: 4.5rem 1fr; gap: .75rem; padding: .2rem 0; line-height: 1.5}
#details time {color: var(--muted); font-variant-numeric: tabular-nums; font-size: .85rem}
#details mark {background: none; color: inherit; text-decoration: underline wavy #b45309; text-underline-offset: 3px}
#details p {font-size: .85rem; color: var(--muted); margin: .4rem 0 0}
#downloads button {font-size: .85rem}
:root {--muted: #475569}
.dark {--muted: #a8b5c7}
button:focus-visible, input:focus-visible, textarea:focus-visible {
  outline: 3px solid var(--color-accent) !important; outline-offset: 1px
}
footer .divider {display: none !important}
@media (max-width: 480px) {#card dl {grid-template-columns: 5.5rem 1fr} #head h1 {font-size: 1.6rem}}
"""

_LOG = logging.getLogger("app")


class Buttons:
    """What the buttons do. Whatever goes wrong reaches the page as one line; the details go to the server's log."""

    def __init__(self, service: Service):
        self.service = service

    def begin(self, recording: dict[str, Any] | None) -> tuple[Any, ...]:
        """Another recording, or none: the Transcribe button, and a page without what was said of the last one."""
        import gradio as gr

        nothing = self.details(None)
        return gr.Button(interactive=recording is not None), "", "", None, "", "", *nothing

    def details(self, heard: Heard | None) -> tuple[Any, ...]:
        """Segments with times and unsure words as HTML, the files to download, and a button for each of them."""
        import gradio as gr

        from pipelines import subtitles
        from pipelines.transcriber import Transcript

        said = bool(heard and heard.segments)
        files = None
        if said:
            transcript = Transcript(heard.text, heard.audio_s, heard.elapsed_s, heard.segments)
            files = {ending: subtitles.FORMATS[ending](transcript) for ending in DOWNLOADS}
        return _details(heard.segments if said else ()), files, *[gr.Button(interactive=said) for _ in DOWNLOADS]

    def transcribe(self, recording: str | None, heard: Heard | None) -> tuple[str, str, Heard]:
        """Transcript, a line with durations, and what the session remembers. The uploaded file is deleted."""
        with _one_line(TEXTS["failed"]):
            try:
                heard = self.service.hear(recording, heard)
            finally:
                _discard(recording)
            line = TEXTS["took"] if heard.text else TEXTS["nothing_heard"]
            return heard.text, line.format(audio_s=heard.audio_s, elapsed_s=heard.elapsed_s), heard

    def right(self, heard: Heard | None, username: str, keep: bool) -> Noted:
        """A line of thanks, and what the session remembers."""
        return self._note(heard, "right", "", username, keep)

    def wrong(self, heard: Heard | None, correction: str, username: str, keep: bool) -> Noted:
        """The same; `correction` is what was said, or the transcript left as it was."""
        return self._note(heard, "wrong", correction, username, keep)

    def _note(self, heard: Heard | None, flag: str, correction: str, username: str, keep: bool) -> Noted:
        import gradio as gr

        from pipelines import feedback

        with _one_line(TEXTS["not_noted"]):
            if heard is None:
                gr.Warning(TEXTS["nothing_to_judge"], title=TEXTS["sorry"])
                return "", None
            if max(map(len, (heard.text, correction or "", username or ""))) > feedback.MAX_CHARS:
                gr.Warning(TEXTS["text_too_long"], title=TEXTS["sorry"])
                return "", heard
            heard = self.service.note(heard, flag, correction or "", username or "", keep=bool(keep))
            line = "thanks" if not keep else "thanks_kept" if heard.recording else "thanks_too_long"
            return TEXTS[line].format(flag=flag), heard


def build(transcriber: Transcriber, log: Path, *, title: str = TEXTS["title"], why: str = "named") -> gr.Blocks:
    """The page around `transcriber`, its feedback going to the CSV file `log`. `why`: see served.choose."""
    import gradio as gr

    buttons = Buttons(served.Service(transcriber, log))
    # delete_cache: (seconds between two looks, seconds after which an upload is deleted)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, SESSION_S)) as demo:
        heard = gr.State(None, time_to_live=SESSION_S)
        gr.Markdown(f"# {title}\n{TEXTS['lead']}", elem_id="head")
        recording = gr.Audio(
            sources=["microphone", "upload"],
            type="filepath",
            label=TEXTS["recording"],
            elem_id="recording",
            buttons=[],
            editable=False,
            waveform_options={"waveform_color": "#94a3b8", "waveform_progress_color": "#1d4ed8"},
        )
        gr.Markdown(TEXTS["privacy"], elem_id="privacy")
        # asleep until the audio has arrived: a recording takes a moment to upload
        transcribe = gr.Button(
            TEXTS["transcribe"], variant="primary", size="lg", interactive=False, elem_id="transcribe"
        )
        transcript = gr.Textbox(
            label=TEXTS["transcript"],
            placeholder=TEXTS["transcript_hint"],
            lines=3,
            max_lines=12,
            interactive=False,
            buttons=["copy"],
            elem_id="transcript",
        )
        timing = gr.Markdown("", elem_id="timing")
        details = gr.HTML("", elem_id="details", padding=False)
        files = gr.JSON(None, visible=False)
        with gr.Row(elem_id="downloads"):
            downloads = [
                gr.Button(TEXTS["download"].format(ending=ending), size="sm", interactive=False, min_width=100)
                for ending in DOWNLOADS
            ]
        gr.HTML(_card(served.card(transcriber.ref), why), elem_id="card", padding=False)
        correction, *verdict = _feedback(gr, buttons, heard)
        spoken = transcribe.click(
            buttons.transcribe,
            [recording, heard],
            [transcript, timing, heard],
            api_name="transcribe",
            show_progress_on=transcript,
        )
        spoken.success(None, transcript, correction, js="text => text", api_visibility="private")
        told = [details, files, *downloads]
        spoken.success(buttons.details, heard, told, show_progress="hidden", api_visibility="private")
        for ending, button in zip(DOWNLOADS, downloads, strict=True):
            button.click(None, files, None, js=_SAVE % (ending, ending), api_visibility="private")
        recording.change(
            buttons.begin,
            recording,
            [transcribe, transcript, timing, heard, correction, *verdict, *told],
            queue=False,
            preprocess=False,
            show_progress="hidden",
            api_visibility="private",
        )
    return demo.queue(default_concurrency_limit=1, max_size=20)


def launch(demo: gr.Blocks, *, host: str | None = None, port: int | None = None, share: bool | None = False) -> str:
    """Serve the page in the background and return its address. Nothing on it comes from another server.

    Raises LabError where the port is taken.
    """
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # else the browser keeps every call; not every 6.x has the argument
    try:
        demo.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=_theme(),
            css=CSS,
            quiet=True,
            show_error=False,
            max_file_size=MAX_UPLOAD,
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
    options = _options(arguments)
    named = options.model or os.environ.get("MODEL_URI") or served.of_space(environment.ROOT)
    uri, why = served.choose(named, environment.runs_folder())
    print(f"model: {uri} ({TEXTS['why'][why]})", flush=True)
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
        demo = build(_transcriber(uri, options.engine), options.log, why=why)
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
        f"newest finished run, else {served.BASE_MODEL}",
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
        "--log", type=Path, default=environment.ROOT / "log.csv", help="feedback log (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say which model would be served, and end")
    return parser.parse_args(arguments)


def _transcriber(uri: str, engine: str) -> Transcriber:
    from pipelines import models
    from pipelines.transcriber import Transcriber

    ref = models.resolve(uri)
    return Transcriber(ref, ref.facts.get("language") or "sv", engine)


def _feedback(gr: Any, buttons: Buttons, heard: gr.State) -> tuple[gr.Textbox, gr.Markdown]:
    """The lower half of the page: the box with the correction, and the line that says thank you."""
    gr.Markdown(f"## {TEXTS['question']}", elem_id="question")
    correction = gr.Textbox(
        label=TEXTS["correction"],
        placeholder=TEXTS["correction_hint"],
        lines=1,
        max_lines=8,
        max_length=2_000,
        elem_id="correction",
    )
    username = gr.Textbox(label=TEXTS["username"], max_length=100, elem_id="username")
    keep = gr.Checkbox(label=TEXTS["keep"], value=False, elem_id="keep", container=False)
    with gr.Row():
        right = gr.Button(TEXTS["right"], min_width=120, elem_id="right")
        wrong = gr.Button(TEXTS["wrong"], min_width=120, elem_id="wrong")
    thanks = gr.Markdown("", elem_id="thanks")
    quiet = {"outputs": [thanks, heard], "api_visibility": "private", "show_progress": "hidden"}
    right.click(buttons.right, [heard, username, keep], **quiet)
    gr.on([wrong.click, correction.submit], buttons.wrong, [heard, correction, username, keep], **quiet)
    return correction, thanks


def _details(segments: tuple[Segment, ...]) -> str:
    """When each segment was said, with the words marked that are more likely wrong than right; all escaped."""
    from pipelines.confidence import UNSURE

    if not segments:
        return ""
    unsure = any(word.confidence < UNSURE for segment in segments for word in segment.words)
    lines = "".join(f"<li>{_time(segment.start_s)}<span>{_words(segment, UNSURE)}</span></li>" for segment in segments)
    note = TEXTS["unsure" if unsure else "sure"]
    opened = " open" if unsure else ""
    return f"<details{opened}><summary>{TEXTS['details']}</summary><ol>{lines}</ol><p>{note}</p></details>"


def _time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"<time>{int(minutes)}:{rest:04.1f}</time>"


def _words(segment: Segment, unsure: float) -> str:
    told = []
    for word in segment.words:
        text, title = html.escape(word.text), TEXTS["word"].format(confidence=word.confidence)
        told.append(f'<mark title="{title}">{text}</mark>' if word.confidence < unsure else text)
    return " ".join(told) or html.escape(segment.text)


def _card(known: dict[str, str], why: str) -> str:
    """The model's facts as HTML."""
    shown = {**known, "test": known.get("test", TEXTS["not_scored"]), "why": TEXTS["why"].get(why, why)}
    if "quantisation" in shown:
        shown["quantisation"] = TEXTS.get(shown["quantisation"], shown["quantisation"])
    rows = [
        f"<dt>{label}</dt><dd>{html.escape(shown[name])}</dd>"
        for name, label in TEXTS["model"].items()
        if name in shown
    ]
    return f"<dl>{''.join(rows)}</dl>"


def _theme() -> gr.themes.Base:
    """Calm, and in the system's own fonts: the page fetches nothing from outside."""
    import gradio as gr

    calm = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
    fill, hover = "*primary_700", "*primary_800"  # white letters need this dark a blue
    return calm.set(
        button_primary_background_fill=fill,
        button_primary_background_fill_hover=hover,
        button_primary_background_fill_dark=fill,
        button_primary_background_fill_hover_dark=hover,
    )


@contextmanager
def _one_line(lab_error: str) -> Iterator[None]:
    """Turn every exception into one line on the page, without a path or a traceback; a LabError into `lab_error`."""
    import gradio as gr

    from pipelines.audio import AudioError

    try:
        yield
    except AudioError as error:
        _LOG.info("refused a recording: %s", error)
        message = TEXTS["refused"].get(error.reason, TEXTS["refused"]["unreadable"])
    except LabError as error:
        _LOG.warning("%s", error)
        message = lab_error
    except Exception:
        _LOG.exception("a request failed")
        message = TEXTS["failed"]
    else:
        return
    raise gr.Error(message, title=TEXTS["sorry"], print_exception=False)


def _discard(upload: str | None) -> None:
    """Delete an upload and its folder; only what lies in Gradio's own folder of uploads."""
    from gradio.utils import get_upload_folder

    if upload is None or not Path(upload).is_relative_to(get_upload_folder()):
        return
    Path(upload).unlink(missing_ok=True)
    try:
        Path(upload).parent.rmdir()
    except OSError:
        pass  # another upload lies in it


if __name__ == "__main__":
    main()
