"""Tables, transcripts and plots of notebook 03."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

_STYLE = "<style>.unsure mark {background: none; color: inherit; text-decoration: underline wavy #b45309}</style>"


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

    The dots are the beginnings that word times are read from. Print a sentence and return None if the model names no
    alignment heads, or wrote nothing.
    """
    engine: Any = transcriber.loaded
    if not isinstance(engine, engines.AttentiveEngine):
        engine = engines.open_engine(transcriber.ref, transcriber.language, "transformers")
    text = transcriber.transcribe(example.audio).text
    if not (engine.can_align and text):
        return print("This part is left out: the model names no alignment heads, or wrote nothing.")
    log_mel = engine.log_mel(audio.decode(example.audio))
    n_frames, is_clip_length = len(log_mel.frames), transcriber.ref.context == "clip"
    weights = engine.attention(
        log_mel.padded(padded_frames(n_frames) if is_clip_length else FULL_FRAMES), n_frames, text
    )
    pieces = [*(engine.spelling.tokenizer.decode([token]) for token in engine.spelling.ids(text)[0]), "(end)"]
    starts_s = np.array(word_timestamps.first_positions(weights)) * POSITION_S
    extent = (0, n_frames / 100)
    figure, (upper, lower) = figure_with_column((1, 0.5 + 0.12 * len(pieces)), 9, 2 + 0.2 * len(pieces))
    upper.imshow(log_mel.frames.T, origin="lower", aspect="auto", cmap="magma", extent=(*extent, 0, engine.n_mels))
    upper.set(ylabel="log-mel", yticks=[])
    shown = weights.mean(axis=0) ** 0.5  # the root makes weak attention visible
    lower.imshow(shown, aspect="auto", cmap="magma", vmax=0.6 * shown.max(), extent=(*extent, len(pieces) - 0.5, -0.5))
    lower.plot(starts_s, range(len(pieces)), "o", color=INK, markersize=4)
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
    return HTML(f"{_STYLE}<table class='unsure'>{rows}</table><p>Confidence {transcript.confidence:.0%}</p>")
