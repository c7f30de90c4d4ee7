"""Tables and transcripts for the notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from pipelines.features.sources import Example
from pipelines.inference.app import html
from pipelines.inference.app.i18n import ENGLISH
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import Transcript

if TYPE_CHECKING:
    from IPython.display import HTML

_STYLE = "<style>mark {background: none; color: inherit; text-decoration: underline wavy #b45309}</style>"


def compare_transcripts(examples: list[Example], transcribers: dict[str, Transcriber]) -> pd.DataFrame:
    """Return the reference of each example beside the transcript of each model."""
    rows = [
        {"said": example.text, **{label: model.transcribe(example.audio).text for label, model in transcribers.items()}}
        for example in examples
    ]
    return pd.DataFrame(rows)


def show_transcript(transcript: Transcript) -> HTML:
    """Return the segments with their times; words that are more likely wrong than right have a wavy underline."""
    from IPython.display import HTML

    rows = "".join(
        f"<tr><td>{html.format_time(segment.start_s)}</td>"
        f"<td style='text-align: left'>{html.mark_unsure_words(segment, ENGLISH)}</td></tr>"
        for segment in transcript.segments
    )
    return HTML(f"{_STYLE}<table>{rows}</table><p>Confidence {transcript.confidence:.0%}</p>")
