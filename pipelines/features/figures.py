"""Tables and plots of a feature cache, for notebook 01 and the first cells of 02 and 03."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.features import rejections
from pipelines.features.cache import FeatureCache
from pipelines.features.sources import Example
from pipelines.infra.plots import ACCENT, SOFT, figure_with_axes
from pipelines.recipes.settings import Recipe
from pipelines.speech import text

if TYPE_CHECKING:
    from IPython.display import Audio
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler


_TITLE_CHARACTERS, _MAX_TICKS = 90, 8
"""Longest transcript above a plot, and the largest number of labelled clips beside one."""


def recipe_table(recipe: Recipe) -> Styler:
    """Return the settings of a recipe that are not empty, one row per group."""
    groups: dict[str, list[str]] = {}
    for name, value in recipe.settings().items():
        group, _, leaf = name.rpartition(".")
        if value in ("", []):
            continue
        groups.setdefault(group or "recipe", []).append(f"{leaf} = {value}")
    table = pd.DataFrame({"settings": {group: ",   ".join(lines) for group, lines in groups.items()}})
    return table.style.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


def corpus_table(cache: FeatureCache) -> pd.DataFrame:
    """Return clips, known speakers, minutes and mean length of every split."""
    grouped = cache.rows.groupby("split", sort=False)
    return pd.DataFrame(
        {
            "clips": grouped.size(),
            "speakers": grouped["speaker"].agg(lambda names: len({*map(text.speaker_key, names)} - {""})),
            "minutes": (grouped["duration_s"].sum() / 60).round(1),
            "mean clip (s)": grouped["duration_s"].mean().round(2),
            "distinct sentences": grouped["text"].nunique(),
        }
    )


def sample_table(cache: FeatureCache, n: int = 8) -> pd.DataFrame:
    """Return the first clips of every split, without internal columns."""
    internal = ["label_offset", "label_count", "shard", "offset", "pad_value", "frames"]
    rows = cache.rows.drop(columns=internal)
    return rows.groupby("split", sort=False).head(max(1, n // 3)).reset_index(drop=True)


def curation_table(cache: FeatureCache) -> pd.DataFrame:
    """Return, for each curation step, clips before and after, dropped clips and changed transcripts."""
    columns = ["step", "before", "after", "dropped", "changed"]
    return pd.DataFrame(cache.curation, columns=columns).set_index("step")


def rejected_table(cache: FeatureCache) -> pd.DataFrame:
    """Return the number of rejected clips by reason, with one example each."""
    columns = ["reason", "clips", "example", "detail", "fault"]
    return pd.DataFrame(map(asdict, rejections.of(cache)), columns=columns).set_index("reason")


def size_table(cache: FeatureCache) -> pd.DataFrame:
    """Compare the size of the cache with float32 tensors padded to 30 s."""
    mb = pd.Series({"padded to 30 s, float32": cache.padded_bytes, "this cache": cache.bytes}) / 1e6
    return pd.DataFrame({"MB": mb.round(1), "share": (mb / mb.iloc[0]).map("{:.1%}".format)})


def player(example: Example) -> Audio:
    """Return an audio player for one example."""
    from IPython.display import Audio

    data = example.audio if isinstance(example.audio, bytes) else example.audio.read_bytes()
    return Audio(data=data)


def log_mel(cache: FeatureCache, row: int) -> Figure:
    """Plot the log-mel of one clip, the input of Whisper."""
    features, clip = cache.log_mel(row), cache.rows.iloc[row]
    figure, axes = figure_with_axes(9, 2.6)
    axes.imshow(
        features.frames.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, len(features.frames) / 100, 0, cache.n_mels),
    )
    text = textwrap.shorten(clip["text"], _TITLE_CHARACTERS, placeholder=" …")
    axes.set(xlabel="time (s)", ylabel="mel band", title=f"“{text}”  {clip['speaker']}".rstrip())
    return figure


def durations(cache: FeatureCache) -> Figure:
    """Plot the distribution of clip lengths; the classic recipe pads each clip to 30 s."""
    figure, axes = figure_with_axes(9, 2.2)
    axes.hist(cache.rows["duration_s"], bins=40, color=SOFT)
    mean = cache.rows["duration_s"].mean()
    axes.axvline(mean, color=ACCENT)
    axes.set(
        xlabel="clip length (s)",
        ylabel="clips",
        title=f"mean {mean:.1f} s: a batch padded to 30 s is {1 - mean / 30:.0%} padding",
    )
    return figure


def batch(batch: dict[str, Any]) -> Figure:
    """Plot one training batch: its clips stacked, padded to the longest."""
    features = batch["input_features"]
    figure, axes = figure_with_axes(9, 3.2)
    stacked = np.concatenate([clip.numpy()[::-4] for clip in features])  # frequency upwards
    axes.imshow(
        stacked, origin="upper", aspect="auto", cmap="magma", extent=(0, features.shape[-1] / 100, len(features), 0)
    )
    for edge in range(1, len(features)):
        axes.axhline(edge, color="white", linewidth=1)
    shown = range(0, len(features), -(-len(features) // _MAX_TICKS))
    axes.set(
        xlabel="time (s)",
        ylabel="clip of the batch",
        yticks=[number + 0.5 for number in shown],
        yticklabels=[number + 1 for number in shown],
        title=f"{len(features)} clips at {features.shape[-1] / 100:.1f} s instead of 30 s",
    )
    return figure
