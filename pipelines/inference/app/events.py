"""Connect the page's components to their handlers. The `js` arguments call the functions of static/page.js."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipelines.inference.app.handlers import DOWNLOADS, Handlers
from pipelines.inference.app.i18n import TEXTS, choose_language
from pipelines.inference.app.service import NO_CHOICES, Choices
from pipelines.inference.app.uploads import EXAMPLES, example_path
from pipelines.inference.http.rate_limits import address_key

if TYPE_CHECKING:
    import gradio as gr

    from pipelines.inference.app.layout import Components
    from pipelines.inference.app.service import SessionTranscript

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_SILENT: dict[str, Any] = {**_PRIVATE, "show_progress": "hidden"}
_SHOW_TRANSCRIPT = "text => { window.lab.showTranscript(); return text }"


def connect_events(demo: gr.Blocks, page: Components, handlers: Handlers, fetches_urls: bool = False) -> None:
    """Register all events, inside the `gr.Blocks` context `demo`; `fetches_urls` as in `create_components`."""
    transcribed = _connect_transcribe(page, handlers)
    live_ended = _connect_microphone(page, handlers)
    for event in (transcribed, live_ended):
        event.success(None, page.transcript, page.feedback.correction, js=_SHOW_TRANSCRIPT, **_PRIVATE)
        event.success(handlers.show_details, [page.transcript_state, page.language], page.detail_outputs, **_SILENT)
    _connect_recorder(page, handlers, fetches_urls)
    _connect_results(page, handlers)
    _connect_feedback(page, handlers)
    connect_language(demo, page, handlers.show_details, page.transcript_state, page.detail_outputs)


def _connect_transcribe(page: Components, handlers: Handlers) -> Any:
    import gradio as gr

    def transcribe(
        recording: str | None,
        previous: SessionTranscript | None,
        language: str,
        count: dict[str, int],
        request: Any,
        progress=gr.Progress(),
        *choices: Any,
    ) -> tuple[Any, ...]:
        label, number = TEXTS[language]["transcribing"], count["number"]
        outputs = handlers.transcribe(
            recording,
            previous,
            language,
            lambda share: progress(share, desc=label),
            client_of(request),
            Choices(*choices),
        )
        # skip the outputs if the visitor has chosen another recording meanwhile
        return outputs if count["number"] == number else (gr.skip(), gr.skip(), gr.skip())

    transcribe.__annotations__ = {"request": gr.Request}  # Gradio passes it only if it can read all annotations
    inputs = [page.recording, page.transcript_state, page.language, page.recording_count]
    outputs, options = page.transcript_outputs, {"show_progress_on": page.transcript}
    # programs send only the recording
    page.call.click(transcribe, [*inputs, *map(gr.State, NO_CHOICES)], outputs, api_name="transcribe", **options)
    return page.transcribe.click(transcribe, [*inputs, *page.choices], outputs, **options, **_PRIVATE)


def _connect_microphone(page: Components, handlers: Handlers) -> Any:
    """Connect the live microphone and return the event of its final transcript.

    The chunks themselves do not pass through Gradio's events: Gradio reloads the page when a connection breaks.
    """
    page.start_live.click(
        handlers.open_microphone,
        [page.live_id, *page.choices[1:]],
        page.result_outputs,
        js="async (_, ...options) => [await window.lab.startMicrophone(options), ...options]",
        queue=False,
        **_SILENT,
    )
    ended = page.end_live.click(
        handlers.collect_live,
        [page.live_id, page.language],
        page.transcript_outputs,
        js="(_, language) => [window.lab.sessionId(), language]",
        trigger_mode="multiple",
        **_SILENT,
    )
    ended.success(None, None, None, js="() => window.lab.transcriptReceived(true)", **_PRIVATE)
    ended.failure(None, None, None, js="() => window.lab.transcriptReceived(false)", **_PRIVATE)
    return ended


def _connect_recorder(page: Components, handlers: Handlers, fetches_urls: bool) -> None:
    for event in (page.recording.change, page.start_live.click):
        event(
            lambda count: count.update(number=count["number"] + 1), page.recording_count, None, queue=False, **_SILENT
        )
    page.recording.change(
        handlers.change_recording,
        page.recording,
        [page.transcribe, *page.result_outputs],
        queue=False,
        preprocess=False,
        **_SILENT,
    )
    page.recording.change(None, page.recording, None, js="file => window.lab.loadRecording(file?.url)", **_PRIVATE)
    if fetches_urls:
        _connect_address(page, handlers)
    for name, button in zip(EXAMPLES, page.examples, strict=True):
        button.click(lambda name=name: example_path(name), None, page.recording, queue=False, **_SILENT)


def _connect_address(page: Components, handlers: Handlers) -> None:
    import gradio as gr

    def fetch(address: str, language: str, request: Any) -> str:
        return handlers.fetch_recording(address, language, client_of(request))

    fetch.__annotations__ = {"request": gr.Request}  # Gradio passes it only if it can read all annotations
    gr.on(
        [page.fetch.click, page.address.submit],
        fetch,
        [page.address, page.language],
        page.recording,
        concurrency_limit=4,
        show_progress="minimal",
        show_progress_on=page.address,  # on the recorder, an error would cover its buttons
        **_PRIVATE,
    )


def _connect_results(page: Components, handlers: Handlers) -> None:
    import gradio as gr

    def compare(transcript: SessionTranscript | None, language: str, request: Any) -> str:
        return handlers.compare(transcript, language, client_of(request))

    compare.__annotations__ = {"request": gr.Request}
    for ending, button in zip(DOWNLOADS, page.downloads, strict=True):
        button.click(None, page.files, None, js=f"files => window.lab.saveFile(files, '{ending}')", **_PRIVATE)
    page.compare.click(
        compare,
        [page.transcript_state, page.language],
        page.comparison,
        show_progress_on=page.comparison,
        **_PRIVATE,
    )


def _connect_feedback(page: Components, handlers: Handlers) -> None:
    import gradio as gr

    form, state = page.feedback, page.transcript_state
    outputs = [form.thanks, state]
    form.right.click(
        handlers.mark_right, [state, form.username, form.save_recording, page.language], outputs, **_SILENT
    )
    gr.on(
        [form.wrong.click, form.correction.submit],
        handlers.mark_wrong,
        [state, form.correction, form.username, form.save_recording, page.language],
        outputs,
        **_SILENT,
    )


def connect_language(demo: gr.Blocks, page: Any, show: Callable[..., Any], state: Any, outputs: list[Any]) -> None:
    """Start in the browser's language, and follow the language switch.

    `page` has the attributes language, language_switch and localized of Components. `show` returns the values of
    `outputs` for the value of `state` and a language.
    """
    import gradio as gr

    localized = page.localized

    def start(request: Any) -> list[Any]:
        language = choose_language(request.headers.get("accept-language", ""))
        unchanged = [gr.skip()] * len(localized.components)
        return [language, *(unchanged if language == "en" else localized.updates(language)), language]

    start.__annotations__["request"] = gr.Request  # Gradio cannot read the annotation as a string

    def switch(language: str, value: Any) -> list[Any]:
        language = language if language in TEXTS else "en"
        return [language, *localized.updates(language), *show(value, language)]

    options = {**_SILENT, "queue": False}
    set_language = {"js": "language => window.lab.setLanguage(language)", **_PRIVATE}
    all_texts = [page.language, *localized.components]
    demo.load(start, None, [*all_texts, page.language_switch], **options).then(
        None, page.language_switch, None, **set_language
    )
    page.language_switch.input(switch, [page.language_switch, state], [*all_texts, *outputs], **options).then(
        None, page.language_switch, None, **set_language
    )


def client_of(request: Any) -> str:
    """Return the address_key of the visitor who sent an event."""
    client = getattr(request, "client", None)
    return address_key(client.host if client else None)
