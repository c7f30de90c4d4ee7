"""Components and events of the review page: one clip at a time. The `js` argument calls static/review.js."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.collection.review.handlers import Handlers
from pipelines.collection.review.queue import MAX_CHARS
from pipelines.collection.review.texts import TEXTS
from pipelines.inference.app import assets
from pipelines.inference.app.components.localized import LocalizedComponents, create_head
from pipelines.inference.app.events import connect_language
from pipelines.inference.app.i18n import choose_language
from pipelines.inference.app.launch import SESSION_S
from pipelines.inference.http.rate_limits import RateLimiter

if TYPE_CHECKING:
    import gradio as gr

_STATIC = Path(__file__).parent / "static"
_PRESSED = "(session, _, ...others) => [session, window.lab.pressed(), ...others]"
"""Reads which clip is on the page at the moment of a key or a click."""
_SILENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


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


@dataclass
class _View:
    """The components that events read or change."""

    localized: LocalizedComponents
    language: gr.State
    language_switch: gr.Radio
    session: gr.Textbox
    """Gradio's name of the open page; hidden. The server keeps it as long as the page is open."""
    pressed: gr.JSON
    """Filled by the script with each event: handlers.Pressed; hidden."""
    reviewer: gr.Textbox
    outputs: list[Any]
    """Outputs of Handlers.show: progress, clip, text field."""
    buttons: dict[str, gr.Button]
    """By verdict, and `skip` and `back`."""


def _create() -> _View:
    import gradio as gr

    page = LocalizedComponents(TEXTS.__getitem__)
    language, session, pressed = gr.State("en"), gr.Textbox(visible=False), gr.JSON(None, visible=False)
    language_switch = create_head(page)
    progress = gr.Markdown("", elem_id="progress")
    clip = gr.HTML("", elem_id="clip", padding=False)
    buttons = _create_buttons(page, "decisions", {"accept": "accept", "reject": "reject"})
    text = page.add(
        gr.Textbox, lambda texts: {"label": texts["correction"]}, lines=2, max_length=MAX_CHARS, elem_id="correction"
    )
    buttons |= _create_buttons(page, "others", {"correct": "save", "skip": "skip", "back": "back"})
    page.add(gr.HTML, lambda texts: {"value": f"<p>{texts['keys']}</p>"}, elem_id="keys", padding=False)
    reviewer = page.add(
        gr.Textbox, lambda texts: {"label": texts["reviewer"]}, max_lines=1, max_length=60, elem_id="reviewer"
    )
    return _View(page, language, language_switch, session, pressed, reviewer, [progress, clip, text], buttons)


def _create_buttons(page: LocalizedComponents, row: str, names: dict[str, str]) -> dict[str, gr.Button]:
    """Create a row of buttons: action to the name of its text, which is also the button's id."""
    import gradio as gr

    with gr.Row(elem_id=row, elem_classes="actions"):
        return {
            action: page.add(
                gr.Button,
                lambda texts, name=name: {"value": texts[name]},
                variant="primary" if action == "accept" else "secondary",
                min_width=280 if action == "correct" else 90,  # on a phone a row of its own
                elem_id=name,
            )
            for action, name in names.items()
        }


def _connect(demo: gr.Blocks, view: _View, handlers: Handlers) -> None:
    import gradio as gr

    def start(request: Any) -> list[Any]:
        language = choose_language(request.headers.get("accept-language", ""))
        return [request.session_hash, *handlers.show(request.session_hash, language)]

    def leave(request: Any) -> None:
        handlers.sessions.leave(request.session_hash)

    start.__annotations__ = leave.__annotations__ = {"request": gr.Request}  # Gradio cannot read them as strings
    demo.load(start, None, [view.session, *view.outputs], **_SILENT)
    demo.unload(leave)
    text, page = view.outputs[2], [view.session, view.pressed]
    for action, button in view.buttons.items():
        if action in ("skip", "back"):
            handle, inputs = getattr(handlers, action), [*page, view.language]
        else:
            handle, inputs = functools.partial(handlers.decide, action), [*page, text, view.reviewer, view.language]
        button.click(handle, inputs, view.outputs, js=_PRESSED, **_SILENT)
    connect_language(demo, view, handlers.show, view.session, view.outputs)
