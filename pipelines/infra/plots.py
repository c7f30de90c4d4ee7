"""The style of all figures and HTML tables that notebooks display: colours, plain axes, escaped cells.

Figures are transparent, and their colours can be read on a white and on a dark page: each has a contrast of at least 3
with white and with #1e1e1e, text of 4.
"""

from __future__ import annotations

import functools
import html
import io
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, SOFT = "#3f7cc0", "#c8553d", "#8494a4"
"""Colours of the main, the highlighted and the secondary data."""
TEXT = "#7a7f85"
"""Colour of texts, axes and ticks."""
SHADE = "#8494a430"
"""Colour of areas and grid lines behind the data."""


def start_at_zero(axes: Axes, axis: str) -> None:
    """Let the `x` or `y` axis of a filled plot begin at 0 and end a little beyond the data, so that no mark is cut."""
    top = getattr(axes.dataLim, f"{axis}1")
    getattr(axes, f"set_{axis}lim")(0, top * 1.08 if 0 < top < float("inf") else None)


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a transparent PNG file, 110 dots per inch; black texts and axes get TEXT."""
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.tick_params(which="both", colors=TEXT)
        for spine in axes.spines.values():
            spine.set_color(TEXT)
    for text in figure.findobj(Text):
        if text.get_color() == "black":
            text.set_color(TEXT)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, transparent=True)
    return file.getvalue()


def figure_with_axes(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """Return a figure of this size in inches and its only axes."""
    figure = empty_figure(width_in, height_in)
    return figure, without_frame(figure.subplots())


def figure_with_row(n: int, width_in: float, height_in: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of this size in inches and its `n` axes, side by side."""
    figure = empty_figure(width_in, height_in)
    return figure, [without_frame(axes) for axes in figure.subplots(1, n)]


def figure_with_column(heights: Sequence[float], width_in: float, height_in: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of this size in inches and axes below each other, which share the x axis."""
    figure = empty_figure(width_in, height_in)
    column = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    return figure, [without_frame(axes) for axes in column]


def empty_figure(width_in: float, height_in: float) -> Figure:
    """Return a figure outside pyplot's registry: notebooks display it once, and it does not have to be closed."""
    kind = _figure_class()
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        # matplotlib's inline backend, which Colab and ipywidgets load, would draw black text on an opaque page
        shell.display_formatter.formatters["image/png"].for_type(kind, png)
    return kind(figsize=(width_in, height_in), layout="constrained")


@functools.cache
def _figure_class() -> type[Figure]:
    """Return the class of all figures; notebooks display it as `png` draws it."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return NotebookFigure


def without_frame(axes: Any) -> Any:
    """Hide the upper and right border of the axes, and return them."""
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def html_table(rows: Iterable[Mapping[str, object]], as_html: Collection[str] = (), note: str = "") -> HTML:
    """Return a table that notebooks display, one dictionary of cells per row, with the HTML `note` below it.

    Cells are escaped, except those of the columns `as_html`, such as players.
    """
    from IPython.display import HTML

    rows = list(rows)
    names = [*dict.fromkeys(name for row in rows for name in row)]
    style = 'style="text-align: left"'
    lines = ["".join(f"<td {style}>{_cell(row.get(name, ''), name in as_html)}</td>" for name in names) for row in rows]
    head = "".join(f"<th {style}>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}")


def _cell(value: object, is_html: bool) -> str:
    return str(value) if is_html else html.escape(str(value))
