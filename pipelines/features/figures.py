"""Tables and plots of a feature cache, for notebook 01 and the first cells of 02 and 03."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.features import identity, rejections
from pipelines.features.cache import FeatureCache
from pipelines.features.sources import Example, NoAudio
from pipelines.infra import console, environment
from pipelines.infra.errors import LabError
from pipelines.infra.plots import ACCENT, INK, SHADE, figure_with_axes, figure_with_column, html_table
from pipelines.recipes.settings import Recipe
from pipelines.speech import audio, audio_uri, text
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.whisper import engines
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import padded_frames
from pipelines.whisper.log_mel import FULL_S, LogMel

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure


_TITLE_CHARACTERS = 90
"""Longest transcript above a plot."""
_MAX_LEVEL_WORDS = 12
"""Words of a longer transcript are turned by 90 degrees, so that they do not overlap."""
_BAR = 20
"""Characters of a bar in a table that stands for 1."""
_MENU_CLIPS = 30
"""Clips in the menu of `pick_clip`."""
_SILENCE_AFTER = 400
"""Frames of silence after a clip whose words are aligned: a model that was not tuned is used to silence."""
_MAX_ALIGNER_BYTES = 1_000_000_000
"""Largest weights that are loaded only to show where words begin: those of whisper-small."""


def recipe_table(recipe: Recipe) -> HTML:
    """Return the settings of a recipe that differ from their defaults; all others unfold on a click."""
    values, defaults = recipe.settings(), type(recipe)(name=recipe.name).settings()
    changed = {name: value for name, value in values.items() if name == "name" or value != defaults.get(name)}
    rows = [
        {
            "setting": name,
            "value": _as_json(value),
            "default": "" if name == "name" else _as_json(defaults.get(name, "")),
        }
        for name, value in changed.items()
    ]
    others = {name: value for name, value in values.items() if name not in changed}
    lines = html.escape("\n".join(f"{name} = {_as_json(value)}" for name, value in others.items()))
    summary = f"The other {len(others)} settings, which have their default"
    return html_table(rows, note=f"<details><summary>{summary}</summary><pre>{lines}</pre></details>")


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def corpus_table(cache: FeatureCache) -> pd.DataFrame:
    """Return clips, known speakers, minutes and mean length of every split, and its share of the clips as a bar."""
    grouped = cache.rows.groupby("split", sort=False)
    sizes = grouped.size()
    return pd.DataFrame(
        {
            "share": _bars(sizes / sizes.sum()),
            "clips": sizes,
            "speakers": grouped["speaker"].agg(lambda names: len({*map(text.speaker_key, names)} - {""})),
            "minutes": (grouped["duration_s"].sum() / 60).round(1),
            "mean clip (s)": grouped["duration_s"].mean().round(2),
            "distinct sentences": grouped["text"].nunique(),
        }
    )


def clip_table(examples: Iterable[Example]) -> HTML:
    """Return a table of examples: a player, the transcript, the speaker, and what else the source knows."""
    rows = [
        {"sound": player(example), "transcript": example.text, "speaker": example.speaker, **example.meta}
        for example in examples
    ]
    return html_table(rows, as_html=["sound"])


def player(example: Example) -> str:
    """Return an HTML player for one example; empty if its audio cannot be played."""
    return "" if isinstance(sound := example.audio, NoAudio) else audio_uri.player(sound)


def curation_table(cache: FeatureCache) -> HTML:
    """Return the curation steps that dropped clips or changed transcripts, and the names of the others."""
    effective = [row for row in cache.curation if row["dropped"] or row["changed"]]
    others = ", ".join(row["step"] for row in cache.curation if row not in effective)
    rest = f"Steps that found nothing: {others}." if others else ""
    return html_table(effective, note=html.escape(rest))


def rejected_table(cache: FeatureCache) -> HTML:
    """Return the number of rejected clips by reason, with one example each."""
    n = len(cache.rows)
    return html_table(
        map(asdict, rejections.of(cache)), note="" if cache.counts["rejected"] else f"All {n:,} clips are used."
    )


def size_table(cache: FeatureCache) -> pd.DataFrame:
    """Compare the size of the cache with float32 tensors padded to 30 s."""
    mb = pd.Series({"padded to 30 s, float32": cache.padded_bytes, "this cache": cache.bytes}) / 1e6
    shares = mb / mb.iloc[0]
    return pd.DataFrame({"": _bars(shares), "MB": mb.round(1), "share": shares.map("{:.1%}".format)})


def _bars(shares: pd.Series) -> pd.Series:
    """Return numbers from 0 to 1 as bars of characters."""
    lengths = (_BAR * shares).round().astype(int)
    return lengths.map(lambda length: "█" * length + "░" * (_BAR - length))


def token_table(labels: Sequence[int], tokenizer: Any) -> HTML:
    """Return a table of label tokens: number, the text that they stand for, and how the vocabulary spells them."""
    special, rows = set(tokenizer.all_special_ids), []
    for token in labels:
        spelling, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
        is_part = "\ufffd" in text
        meaning = "control" if token in special or spelling.startswith("<|") else text.replace(" ", "␣")
        rows.append({"number": token, "stored as": spelling, "text": "part of a letter" if is_part else meaning})
    return html_table(rows, note="␣ is a space.")


def row_with(cache: FeatureCache, letters: str) -> int:
    """Return the first training row whose transcript has these letters; the first row if none has."""
    rows = cache.split("train")
    texts = cache.rows["text"].iloc[rows].str.lower().tolist()
    return next((int(row) for row, line in zip(rows, texts, strict=True) if letters in line), 0)


def pick_clip(recipe: Recipe, cache: FeatureCache, row: int) -> None:
    """Show and play a clip of the cache; in an interactive notebook under a menu that shows other training clips.

    In batch, and without ipywidgets, there is no menu. The clip itself is an ordinary output in any case.
    """
    from IPython.display import display

    widgets = _widgets() if environment.interactive() else None
    if widgets:
        rows = list(dict.fromkeys([row, *cache.split("train")[:_MENU_CLIPS].tolist()]))
        texts = cache.rows["text"].iloc[rows]
        names = [textwrap.shorten(text, _TITLE_CHARACTERS, placeholder=" …") for text in texts]
        menu = widgets.Dropdown(options=list(zip(names, rows, strict=True)), value=row, layout={"width": "100%"})
        display(menu)
    outputs = [display(draw(recipe, cache, row), display_id=True) for draw in (clip_player, sound)]

    def show(change: dict[str, Any]) -> None:
        for output, draw in zip(outputs, (clip_player, sound), strict=True):
            output.update(draw(recipe, cache, change["new"]))

    if widgets:
        menu.observe(show, names="value")


def _widgets() -> Any:
    """Return the module ipywidgets, or None if it is not installed."""
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets


def clip_player(recipe: Recipe, cache: FeatureCache, row: int) -> HTML:
    """Return a player of a clip of the cache; a sentence if its source does not have it any more."""
    from IPython.display import HTML

    content = _audio(recipe, cache.rows.iloc[row])
    return HTML((content and audio_uri.player(content)) or "This clip's sound is not available here.")


def sound(recipe: Recipe, cache: FeatureCache, row: int) -> Figure:
    """Plot a clip of the cache: its waveform, its log-mel, and its words where the base model hears them.

    The waveform is left out if the source does not have the clip any more, the words if the model cannot align them.
    """
    clip, log_mel = cache.rows.iloc[row], cache.log_mel(row)
    waveform, end_s = _waveform(recipe, clip), len(log_mel.frames) / 100
    figure, (upper, middle, lower) = figure_with_column((1, 2, 0.5), 9, 4)
    if waveform is not None:
        upper.plot(np.arange(len(waveform)) / SAMPLE_RATE_HZ, waveform, color=INK, linewidth=0.6)
    upper.set(ylabel="waveform", yticks=[], xlim=(0, end_s))
    image = middle.imshow(
        log_mel.frames.T, origin="lower", aspect="auto", cmap="magma", extent=(0, end_s, 0, cache.n_mels)
    )
    middle.set(ylabel="mel band")
    words = _words(recipe, log_mel, clip["text"])
    turned = {"rotation": 90, "fontsize": 7} if len(words) > _MAX_LEVEL_WORDS else {"fontsize": 11}
    for word, start_s, stop_s in words:
        lower.text((start_s + stop_s) / 2, 0.5, word, ha="center", va="center", color=INK, **turned)
        for axes in (upper, middle, lower):
            axes.axvline(start_s, color=ACCENT, linewidth=0.8)
    lower.set(xlabel="time (s)", yticks=[], xlim=(0, end_s))
    upper.set_title(textwrap.shorten(f"“{clip['text']}”  {clip['speaker']}", _TITLE_CHARACTERS, placeholder=" …"))
    figure.colorbar(image, ax=middle, label="log energy")
    return figure


def _words(recipe: Recipe, log_mel: LogMel, transcript: str) -> list[tuple[str, float, float]]:
    """Return each word of a transcript with its start and end in seconds, by the base model's cross-attention.

    Empty if the model cannot align, or if its weights are too large to load them for a picture.
    """
    base = whisper_model.resolve(recipe.model.base)
    if sum(path.stat().st_size for path in base.folder.glob("*.safetensors")) > _MAX_ALIGNER_BYTES:
        return []
    engine = engines.open_engine(base, recipe.language, "transformers")
    n_frames = len(log_mel.frames)
    window = log_mel.padded(padded_frames(n_frames + _SILENCE_AFTER))  # 30 s give the same times and take longer
    (starts,) = engine.word_starts(window[np.newaxis], [n_frames], [transcript])
    ends = [*starts[1:], n_frames / 100]
    return list(zip(transcript.split(), starts, ends, strict=False))


def _waveform(recipe: Recipe, clip: pd.Series) -> np.ndarray | None:
    """Return the samples of a clip of the cache at 16 kHz, float32 [n], or None if its source does not have it."""
    if (content := _audio(recipe, clip)) is None:
        return None
    try:
        return audio.decode(content).samples
    except audio.AudioError:
        return None


def _audio(recipe: Recipe, clip: pd.Series) -> bytes | Path | None:
    """Return the audio file of a clip of the cache, or None if its source does not have it any more."""
    try:
        with console.silenced():  # what the source says was printed when the cache was made
            examples = identity.source_of(recipe).examples((clip["split"],))
            content = next((example.audio for example in examples if example.id == clip["id"]), None)
    except (LabError, OSError):
        return None
    return None if isinstance(content, NoAudio) else content


def durations(cache: FeatureCache) -> Figure:
    """Plot the distribution of clip lengths on an axis of 30 s, the length to which the classic recipe pads each."""
    figure, axes = figure_with_axes(9, 2.4)
    mean = cache.rows["duration_s"].mean()
    axes.axvspan(mean, FULL_S, color=SHADE, linewidth=0)
    axes.text((mean + FULL_S) / 2, 0.5, "padding of the mean clip", transform=axes.get_xaxis_transform(), ha="center")
    axes.hist(cache.rows["duration_s"], bins=np.linspace(0, FULL_S, 121), color=INK)
    axes.axvline(mean, color=ACCENT)
    axes.set(
        xlabel="clip length (s)",
        ylabel="clips",
        xlim=(0, FULL_S),
        title=f"mean {mean:.1f} s: a batch padded to 30 s is {1 - mean / FULL_S:.0%} padding",
    )
    return figure
