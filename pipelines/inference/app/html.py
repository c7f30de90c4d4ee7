"""Pieces of HTML that the page shows; whatever a model, a file or a visitor said is escaped."""

from __future__ import annotations

import difflib
import html
from typing import TYPE_CHECKING

from pipelines.speech import text

if TYPE_CHECKING:
    from pipelines.inference.app.i18n import Words
    from pipelines.inference.streaming import Partial
    from pipelines.inference.transcriber import Segment


def details(segments: tuple[Segment, ...], words: Words) -> str:
    """When each segment was said, with the words marked that are more likely wrong than right."""
    from pipelines.whisper.confidence import UNSURE

    if not segments:
        return ""
    unsure = any(word.confidence < UNSURE for segment in segments for word in segment.words)
    lines = "".join(_line(segment, words) for segment in segments)
    note = words["unsure" if unsure else "sure"]
    opened = " open" if unsure or len(segments) > 1 else ""
    return f'<details{opened}><summary>{words["details"]}</summary><ol lang="sv">{lines}</ol><p>{note}</p></details>'


def _line(segment: Segment, words: Words) -> str:
    start = clock(segment.start_s)
    return (
        f'<li data-start="{segment.start_s:.3f}" data-end="{segment.end_s:.3f}"><button type="button" class="play" '
        f'title="{words["play"].format(start=start)}" aria-label="{words["play"].format(start=start)}">'
        f"<time>{start}</time></button><span>{words_of(segment, words)}</span></li>"
    )


def clock(seconds: float) -> str:
    """`1:01.5`."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def words_of(segment: Segment, words: Words) -> str:
    """What was said in a segment; words more likely wrong than right are marked, and tell how sure they are."""
    from pipelines.whisper.confidence import UNSURE

    told = []
    for word in segment.words:
        heard, title = html.escape(word.text), words["word"].format(confidence=word.confidence)
        told.append(f'<mark title="{title}">{heard}</mark>' if word.confidence < UNSURE else heard)
    return " ".join(told) or html.escape(segment.text)


LIVE = '<div id="live-text"></div><p id="live-note" role="status"></p>'
"""Where the script puts what is heard of an open microphone, and what it has to say of the connection."""


def live(partial: Partial, words: Words) -> str:
    """What is certain, and in grey what may yet change."""
    certain = " ".join(part for part in (*(segment.text for segment in partial.segments), partial.settled) if part)
    told = html.escape(certain)
    if partial.open:
        told += f" <span>{html.escape(partial.open)}</span>"
    # the script puts in what the visitor waited for, the way there and back included
    late = f"<b>{partial.latency_s:.1f}</b>"
    line = words["live_line"].format(audio_s=partial.audio_s, late=late)
    return f'<p lang="sv">{told}</p><small>{line}</small>'


def side_by_side(base: tuple[str, str], tuned: tuple[str, str], words: Words) -> str:
    """Two transcripts, each with the title of its model; what only one of them holds is marked."""
    one, other = base[1].split(), tuned[1].split()
    a, b = ([text.normalise(word) or word for word in heard] for heard in (one, other))
    shared = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    columns = (
        (base[0], one, {block.a + n for block in shared for n in range(block.size)}),
        (tuned[0], other, {block.b + n for block in shared for n in range(block.size)}),
    )
    told = "".join(
        f"<dt>{html.escape(title)}</dt><dd lang='sv'>{_marked(heard, known) or words['no_words']}</dd>"
        for title, heard, known in columns
    )
    note = words["same" if a == b else "differs"]
    return f"<h3>{words['compared']}</h3><dl>{told}</dl><p>{note}</p>"


def _marked(heard: list[str], shared: set[int]) -> str:
    return " ".join(
        html.escape(word) if place in shared else f"<mark>{html.escape(word)}</mark>"
        for place, word in enumerate(heard)
    )


def player(languages: dict[str, Words]) -> str:
    """The recording and its waveform, empty until the script fills it in; it also picks the labels' language."""

    def named(key: str) -> str:
        labels = " ".join(f'data-label-{tag}="{words[key]}"' for tag, words in languages.items())
        return f'aria-label="{next(iter(languages.values()))[key]}" {labels}'

    return (
        f'<figure hidden><canvas role="img" {named("waveform")} height="64"></canvas>'
        f'<div class="parts" aria-hidden="true"></div><audio controls {named("player")}></audio></figure>'
    )


def card(known: dict[str, str], why: str, words: Words) -> str:
    """The model's facts (served.card)."""
    shown = {**known, "test": known.get("test", words["not_scored"]), "why": words["why"].get(why, why)}
    if "quantisation" in shown:
        shown["quantisation"] = words.get(shown["quantisation"], shown["quantisation"])
    rows = [
        f"<dt>{label}</dt><dd>{html.escape(shown[name])}</dd>"
        for name, label in words["model"].items()
        if name in shown
    ]
    return f"<dl>{''.join(rows)}</dl>"
