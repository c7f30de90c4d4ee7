"""The review page: one clip at a time, decided on with the keyboard. A visitor names no file."""

from __future__ import annotations

import base64
import difflib
import html
import io
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.collection.review.queue import MAX_CHARS, MIN_DECISIONS, Item, Queue
from pipelines.collection.review.texts import TEXTS
from pipelines.features.sources import Example, NoAudio
from pipelines.inference.app import assets
from pipelines.inference.app import launch as app_launch
from pipelines.inference.app.events import connect_language
from pipelines.inference.app.i18n import choose_language
from pipelines.inference.app.launch import SESSION_S
from pipelines.inference.app.layout import LocalizedComponents, create_head
from pipelines.inference.app.uploads import temporary_folder
from pipelines.inference.http.rate_limits import RateLimiter
from pipelines.infra.errors import LabError
from pipelines.speech import audio as speech_audio

if TYPE_CHECKING:
    import gradio as gr

_STATIC = Path(__file__).parent / "static"
_MAX_S = 30.0
_SILENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Handlers:
    """What the page's buttons call."""

    queue: Queue
    examples: Mapping[str, Example]
    """The source's example of each clip of the queue by its id; its audio is read when it is played."""

    def show(self, session: str | None, language: str) -> list[Any]:
        """Return progress, clip and text field for the clip that this session reviews now."""
        import gradio as gr

        texts = TEXTS[language]
        at = self.queue.progress()
        line = texts["progress"].format(reviewed=at.reviewed, clips=at.clips, wrong=at.wrong) + " "
        line += texts["no_share"].format(least=MIN_DECISIONS) if at.share is None else ""
        line += texts["share"].format(share=at.share) if at.share is not None else ""
        item = self.queue.next(session) if session else None
        if item is None:
            return [line, f"<p id='done'>{texts['done']}</p>" if session else "", gr.update(value="", visible=False)]
        return [line, self._clip(item, texts), gr.update(value=item.text, visible=True)]

    def decide(self, verdict: str, session: str | None, after: str, reviewer: str, language: str) -> list[Any]:
        """Store a decision about the clip that this session sees, and show the next one."""
        import gradio as gr

        try:
            if session and (item := self.queue.shown(session)):
                self.queue.decide(item.id, verdict, str(after or ""), str(reviewer or ""))
        except LabError as error:
            gr.Warning(html.escape(str(error)), title=TEXTS[language]["not_stored"])
            return [gr.skip()] * 3
        return self.show(session, language)

    def _clip(self, item: Item, texts: Mapping[str, Any]) -> str:
        ours, theirs = _marked(item.text, item.heard)
        return (
            f"{self._player(item, texts)}<dl id='texts'><dt>{texts['transcript']}</dt><dd id='before'>{ours}</dd>"
            f"<dt>{texts['heard']}</dt><dd id='heard'>{theirs}</dd></dl>"
        )

    def _player(self, item: Item, texts: Mapping[str, Any]) -> str:
        example = self.examples.get(item.id)
        try:
            sound = example.audio if example else NoAudio("missing", "")
            wav = "" if isinstance(sound, NoAudio) else base64.b64encode(_wav(sound)).decode()
        except (speech_audio.AudioError, OSError):
            wav = ""
        if not wav:
            return f"<p>{texts['no_audio']}</p>"
        return f"<audio id='review-player' controls autoplay src='data:audio/wav;base64,{wav}'></audio>"


def build(handlers: Handlers, speech: str) -> gr.Blocks:
    """Build the page for transcripts in the language `speech`; inference.app.launch.launch serves it."""
    import gradio as gr

    with gr.Blocks(title=TEXTS["en"]["title"], analytics_enabled=False, delete_cache=(60, SESSION_S)) as demo:
        view = _create()
        _connect(demo, view, handlers)
    demo.page_style = assets.style() + (_STATIC / "review.css").read_text("utf-8")
    demo.page_script = assets.script(speech, (_STATIC / "review.js").read_text("utf-8"))
    demo.live_sessions, demo.rate_limiter = None, RateLimiter(0, 0)
    return demo.queue(default_concurrency_limit=4, max_size=100)


def serve(handlers: Handlers, speech: str, host: str, port: int | None, announce: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; `announce` receives its address. Raises LabError if the port is taken."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the temporary folder
    with temporary_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when Gradio is imported
        demo = build(handlers, speech)
        try:
            announce(app_launch.launch(demo, host=host, port=port))
            demo.block_thread()
        finally:
            demo.close(verbose=False)


@dataclass
class _View:
    """The components that events read or change."""

    localized: LocalizedComponents
    language: gr.State
    language_switch: gr.Radio
    session: gr.State
    reviewer: gr.Textbox
    outputs: list[Any]
    """Outputs of Handlers.show: progress, clip, text field."""
    buttons: dict[str, gr.Button]
    """By verdict."""


def _create() -> _View:
    import gradio as gr

    page = LocalizedComponents(TEXTS.__getitem__)
    language, session = gr.State("en"), gr.State(None, time_to_live=SESSION_S)
    language_switch = create_head(page)
    progress = gr.Markdown("", elem_id="progress")
    clip = gr.HTML("", elem_id="clip", padding=False)
    text = page.add(
        gr.Textbox, lambda texts: {"label": texts["correction"]}, lines=2, max_length=MAX_CHARS, elem_id="correction"
    )
    buttons = {}
    with gr.Row(elem_id="actions"):
        for verdict, name in (("accept", "accept"), ("correct", "save"), ("reject", "reject")):
            variant = "primary" if verdict == "accept" else "secondary"
            buttons[verdict] = page.add(
                gr.Button, lambda texts, name=name: {"value": texts[name]}, variant=variant, min_width=90, elem_id=name
            )
    page.add(gr.HTML, lambda texts: {"value": f"<p>{texts['keys']}</p>"}, elem_id="keys", padding=False)
    reviewer = page.add(
        gr.Textbox, lambda texts: {"label": texts["reviewer"]}, max_lines=1, max_length=60, elem_id="reviewer"
    )
    return _View(page, language, language_switch, session, reviewer, [progress, clip, text], buttons)


def _connect(demo: gr.Blocks, view: _View, handlers: Handlers) -> None:
    import gradio as gr

    def start(request: Any) -> list[Any]:
        session = uuid.uuid4().hex
        return [session, *handlers.show(session, choose_language(request.headers.get("accept-language", "")))]

    start.__annotations__["request"] = gr.Request  # Gradio cannot read the annotation as a string
    demo.load(start, None, [view.session, *view.outputs], **_SILENT)
    text = view.outputs[2]
    for verdict, button in view.buttons.items():

        def decide(session: str, after: str, reviewer: str, tag: str, verdict: str = verdict) -> list[Any]:
            return handlers.decide(verdict, session, after, reviewer, tag)

        button.click(decide, [view.session, text, view.reviewer, view.language], view.outputs, **_SILENT)
    connect_language(demo, view, handlers.show, view.session, view.outputs)


def _marked(ours: str, theirs: str) -> tuple[str, str]:
    """Return two texts as HTML, with marks around the words that differ."""
    pair = (ours.split(), theirs.split())
    keys = [[word.lower().strip(".,!?:;\"'") for word in words] for words in pair]
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, *ends in difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        for side, (start, end) in enumerate((ends[:2], ends[2:])):
            part = html.escape(" ".join(pair[side][start:end]))
            if part:
                marked[side].append(part if kind == "equal" else f"<mark>{part}</mark>")
    return " ".join(marked[0]), " ".join(marked[1])


def _wav(sound: bytes | Path) -> bytes:
    """Return a recording as a WAV file of 16 bits. Raises AudioError."""
    import soundfile

    waveform, out = speech_audio.decode(sound, _MAX_S), io.BytesIO()
    soundfile.write(out, waveform.samples, speech_audio.SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return out.getvalue()
