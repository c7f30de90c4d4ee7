"""Style, script and theme of the page. Nothing is loaded from another server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.inference.app.i18n import TEXTS
from pipelines.inference.app.service import MAX_DURATION_S
from pipelines.recipes import languages

if TYPE_CHECKING:
    import gradio as gr

STATIC = Path(__file__).parent / "static"
_MODULES = ("player.js", "microphone_help.js", "microphone.js", "page.js")
"""In the order of their imports."""
_MODULE_SYNTAX = re.compile(r"^(?:import .*\n|export )", re.MULTILINE)


def style() -> str:
    """Return the page's CSS."""
    return (STATIC / "page.css").read_text("utf-8")


def script(speech: str, extension: str = "") -> str:
    """Return the JavaScript function that the page runs once: the modules of static/, joined into one scope.

    `speech` is Whisper's code of the transcripts' language. `extension` are statements that run afterwards.
    """
    modules = "\n".join(_MODULE_SYNTAX.sub("", (STATIC / name).read_text("utf-8")) for name in _MODULES)
    options = {
        "messages": {tag: texts["browser"] | {"sorry": texts["sorry"]} for tag, texts in TEXTS.items()},
        "maxDurationS": int(MAX_DURATION_S) - 1,  # the server accepts a second more
        "speech": languages.tag(speech),
        "workletSource": (STATIC / "worklet.js").read_text("utf-8"),
    }
    return f"() => {{\n{modules}\nstartPage({json.dumps(options)})\n{extension}}}"


def theme() -> gr.themes.Base:
    """Return a plain theme with the system's own fonts."""
    import gradio as gr

    default = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
    fill, hover = "*primary_700", "*primary_800"  # dark enough for the contrast of white text
    return default.set(
        button_primary_background_fill=fill,
        button_primary_background_fill_hover=hover,
        button_primary_background_fill_dark=fill,
        button_primary_background_fill_hover_dark=hover,
    )
