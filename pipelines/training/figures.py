"""Plot batches, the curves of a training run (once or live in a notebook), and the loss of single tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.features.cache import FeatureCache
from pipelines.infra.plots import ACCENT, INK, SHADE, SOFT, figure_with_axes, figure_with_row, start_at_zero
from pipelines.recipes.settings import Recipe
from pipelines.training.callbacks.console import progress_bar
from pipelines.training.callbacks.progress import Progress
from pipelines.training.validation import rows_of
from pipelines.whisper.batching import BucketSampler, padded_frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_REDRAW_S = 5.0
"""Shortest time between two drawings of live curves, in seconds: drawing takes time from training."""
_FEWEST_OF_A_CURVE = 3
"""Fewer points are joined by a dotted line: they are no curve."""
_MAX_DRAWN = 16
"""Most clips of a batch that are drawn."""


def batches(recipe: Recipe, cache: FeatureCache) -> Figure:
    """Plot two batches of training clips beside each other: clips in the corpus's order, and clips of similar length.

    The second is the batch from length buckets whose share of padding is the median of an epoch.
    """
    settings, rows = recipe.training, rows_of(cache, "train")
    frames = cache.rows["frames"].to_numpy()[rows]
    sampler = BucketSampler(frames, settings.batch_size, settings.bucket_batches, settings.seed)
    drawn = sorted(sampler, key=lambda batch: padding_share(frames[batch]))
    bucketed, first = drawn[len(drawn) // 2], np.arange(min(settings.batch_size, len(rows)))
    in_order = [frames[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
    figure, panels = figure_with_row(2, 11, 3.2)
    for axes, batch, epoch, name in (
        (panels[0], first, in_order, "as in the corpus"),
        (panels[1], bucketed, [frames[batch] for batch in drawn], "from length buckets"),
    ):
        _draw_batch(axes, cache, rows[batch][:_MAX_DRAWN], padded_frames(int(frames[batch].max())))
        mean = np.mean([padding_share(lengths) for lengths in epoch])
        axes.set_title(f"{name}: {padding_share(frames[batch]):.1%} padding (epoch: {mean:.1%})", fontsize=10)
    widest = max(axes.get_xlim()[1] for axes in panels)
    for axes in panels:
        axes.set_xlim(0, widest)
    panels[0].set_ylabel("clips of the batch")
    return figure


def padding_share(frames: np.ndarray) -> float:
    """Return the share of padding in a batch of clips with these numbers of frames."""
    return float(1 - frames.mean() / padded_frames(int(frames.max())))


def _draw_batch(axes: Any, cache: FeatureCache, rows: np.ndarray, n_frames: int) -> None:
    """Draw the log-mels of clips below each other, low frequencies at the bottom of each, and their padding."""
    for place, row in enumerate(rows):
        frames, bottom = cache.log_mel(int(row)).frames, len(rows) - place - 0.95
        extent = (0, len(frames) / 100, bottom, bottom + 0.9)
        axes.imshow(frames.T, origin="lower", aspect="auto", cmap="magma", vmin=-1, vmax=1.5, extent=extent)
        axes.barh(
            bottom + 0.45,
            (n_frames - len(frames)) / 100,
            left=len(frames) / 100,
            height=0.9,
            color=SHADE,
            edgecolor=SOFT,
            linewidth=0,
            hatch="//",
        )
    axes.set(xlabel="time (s); hatched: padding", yticks=[], xlim=(0, n_frames / 100), ylim=(0, len(rows)))


def token_losses(tokens: Sequence[str], before: np.ndarray, after: np.ndarray) -> Figure:
    """Plot the loss of each label token of one clip, float [n_tokens], before and after training."""
    figure, axes = figure_with_axes(max(6, min(14, 0.55 * len(tokens))), 3.2)
    places = np.arange(len(tokens))
    axes.bar(places - 0.2, before, width=0.4, color=SOFT, label=f"before, mean {before.mean():.2f}")
    axes.bar(places + 0.2, after, width=0.4, color=ACCENT, label=f"after, mean {after.mean():.2f}")
    axes.set_xticks(places, tokens, rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="loss", xlabel="token to be written")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def curves(history: list[dict[str, float]]) -> Figure:
    """Plot training loss, validation loss, validation WER with its 95 % interval, and clips per second over steps."""
    figure, (left, middle, right) = figure_with_row(3, 11, 2.6)
    for axes, name, colour, label in (
        (left, "loss", SOFT, "training"),
        (left, "eval_loss", INK, "validation"),
        (middle, "eval_wer", ACCENT, "validation WER"),
        (right, "clips_per_s", SOFT, "training"),
    ):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            line = "-" if len(points) >= _FEWEST_OF_A_CURVE else ":"
            axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=4, label=label)
    for row in history:
        if "eval_wer_low" in row:
            middle.plot(
                [row["step"]] * 2, [row["eval_wer_low"], row["eval_wer_high"]], color=SOFT, linewidth=3, zorder=1
            )
    left.set(xlabel="step", ylabel="loss per token")
    middle.set(xlabel="step", ylabel="WER")
    right.set(xlabel="step", ylabel="clips per second")
    for axes in (left, middle, right):
        start_at_zero(axes, "y")
        axes.set_xlim(0, 1.03 * max((row["step"] for row in history), default=1))
        if axes.has_data():
            axes.legend(frameon=False)
    return figure


def live_progress() -> Progress:
    """Return a progress bar with curves that are redrawn in place, for notebooks."""
    from IPython.display import display

    handle, drawn_at = display(curves([]), display_id=True), [0.0]

    def redraw(history: list[dict[str, float]]) -> None:
        if handle and time.monotonic() - drawn_at[0] > _REDRAW_S:
            handle.update(curves(history))
            drawn_at[0] = time.monotonic()

    def finish(history: list[dict[str, float]]) -> None:
        drawn_at[0] = float("-inf")
        redraw(history)

    return progress_bar(redraw, finish)
