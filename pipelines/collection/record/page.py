"""Components and events of the recording page. The `js` arguments call the functions of static/record.js."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.collection.record.handlers import Handlers, Visit
from pipelines.collection.record.i18n import TEXTS, localized_texts
from pipelines.collection.record.recorder import AGES, GENDERS, MAX_ACCENT_CHARS
from pipelines.inference.app import assets, html
from pipelines.inference.app.events import client_of, connect_language
from pipelines.inference.app.launch import SESSION_S
from pipelines.inference.app.layout import LocalizedComponents, create_head

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.inference.app.i18n import Texts

_STATIC = Path(__file__).parent / "static"
_SILENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass
class View:
    """The components that events read or change."""

    localized: LocalizedComponents
    language: gr.State
    language_switch: gr.Radio
    visit: gr.State
    """The visitor's handlers.Visit."""
    fields: list[Any]
    """Agreement, nickname, gender, age, accent."""
    start: gr.Button
    recording: gr.Audio
    keep: gr.Button
    skip: gr.Button
    outputs: list[Any]
    """Outputs of Handlers.show."""


def build(handlers: Handlers) -> gr.Blocks:
    """Build the page; inference.app.launch.launch serves it."""
    import gradio as gr

    speech = handlers.recorder.folder.terms.language
    with gr.Blocks(title=TEXTS["en"]["title"], analytics_enabled=False, delete_cache=(60, SESSION_S)) as demo:
        view = _create(handlers)
        _connect(demo, view, handlers)
    extension = (_STATIC / "record.js").read_text("utf-8")
    demo.page_style = assets.style() + (_STATIC / "record.css").read_text("utf-8")
    demo.page_script = assets.script(speech, extension)
    demo.live_sessions, demo.rate_limiter = None, handlers.limiter
    return demo.queue(default_concurrency_limit=4, max_size=100)


def _create(handlers: Handlers) -> View:
    import gradio as gr

    terms = handlers.recorder.folder.terms
    page = LocalizedComponents(lambda tag: {**localized_texts(tag, terms.language), "consent": terms.consent[tag]})
    language, visit = gr.State("en"), gr.State(None, time_to_live=SESSION_S)
    language_switch = create_head(page)
    with gr.Column(elem_id="agreement") as agreement:
        fields, start = _create_agreement(page, terms.licence)
    with gr.Column(elem_id="recorder", visible=False) as recorder:
        progress = gr.Markdown("", elem_id="progress")
        sentence = gr.HTML("", elem_id="sentence", padding=False)
        recording, status = _create_recorder(page)
        again, keep, skip = _create_buttons(page)
        page.add(gr.HTML, lambda texts: {"value": f"<p>{texts['keys']}</p>"}, elem_id="keys", padding=False)
    outputs = [agreement, recorder, progress, sentence, status, again, keep, skip]
    return View(page, language, language_switch, visit, fields, start, recording, keep, skip, outputs)


def _create_agreement(page: LocalizedComponents, licence: str) -> tuple[list[Any], gr.Button]:
    """Create the consent, which is read first, and the optional fields about the speaker."""
    import gradio as gr

    def choices(name: str, values: tuple[str, ...]) -> Callable[[Texts], dict[str, Any]]:
        return lambda texts: {
            "label": f"{texts[name]} ({texts['optional']})",
            "choices": [(texts["unstated"], ""), *((texts[f"{name}s"][value], value) for value in values)],
        }

    def consent(texts: Texts) -> dict[str, Any]:
        licence_line = texts["licence"].format(licence=licence)
        return {"value": f"## {texts['consent_title']}\n{texts['consent']}\n\n{licence_line}"}

    line: dict[str, Any] = {"value": "", "lines": 1, "max_lines": 1, "max_length": MAX_ACCENT_CHARS}
    page.add(gr.Markdown, consent, elem_id="consent")
    agrees = page.add(gr.Checkbox, lambda texts: {"label": texts["agree"]}, value=False, elem_id="agree")
    nickname = page.add(
        gr.Textbox,
        lambda texts: {"label": f"{texts['nickname']} ({texts['optional']})", "info": texts["nickname_info"]},
        elem_id="nickname",
        **line,
    )
    with gr.Row():
        age = page.add(gr.Dropdown, choices("age", AGES), value="", elem_id="age", min_width=140)
        gender = page.add(gr.Dropdown, choices("gender", GENDERS), value="", elem_id="gender", min_width=140)
        accent = page.add(
            gr.Textbox,
            lambda texts: {"label": f"{texts['accent']} ({texts['optional']})"},
            elem_id="accent",
            min_width=140,
            **line,
        )
    start = page.add(gr.Button, lambda texts: {"value": texts["start"]}, variant="primary", size="lg", elem_id="start")
    return [agrees, nickname, gender, age, accent], start


def _create_recorder(page: LocalizedComponents) -> tuple[gr.Audio, gr.HTML]:
    import gradio as gr

    recording = page.add(
        gr.Audio,
        lambda texts: {"label": texts["recording"]},
        sources=["microphone", "upload"],
        type="filepath",
        elem_id="recording",
        buttons=[],
        editable=False,
        waveform_options={"waveform_color": "#94a3b8", "waveform_progress_color": "#1d4ed8"},
    )
    gr.HTML(html.RECORDER_NOTE, elem_id="recorder-status", padding=False)
    return recording, gr.HTML("", elem_id="status", padding=False)


def _create_buttons(page: LocalizedComponents) -> list[gr.Button]:
    import gradio as gr

    with gr.Row(elem_id="actions"):
        return [
            page.add(
                gr.Button,
                lambda texts, name=name: {"value": texts[name]},
                variant="primary" if name == "next" else "secondary",
                size="lg",
                min_width=90,
                interactive=False,
                elem_id=name,
            )
            for name in ("again", "next", "skip")
        ]


def _connect(demo: gr.Blocks, view: View, handlers: Handlers) -> None:
    """Connect the events. The button to record again only clears the recorder: the script clicks its buttons."""
    import gradio as gr

    visit, language, outputs = view.visit, view.language, view.outputs

    def start(
        agrees: bool, nickname: str, gender: str, age: str, accent: str, tag: str, request: Any
    ) -> tuple[Any, ...]:
        started = handlers.start(agrees, nickname, (gender, age, accent), tag, client_of(request))
        return started, *handlers.show(started, tag)

    def check(recording: str | None, current: Visit | None, tag: str, request: Any) -> tuple[Any, ...]:
        checked = handlers.check(recording, current, tag, client_of(request))
        return checked, *handlers.show(checked, tag)

    def go_on(action: Callable[..., Visit | None]) -> Callable[..., tuple[Any, ...]]:
        def act(current: Visit | None, tag: str) -> tuple[Any, ...]:
            changed = action(current, tag)
            return changed, gr.skip() if changed is current else None, *handlers.show(changed, tag)

        return act

    start.__annotations__ = check.__annotations__ = {"request": gr.Request}  # Gradio cannot read them as strings
    view.start.click(start, [*view.fields, language], [visit, *outputs], **_SILENT)
    view.recording.change(
        check,
        [view.recording, visit, language],
        [visit, *outputs],
        show_progress="minimal",
        show_progress_on=outputs[4],
        api_visibility="private",
    )
    for button, action in ((view.keep, handlers.keep), (view.skip, handlers.skip)):
        button.click(go_on(action), [visit, language], [visit, view.recording, *outputs], **_SILENT)
    connect_language(demo, view, handlers.show, visit, outputs)
