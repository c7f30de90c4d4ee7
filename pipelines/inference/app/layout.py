"""Components of the page, each with its texts in every language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.inference.app import html
from pipelines.inference.app.components.localized import LocalizedComponents, create_head, create_recorder
from pipelines.inference.app.handlers import DOWNLOADS
from pipelines.inference.app.i18n import TEXTS, localized_texts
from pipelines.inference.app.service import MAX_OPTION_CHARS
from pipelines.inference.app.uploads import EXAMPLES

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.inference.app.components.localized import Texts


@dataclass
class Components:
    """The components of the page that events read or change."""

    localized: LocalizedComponents
    transcript_state: gr.State
    """The visitor's SessionTranscript."""
    language: gr.State
    recording_count: gr.State
    """Dictionary with the `number` of recordings chosen so far."""
    live_id: gr.JSON
    """Session id of the open microphone; hidden."""
    language_switch: gr.Radio
    recording: gr.Audio
    transcribe: gr.Button
    choices: list[Any]
    """The fields of service.Choices, in order."""
    call: gr.Button
    """Has the event that programs call; hidden."""
    address: gr.Textbox
    """Address of a recording; hidden unless the server fetches addresses."""
    fetch: gr.Button
    examples: list[gr.Button]
    start_live: gr.Button
    end_live: gr.Button
    """Clicked by the script when the server has the whole live recording; hidden."""
    transcript: gr.Textbox
    timing: gr.Markdown
    details: gr.HTML
    files: gr.JSON
    """Content of the files to download, by format; hidden."""
    downloads: list[gr.Button]
    compare: gr.Button
    comparison: gr.HTML
    feedback: FeedbackForm

    @property
    def detail_outputs(self) -> list[Any]:
        """Outputs of Handlers.show_details."""
        return [self.details, self.files, *self.downloads, self.compare]

    @property
    def transcript_outputs(self) -> list[Any]:
        """Outputs of Handlers.transcribe and Handlers.collect_live."""
        return [self.transcript, self.timing, self.transcript_state]

    @property
    def result_outputs(self) -> list[Any]:
        """Return the outputs that are cleared for a new recording."""
        form = self.feedback
        return [*self.transcript_outputs, form.correction, form.thanks, self.comparison, *self.detail_outputs]


@dataclass
class FeedbackForm:
    """The form below the transcript."""

    correction: gr.Textbox
    username: gr.Textbox
    save_recording: gr.Checkbox
    right: gr.Button
    wrong: gr.Button
    thanks: gr.Markdown


def create_components(
    model_info: dict[str, str],
    speech: str,
    why: str,
    *,
    session_s: int,
    can_compare: bool,
    is_ephemeral: bool,
    fetches_urls: bool = False,
) -> Components:
    """Create the page from top to bottom, inside a `gr.Blocks` context.

    `speech` is Whisper's code of the model's language; `why` is the reason of inference.pipeline.choose_model; a
    session expires after `session_s`; `is_ephemeral` says that a restart deletes the feedback log; `fetches_urls` shows
    the field for the address of a recording.
    """
    import gradio as gr

    page = LocalizedComponents(lambda language: localized_texts(language, speech))
    transcript_state = gr.State(None, time_to_live=session_s)
    language, recording_count = gr.State("en"), gr.State({"number": 0})
    language_switch = create_head(page)
    with gr.Tabs():
        with page.add(gr.Tab, lambda texts: {"label": texts["file_tab"]}):
            address, fetch = _create_address(page, fetches_urls)
            recording, split_channels, transcribe, examples = _create_recorder(page, has_examples=speech == "sv")
        with page.add(gr.Tab, lambda texts: {"label": texts["live_tab"]}):
            start_live, end_live = _create_microphone(page)
    choices = [split_channels, *_create_options(page)]
    page.add(gr.Markdown, lambda texts: {"value": texts["privacy"]}, elem_id="privacy")
    results = _create_results(page, can_compare)
    page.add(gr.HTML, lambda texts: {"value": html.model_card(model_info, why, texts)}, elem_id="card", padding=False)
    return Components(
        localized=page,
        transcript_state=transcript_state,
        language=language,
        recording_count=recording_count,
        language_switch=language_switch,
        recording=recording,
        transcribe=transcribe,
        choices=choices,
        call=gr.Button(visible=False),
        address=address,
        fetch=fetch,
        examples=examples,
        start_live=start_live,
        end_live=end_live,
        **results,
        feedback=_create_feedback_form(page, is_ephemeral),
    )


def _create_recorder(
    page: LocalizedComponents, has_examples: bool
) -> tuple[gr.Audio, gr.Checkbox, gr.Button, list[gr.Button]]:
    """Create the recorder, a choice of channels, the Transcribe button, and a button for each example (Swedish)."""
    import gradio as gr

    recording = create_recorder(page)
    split_channels = page.add(
        gr.Checkbox,
        lambda texts: {"label": texts["split_channels"]},
        value=False,
        elem_id="split-channels",
        container=False,
    )
    # disabled until the audio has been uploaded
    transcribe = page.add(
        gr.Button,
        lambda texts: {"value": texts["transcribe"]},
        variant="primary",
        size="lg",
        interactive=False,
        elem_id="transcribe",
    )
    page.add(gr.Markdown, lambda texts: {"value": texts["examples"]}, elem_id="examples-label", visible=has_examples)
    with gr.Row(elem_id="examples", visible=has_examples):
        examples = [gr.Button(sentence, size="sm", min_width=120) for sentence in EXAMPLES.values()]
    return recording, split_channels, transcribe, examples


def _create_options(page: LocalizedComponents) -> list[Any]:
    """Create prompt, hotwords and number of beams, which hold for recordings and for the live microphone."""
    import gradio as gr

    def labels(name: str) -> Callable[[Texts], dict[str, Any]]:
        return lambda texts: {"label": texts[name], "info": texts[f"{name}_info"]}

    def beams(texts: Texts) -> dict[str, Any]:
        return {**labels("beams")(texts), "choices": [(texts["usual"], 0), *((str(n), n) for n in (1, 5, 10))]}

    # an empty text, since Gradio sends None for a field that was never filled in
    text: dict[str, Any] = {"value": "", "lines": 1, "max_lines": 4, "max_length": MAX_OPTION_CHARS}
    with page.add(gr.Accordion, lambda texts: {"label": texts["options"]}, open=False, elem_id="options"):
        return [
            page.add(gr.Textbox, labels("prompt"), elem_id="prompt", **text),
            page.add(gr.Textbox, labels("hotwords"), elem_id="hotwords", **text),
            page.add(gr.Radio, beams, value=0, elem_id="beams"),
        ]


def _create_address(page: LocalizedComponents, is_visible: bool) -> tuple[gr.Textbox, gr.Button]:
    """Create the field for the address of a recording and the button that fetches it."""
    import gradio as gr

    with gr.Row(elem_id="address", visible=is_visible, equal_height=True):
        address = page.add(
            gr.Textbox,
            lambda texts: {"label": texts["web_address"]},
            placeholder="https://",
            max_length=8_000,
            lines=1,
            max_lines=1,
            scale=4,
        )
        fetch = page.add(gr.Button, lambda texts: {"value": texts["fetch"]}, size="sm", min_width=100, scale=1)
    return address, fetch


def _create_microphone(page: LocalizedComponents) -> tuple[gr.Button, gr.Button]:
    """Create the buttons to start and stop, a hidden button for the script, and the area of the live transcript."""
    import gradio as gr

    page.add(gr.Markdown, lambda texts: {"value": texts["live_hint"]}, elem_id="live-hint")
    start = page.add(gr.Button, lambda texts: {"value": texts["speak"]}, variant="primary", size="lg", elem_id="speak")
    page.add(gr.Button, lambda texts: {"value": texts["stop"]}, variant="stop", size="lg", elem_id="stop")
    end = gr.Button(elem_id="live-end")
    gr.HTML(html.LIVE, elem_id="live", padding=False)
    return start, end


def _create_results(page: LocalizedComponents, can_compare: bool) -> dict[str, Any]:
    """Create transcript, player, details, downloads and comparison, by the names of Components."""
    import gradio as gr

    transcript = page.add(
        gr.Textbox,
        lambda texts: {"label": texts["transcript"], "placeholder": texts["transcript_hint"]},
        lines=3,
        max_lines=12,
        interactive=False,
        buttons=["copy"],
        elem_id="transcript",
    )
    timing = gr.Markdown("", elem_id="timing")
    gr.HTML(html.player(TEXTS), elem_id="player", padding=False)
    details = gr.HTML("", elem_id="details", padding=False)
    files, live_id = gr.JSON(None, visible=False), gr.JSON(None, visible=False)
    with gr.Row(elem_id="downloads"):
        downloads = [_create_download(page, ending) for ending in DOWNLOADS]
    compare = page.add(
        gr.Button,
        lambda texts: {"value": texts["compare"]},
        size="sm",
        interactive=False,
        visible=can_compare,
        elem_id="compare",
    )
    comparison = gr.HTML("", elem_id="compared", padding=False)
    return {
        "transcript": transcript,
        "timing": timing,
        "details": details,
        "files": files,
        "live_id": live_id,
        "downloads": downloads,
        "compare": compare,
        "comparison": comparison,
    }


def _create_download(page: LocalizedComponents, ending: str) -> gr.Button:
    import gradio as gr

    return page.add(
        gr.Button,
        lambda texts: {"value": texts["download"].format(ending=ending)},
        size="sm",
        interactive=False,
        min_width=100,
    )


def _create_feedback_form(page: LocalizedComponents, is_ephemeral: bool) -> FeedbackForm:
    import gradio as gr

    page.add(gr.Markdown, lambda texts: {"value": f"## {texts['question']}"}, elem_id="question")
    correction = page.add(
        gr.Textbox,
        lambda texts: {"label": texts["correction"], "placeholder": texts["correction_hint"]},
        lines=1,
        max_lines=8,
        max_length=2_000,
        elem_id="correction",
    )
    username = page.add(gr.Textbox, lambda texts: {"label": texts["username"]}, max_length=100, elem_id="username")
    save_recording = page.add(
        gr.Checkbox, lambda texts: {"label": texts["keep"]}, value=False, elem_id="keep", container=False
    )
    page.add(
        gr.Markdown,
        lambda texts: {"value": f"{texts['stored']} {texts['fleeting']}" if is_ephemeral else texts["stored"]},
        elem_id="stored",
    )
    with gr.Row():
        right = page.add(gr.Button, lambda texts: {"value": texts["right"]}, min_width=120, elem_id="right")
        wrong = page.add(gr.Button, lambda texts: {"value": texts["wrong"]}, min_width=120, elem_id="wrong")
    return FeedbackForm(correction, username, save_recording, right, wrong, gr.Markdown("", elem_id="thanks"))
