"""TODO: describe this module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.features.cache import FeatureCache
from pipelines.features.sources import Example
from pipelines.infra.plots import _ACCENT, _SOFT, _axes
from pipelines.recipes.settings import Recipe

if TYPE_CHECKING:
    from IPython.display import Audio
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler


def recipe_table(recipe: Recipe) -> Styler:
    """Every setting of a recipe that says something, one row for each group: what will run, before it runs."""
    groups: dict[str, list[str]] = {}
    for name, value in recipe.settings().items():
        group, _, leaf = name.rpartition(".")
        if value in ("", []):
            continue
        groups.setdefault(group or "recipe", []).append(f"{leaf} = {value}")
    table = pd.DataFrame({"settings": {group: ",   ".join(told) for group, told in groups.items()}})
    return table.style.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


def corpus_table(cache: FeatureCache) -> pd.DataFrame:
    """Clips, speakers, minutes and mean length of every split."""
    grouped = cache.rows.groupby("split", sort=False)
    return pd.DataFrame(
        {
            "clips": grouped.size(),
            "speakers": grouped["speaker"].nunique(),
            "minutes": (grouped["duration_s"].sum() / 60).round(1),
            "mean clip (s)": grouped["duration_s"].mean().round(2),
            "distinct sentences": grouped["text"].nunique(),
        }
    )


def sample_table(cache: FeatureCache, n: int = 8) -> pd.DataFrame:
    """The first clips of every split, without the columns that are for machines."""
    machine = ["label_offset", "label_count", "shard", "offset", "pad_value", "frames"]
    shown = cache.rows.drop(columns=machine)
    return shown.groupby("split", sort=False).head(max(1, n // 3)).reset_index(drop=True)


def curation_table(cache: FeatureCache) -> pd.DataFrame:
    """What each step of curation left: step, clips before and after, dropped, and transcripts that it changed."""
    columns = ["step", "before", "after", "dropped", "changed"]
    return pd.DataFrame(cache.curation, columns=columns).set_index("step")


def rejected_table(cache: FeatureCache) -> pd.DataFrame:
    """How many clips were not used, by reason, with one example each."""
    rejected = cache.rejected
    return rejected.groupby("reason").agg(clips=("id", "size"), example=("id", "first"), detail=("detail", "first"))


def size_table(cache: FeatureCache) -> pd.DataFrame:
    """The cache beside the padded float32 tensors of the classic recipe."""
    mb = pd.Series({"padded to 30 s, float32": cache.padded_bytes, "this cache": cache.bytes}) / 1e6
    return pd.DataFrame({"MB": mb.round(1), "share": (mb / mb.iloc[0]).map("{:.1%}".format)})


def player(example: Example) -> Audio:
    """An audio player for one example, as the source holds it."""
    from IPython.display import Audio

    data = example.audio if isinstance(example.audio, bytes) else example.audio.read_bytes()
    return Audio(data=data)


def log_mel(cache: FeatureCache, row: int) -> Figure:
    """The log-mel of one clip: what Whisper sees."""
    features, told = cache.log_mel(row), cache.rows.iloc[row]
    figure, axes = _axes(9, 2.6)
    axes.imshow(
        features.frames.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, len(features.frames) / 100, 0, cache.n_mels),
    )
    axes.set(xlabel="time (s)", ylabel="mel band", title=f"“{told['text']}”  {told['speaker']}")
    return figure


def durations(cache: FeatureCache) -> Figure:
    """How long the clips are, beside the 30 s that the classic recipe computes on for each."""
    figure, axes = _axes(9, 2.2)
    axes.hist(cache.rows["duration_s"], bins=40, color=_SOFT)
    mean = cache.rows["duration_s"].mean()
    axes.axvline(mean, color=_ACCENT)
    axes.set(
        xlabel="clip length (s)",
        ylabel="clips",
        title=f"mean {mean:.1f} s: a padded batch is {1 - mean / 30:.0%} silence",
    )
    return figure


def batch(batch: dict[str, Any]) -> Figure:
    """One training batch: the clips stacked, each as long as it is, padded to the longest."""
    features = batch["input_features"]
    figure, axes = _axes(9, 3.2)
    stacked = np.concatenate([clip.numpy()[::4] for clip in features])
    axes.imshow(
        stacked, origin="upper", aspect="auto", cmap="magma", extent=(0, features.shape[-1] / 100, len(features), 0)
    )
    axes.set(
        xlabel="time (s)",
        ylabel="clip of the batch",
        title=f"{len(features)} clips at {features.shape[-1] / 100:.1f} s instead of 30 s",
    )
    return figure
