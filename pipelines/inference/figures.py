"""TODO: describe this module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from pipelines.features.sources import Example
from pipelines.inference.app import html as app_html
from pipelines.inference.app.i18n import ENGLISH
from pipelines.inference.transcriber import Transcriber, Transcript

if TYPE_CHECKING:
    from IPython.display import HTML


def heard(examples: list[Example], transcribers: dict[str, Transcriber]) -> pd.DataFrame:
    """What each model makes of the same clips, beside what was said."""
    rows = [
        {"said": example.text, **{label: model.transcribe(example.audio).text for label, model in transcribers.items()}}
        for example in examples
    ]
    return pd.DataFrame(rows)


def transcript(transcript: Transcript) -> HTML:
    """When each part was said, and with a wavy line the words that are more likely wrong than right."""
    from IPython.display import HTML

    look = "<style>mark {background: none; color: inherit; text-decoration: underline wavy #b45309}</style>"
    lines = "".join(
        f"<tr><td>{app_html.clock(segment.start_s)}</td>"
        f"<td style='text-align: left'>{app_html.words_of(segment, ENGLISH)}</td></tr>"
        for segment in transcript.segments
    )
    return HTML(f"{look}<table>{lines}</table><p>{transcript.confidence:.0%} sure of the words</p>")
