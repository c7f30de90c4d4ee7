"""Components and events of the recording page. The `js` arguments call the functions of static/record.js."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.collection.record.handlers import Handlers, SameNickname, Visit
from pipelines.collection.record.i18n import TEXTS, localized_texts
from pipelines.collection.record.recorder import AGES, GENDERS, MAX_ACCENT_CHARS
from pipelines.inference.app import assets
from pipelines.inference.app.components.localized import LocalizedComponents, create_head, create_recorder
from pipelines.inference.app.events import client_of, connect_language
from pipelines.inference.app.launch import SESSION_S

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.inference.app.components.localized import Texts

_STATIC = Path(__file__).parent / "static"
_SILENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_SENTENCE = "(_, ...others) => [window.lab.sentence(), ...others]"
_RECORDED_SENTENCE = "(_, ...others) => [window.lab.recordedSentence(), ...others]"
"""Read which sentence was on the page when a button was pressed, and when the recording began."""


@dataclass
class Question:
    """Asks whether a nickname that was used before is the visitor's own."""

    group: gr.Column
    yes: gr.Button
    no: gr.Button
    nickname: gr.State
    """The nickname that the question is about."""


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
    question: Question
    sentence_id: gr.Textbox
    """Filled by the script with each event: the sentence on the page; hidden."""
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
        question = _create_question(page)
    with gr.Column(elem_id="recorder", visible=False) as recorder:
        progress = gr.Markdown("", elem_id="progress")
        sentence = gr.HTML("", elem_id="sentence", padding=False)
        recording = create_recorder(page)
        status = gr.HTML("", elem_id="status", padding=False)
        again, keep, skip = _create_buttons(page)
        page.add(gr.HTML, lambda texts: {"value": f"<p>{texts['keys']}</p>"}, elem_id="keys", padding=False)
    outputs = [agreement, recorder, progress, sentence, status, again, keep, skip]
    return View(
        page,
        language,
        language_switch,
        visit,
        fields,
        start,
        question,
        gr.Textbox(visible=False),
        recording,
        keep,
        skip,
        outputs,
    )


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


def _create_question(page: LocalizedComponents) -> Question:
    import gradio as gr

    with gr.Column(elem_id="known", visible=False) as group:
        page.add(gr.Markdown, lambda texts: {"value": f"**{texts['known']}**"})
        with gr.Row():
            yes, no = (
                page.add(
                    gr.Button,
                    lambda texts, name=name: {"value": texts[name]},
                    variant="primary" if name == "known_yes" else "secondary",
                    min_width=140,
                    elem_id=name,
                )
                for name in ("known_yes", "known_no")
            )
    return Question(group, yes, no, gr.State(""))


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
    _connect_start(view, handlers)

    def check(sentence: Any, recording: str | None, current: Visit | None, tag: str, request: Any) -> tuple[Any, ...]:
        checked = handlers.check(recording, current, tag, client_of(request), str(sentence or ""))
        if checked is None and current is not None:  # the page went on during the check
            return tuple(gr.skip() for _ in range(2 + len(outputs)))
        is_refused = recording is not None and checked is not None and checked.upload is None
        return checked, None if is_refused else gr.skip(), *handlers.show(checked, tag)

    def go_on(action: Callable[..., Visit | None]) -> Callable[..., tuple[Any, ...]]:
        def act(sentence: Any, current: Visit | None, tag: str) -> tuple[Any, ...]:
            changed = action(current, tag, str(sentence or ""))
            if changed is None:  # an earlier press has gone on
                return tuple(gr.skip() for _ in range(2 + len(outputs)))
            return changed, gr.skip() if changed is current else None, *handlers.show(changed, tag)

        return act

    check.__annotations__ = {"request": gr.Request}  # Gradio cannot read it as a string
    view.recording.change(
        check,
        [view.sentence_id, view.recording, visit, language],
        [visit, view.recording, *outputs],
        js=_RECORDED_SENTENCE,
        show_progress="minimal",
        show_progress_on=outputs[4],
        api_visibility="private",
    )
    for button, action in ((view.keep, handlers.keep), (view.skip, handlers.skip)):
        button.click(
            go_on(action),
            [view.sentence_id, visit, language],
            [visit, view.recording, *outputs],
            js=_SENTENCE,
            **_SILENT,
        )
    connect_language(demo, view, handlers.show, visit, outputs)


def _connect_start(view: View, handlers: Handlers) -> None:
    """Connect the button that begins a visit, and the question about a nickname that was used before."""
    import gradio as gr

    question, nickname = view.question, view.fields[1]

    def start(confirmed: str, tag: str, request: Any, *fields: Any) -> tuple[Any, ...]:
        agrees, name, gender, age, accent = fields
        try:
            started = handlers.start(agrees, name, (gender, age, accent), tag, client_of(request), confirmed)
        except SameNickname:
            return None, name, gr.update(visible=True), *handlers.show(None, tag)
        return started, "", gr.update(visible=False), *handlers.show(started, tag)

    start.__annotations__ = {"request": gr.Request}  # Gradio cannot read it as a string
    outputs = [view.visit, question.nickname, question.group, *view.outputs]
    for button, confirmed in ((view.start, gr.State("")), (question.yes, question.nickname)):
        button.click(start, [confirmed, view.language, *view.fields], outputs, **_SILENT)
    question.no.click(
        lambda: ("", "", gr.update(visible=False)), None, [nickname, question.nickname, question.group], **_SILENT
    )
    question.no.click(None, None, None, js="() => window.lab.focusNickname()", **_SILENT)
    nickname.input(
        lambda: ("", gr.update(visible=False)), None, [question.nickname, question.group], queue=False, **_SILENT
    )
