"""Tables, transcripts and plots of notebook 03."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.features.figures import player
from pipelines.features.sources import Example
from pipelines.inference.app import html
from pipelines.inference.app.i18n import ENGLISH
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import Transcript
from pipelines.infra.plots import ACCENT, INK, SOFT, figure_with_column, html_table
from pipelines.speech import audio
from pipelines.speech.alignment import marked
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.whisper import engines
from pipelines.whisper.batching import padded_frames
from pipelines.whisper.engines import word_timestamps
from pipelines.whisper.log_mel import FULL_FRAMES, POSITION_S

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure

_STYLE = "<style>mark {background: none; color: inherit; text-decoration: underline wavy #b45309}</style>"


def compare_transcripts(examples: list[Example], transcribers: dict[str, Transcriber]) -> HTML:
    """Return a table: a player, the reference, and the transcript of each model, one row per example.

    Words that differ from the reference are marked.
    """
    rows = [
        {
            "sound": player(example),
            "said": example.text,
            **{
                label: marked(example.text, model.transcribe(example.audio).text)
                for label, model in transcribers.items()
            },
        }
        for example in examples
    ]
    return html_table(rows, as_html=["sound", *transcribers])


def words_in_time(transcriber: Transcriber, example: Example) -> Figure:
    """Plot the waveform of an example with the words that the model wrote, where it heard them.

    The height of a word is its confidence, 0 to 1. A model without word times has the words at equal distances.
    """
    samples = audio.decode(example.audio).samples
    transcript = transcriber.transcribe(example.audio, word_times=transcriber.times_words)
    words = [word for segment in transcript.segments for word in segment.words]
    figure, (upper, lower) = figure_with_column([2, 2], 11, 3.2)
    upper.plot(np.arange(len(samples)) / SAMPLE_RATE_HZ, samples, color=INK, linewidth=0.6)
    upper.set(ylabel="waveform", yticks=[])
    for n, word in enumerate(words):
        start_s = transcript.audio_s * n / len(words) if word.start_s is None else word.start_s
        colour = ACCENT if word.confidence < 0.5 else INK
        lower.plot(start_s, word.confidence, "|", color=colour, markersize=12)
        lower.annotate(f" {word.text}", (start_s, word.confidence), color=colour, va="center")
    lower.set(ylabel="confidence", ylim=(-0.1, 1.1), yticks=[0, 0.5, 1], xlabel="time (s)")
    lower.axhline(0.5, color=SOFT, linewidth=0.8, linestyle="--")
    return figure


def attention(transcriber: Transcriber, example: Example) -> Figure | None:
    """Plot where in the sound the decoder looks while it writes each token: the mean over its alignment heads.

    The dots are the beginnings that alignment reads from it. Print a sentence and return None if the model names no
    alignment heads, or wrote nothing.
    """
    text, log_mel = transcriber.transcribe(example.audio).text, transcriber.loaded.log_mel(audio.decode(example.audio))
    engine = engines.open_engine(transcriber.ref, transcriber.language, "transformers")
    if not (engine.can_align and text):
        return print("This part is left out: the model names no alignment heads, or wrote nothing.")
    n_frames = len(log_mel.frames)
    window = log_mel.padded(padded_frames(n_frames) if transcriber.ref.context == "clip" else FULL_FRAMES)
    pieces, weights = engine.attention(window, n_frames, text)
    positions, end_s = word_timestamps.first_positions(weights), n_frames / 100
    figure, (upper, lower) = figure_with_column((1, 0.5 + 0.12 * len(pieces)), 9, 2 + 0.2 * len(pieces))
    upper.imshow(log_mel.frames.T, origin="lower", aspect="auto", cmap="magma", extent=(0, end_s, 0, engine.n_mels))
    upper.set(ylabel="log-mel", yticks=[])
    lower.imshow(weights.mean(axis=0) ** 0.5, aspect="auto", cmap="magma", extent=(0, end_s, len(pieces) - 0.5, -0.5))
    lower.plot(np.array(positions) * POSITION_S, range(len(pieces)), "o", color=INK, markersize=4)
    lower.set(xlabel="time (s)", yticks=range(len(pieces)), yticklabels=pieces, ylabel="token to be written")
    return figure


def show_transcript(transcript: Transcript) -> HTML:
    """Return the segments with their times; words that are more likely wrong than right have a wavy underline."""
    from IPython.display import HTML

    rows = "".join(
        f"<tr><td>{html.format_time(segment.start_s)}</td>"
        f"<td style='text-align: left'>{html.mark_unsure_words(segment, ENGLISH)}</td></tr>"
        for segment in transcript.segments
    )
    return HTML(f"{_STYLE}<table>{rows}</table><p>Confidence {transcript.confidence:.0%}</p>")
