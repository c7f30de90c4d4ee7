"""Plot the curves of a training run, once or live in a notebook."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipelines.infra.plots import ACCENT, INK, SOFT, figure_with_row, start_at_zero
from pipelines.training.callbacks.console import progress_bar
from pipelines.training.callbacks.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_REDRAW_S = 5.0
"""Shortest time between two drawings of live curves, in seconds: drawing takes time from training."""


def curves(history: list[dict[str, float]]) -> Figure:
    """Plot training loss, validation loss, validation WER and clips per second over steps."""
    figure, (left, middle, right) = figure_with_row(3, 11, 2.6)
    for axes, name, colour, label in (
        (left, "loss", SOFT, "training"),
        (left, "eval_loss", INK, "validation"),
        (middle, "eval_wer", ACCENT, "validation WER"),
        (right, "clips_per_s", SOFT, "training"),
    ):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    left.set(xlabel="step", ylabel="loss per token")
    middle.set(xlabel="step", ylabel="WER")
    right.set(xlabel="step", ylabel="clips per second")
    for axes in (left, middle, right):
        start_at_zero(axes, "y")
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
