"""Components whose texts follow the language of the page, and those that the pages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

Texts = dict[str, Any]
"""A page's texts in one language, by name."""
_RECORDER_NOTE = '<p id="recorder-note" role="status"></p>'
"""Element that the script fills if the recorder's microphone cannot be used."""


class LocalizedComponents:
    """Components that contain text, and how their arguments depend on the language."""

    def __init__(self, texts_in: Callable[[str], Texts]) -> None:
        """`texts_in` returns the page's texts in a language, by its tag."""
        self._texts_in = texts_in
        self._entries: list[tuple[Any, Callable[[Texts], dict[str, Any]]]] = []

    @property
    def components(self) -> list[Any]:
        """Return all components, in the order of `updates`."""
        return [component for component, _ in self._entries]

    def add(self, kind: Any, localize: Callable[[Texts], dict[str, Any]], **options: Any) -> Any:
        """Create a component; `localize` returns the arguments that are texts."""
        component = kind(**localize(self._texts_in("en")), **options)
        self._entries.append((component, localize))
        return component

    def updates(self, language: str) -> list[Any]:
        """Return an update of each component to `language`."""
        import gradio as gr

        texts = self._texts_in(language)
        return [gr.update(**localize(texts)) for _, localize in self._entries]


def create_head(page: LocalizedComponents) -> gr.Radio:
    """Create the language switch and below it the page's title and first lines; return the switch."""
    import gradio as gr

    language_switch = page.add(
        gr.Radio,
        lambda texts: {"label": texts["language"]},
        choices=[("English", "en"), ("Svenska", "sv")],
        value="en",
        container=False,
        elem_id="language",
    )
    page.add(gr.Markdown, lambda texts: {"value": f"# {texts['title']}\n{texts['lead']}"}, elem_id="head")
    return language_switch


def create_recorder(page: LocalizedComponents) -> gr.Audio:
    """Create the field that records or takes a file, and below it a note that the script fills."""
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
    gr.HTML(_RECORDER_NOTE, elem_id="recorder-status", padding=False)
    return recording
