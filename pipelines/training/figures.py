"""TODO: describe this module."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.infra.plots import _ACCENT, _INK, _SOFT, _row
from pipelines.training.callbacks.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_Draw = Callable[[list[dict[str, float]]], None]
_REDRAW_S = 5.0
"""Live curves are drawn at most this often: each picture takes time from training."""


def curves(history: list[dict[str, float]]) -> Figure:
    """Training loss, validation loss, validation WER and clips per second over steps."""
    figure, (left, middle, right) = _row(3, 11, 2.6)
    for axes, name, colour, label in (
        (left, "loss", _SOFT, "training"),
        (left, "eval_loss", _INK, "validation"),
        (middle, "eval_wer", _ACCENT, "validation WER"),
        (right, "clips_per_s", _SOFT, "training"),
    ):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    left.set(xlabel="step", ylabel="loss per token", ylim=(0, None))
    middle.set(xlabel="step", ylabel="WER", ylim=(0, None))
    right.set(xlabel="step", ylabel="clips per second", ylim=(0, None))
    for axes in (left, middle, right):
        if axes.has_data():
            axes.legend(frameon=False)
    return figure


def console_progress() -> Progress:
    """A progress bar in steps, and a line for every validation."""
    return _progress(lambda history: None, lambda history: None)


def live_progress() -> Progress:
    """For notebooks: a progress bar in steps, and curves that are redrawn in place as the run goes on."""
    from IPython.display import display

    handle, drawn = display(curves([]), display_id=True), [0.0]

    def redraw(history: list[dict[str, float]]) -> None:
        if handle and time.monotonic() - drawn[0] > _REDRAW_S:
            handle.update(curves(history))
            drawn[0] = time.monotonic()

    def finish(history: list[dict[str, float]]) -> None:
        drawn[0] = float("-inf")
        redraw(history)

    return _progress(redraw, finish)


def _progress(draw: _Draw, finish: _Draw) -> Progress:
    from tqdm.auto import tqdm

    bar = tqdm(unit="step", desc="training")

    def start(step: int, steps: int) -> None:
        bar.reset(total=steps)
        bar.initial = bar.n = bar.last_print_n = step  # steps of earlier sittings cost this one no time
        bar.refresh()

    def tell(history: list[dict[str, float]]) -> None:
        paces = [row["clips_per_s"] for row in history if "clips_per_s" in row]
        bar.set_postfix_str(f"{paces[-1]:.3g} clips/s" if paces else "", refresh=False)
        draw(history)

    def end(history: list[dict[str, float]]) -> None:
        bar.close()
        finish(history)

    return Progress(start, lambda step: bar.update(step - bar.n), tell, end, bar.close)
