"""HTML fragments of the page. Text from a model, a file or a visitor is escaped."""

from __future__ import annotations

import difflib
import html
from typing import TYPE_CHECKING

from pipelines.recipes import languages
from pipelines.speech import text

if TYPE_CHECKING:
    from pipelines.inference.app.components.localized import Texts
    from pipelines.inference.streaming import Partial
    from pipelines.inference.transcript import Segment

LIVE = '<div id="live-text"></div><p id="live-note" role="status"></p>'
"""Elements that the script fills with the live transcript and the state of the connection."""


def segment_list(segments: tuple[Segment, ...], texts: Texts, speech: str) -> str:
    """Return the segments with their times; words of low confidence are marked.

    `speech` is Whisper's code of the transcript's language, here and below.
    """
    from pipelines.whisper.confidence import UNSURE

    if not segments:
        return ""
    is_unsure = any(word.confidence < UNSURE for segment in segments for word in segment.words)
    items = "".join(_segment_item(segment, texts) for segment in segments)
    note = texts["unsure" if is_unsure else "sure"]
    is_open = " open" if is_unsure or len(segments) > 1 else ""
    listed = f'<ol lang="{languages.tag(speech)}">{items}</ol>'
    return f"<details{is_open}><summary>{texts['details']}</summary>{listed}<p>{note}</p></details>"


def _segment_item(segment: Segment, texts: Texts) -> str:
    start = format_time(segment.start_s)
    label = texts["play"].format(start=start)
    speaker = f"<b>{html.escape(segment.speaker)}:</b> " if segment.speaker else ""
    return (
        f'<li data-start="{segment.start_s:.3f}" data-end="{segment.end_s:.3f}"><button type="button" class="play" '
        f'title="{label}" aria-label="{label}"><time>{start}</time></button>'
        f"<span>{speaker}{mark_unsure_words(segment, texts)}</span></li>"
    )


def format_time(seconds: float) -> str:
    """Return minutes, seconds and tenths, for example `1:01.5`."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def mark_unsure_words(segment: Segment, texts: Texts) -> str:
    """Return the text of a segment; words that are more likely wrong than right are marked, with their confidence."""
    from pipelines.whisper.confidence import UNSURE

    words = []
    for word in segment.words:
        escaped, title = html.escape(word.text), texts["word"].format(percent=round(100 * word.confidence))
        words.append(f'<mark title="{title}">{escaped}</mark>' if word.confidence < UNSURE else escaped)
    return " ".join(words) or html.escape(segment.text)


def live_transcript(partial: Partial, texts: Texts, speech: str) -> str:
    """Return the transcript so far; words that may still change are in a <span>."""
    final = " ".join(part for part in (*(segment.text for segment in partial.segments), partial.settled) if part)
    transcript = html.escape(final)
    if partial.open:
        transcript += f" <span>{html.escape(partial.open)}</span>"
    # the script replaces the number by the latency that it measured, network included
    latency = f"<b>{partial.latency_s:.1f}</b>"
    line = texts["live_line"].format(audio_s=partial.audio_s, late=latency)
    return f'<p lang="{languages.tag(speech)}">{transcript}</p><small>{line}</small>'


def comparison(base: tuple[str, str], tuned: tuple[str, str], texts: Texts, speech: str) -> str:
    """Return two (model title, transcript) pairs side by side; words of only one transcript are marked."""
    words = [transcript.split() for _, transcript in (base, tuned)]
    a, b = ([text.normalise(word) or word for word in transcript] for transcript in words)
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    shared = (
        {block.a + n for block in blocks for n in range(block.size)},
        {block.b + n for block in blocks for n in range(block.size)},
    )
    tag = languages.tag(speech)
    columns = "".join(
        f"<dt>{html.escape(title)}</dt><dd lang='{tag}'>{_mark_differences(*column) or texts['no_words']}</dd>"
        for (title, _), column in zip((base, tuned), zip(words, shared, strict=True), strict=True)
    )
    note = texts["same" if a == b else "differs"]
    return f"<h3>{texts['compared']}</h3><dl>{columns}</dl><p>{note}</p>"


def _mark_differences(words: list[str], shared: set[int]) -> str:
    return " ".join(
        html.escape(word) if index in shared else f"<mark>{html.escape(word)}</mark>"
        for index, word in enumerate(words)
    )


def player(languages: dict[str, Texts]) -> str:
    """Return the player and the waveform, empty until the script fills them; it also sets the labels' language."""

    def labels(key: str) -> str:
        translations = " ".join(f'data-label-{tag}="{texts[key]}"' for tag, texts in languages.items())
        return f'aria-label="{next(iter(languages.values()))[key]}" {translations}'

    return (
        f'<figure hidden><canvas role="img" {labels("waveform")} height="64"></canvas>'
        f'<div class="parts" aria-hidden="true"></div><audio controls {labels("player")}></audio></figure>'
    )


def model_card(info: dict[str, str], why: str, texts: Texts) -> str:
    """Return the facts about the model (inference.pipeline.model_info) and why it was chosen."""
    fields = {**info, "test": info.get("test", texts["not_scored"]), "why": texts["why"].get(why, why)}
    if "quantisation" in fields:
        fields["quantisation"] = texts.get(fields["quantisation"], fields["quantisation"])
    rows = [
        f"<dt>{label}</dt><dd>{html.escape(fields[name])}</dd>"
        for name, label in texts["model"].items()
        if name in fields
    ]
    return f"<dl>{''.join(rows)}</dl>"
